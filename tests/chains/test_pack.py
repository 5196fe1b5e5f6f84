"""Chains that advance together: the numbers are those of chains alone, and no lane sees another."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import distsampler as ds
from distsampler.chains.chain import Chain
from distsampler.chains.pack import Pack
from distsampler.draws import DrawBlock
from distsampler.errors import StoreError
from distsampler.execution import driver
from distsampler.models.replica import ChainSpec, Replica
from distsampler.models.stack import Lanes
from distsampler.sampling import packing
from distsampler.sampling.prepare import prepare
from distsampler.store.trace import Trace
from tests.assertions import assert_same
from tests.fakes import FlakyPool
from tests.problems import Net, anchored, config, mean_squared_error, regression, squared_error

CPU = torch.device("cpu")
NORMS = dict.fromkeys(("grad_norm", "weight_norm", "distance"), True)
SAMPLERS = {
    "sgld": {"weight_decay": 2.0, "noise_norm": True, **NORMS},
    "lmsgld": {"bounding_box_size": 0.02},
    "sgnht": {"diffusion_factor": 0.1, "bounding_box_size": 0.05, **NORMS},
    "sgnht badodab": {"scheme": "badodab", "diffusion_factor": 0.1},
    "sghmc": {"friction": 0.2},
    "rmsprop_sgld": {"freeze_after": 13},
    "adam_sgld": {"freeze_after": 13},
}


def packed(pack: int = 4, model: Any = None, loss: Any = squared_error, **fields: Any) -> ChainSpec:
    given, data = regression()
    data = fields.pop("data", data)
    return prepare(model or given, data, loss, config(**{"chains": 4, "pack": pack, **fields}))


def sampler(name: str, **more: Any) -> ds.SamplerConfig:
    kind, *_ = name.split()
    options = {"lr": 1e-3, "localization": 10.0, **SAMPLERS[name], **more}
    return ds.SamplerConfig(name=kind, **options)


def make(spec: ChainSpec, chains: Any = None, at_anchor: Any = None) -> Pack:
    return Pack(spec, chains or range(spec.config.together), at_anchor or anchored(spec),
                Replica(spec, CPU))  # fmt: skip


def assert_equal(one: DrawBlock, *parts: DrawBlock) -> None:
    """A block is the others put together, bit for bit, state included."""
    for name, values in one.values.items():
        assert np.array_equal(values, np.concatenate([p.values[name] for p in parts])), name
    assert one.state == parts[-1].state


def assert_follows(spec: ChainSpec, draws: int = 8) -> None:
    """The draws of a pack are those of its chains alone, but for the last bits."""
    at_anchor = anchored(spec)
    blocks = make(spec, at_anchor=at_anchor).advance(draws).blocks
    assert [block.chain for block in blocks] == list(range(spec.config.together))
    for block in blocks:
        alone = Chain(spec, block.chain, at_anchor).advance(draws)
        for name, values in alone.values.items():
            scale = max(1.0, float(np.abs(values).max()))
            assert np.allclose(block.values[name], values, rtol=1e-5, atol=1e-5 * scale), name


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.filterwarnings("ignore")  # cautions of samplers
def test_a_packed_chain_follows_the_chain_that_is_alone(name: str) -> None:
    assert_follows(packed(sampler=sampler(name)))


@pytest.mark.parametrize("name", ["sgld", "lmsgld", "rmsprop_sgld"])
def test_so_it_does_with_corrected_heat(name: str) -> None:
    assert_follows(packed(sampler=sampler(name, correct_heat=True), batch_size=4))


@pytest.mark.parametrize("name", ["sgld", "sgnht", "rmsprop_sgld"])
def test_so_it_does_under_masks(name: str) -> None:
    mask = {"weight": [[True, False, True, True, False]]}
    assert_follows(packed(sampler=sampler(name), restrict_to=mask))


class Convolution(nn.Module):
    """Two precisions, a memory format that is not plain, a frozen part and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3).double()
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)).relu().mean((2, 3)).double())
        return out


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def test_so_it_does_in_a_model_of_two_precisions_and_memory_formats() -> None:
    torch.manual_seed(0)
    data = {"x": torch.randn(100, 2, 6, 6), "y": torch.randint(0, 3, (100,))}
    spec = packed(model=Convolution(), loss=cross_entropy, data=data, sampler=sampler("sgnht"))
    assert packing.refusal(spec) is None
    assert_follows(spec)


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": mean_squared_error},
        {"batches": "epoch", "thin": 1},
        {"init": "dispersed"},
        {"thin": 100},  # the watch looks again
    ],
)
def test_so_it_does_with_other_losses_batches_and_starts(fields: dict[str, Any]) -> None:
    assert_follows(packed(**fields))


