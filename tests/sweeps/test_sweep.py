"""Sweeps: cells are runs, failures stay inside them, and what was asked is checked first."""

import json
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distsampler as ds
from distsampler.errors import ConfigError, DistsamplerError, PlacementError, RunFailed, StoreError
from distsampler.sampling.pilots import Pilot, reach
from distsampler.sampling.prepare import prepare
from distsampler.sweeps import checkpoints, plan, warm_start
from distsampler.sweeps import recipe as sweep_recipe
from distsampler.sweeps import sweep as sweeping
from distsampler.sweeps.cells import CELL_DIMS, Cell, Grid
from distsampler.sweeps.fleet import ActorFleet, OneByOne
from distsampler.sweeps.scheduler import Outcome, Scheduler, Stopped
from tests.assertions import assert_same
from tests.problems import config, regression, squared_error
from tests.processes import CONFIG, command

MODEL, DATA = regression()
X, Y = DATA
CLOCK = ["seconds"]  # all that may differ between two sweeps of the same
Weights = dict[str, torch.Tensor]


def weights(shift: float) -> Weights:
    return {name: value + shift for name, value in MODEL.state_dict().items()}


STEPS = {f"step{k}": weights(0.01 * k) for k in (1, 2, 10)}


def sweep(store: Path, base: ds.RunConfig | None = None, /, **given: Any) -> ds.Sweep:
    fields = {"checkpoints": STEPS, "pool": ds.SerialPool(), "quiet": True, **given}
    data = None if "datasets" in fields else DATA
    return ds.sweep(MODEL, data, squared_error, base or config(draws=24), store=store, **fields)


def table(found: ds.Sweep) -> xr.Dataset:
    return found.collect().drop_vars(CLOCK).drop_attrs()


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> ds.Sweep:
    return sweep(
        tmp_path_factory.mktemp("sweep") / "s",
        checkpoints={name: STEPS[name] for name in ("step2", "step10")},
        restrictions={"all": None, "half": {"weight": [[True, True, False, False, False]]}},
        settings={"cold": {"sampler.nbeta": 20.0}, "hot": {"sampler": {"nbeta": 5.0}, "thin": 2}},
        datasets={"odd": (X[1::2], Y[1::2])},
    )


@pytest.fixture(scope="module")
def collected(swept: ds.Sweep) -> xr.Dataset:
    return swept.collect()


def test_every_checkpoint_meets_every_restriction_setting_and_data_set(
    swept: ds.Sweep, collected: xr.Dataset
) -> None:
    found = collected
    assert dict(found.sizes) == {"checkpoint": 2, "restriction": 2, "setting": 2, "data": 1}
    assert len({cell.name for cell in swept.cells}) == 8
    assert swept.counts() == {"finished": 8}
    assert found.step.values.tolist() == [2, 10]
    assert len(np.unique(found.llc.values)) == 8
    assert found.nbeta.sel(setting="hot").values.tolist() == np.full((2, 2, 1), 5.0).tolist()
    assert repr(swept) == f"Sweep({swept.store!r}, 8 cells: 8 finished)"
    cell = swept.run("step10--half--hot--odd")
    assert cell.manifest.config.thin == 2
    masks = cell.manifest.config.restrict_to
    assert isinstance(masks, dict)
    assert list(masks) == ["weight"]


def test_what_is_collected_is_what_the_runs_say(swept: ds.Sweep, collected: xr.Dataset) -> None:
    for cell in swept.cells[::3]:
        estimate, at = swept.run(cell.name).llc("ignore"), collected.sel(where(cell))
        assert at.llc.item() == estimate.mean
        assert at.se.item() == estimate.se
        assert (at.interval_low.item(), at.interval_high.item()) == estimate.interval
        assert at.verdict.item() == str(estimate.verdict.status)
        assert at.init_loss.item() == estimate.init_loss
        assert at.r_hat.item() == estimate.verdict.r_hat
        assert at.ess.item() == estimate.verdict.ess


def where(cell: Cell) -> dict[str, str]:
    return cell.labels


