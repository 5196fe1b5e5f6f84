"""What is too large to travel: written where it is made, counted by the driver, read when used."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distsampler as ds
from distsampler.analysis import inference_data
from distsampler.chains.chain import Chain
from distsampler.draws import DrawBlock
from distsampler.errors import StoreError
from distsampler.sampling import pilots
from distsampler.sampling.prepare import prepare
from distsampler.seeding import probe_rows
from distsampler.store.files import Files
from distsampler.store.trace import Trace
from tests.assertions import digest
from tests.fakes import FlakyPool
from tests.problems import (
    Held,
    Net,
    anchored,
    config,
    mean_squared_error,
    regression,
    squared_error,
)
from tests.processes import events, until


def sample(store: Path | str, pool: Any = None, block: int = 7, **fields: Any) -> ds.Run:
    model, data = regression()
    loss, resume = fields.pop("loss", squared_error), fields.pop("resume", "never")
    placement = ds.PlacementConfig(block=block)
    settings = config(**{"save_losses": True, "placement": placement, **fields})
    return ds.sample(
        model, data, loss, settings, store=store, pool=pool or ds.SerialPool(), resume=resume,
        quiet=True,
    )  # fmt: skip


def assert_same(one: ds.Run, other: ds.Run) -> None:
    """The same draws, narrow and wide, bit for bit."""
    assert digest(one) == digest(other)
    assert one.wide.keys() == other.wide.keys()
    assert one.wide
    for name, array in one.wide.items():
        assert array.identical(other.wide[name]), name


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_losses_are_those_of_the_probe_at_each_draw(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", draws=30, burn_in=11)
    assert run.losses.dims == ("chain", "draw", "example")
    assert run.losses.dtype == np.float32
    assert run.losses.sizes == {"chain": 2, "draw": 30, "example": 32}
    assert run.losses["example"].values.tolist() == probe_rows(0, 300, 32).tolist()
    assert run.losses["draw"].values.tolist() == run.posterior["draw"].values.tolist()
    means = run.losses.astype("float64").mean("example").values
    assert np.allclose(means, run.posterior["probe_loss"].values, rtol=1e-6)


def test_losses_are_a_plain_computation_at_the_weights_of_the_draw() -> None:
    model, (x, y) = regression()
    spec = prepare(model, (x, y), squared_error, config(save_losses=True, thin=1))
    kept = Kept()
    walker = Chain(spec, 0, anchored(spec), writer=kept)  # type: ignore[arg-type]
    walker.advance(9)
    weights = walker.replica.flats[0].detach().clone().view(1, 5)
    walker.advance(1)
    rows = probe_rows(0, 300, 32)
    with torch.no_grad():
        model.weight.copy_(weights)
        expected = squared_error(model, (x[rows], y[rows])).numpy()
    assert np.array_equal(kept.values[9]["losses"], expected)


class Kept:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}

    def put(self, draw: int, values: Any) -> None:
        self.values[draw] = dict(values)

    def flush(self) -> tuple[str, ...]:
        return ("losses",)


@pytest.mark.parametrize(
    ("pool", "fields"),
    [
        (ds.SerialPool, {"block": 50}),
        (ds.SerialPool, {"block": 1}),
        (ds.SerialPool, {"commit_seconds": 1e-9, "max_state_mb": 0.0}),
        (lambda: FlakyPool(2, deaths=(3, 5, 8, 9)), {}),
        (lambda: FlakyPool(1, deaths=(4, 7)), {"block": 3, "commit_seconds": 1e-9}),
        (lambda: FlakyPool(1, deaths=(4, 7)), {"block": 3, "save_weights_every": 4}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_bits_depend_on_no_block_and_no_death(
    tmp_path: Path, pool: Callable[[], Any], fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("distsampler.execution.driver.random.uniform", lambda a, b: 0.0)
    monkeypatch.setattr(
        "distsampler.store.large_arrays.CHUNK_BYTES", 32 * 4 * 5
    )  # five draws a chunk
    plain = sample(tmp_path / "plain", save_weights_every=fields.get("save_weights_every"))
    assert_same(sample(tmp_path / "run", pool(), **fields), plain)


def test_saved_weights_are_those_at_which_the_losses_were_measured(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", draws=30, burn_in=10, save_weights_every=4)
    assert list(run.weights) == ["weight"]
    weights = run.weights["weight"]
    assert weights.dims == ("chain", "draw", "weight_dim_0", "weight_dim_1")
    assert weights["draw"].values.tolist() == [1, 5, 9, 13, 17, 21, 25, 29]
    model, (x, y) = regression()
    rows = torch.tensor(run.losses["example"].values)
    for at in weights.stack(at=("chain", "draw")).transpose("at", ...):
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(at.values))
            expected = squared_error(model, (x[rows], y[rows])).numpy()
        chain, draw = (at[name].item() for name in ("chain", "draw"))
        assert np.array_equal(run.losses.sel(chain=chain, draw=draw), expected)


def test_saved_weights_are_of_what_moves_and_in_its_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    _, data = regression()
    settings = config(restrict_to=r"layers\.0\..*", save_weights_every=5, pack=2)
    run = ds.sample(
        model, data, squared_error, settings, store=tmp_path / "run", pool=ds.SerialPool(),
        quiet=True,
    )  # fmt: skip
    shapes = {name: array.shape for name, array in run.weights.items()}
    assert shapes == {"layers.0.weight": (2, 8, 8, 5), "layers.0.bias": (2, 8, 8)}
    moved = run.weights["layers.0.weight"] - model.state_dict()["layers.0.weight"].numpy()
    assert float(np.square(moved).sum()) > 0


def test_a_draw_that_is_large_is_cut_into_pieces_and_each_is_looked_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distsampler.store.large_arrays.PIECE_BYTES", 32 * 4 // 3)
    run = sample(tmp_path / "run")
    Path(run.store, "wide.zarr/losses/c/0/29/2").unlink()
    with pytest.raises(StoreError, match="losses/c/0/29 is missing or damaged"):
        ds.open(run.store).losses.values  # noqa: B018 (it reads)
    assert_same(sample(tmp_path / "run", resume="must"), sample(tmp_path / "plain"))


def test_a_pack_writes_what_its_chains_write_alone(tmp_path: Path) -> None:
    alone, packed = (sample(tmp_path / str(n), chains=4, pack=n) for n in (1, 4))
    assert np.allclose(packed.losses, alone.losses, rtol=1e-4, atol=1e-5)
    assert_same(
        packed, sample(tmp_path / "again", FlakyPool(1, deaths=(3, 5)), 3, chains=4, pack=4)
    )


def test_a_run_that_is_extended_has_the_bits_of_a_long_one(tmp_path: Path) -> None:
    sample(tmp_path / "run", draws=20)
    longer = sample(tmp_path / "run", draws=40, resume="must")
    assert_same(longer, sample(tmp_path / "whole", draws=40))


def test_a_burn_in_that_is_chosen_divides_them_too(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", draws=60, burn_in="auto")
    assert run.losses.sizes["draw"] == run.posterior.sizes["draw"] == 60 - run.burn_in
    means = run.losses.astype("float64").mean("example").values
    assert np.allclose(means, run.posterior["probe_loss"].values, rtol=1e-6)


def test_a_remote_store_holds_them_as_a_disk_does(tmp_path: Path) -> None:
    assert_same(sample(f"memory://{tmp_path.name}/run"), sample(tmp_path / "run"))


def test_a_chain_that_is_retired_is_left_out(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", chains=3)
    last = run.losses[2].values
    Trace(run.store).retire(1, "diverged")
    again = ds.open(run.store)
    assert again.losses["chain"].values.tolist() == [0, 2]
    assert np.array_equal(again.losses[1], last)


def test_opening_reads_nothing_and_a_selection_reads_its_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(tmp_path / "run")
    read, seen = Files.read, list[str]()

    def watched(self: Files, name: str) -> bytes:
        seen.append(name)
        return read(self, name)

    monkeypatch.setattr(Files, "read", watched)
    run = ds.open(tmp_path / "run")
    losses = run.losses
    assert run.inference_data is not None
    assert not [name for name in seen if "/losses/c/" in name]
    one = losses.sel(chain=1).isel(draw=slice(3, 20, 4), example=[5, 2])
    assert one.values.shape == (5, 2)
    assert {name for name in seen if "/losses/c/" in name} == {"wide.zarr/losses/c/1/0/0"}


@pytest.mark.parametrize(
    "key",
    [
        {"chain": 1}, {"draw": slice(None, None, -3)}, {"example": [4, 1, 1]},
        {"chain": [1, 0], "draw": 7}, {"draw": slice(5, 5)}, {"chain": 0, "draw": -1, "example": 3},
    ],
)  # fmt: skip
def test_a_selection_is_that_of_the_whole(tmp_path: Path, key: dict[str, Any]) -> None:
    losses = sample(tmp_path / "run", draws=20, burn_in=3).losses
    assert np.array_equal(losses.isel(key).values, losses.load().isel(key).values)


@pytest.mark.parametrize("harm", [Path.unlink, flip])
def test_a_chunk_that_is_damaged_or_missing_is_named_and_resume_makes_it_again(
    tmp_path: Path, harm: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distsampler.store.large_arrays.CHUNK_BYTES", 32 * 4 * 20)
    run, plain = sample(tmp_path / "run"), sample(tmp_path / "plain")
    harm(Path(run.store, "wide.zarr/losses/c/1/1/0"))
    hurt = ds.open(run.store)
    named = r"wide\.zarr/losses/c/1/1 is missing or damaged: it holds losses of chain 1 at draw 20"
    with pytest.raises(StoreError, match=named):
        hurt.losses.values  # noqa: B018 (it reads)
    assert np.array_equal(hurt.losses[0], plain.losses[0])
    assert hurt.posterior.identical(plain.posterior)
    again = sample(tmp_path / "run", resume="must")
    assert again.events[-1]["event"] == "finished"
    assert [e["intact"] for e in again.events if e["event"] == "damaged"] == [[50, 20]]
    assert_same(again, plain)


def test_what_lies_beyond_the_counts_is_not_shown(tmp_path: Path) -> None:
    run = sample(tmp_path / "run")
    trace = Trace(run.store)
    trace._update(kept=None)
    trace._committed = [50, 31]
    assert ds.open(run.store).losses.sizes["draw"] == 40
    assert inference_data.wide(trace)["losses"].sizes["draw"] == 21


def test_a_block_that_does_not_acknowledge_them_is_refused(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", draws=20)
    values = {v.name: np.zeros((3, *v.shape)) for v in run.manifest.variables}
    block = DrawBlock(0, 30, values, b"")
    with pytest.raises(StoreError, match=r"chain 0, draws 30..33: \['losses'\] must be written"):
        Trace(run.store).commit([block])


def test_a_disk_that_is_full_ends_the_run_and_retires_no_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Files.write

    def full(self: Files, name: str, data: bytes, *, fsync: bool = False) -> None:
        if "/losses/c/1/" in name and full.left <= 0:  # type: ignore[attr-defined]
            raise OSError(28, "No space left on device")
        full.left -= "/losses/c/1/" in name  # type: ignore[attr-defined]
        write(self, name, data, fsync=fsync)

    full.left = 3  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(Files, "write", full)
        with pytest.raises(ds.RunFailed, match=r"No space left on device.*make room"):
            sample(tmp_path / "run")
    assert not ds.open(tmp_path / "run").lost_chains
    assert_same(sample(tmp_path / "run", resume="must"), sample(tmp_path / "plain"))


@pytest.mark.filterwarnings("ignore::distsampler.errors.StepTooLargeWarning")
@pytest.mark.parametrize("pack", [1, 2])
def test_what_a_chain_wrote_before_it_diverged_stays(tmp_path: Path, pack: int) -> None:
    hot = ds.SamplerConfig(lr=0.05, localization=10.0)
    fields = {"sampler": hot, "thin": 1, "burn_in": 0, "divergence_factor": 2.0, "pack": pack}
    with pytest.raises(ds.RunFailed, match="diverged at step"):
        sample(tmp_path / "run", block=50, draws=400, **fields)
    trace = ds.open(tmp_path / "run")._trace
    (losses,) = trace.manifest.wide
    assert tuple(trace.wide.rows(losses).whole([400, 400])) == trace.committed
    assert max(trace.committed) > 0


def test_pilots_keep_none_of_it() -> None:
    asked = config(save_losses=True, save_weights_every=2, observables={"outputs": outputs})
    short = pilots.short(asked, asked.sampler, 10)
    assert (short.save_losses, short.save_weights_every, short.observables) == (False, None, {})


def test_weights_may_be_asked_for_more_rarely_than_there_are_draws(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", draws=20, save_weights_every=100)
    assert run.weights["weight"].shape == (2, 0, 1, 5)
    longer = sample(tmp_path / "run", draws=200, save_weights_every=100, resume="must")
    assert longer.weights["draw"].values.tolist() == [89, 189]
    assert np.isfinite(longer.weights["weight"]).all()


def test_a_loss_that_gives_means_has_none(tmp_path: Path) -> None:
    with pytest.raises(ds.ConfigError, match="save_losses needs a loss of one value per example"):
        sample(tmp_path / "run", loss=mean_squared_error)
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_not_asked_says_what_to_ask(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", save_losses=False)
    assert run.wide == {}
    assert not Path(run.store, "wide.zarr").exists()
    with pytest.raises(StoreError, match="sample with save_losses=True"):
        run.losses  # noqa: B018 (it reads)
    with pytest.raises(StoreError, match="sample with save_weights_every"):
        run.weights  # noqa: B018 (it reads)


MEMORY = """
import resource, sys
from pathlib import Path
from tests.problems import regression, squared_error
import distsampler as ds

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def sample(store, draws):
    model, data = regression(1000)
    config = ds.RunConfig(
        sampler=ds.SamplerConfig(lr=1e-4), chains=16, pack=16, draws=draws, burn_in=0, thin=1,
        batch_size=16, probe=1000, save_losses=True, device="cpu", watch=False,
    )
    pool = ds.SerialPool()
    return ds.sample(model, data, squared_error, config, store=store, pool=pool, quiet=True)

