"""What only a GPU can show of whole runs: the CPU's law, the same bits again, deaths, memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.chains.chain import Chain
from distsampler.chains.steps import alone
from distsampler.data import rows as shards
from distsampler.data.kinds import as_rows
from distsampler.sampling.prepare import prepare
from tests.assertions import assert_mean, assert_same
from tests.faults import job
from tests.faults.job import DriverProcess
from tests.problems import anchored, config, regression, squared_error
from tests.processes import actors, committed, end, events

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HALF = {"address": "local", "gpus_per_chain": 0.5, "cpus_per_chain": 1, "block": 10}


def run(store: Path, device: str = "cuda", **fields: Any) -> ds.Run:
    model, data = regression()
    settings = config(device=device, **fields)
    return ds.sample(
        model, data, squared_error, settings, store=store, pool=ds.SerialPool(), quiet=True
    )


@pytest.mark.parametrize("name", ["sgld", "lmsgld", "sgnht"])
def test_a_gpu_samples_the_law_of_the_cpu(tmp_path: Path, name: str) -> None:
    sampler = ds.SamplerConfig(name=name, lr=1e-3, localization=10.0)
    fields = {"sampler": sampler, "chains": 4, "draws": 1_000, "burn_in": 100}
    here, there = (run(tmp_path / device, device, **fields) for device in ("cpu", "cuda"))
    one, other = here.llc("ignore"), there.llc("ignore")
    assert other.init_loss == pytest.approx(one.init_loss, rel=1e-6)
    assert_mean(other.mean, one.mean, (one.se**2 + other.se**2) ** 0.5)
    assert other.mean != one.mean  # another stream of noise: it did run there
    assert there.manifest.fingerprint["device"].startswith("cuda")


def test_the_length_of_a_block_changes_no_bit(tmp_path: Path) -> None:
    runs = [
        run(tmp_path / f"{block}", placement=ds.PlacementConfig(block=block)) for block in (7, 50)
    ]
    assert_same(*runs)


def test_a_model_and_data_that_lie_on_the_gpu_give_the_bits_of_those_on_the_cpu(
    tmp_path: Path,
) -> None:
    model, data = regression()
    there = tuple(tensor.cuda() for tensor in data)
    found = ds.sample(
        model.cuda(), there, squared_error, config(device="cuda"), store=tmp_path / "there",
        pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    assert next(model.parameters()).is_cuda
    assert_same(found, run(tmp_path / "here"))


class Wide(nn.Module):
    """Convolution, normalisation, attention: kernels that have deterministic forms to choose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.first(x).flatten(2).mT)
        out: Tensor = self.last(self.attention(tokens, tokens, tokens)[0].mean(1))
        return out


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


def test_convolution_and_attention_give_the_same_bits_again(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Wide()
    source = torch.Generator().manual_seed(0)
    data = (
        torch.randn(200, 1, 10, 10, generator=source),
        torch.randint(10, (200,), generator=source),
    )
    settings = config(device="cuda", sampler=ds.SamplerConfig(lr=1e-5, localization=100.0))
    runs = [
        ds.sample(
            model, data, cross_entropy, settings, store=tmp_path / name, pool=ds.SerialPool(),
            quiet=True,
        )
        for name in ("one", "other")
    ]  # fmt: skip
    assert_same(*runs)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_an_actor_on_a_gpu_that_is_killed_changes_no_bit(tmp_path: Path) -> None:
    fields = {"chains": 2, "draws": 80, "device": "cuda"}
    undisturbed = job.sample(tmp_path / "serial", tmp_path / "free", pool=ds.SerialPool(), **fields)
    store, held = tmp_path / "run", tmp_path / "held"
    held.touch()
    with DriverProcess(store, held, placement=HALF, **fields) as driver:
        driver.until(lambda: committed(store) and len(actors(store)) == 2)
        end(actors(store)[1])
        driver.until(lambda: events(store, "lost"))
        held.unlink()
        driver.finish()
    found = ds.open(store)
    assert [event["fault"] for event in events(store, "lost")] == ["infrastructure"]
    assert all(event["device"].startswith("cuda") for event in events(store, "started"))
    assert_same(found, undisturbed)
    assert found.llc("ignore") == undisturbed.llc("ignore")


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_gpu_out_of_memory_is_a_fault_of_the_place_and_not_of_the_chain(tmp_path: Path) -> None:
    store, held = tmp_path / "run", tmp_path / "held"
    held.touch()
    fields = {"chains": 2, "draws": 40, "device": "cuda", "memory": 10**13}
    with DriverProcess(store, held, placement=HALF, **fields) as driver:
        assert driver.process.wait(300) == 1
        assert "ran out of memory 3 times: lower batch_size" in driver.said()
    assert {event["fault"] for event in events(store, "lost")} == {"memory"}
    assert not events(store, "retired")


def test_data_in_memory_lie_on_the_gpu_if_they_fit_and_no_bit_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = as_rows(torch.arange(12.0).view(6, 2))
    batch = rows.taker(torch.device("cuda"))(np.array([4, 0]))
    assert isinstance(batch, Tensor)
    assert batch.is_cuda
    assert batch.tolist() == [[8.0, 9.0], [0.0, 1.0]]
    resident = run(tmp_path / "resident")
    monkeypatch.setattr(shards, "RESIDENT", 0.0)
    assert_same(run(tmp_path / "sent"), resident)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", ["lmsgld", "sgnht"])
def test_a_step_between_two_draws_never_waits_for_the_gpu(name: str) -> None:
    model, data = regression()
    sampler = ds.SamplerConfig(name=name, lr=1e-3, localization=10.0)
    spec = prepare(model, data, squared_error, config(device="cuda", sampler=sampler))
    chain = Chain(spec, 0, anchored(spec), device=torch.device("cuda"))
    chain.advance(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            alone(chain).step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["sgld", "lmsgld", "sgnht"])
def test_a_pack_on_a_gpu_has_the_first_steps_of_its_chains_alone_and_the_same_bits_again(
    tmp_path: Path, name: str
) -> None:
    sampler = ds.SamplerConfig(name=name, lr=1e-3, localization=10.0)
    fields = {"chains": 4, "draws": 3, "burn_in": 1, "thin": 2, "sampler": sampler}
    alone, one, other = (
        run(tmp_path / key, pack=pack, **fields) for key, pack in [("a", 1), ("b", 4), ("c", 4)]
    )
    assert one.manifest.config.pack == 4
    assert_same(one, other)
    values = [found._trace.read("posterior", "probe_loss") for found in (alone, one)]
    np.testing.assert_allclose(*values, rtol=1e-5)