def test_a_cell_has_the_bits_of_sample(swept: ds.Sweep, tmp_path: Path) -> None:
    cell = swept.run("step2--all--cold--odd")
    model, _ = regression()
    model.load_state_dict(STEPS["step2"])
    again = ds.sample(
        model, (X[1::2], Y[1::2]), squared_error, cell.manifest.config, store=tmp_path / "run",
        pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    assert_same(again, cell)


def test_a_cells_bits_do_not_depend_on_the_other_cells_nor_are_its_draws_theirs(
    tmp_path: Path,
) -> None:
    two = sweep(tmp_path / "two")
    one = sweep(tmp_path / "one", checkpoints={"step2": STEPS["step2"]})
    assert_same(one.run("step2"), two.run("step2"))
    same = sweep(tmp_path / "same", checkpoints={"a": STEPS["step2"], "b": STEPS["step2"]})
    assert len(np.unique(same.collect().llc.values)) == 2


@pytest.mark.filterwarnings("ignore::xarray.SerializationWarning")
def test_csv_and_netcdf_hold_every_digit(
    swept: ds.Sweep, collected: xr.Dataset, tmp_path: Path
) -> None:
    import pandas as pd

    found = collected
    swept.to_netcdf(tmp_path / "s.nc")
    with xr.open_dataset(tmp_path / "s.nc") as read:
        assert read.equals(found)
    swept.to_csv(tmp_path / "s.csv")
    rows = pd.read_csv(tmp_path / "s.csv", index_col=list(CELL_DIMS))
    assert len(rows) == 8
    for cell in swept.cells:
        row = rows.loc[tuple(where(cell).values())]
        assert row["llc"] == found.llc.sel(where(cell)).item()
        assert row["verdict"] == found.verdict.sel(where(cell)).item()


def test_reading_needs_neither_torch_nor_ray(swept: ds.Sweep, collected: xr.Dataset) -> None:
    code = (
        "import sys, distsampler as ds\n"
        f"found = ds.open_sweep({swept.store!r}).collect()\n"
        "print(float(found.llc.sum()), [m for m in ('torch', 'ray') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [repr(float(collected.llc.sum())), "[]"]


# Failures stay inside their cell


@pytest.mark.filterwarnings("ignore::distsampler.errors.StepTooLargeWarning")
def test_a_cell_that_cannot_be_loaded_or_diverges_leaves_the_others_alone(tmp_path: Path) -> None:
    def load(name: str) -> Weights:
        if name == "step2":
            raise OSError("no such bucket")
        return {"wieght": STEPS[name]["weight"]} if name == "step10" else STEPS[name]

    found = sweep(
        tmp_path / "s",
        checkpoints=list(STEPS),
        load=load,
        settings={"fine": {}, "wild": {"sampler.lr": 1e6}},
    )
    assert found.counts() == {"finished": 1, "failed": 5}
    assert "no such bucket" in found.reason("step2--fine")
    assert "missing keys: weight; unexpected keys: wieght" in found.reason("step10--fine")
    assert "diverged" in found.reason("step1--wild")
    rows = found.collect()
    assert rows.status.sel(checkpoint="step1").values.ravel().tolist() == ["finished", "failed"]
    assert np.isfinite(rows.llc.sel(checkpoint="step1", setting="fine")).all()
    assert np.isnan(rows.llc.sel(checkpoint="step2")).all()
    lost = rows.lost_chains.sel(checkpoint="step1").values.ravel().tolist()
    assert lost[0] == 0 < lost[1]
    alone = sweep(tmp_path / "alone", checkpoints={"step1": STEPS["step1"]}, settings={"fine": {}})
    assert_same(alone.run("step1--fine"), found.run("step1--fine"))


def test_a_cell_that_failed_is_tried_again_and_finished_ones_are_left_alone(
    tmp_path: Path,
) -> None:
    there: list[str] = ["step1"]

    def load(name: str) -> Weights:
        if name not in there:
            raise OSError("not yet there")
        return STEPS[name]

    names = ["step1", "step10"]
    first = sweep(tmp_path / "s", checkpoints=names, load=load)
    assert first.counts() == {"finished": 1, "failed": 1}
    stores = [tmp_path / f"s/cells/step1/{name}" for name in ("run.json", "events.jsonl")]
    before = [store.read_bytes() for store in stores]
    there.append("step10")
    again = sweep(tmp_path / "s", checkpoints=names, load=load, resume="auto")
    assert again.counts() == {"finished": 2}
    assert again.reason("step10") == "the draw budget is used up"
    assert [store.read_bytes() for store in stores] == before
    whole = sweep(tmp_path / "whole", checkpoints=names, load=STEPS.__getitem__)
    assert table(again).equals(table(whole))


def test_other_weights_under_the_same_names_are_refused(tmp_path: Path) -> None:
    sweep(tmp_path / "s")
    moved = {name: weights(1.0) for name in STEPS}
    with pytest.raises(StoreError, match=r"(?s)step1: .*model: stored") as caught:
        sweep(tmp_path / "s", checkpoints=moved, resume="auto")
    assert "step10: " in str(caught.value)
    assert ds.open_sweep(tmp_path / "s").counts() == {"finished": 3}


def test_only_the_same_sweep_is_continued(tmp_path: Path) -> None:
    sweep(tmp_path / "s", settings={"a": {"thin": 2}})
    with pytest.raises(StoreError) as caught:
        sweep(
            tmp_path / "s",
            config(draws=24, batch_size=32),
            checkpoints={**STEPS, "step11": weights(0.3)},
            settings={"a": {"thin": 3}},
            resume="auto",
        )
    message = str(caught.value)
    assert "config.batch_size: stored 16, now 32" in message
    assert "settings.a: stored {'thin': 2}, now {'thin': 3}" in message
    assert "checkpoints: stored ['step1', 'step2', 'step10']" in message
    assert "config.thin" not in message
    with pytest.raises(StoreError, match=r"it holds a sweep: .*resume='auto'"):
        sweep(tmp_path / "s")
    with pytest.raises(StoreError, match="resume='must' needs a sweep"):
        sweep(tmp_path / "other", resume="must")


@pytest.mark.parametrize(
    ("data", "fields", "batch_size"),
    [
        (DATA, {}, 64),
        (DataLoader(TensorDataset(*DATA), batch_size=5), {}, 5),
        ([(X[:30], Y[:30]), (X[30:], Y[30:])], {"data_mode": "hop"}, 64),
    ],
)
def test_the_cells_of_a_data_set_have_the_same_rows_in_memory(
    data: object, fields: dict[str, Any], batch_size: int
) -> None:
    request = plan.SweepRequest(
        MODEL, {"data": data}, squared_error, ds.RunConfig(device="cpu", **fields),
        checkpoints.find(STEPS, None),
    )  # fmt: skip
    found = plan.make_plan(request)
    specs = [
        prepare(MODEL, found.request.data[cell.data], squared_error, found.config(cell))
        for cell in found.cells
    ]
    assert len(specs) == 3
    assert {spec.config.batch_size for spec in specs} == {batch_size}
    ids = [
        [id(shard) for shard in getattr(spec.rows, "_shards", [])] or id(spec.rows)
        for spec in specs
    ]
    assert ids[0] == ids[1] == ids[2]


# What is wrong is told before anything starts


def shaped(*shape: int) -> Weights:
    return {"weight": torch.zeros(shape)}


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("no file", {"checkpoints": "nowhere/step*.pt"}, "there is no"),
    ("missing key", {"checkpoints": {"a": {}}}, "checkpoint 'a' must have the architecture of the model, Linear, and does not; missing keys: weight"),
    ("unexpected key", {"checkpoints": {"a": {**weights(0), "bias": Y}}}, "unexpected keys: bias"),
    ("other shape", {"checkpoints": {"a": shaped(1, 4)}}, "other shapes: weight: (1, 4), not (1, 5)"),
    ("not weights", {"checkpoints": {"a": 3}}, "must be a state dict or a module, got int"),
    ("no checkpoint", {"checkpoints": {}}, "at least one checkpoint"),
    ("two of one name", {"checkpoints": ["a", "a"], "load": STEPS.get}, "two checkpoints must not have one name: got 'a'"),
    ("two cells of one name", {"checkpoints": {"a--b": weights(0), "a": weights(0)}, "restrictions": {"c": None, "b--c": None}}, "two cells must not have one name: got 'a--b--c'"),
    ("name that is no folder", {"checkpoints": {"../a": weights(0)}}, "it names a folder: got '../a'"),
    ("too many", {"max_cells": 5, "settings": {"a": {}, "b": {}}}, "at most max_cells=5 cells, and this one would have 6 (3 checkpoints x 1 restrictions x 2 settings"),
    ("restriction", {"restrictions": {"h": ["wieght"]}}, "restriction 'h', setting 'config', data 'data': restrict_to must match"),
    ("restrictions without names", {"restrictions": ["weight"]}, "restrictions must have names, by which cells are called, got a list: give them as {'head': 'l0h3'}"),
    ("settings without names", {"settings": [{}]}, "settings must have names"),
    ("data without names", {"datasets": [(X, Y)]}, "datasets must have names"),
    ("setting", {"settings": {"h": {"drawss": 3}}}, "setting 'h': unknown option 'drawss': did you mean 'draws'"),
    ("sampler of a setting", {"settings": {"h": {"sampler.lrr": 3}}}, "setting 'h', data 'data': unknown option"),
    ("option of no option", {"settings": {"h": {"draws.x": 3}}}, "draws.x: draws holds no options"),
    ("device of a setting", {"settings": {"h": {"device": "cuda"}}}, "device must be the same for all cells"),
    ("data", {"datasets": {"few": (X[:5], Y[:5])}}, "data 'few': batch_size must be at most"),
    ("bias", {"bias": 2.0}, "bias must be between 0 and 1"),
    ("resume", {"resume": "yes"}, "'never', 'auto' or 'must'"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "sentence"), [c[1:] for c in MISTAKES], ids=[c[0] for c in MISTAKES])  # fmt: skip
def test_a_mistake_is_one_clear_error_and_writes_nothing(
    tmp_path: Path, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DistsamplerError) as caught:
        sweep(tmp_path / "s", **given)
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "must be the directory of a sweep, but it holds no sweep.json"),
        ('{"schema_version": 7}', "must have schema version 2, got 7: read it with the version"),
        ("{", "it cannot be read"),
        ('{"schema_version": 1, "bais": 3}', "it cannot be read"),
    ],
)
def test_a_folder_that_is_no_sweep_is_refused(
    tmp_path: Path, text: str | None, sentence: str
) -> None:
    if text is not None:
        (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(StoreError) as caught:
        ds.open_sweep(tmp_path)
    assert sentence in str(caught.value)


def test_another_version_is_not_continued_nor_a_full_folder_used(tmp_path: Path) -> None:
    found = sweep(tmp_path / "s", checkpoints=None)
    assert [cell.name for cell in found.cells] == ["model"]
    file = tmp_path / "s/sweep.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 3}))
    with pytest.raises(StoreError, match="schema version 2, got 3"):
        sweep(tmp_path / "s", checkpoints=None, resume="auto")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(StoreError, match="new or an empty folder"):
        sweep(tmp_path / "full")


def test_a_cell_that_is_damaged_has_failed_and_the_others_are_read(tmp_path: Path) -> None:
    found = sweep(tmp_path / "s")
    (tmp_path / "s/cells/step2/run.json").write_text("{")
    rows = found.collect()
    assert rows.status.values.ravel().tolist() == ["finished", "failed", "finished"]
    assert "cannot be read" in str(rows.reason.sel(checkpoint="step2").item())
    assert np.isnan(rows.llc.sel(checkpoint="step2")).all()


# Where checkpoints come from


def saved(path: Path, shift: float, wrap: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({wrap: weights(shift), "epoch": 3} if wrap else weights(shift), path)
    return path


def loaded(found: checkpoints.Checkpoint) -> float:
    model = checkpoints.loaded(MODEL, found)
    return float((model.weight - MODEL.weight).detach().mean())  # type: ignore[operator]


def test_folders_of_steps_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for step in (1000, 500, 20):
        saved(tmp_path / f"checkpoint-{step}/pytorch_model.bin", step / 1000)
        (tmp_path / f"checkpoint-{step}/config.json").touch()
    found = checkpoints.find(tmp_path)
    assert [each.name for each in found] == ["checkpoint-20", "checkpoint-500", "checkpoint-1000"]
    assert [each.step for each in found] == [20, 500, 1000]
    assert [loaded(each) for each in found] == pytest.approx([0.02, 0.5, 1.0], abs=1e-6)


def test_globs_files_lists_mappings_and_wrapped_state_dicts_are_read(tmp_path: Path) -> None:
    for step in (10, 9):
        saved(tmp_path / f"step{step}.pt", step, wrap="state_dict")
    last = saved(tmp_path / "other/last.pth", 3.0)
    assert [each.name for each in checkpoints.find("step*.pt", folder=tmp_path)] == [
        "step9",
        "step10",
    ]
    found = checkpoints.find([tmp_path / "step10.pt", str(last)])
    assert [each.name for each in found] == ["step10", "last"]
    assert [loaded(each) for each in found] == pytest.approx([10, 3.0], abs=1e-5)
    found = checkpoints.find({"a": last, "b": MODEL, "c": weights(1.0)})
    assert [loaded(each) for each in found] == pytest.approx([3.0, 0.0, 1.0], abs=1e-5)
    assert [each.step for each in found] == [None] * 3
    with pytest.raises(ConfigError, match="must be one file, got 2"):
        checkpoints.find({"a": f"{tmp_path}/step*.pt"})


def test_a_file_that_holds_no_state_dict_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 half")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(MODEL, tmp_path / "model.pt")
    (tmp_path / "empty").mkdir()
    for name in ("torn", "list", "model"):
        (found,) = checkpoints.find(tmp_path / f"{name}.pt")
        with pytest.raises(ConfigError, match=rf"{name}.pt must .*load"):
            checkpoints.check(MODEL, found)
    with pytest.raises(ConfigError, match="holds none"):
        checkpoints.find(tmp_path / "empty")


def test_safetensors_are_read_where_the_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step7").mkdir()
    save_file(weights(2.0), tmp_path / "step7/model.safetensors")
    (found,) = checkpoints.find(tmp_path)
    assert (found.name, found.step) == ("step7", 7)
    checkpoints.check(MODEL, found)
    assert loaded(found) == pytest.approx(2.0, abs=1e-5)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match="needs the package safetensors: install it"):
        checkpoints.check(MODEL, found)


def test_tied_weights_may_be_saved_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
            self.head.weight = self.embed.weight

    model, new = Tied(), torch.ones(3, 2)
    found = checkpoints.loaded(model, checkpoints.Checkpoint("a", {"embed.weight": new}))
    assert torch.equal(found.head.weight, new)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(model.head.weight, new)
    with pytest.raises(ConfigError, match=r"missing keys: embed.weight, head.weight"):
        checkpoints.check(model, checkpoints.Checkpoint("a", {}))


# Warm start


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> ds.Sweep:
    return sweep(tmp_path_factory.mktemp("calibrated") / "s", CALIBRATE, calibrate=True)


CALIBRATE = ds.RunConfig(
    sampler=ds.SamplerConfig(localization=10.0),
    chains=2, draws=24, burn_in=10, batch_size=100, probe=32, device="cpu",
)  # fmt: skip


def asked(config: ds.RunConfig = CALIBRATE, data: Any = DATA, **how: Any) -> warm_start.Asked:
    return warm_start.Asked(MODEL, data, squared_error, config, ds.SerialPool(), 0.005, **how)


def test_the_first_checkpoint_is_calibrated_and_the_others_start_from_there(
    calibrated: ds.Sweep,
) -> None:
    chosen = {
        name: json.loads(Path(calibrated.store, "cells", name, "cell.json").read_text())["chosen"]
        for name in STEPS
    }
    model, _ = regression()
    model.load_state_dict(STEPS["step1"])
    first = calibrated.run("step1").manifest.config
    alone = ds.calibrate(
        model, DATA, squared_error, CALIBRATE.replaced(seed=first.seed),
        pool=ds.SerialPool(),
    )  # fmt: skip
    assert alone.config == first
    assert chosen["step1"]["curvature"] == alone.curvature
    for name, found in chosen.items():
        config = calibrated.run(name).manifest.config
        assert config.sampler.model_dump(exclude_unset=True) == found["sampler"]
        same = {k: v for k, v in config.sampler.options.items() if k != "lr"}
        assert same == {k: v for k, v in first.sampler.options.items() if k != "lr"}
        assert config.draws == first.draws
        assert config.sampler.options["lr"] <= first.sampler.options["lr"]
    assert "the first checkpoint's" in chosen["step10"]["reasons"]["sampler.lr"]


def test_a_steeper_checkpoint_gets_a_step_smaller_by_the_ratio_of_kappa(tmp_path: Path) -> None:
    """The same network with inputs 3 times as large has 9 times the curvature."""
    first = warm_start.lead(asked())
    steep = (3 * X, Y)
    found = warm_start.start_from(first, asked(data=steep))
    nbeta, gamma = ds.optimal_nbeta(len(X)), 10.0
    ratio = (nbeta * first.curvature + gamma) / (nbeta * found.curvature + gamma)
    assert ratio == pytest.approx(1 / 9, rel=0.1)
    assert found.sampler["lr"] == pytest.approx(first.sampler["lr"] * ratio, rel=0.01)
    flat = warm_start.start_from(first, asked(data=(X / 3, Y)))
    assert flat.sampler["lr"] == first.sampler["lr"]
    given = CALIBRATE.replaced(sampler=ds.SamplerConfig(lr=1e-3))
    assert warm_start.start_from(first, asked(given, steep)) == first


@pytest.mark.parametrize(
    ("sampler", "heat", "expected"),
    [
        ({"name": "lmsgld", "lr": 1e-4}, 0.02, {"lr": 2.5e-5}),
        ({"name": "lmsgld", "lr": 1e-4}, 0.001, {"lr": 1e-4}),
        ({"name": "sgnht", "lr": 1e-4, "diffusion_factor": 0.03}, 0.02, {"diffusion_factor": 0.12}),
        (
            {"name": "sgnht", "lr": 1e-4, "diffusion_factor": 0.03}, 1.12,
            {"diffusion_factor": 0.5, "lr": 7.44e-6},
        ),
        ({"name": "sgnht", "lr": 1e-4, "diffusion_factor": 0.3}, 0.002, {"diffusion_factor": 0.3}),
    ],
)  # fmt: skip
def test_where_minibatches_heat_friction_is_raised_and_then_the_step_lowered(
    sampler: dict[str, Any], heat: float, expected: dict[str, float]
) -> None:
    given = ds.SamplerConfig(**sampler)
    pilot = Pilot(given, h=1.0, discretisation=0.0, heat=heat, ess=0.1, steps=100)
    found = warm_start.cooled(given, pilot, bias=0.005)
    assert {k: found.options[k] for k in expected} == pytest.approx(expected, rel=1e-2)
    left = heat * reach(found) / reach(given)
    assert left <= max(0.005 * 1.02, min(heat, 0.005))


def test_a_friction_that_was_given_stays_and_the_step_is_lowered_alone() -> None:
    hot = ds.SamplerConfig(name="sgnht", lr=1e-4, diffusion_factor=0.03)
    pilot = Pilot(hot, h=1.0, discretisation=0.0, heat=0.02, ess=0.1, steps=100)
    found = warm_start.cooled(hot, pilot, 0.005, fixed={"diffusion_factor"})
    assert found.options["diffusion_factor"] == 0.03
    assert found.options["lr"] == pytest.approx(2.5e-5, rel=1e-2)


def test_a_follower_keeps_the_friction_of_the_config() -> None:
    friction = ds.SamplerConfig(name="sgnht", diffusion_factor=0.03)
    given = CALIBRATE.replaced(sampler=friction)
    first = warm_start.lead(asked(given))
    strict = first.replaced(bias=1e-9)
    found = warm_start.start_from(strict, asked(given))
    assert found.sampler["diffusion_factor"] == 0.03
    assert found.sampler["lr"] < first.sampler["lr"] / 10


def test_pilots_that_diverge_at_the_first_checkpoints_step_are_repeated_with_a_smaller() -> None:
    first = warm_start.lead(asked())
    fast = {**first.sampler, "lr": 100 * first.sampler["lr"]}
    found = warm_start.start_from(first.replaced(sampler=fast), asked())
    assert 0 < found.sampler["lr"] < fast["lr"] / 3
    hopeless = {**first.sampler, "lr": 1e12}
    with pytest.raises(RunFailed, match="the pilots diverged down to"):
        warm_start.start_from(first.replaced(sampler=hopeless), asked())


def test_what_was_chosen_is_kept_when_a_sweep_goes_on(
    calibrated: ds.Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(calibrated.store, tmp_path / "s")
    shutil.rmtree(tmp_path / "s/cells/step10")
    monkeypatch.setattr(warm_start, "lead", None)  # it is not asked again
    again = sweep(tmp_path / "s", CALIBRATE, calibrate=True, resume="auto")
    assert table(again).equals(table(calibrated))


def test_a_row_whose_first_checkpoint_cannot_be_calibrated_fails_with_the_reason(
    tmp_path: Path,
) -> None:
    def load(name: str) -> Weights:
        if name == "step1":
            raise OSError("no such bucket")
        return STEPS[name]

    found = sweep(tmp_path / "s", CALIBRATE, checkpoints=list(STEPS), load=load, calibrate=True)
    assert found.counts() == {"failed": 3}
    assert "calibration starts from cell 'step1', which failed" in found.reason("step10")
    assert "no such bucket" in found.reason("step10")


@pytest.mark.timeout(60)
def test_a_row_whose_first_checkpoint_meets_a_full_store_fails_and_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(warm_start, "lead", full)
    with pytest.raises(StoreError, match=r"could not be used:\n  step1: no space left$"):
        sweep(tmp_path / "s", CALIBRATE, calibrate=True)
    found = ds.open_sweep(tmp_path / "s")
    assert "starts from cell 'step1', which failed: no space left" in found.reason("step10")


def test_a_record_that_cannot_be_written_breaks_its_cell_only(tmp_path: Path) -> None:
    def load(name: str) -> Weights:
        if name == "step1":
            (tmp_path / "s/cells/step1/cell.json").mkdir(parents=True)
            raise ValueError("damaged")
        return STEPS[name]

    with pytest.raises(StoreError, match=r"step1: .*damaged.*; .* can no longer be written"):
        sweep(tmp_path / "s", checkpoints=list(STEPS), load=load)
    assert ds.open_sweep(tmp_path / "s").counts()["finished"] == 2


def test_an_error_without_a_word_is_told_by_its_name() -> None:
    assert sweeping._ending(AssertionError()) == "failed: AssertionError"


# The scheduler and its fleet


class FakeJoined:
    """A Ray with so much room; what it shares is told."""

    def __init__(self, room: int) -> None:
        self.slots, self.kept = room, -1

    def room(self, config: ds.RunConfig) -> int:
        if self.slots == 0:
            raise PlacementError("one node must hold an actor")
        return self.slots

    def sharing(self, stock: deque[Any], places: int) -> Any:
        return type("Pool", (), {"places": places})()

    def discard(self, stock: deque[Any], kept: int) -> None:
        self.kept = kept


def shares(slots: int, cells: int, chains: int = 4) -> list[int]:
    joined: Any = FakeJoined(slots)
    fleet, found = ActorFleet(joined, config(chains=chains)), list[Any]()
    while len(found) < cells and (pool := fleet.lend(cells)) is not None:
        found.append(pool)
    return [pool.places for pool in found]


@pytest.mark.parametrize(
    ("slots", "cells", "expected"),
    [
        (2, 200, [1, 1]),
        (2, 1, [2]),
        (3, 2, [2, 1]),
        (64, 12, [4] * 12),
        (8, 6, [2, 2, 2, 2]),
        (100, 200, [2] * 32 + [2] * 18),
    ],
)
def test_all_places_are_used_and_cells_share_them_when_they_become_few(
    slots: int, cells: int, expected: list[int]
) -> None:
    assert shares(slots, cells) == expected


def test_a_fleet_follows_a_cluster_that_shrinks() -> None:
    joined: Any = FakeJoined(2)
    fleet = ActorFleet(joined, config())
    first, _ = fleet.lend(9), fleet.lend(9)
    joined.slots = 1
    assert first is not None
    fleet.take_back(first)
    assert fleet.lend(9) is None
    assert joined.kept == 0  # the idle actor ends: its place is not there
    joined.slots = 0
    assert fleet.lend(9) is None
    with pytest.raises(PlacementError):
        ActorFleet(joined, config())


def test_a_scheduler_that_is_stopped_begins_nothing_more_and_ends_what_runs() -> None:
    begun, ended, reason = list[str](), list[Cell](), list[str]()

    class Work:
        def ready(self, cell: Cell) -> bool:
            return cell.name != "a"

        def run(self, cell: Cell, pool: Any, observer: Any, stopped: Stopped) -> Any:
            begun.append(cell.name)
            reason.append("stop")
            while stopped() is None:
                pass
            raise RunFailed("stopped")

        def ended(self, cell: Cell, outcome: Outcome) -> None:
            assert isinstance(outcome, RunFailed)
            ended.append(cell)

    scheduler = Scheduler(OneByOne(ds.SerialPool()), Work(), lambda: reason[0] if reason else None)
    scheduler.run(Grid(("a", "b", "c"), ("r",), ("s",), ("d",)).cells)
    assert begun == ["b"]  # "a" is not ready
    assert [cell.name for cell in ended] == ["b"]


@pytest.mark.ray
def test_on_ray_actors_go_from_cell_to_cell_and_every_bit_is_that_of_one_process(
    ray_cluster: None, tmp_path: Path
) -> None:
    settings = config(draws=24, placement=ds.PlacementConfig(cpus_per_chain=2, gpus_per_chain=0))
    steps = {f"step{k}": weights(0.01 * k) for k in range(6)}
    serial = sweep(tmp_path / "serial", settings, checkpoints=steps)
    ray = sweep(tmp_path / "ray", settings, checkpoints=steps, pool=None)
    assert table(ray).equals(table(serial))
    pids = set[str]()
    for cell in ray.cells:
        assert_same(ray.run(cell.name), serial.run(cell.name))
        pids |= {event["pid"] for event in ray.run(cell.name).events if event["event"] == "started"}
    assert len(pids) == 2  # the cluster of the tests has four CPUs


# From a file


def written(path: Path, **changes: Any) -> Path:
    for step in (5, 10):
        saved_user_model(path / f"ck/step{step}.pt", step / 500)
    block = {"checkpoints": "ck/step*.pt", **changes.pop("sweep", {})}
    file = path / "sweep.yaml"
    file.write_text(
        yaml.safe_dump({**CONFIG, "draws": 30, "burn_in": 5, "sweep": block, **changes})
    )
    return file


def saved_user_model(path: Path, shift: float) -> None:
    from tests.user_code import model

    path.parent.mkdir(exist_ok=True)
    torch.save({name: value + shift for name, value in model().state_dict().items()}, path)


def test_a_file_says_what_is_varied(tmp_path: Path) -> None:
    block = {
        "restrictions": {"all": None, "w": ["weight"]},
        "settings": {"hot": {"sampler.nbeta": 3.0}},
        "datasets": {"few": {"n": 150}, "more": {"n": 200}},
        "bias": 0.01,
    }
    found = plan.make_plan(sweep_recipe.load(written(tmp_path, sweep=block), ["sweep.bias=0.02"]))
    assert len(found.cells) == 8
    assert found.cells[0].name == "step5--all--hot--few"
    assert {name: len(data) for name, data in found.request.data.items()} == {  # type: ignore[arg-type]
        "few": 150,
        "more": 200,
    }
    assert found.request.bias == 0.02
    with pytest.raises(ConfigError, match="at most max_cells=7"):
        plan.make_plan(sweep_recipe.load(written(tmp_path, sweep=block), (), 7))
    with pytest.raises(ConfigError, match=r"sweep: unknown option 'setings': did you mean"):
        sweep_recipe.load(written(tmp_path, sweep={"setings": {}}))
    with pytest.raises(ConfigError, match="sweep must hold options, got list"):
        sweep_recipe.load(written(tmp_path, **{"sweep": {}}), ["sweep=[a]"])


@pytest.mark.ray
def test_the_command_sweeps_and_collect_reads_it_again(tmp_path: Path) -> None:
    file = written(tmp_path, gate={"rhat": 3.0, "ess": 1.0}, draws=200)
    out = command("sweep", file, "--store", tmp_path / "s", "--json")
    assert out.returncode == 0, out.stderr
    cells = json.loads(out.stdout)["cells"]
    assert [cell["cell"] for cell in cells] == ["step5", "step10"]
    assert "2 of 2" in out.stderr
    read = command("collect", tmp_path / "s", "--json", "--csv", tmp_path / "s.csv")
    page = Path(json.loads(command("report", tmp_path / "s", "--json").stdout)["report"])
    assert page == tmp_path / "s/report.html"
    assert "LLC over checkpoints" in page.read_text()
    assert command("collect", tmp_path / "s", "--netcdf", tmp_path / "s.nc").returncode == 0
    with xr.open_dataset(tmp_path / "s.nc") as table:
        assert table.llc.values.ravel().tolist() == [cell["llc"] for cell in cells]
    assert read.stdout == out.stdout
    assert (tmp_path / "s.csv").read_text().count("\n") == 3
    refused = command("sweep", file, "--store", tmp_path / "s")
    assert refused.returncode == 2
    assert "it holds a sweep" in refused.stderr