def test_half_precision_keeps_its_masters() -> None:
    model, (x, y) = regression()
    data = (x.bfloat16(), y.bfloat16())
    spec = packed(model=model.bfloat16(), data=data, sampler=sampler("lmsgld"), watch=False)
    pack = make(spec)
    assert all(np.isfinite(b.values["loss"]).all() for b in pack.advance(4).blocks)
    state = pack._chains[1].sampler.state[pack._chains[1].replica.flats[0]]
    assert state["master"].dtype == torch.float32
    assert torch.equal(state["master"].bfloat16(), pack._chains[1].replica.flats[0])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.filterwarnings("ignore")
def test_a_then_b_is_a_plus_b_and_a_restored_pack_goes_on_to_the_bit(name: str) -> None:
    spec = packed(sampler=sampler(name))
    at_anchor = anchored(spec)
    whole, parts, other = (make(spec, at_anchor=at_anchor) for _ in range(3))
    first, second = parts.advance(4), parts.advance(5)
    for block in first.blocks:
        other.restore(block.chain, block.state)
    assert other.at(range(4), 4)
    others = other.advance(5)
    for one, a, b, c in zip(whole.advance(9).blocks, first.blocks, second.blocks, others.blocks,
                            strict=True):  # fmt: skip
        assert_equal(one, a, b)
        assert_equal(b, c)


@pytest.mark.parametrize("name", ["sgld", "sgnht", "adam_sgld"])
@pytest.mark.filterwarnings("ignore")
def test_a_lane_that_diverges_changes_no_bit_of_the_others(name: str) -> None:
    spec = packed(sampler=sampler(name))
    at_anchor = anchored(spec)
    whole, hurt = make(spec, at_anchor=at_anchor), make(spec, at_anchor=at_anchor)
    hurt.advance(2)
    with torch.no_grad():
        hurt._chains[1].replica.flats[0][2] = torch.nan
    done = hurt.advance(3)
    (error,) = done.diverged
    assert (error.chain, error.block.draws, error.step) == (1, 0, 8)
    rest = hurt.advance(4)
    whole.advance(2)
    parts = zip(done.blocks, rest.blocks, strict=True)
    expected = {block.chain: block for block in whole.advance(7).blocks}
    for a, b in parts:
        assert_equal(expected[a.chain], a, b)


def test_without_a_retired_chain_a_pack_has_the_same_bits() -> None:
    spec = packed()
    at_anchor = anchored(spec)
    whole, rest = make(spec, at_anchor=at_anchor), make(spec, (0, 2, 3), at_anchor)
    blocks = {block.chain: block for block in whole.advance(6).blocks}
    for block in rest.advance(6).blocks:
        assert_equal(blocks[block.chain], block)


def test_a_chain_that_leaves_is_retired_with_its_draws_and_the_others_finish() -> None:
    fields = {"sampler": ds.SamplerConfig(lr=3e-3, localization=10.0), "thin": 1, "burn_in": 0}
    found, free = (
        go(divergence_factor=factor, draws=60, pack=3, **fields) for factor in (4.5, None)
    )
    assert set(found.lost_chains) == {0, 4, 5}
    for chain, count in enumerate(found.manifest.n_committed):
        assert (0 < count < 60) == (chain in found.lost_chains)
        a, b = (run._trace.read("posterior", "loss")[chain] for run in (found, free))
        assert np.array_equal(a[:count], b[:count])


def test_a_lanes_state_holds_nothing_of_the_others() -> None:
    spec = packed(sampler=sampler("sgnht"))
    at_anchor = anchored(spec)
    (alone, *_), together = (
        make(spec, at_anchor=at_anchor).advance(2).blocks,
        Chain(spec, 0, at_anchor),
    )
    assert len(alone.state) == len(together.advance(2).state)


def test_operations_are_recorded_once() -> None:
    calls = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return squared_error(model, batch)

    spec = packed(loss=counted, watch=False)
    pack = make(spec)
    calls.clear()
    pack.advance(5)
    assert calls.count(16) == 1
    assert calls.count(32) == 5 * 4  # the probe