sample(sys.argv[1] + "/small", 8).losses[0].values
before = peak()
run = sample(sys.argv[1] + "/large", 1000)
run.losses.sel(chain=3, draw=slice(500, 600)).values
print(run.losses.nbytes / 2**20, peak() - before)
"""


def test_the_memory_of_the_process_does_not_grow_with_the_losses(tmp_path: Path) -> None:
    """Even where it is the process that makes them: 61 MB go through a chunk for each chain."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    size, grown = map(float, found.stdout.split())
    assert size > 60
    assert grown < size / 2, (size, grown)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_actors_write_them_and_one_that_is_killed_changes_no_bit(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a relative store, and actors that work elsewhere
    held = tmp_path / "held"
    held.touch()
    model, data = regression()
    settings = config(
        draws=60, save_losses=True, save_weights_every=7, observables={"outputs": outputs},
        placement=ds.PlacementConfig(cpus_per_chain=1, block=4), commit_seconds=0.2,
    )  # fmt: skip
    loss = Held(held, 0.02)
    running = ds.start(model, data, loss, settings, store="run")
    until(lambda: len(events(Path("run"), "started")) == 2)
    until(lambda: min(ds.open("run").manifest.n_committed) > 4)
    os.kill(int(events(Path("run"), "started")[0]["pid"]), signal.SIGKILL)
    until(lambda: len(events(Path("run"), "lost")) == 1)
    held.unlink()
    killed = running.wait(120)
    plain = ds.sample(
        model, data, loss, settings, store="plain", pool=ds.SerialPool(), quiet=True
    )  # fmt: skip
    assert set(killed.wide) == {"losses", "weights/weight", "outputs"}
    assert_same(killed, plain)


def outputs(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """One value for every example: too many to travel."""
    return torch.cat(2 * [model(batch[0])]).repeat(1, 2)