# Runs


def go(store: Path | None = None, pool: Any = None, resume: Any = "never", **fields: Any) -> ds.Run:
    model, data = fields.pop("model", None), fields.pop("data", None)
    given, rows = regression()
    fields = {"chains": 6, "pack": 4, "placement": ds.PlacementConfig(block=9), **fields}
    return ds.sample(
        model or given, data or rows, fields.pop("loss", squared_error), config(**fields),
        store=store, pool=pool or ds.SerialPool(), resume=resume, quiet=True,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.random, "uniform", lambda low, high: 0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> ds.Run:
    return go(tmp_path_factory.mktemp("pack") / "run")


def test_a_packed_run_is_the_run_of_its_chains(undisturbed: ds.Run) -> None:
    plain = go(pack=1)
    for name in ("loss", "excess_loss", "probe_loss", "distance"):
        found, expected = (r._trace.read("posterior", name) for r in (undisturbed, plain))
        assert np.allclose(found, expected, atol=1e-4)
        assert not np.array_equal(found, expected)  # or nothing was packed
    last = [r._trace.read("posterior", "loss")[5] for r in (undisturbed, plain)]
    assert np.allclose(*last, atol=1e-4)


@pytest.mark.parametrize("deaths", [[1], [4, 5], list(range(3, 30, 4))])
def test_blocks_and_deaths_change_no_bit(
    tmp_path: Path, undisturbed: ds.Run, deaths: list[int]
) -> None:
    pool = FlakyPool(2, deaths)
    found = go(tmp_path / "run", pool, placement=ds.PlacementConfig(block=5))
    assert pool.died == len(deaths)
    assert_same(found, undisturbed)


def test_a_run_goes_on_to_the_bit(tmp_path: Path, undisturbed: ds.Run) -> None:
    with pytest.raises(ds.RunFailed):
        go(tmp_path / "run", FlakyPool(1, [9], kind="fatal"))
    assert min(ds.open(tmp_path / "run").manifest.n_committed) > 0
    assert_same(go(tmp_path / "run", resume="must"), undisturbed)


def test_a_pack_goes_back_to_where_all_of_it_have_a_state(
    tmp_path: Path, undisturbed: ds.Run
) -> None:
    with pytest.raises(ds.RunFailed):
        go(tmp_path / "run", FlakyPool(1, [12], kind="fatal"), commit_seconds=1e-9)
    newest = sorted((tmp_path / "run/checkpoints/chain-0002").iterdir())[-1]
    newest.write_bytes(b"torn")
    points = Trace(tmp_path / "run").restart_points()
    assert len(set(points[:4])) == 1
    assert points[0] < ds.open(tmp_path / "run").manifest.n_committed[0]
    assert_same(go(tmp_path / "run", resume="must"), undisturbed)


@pytest.mark.ray
def test_actors_give_the_bits_of_one_process(
    ray_cluster: None, tmp_path: Path, undisturbed: ds.Run
) -> None:
    placement = ds.PlacementConfig(cpus_per_chain=1, block=7)
    found = go(tmp_path / "run", ds.RayPool(placement), placement=placement)
    started = [event for event in found.events if event["event"] == "started"]
    assert len({event["pid"] for event in started}) == 2, "one actor a pack"
    assert_same(found, undisturbed)


def test_another_pack_is_refused_on_resume(tmp_path: Path) -> None:
    go(tmp_path / "run", draws=10)
    with pytest.raises(StoreError, match=r"config\.pack: stored 4, now 2"):
        go(tmp_path / "run", draws=20, pack=2, resume="must")


def told(run: ds.Run) -> list[dict[str, Any]]:
    return [event for event in run.events if event["event"] == "packing"]


def test_the_fastest_is_chosen_once_and_read_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {1: 100.0, 2: 190.0, 4: 300.0, 6: 200.0}
    monkeypatch.setattr(packing, "_speed", lambda spec, count: speeds[count])
    run = go(tmp_path / "run", draws=10, pack="auto")
    assert run.manifest.config.pack == 4
    assert told(run)[0] | {"time": 0} == {
        "time": 0, "event": "packing", "asked": "auto", "pack": 4, "refused": "",
        "speeds": {str(count): speed for count, speed in speeds.items()},
    }  # fmt: skip
    speeds[6] = 1000.0
    more = go(tmp_path / "run", draws=40, pack="auto", resume="must")
    assert more.manifest.config.pack == 4
    assert_same(more, go(tmp_path / "whole", pack=4))


def test_more_places_are_worth_more_than_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {1: 100.0, 2: 190.0, 4: 250.0}
    monkeypatch.setattr(packing, "_speed", lambda spec, count: speeds[count])
    monkeypatch.setattr(packing.os, "cpu_count", lambda: 4)
    spec = packed("auto")
    assert packing.choose_pack(spec, places=1, stored=None).pack == 4
    assert packing.choose_pack(spec, places=None, stored=None).pack == 1


def test_a_measured_choice_is_a_number_of_chains() -> None:
    packs = packing.choose_pack(packed("auto", chains=3), places=1, stored=None)
    assert set(packs.speeds) == {1, 2, 3}
    assert packs.pack in packs.speeds
    assert all(speed > 0 for speed in packs.speeds.values())


class Own(ds.SGLD):
    """A sampler of the user's."""


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> Any:
        x, y = regression()[1]
        return x[index], y[index]


def branching(model: nn.Module, batch: Any) -> Tensor:
    losses = squared_error(model, batch)
    return losses if losses.sum() > 0 else 2 * losses


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return squared_error(model, batch) * self.calls


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": Net(), "mode": "train"}, "the loss draws at random"),
        ({"model": nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)),
          "mode": "train"}, "may move the model's buffers, as batch norm does"),
        ({"sampler": ds.SamplerConfig(name="mala", lr=1e-3), "batch_size": 300},
         "'mala' evaluates the loss inside its step"),
        ({"sampler": ds.SamplerConfig(name="tests.chains.test_pack:Own", lr=1e-3)},
         "a sampler of your own"),
        ({"sampler": ds.SamplerConfig(lr=1e-3, save_mala_vars=True)}, "a second gradient"),
        ({"data": Rows()}, "give the data as tensors in memory"),
        ({"loss": branching}, "torch.func refuses the model: RuntimeError: vmap: .*control flow"),
        ({"loss": Counting(), "watch": False}, "the same operations at every call"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_refused_with_the_reason(
    fields: dict[str, Any], reason: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of the loss itself
        spec = packed(**fields)
    found = packing.refusal(spec)
    assert found is not None
    assert re.search(reason, found), found


def test_a_loss_that_stops_gradients_is_recorded_as_it_is() -> None:
    def held(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            target = model(batch[0])
        return (model(batch[0]) - 0.5 * target - batch[1]).square().sum(1)

    spec = packed(loss=held, watch=False)
    assert packing.refusal(spec) is None
    assert_follows(spec)


def test_chains_that_cannot_be_packed_run_one_after_another_and_the_run_says_so(
    tmp_path: Path,
) -> None:
    with pytest.warns(UserWarning, match="one after another in this run, though pack=4: .*control"):
        found = go(tmp_path / "run", loss=branching, watch=False)
    (event,) = told(found)
    assert (event["asked"], event["pack"]) == (4, 1)
    assert "control flow" in event["refused"]
    assert found.manifest.config.pack == 1
    assert_same(found, go(loss=branching, watch=False, pack=1))


def test_the_recorded_gradient_is_that_of_each_lane() -> None:
    spec = packed()
    lanes = Lanes(Replica(spec, CPU), spec, 3)
    with torch.no_grad():
        lanes.weights[0] += torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    rows = np.random.default_rng(0).integers(0, 300, (3, 16))
    losses = lanes.losses_and_gradients(rows)
    x, y = regression()[1]
    for lane in range(3):
        w = lanes.weights[0][lane].double().requires_grad_()
        expected = (x[rows[lane]].double() @ w - y[rows[lane], 0]).square()
        (slope,) = torch.autograd.grad(expected.mean(), w)
        assert torch.allclose(losses[lane].double(), expected, rtol=1e-5)
        assert torch.allclose(lanes.gradients[0][lane].double(), slope, rtol=1e-4, atol=1e-5)


def test_as_many_places_as_packs_are_asked_for() -> None:
    assert [list(pack) for pack in config(chains=7, pack=3).packs] == [[0, 1, 2], [3, 4, 5], [6]]
    assert config(chains=2, pack=8).together == 2
    assert config(pack="auto").together == 1


def test_a_wrong_pack_says_what_was_got() -> None:
    with pytest.raises(ds.ConfigError, match="pack: input should be greater than or equal to 1"):
        ds.RunConfig(pack=0)
