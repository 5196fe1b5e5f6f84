"""The same bits whatever runs the chains: one process or Ray, few actors or many, killed or not."""

import os
import platform
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.data.kinds import as_rows
from distsampler.errors import ConfigError, PlacementError
from distsampler.models.replica import ChainSpec
from distsampler.sampling.prepare import prepare
from tests.assertions import assert_same
from tests.problems import Held, config, regression, squared_error
from tests.processes import events, until

pytestmark = pytest.mark.ray


def run(store: Path, pool: Any = None, **fields: Any) -> ds.Run:
    model, data = regression()
    fields = {"chains": 4, "placement": ds.PlacementConfig(cpus_per_chain=1), **fields}
    return ds.sample(
        model, data, squared_error, config(**fields), store=store, pool=pool, quiet=True
    )


def run_until_all_are_up(store: Path, actors: int, **fields: Any) -> ds.Run:
    """A run that does not end before its last actor has started."""
    model, data = regression()
    held = store.with_name("held")
    held.touch()
    running = ds.start(model, data, Held(held, 0.02), config(**fields), store=store)
    until(lambda: len(events(store, "started")) == actors)
    held.unlink()
    return running.wait()


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> ds.Run:
    return run(tmp_path_factory.mktemp("serial") / "run", ds.SerialPool())


def started(done: ds.Run) -> list[dict[str, Any]]:
    return [event for event in done.events if event["event"] == "started"]


@pytest.mark.parametrize(("chains_per_actor", "actors"), [(4, 1), (2, 2), (1, 4)])
def test_one_two_and_four_actors_give_the_bits_of_one_process(
    ray_cluster: None, serial: ds.Run, tmp_path: Path, chains_per_actor: int, actors: int
) -> None:
    placement = ds.PlacementConfig(cpus_per_chain=1, chains_per_actor=chains_per_actor)
    done = run_until_all_are_up(tmp_path / "run", actors, chains=4, placement=placement)
    assert len({event["pid"] for event in started(done)}) == actors
    assert str(os.getpid()) not in {event["pid"] for event in started(done)}
    assert_same(done, serial)
    assert done.llc("ignore") == serial.llc("ignore")


@pytest.mark.parametrize("block", [7, 50])
def test_the_length_of_a_block_changes_no_bit(
    ray_cluster: None, serial: ds.Run, tmp_path: Path, block: int
) -> None:
    placement = ds.PlacementConfig(cpus_per_chain=1, chains_per_actor=4, block=block)
    done = run(tmp_path / "run", placement=placement)
    assert_same(done, serial)


def test_more_chains_than_slots_rotate(ray_cluster: None, serial: ds.Run, tmp_path: Path) -> None:
    placement = ds.PlacementConfig(cpus_per_chain=2, block=5)
    done = run_until_all_are_up(tmp_path / "run", 2, chains=4, placement=placement)
    assert len(started(done)) == 2
    assert_same(done, serial)


def test_chain_k_of_four_is_chain_k_of_eight(serial: ds.Run, tmp_path: Path) -> None:
    eight = run(tmp_path / "run", ds.SerialPool(), chains=8)
    for name in ("loss", "probe_loss", "weight_projections"):
        values = [done._trace.read("posterior", name) for done in (serial, eight)]
        assert np.array_equal(values[0], values[1][:4])
        assert not np.array_equal(values[1][:4], values[1][4:])


def test_each_chain_has_a_gpu_of_its_own(ray_cluster: None, tmp_path: Path) -> None:
    placement = ds.PlacementConfig(gpus_per_chain=1, cpus_per_chain=1)
    done = run_until_all_are_up(tmp_path / "run", 2, chains=2, placement=placement)
    assert sorted(event["cuda_visible_devices"] for event in started(done)) == ["0", "1"]


def test_four_chains_of_half_a_gpu_share_two(ray_cluster: None, tmp_path: Path) -> None:
    placement = ds.PlacementConfig(gpus_per_chain=0.5, cpus_per_chain=1)
    done = run_until_all_are_up(tmp_path / "run", 4, chains=4, placement=placement)
    devices = sorted(event["cuda_visible_devices"] for event in started(done))
    assert devices == ["0", "0", "1", "1"]


@pytest.mark.parametrize(
    ("placement", "sentence"),
    [
        (
            {"gpus_per_chain": 3},
            "an actor of 1 CPU and 3 GPU, but the cluster has 1 nodes, "
            "the largest with 4 CPU and 2 GPU",
        ),
        ({"cpus_per_chain": 64}, "an actor of 64 CPU"),
        ({"label_selector": {"zone": "moon"}}, "with labels {'zone': 'moon'}"),
    ],
)
def test_a_placement_that_can_never_be_met_fails_at_once(
    ray_cluster: None, tmp_path: Path, placement: dict[str, Any], sentence: str
) -> None:
    began = time.monotonic()
    with pytest.raises(PlacementError) as caught:
        run(tmp_path / "run", placement=ds.PlacementConfig(**placement))
    assert sentence in str(caught.value)
    assert time.monotonic() - began < 10
    assert not (tmp_path / "run").exists()


class Unpicklable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 1, bias=False))
        self.inner[0].lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out


def test_a_model_that_cannot_be_pickled_names_the_attribute(
    ray_cluster: None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"model\.inner\.0\.lock \(lock\) is not"):
        ds.sample(
            Unpicklable(),
            regression()[1],
            squared_error,
            config(),
            store=tmp_path / "run",
            quiet=True,
        )
    assert not (tmp_path / "run").exists()


class Broken:
    """A loss that raises in the actors, after the first calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls > 40:  # not yet while it is inspected
            raise KeyError("no such label")
        return squared_error(model, batch)


def test_an_error_in_the_loss_names_chain_step_and_examples_and_carries_the_traceback(
    ray_cluster: None, tmp_path: Path
) -> None:
    model, data = regression()
    one = ds.PlacementConfig(chains_per_actor=2)
    with pytest.raises(
        ds.RunFailed, match=r"chain \d failed at step \d+, on the examples \[[\d, \n]+\]: KeyError"
    ) as caught:
        ds.sample(model, data, Broken(), config(placement=one), store=tmp_path / "run", quiet=True)
    assert "in __call__" in str(caught.value)
    assert "it made no draw: nothing is left in" in str(caught.value)
    assert not (tmp_path / "run").exists()


class HomeOnly:
    """A loss that cannot be rebuilt in another process, which is noted in a file."""

    def __init__(self, tries: Path) -> None:
        self.pid, self.tries = os.getpid(), tries

    def __setstate__(self, state: dict[str, Any]) -> None:
        if os.getpid() != state["pid"]:
            with state["tries"].open("a") as file:
                file.write("tried\n")
            raise OSError("the file of labels is not on this machine")
        self.__dict__.update(state)

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return squared_error(model, batch)


def test_an_actor_that_can_never_start_is_not_tried_again(
    ray_cluster: None, tmp_path: Path
) -> None:
    model, data = regression()
    one = config(placement=ds.PlacementConfig(chains_per_actor=2))
    with pytest.raises(ds.RunFailed, match="the file of labels is not on this machine"):
        ds.sample(
            model, data, HomeOnly(tmp_path / "tries"), one, store=tmp_path / "run", quiet=True
        )
    assert (tmp_path / "tries").read_text() == "tried\n"
    assert not (tmp_path / "run").exists()


NOT_HERE = """
import sys
class Hidden:
    def find_spec(self, name, *more):
        if name == "distsampler":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
ANOTHER = "import numpy; numpy.__version__ = '9.9.9'"


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (NOT_HERE, r"node [\d.]+ must have the module 'distsampler', and does not: install it"),
        (ANOTHER, rf"node [\d.]+ must have the driver's .* numpy 9\.9\.9, not {np.__version__}: "),
    ],
)
def test_a_node_without_the_package_or_with_another_version_is_named_before_any_chain_starts(
    ray_cluster: None, tmp_path: Path, node: str, said: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(node)
    there = {"env_vars": {"PYTHONPATH": str(tmp_path)}}
    with pytest.raises(ds.RunFailed, match=said) as caught:
        run(tmp_path / "run", chains=1, placement=ds.PlacementConfig(runtime_env=there))
    assert "Traceback" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_cluster_of_another_ray_is_refused_with_both_versions(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private.utils import check_version_info

    def join(**options: Any) -> None:  # as ray.init() does
        check_version_info({"ray_version": "2.59.0", "python_version": "3.10.1"}, "this process")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", join)
    versions = rf"(?s)2\.59\.0.*3\.10\.1.*{ray.__version__}.*{platform.python_version()}"
    with pytest.raises(PlacementError, match=versions):
        run(tmp_path / "run", chains=1)
    assert not (tmp_path / "run").exists()


def test_local_folders_that_come_too_late_to_be_sent_are_refused(
    ray_cluster: None, tmp_path: Path
) -> None:
    placement = ds.PlacementConfig(runtime_env={"working_dir": str(tmp_path)})
    with pytest.raises(PlacementError, match=rf"give \['{tmp_path}'\] to its ray\.init"):
        run(tmp_path / "run", placement=placement)
    assert not (tmp_path / "run").exists()


def test_what_was_not_started_is_not_stopped(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    run(tmp_path / "run", chains=2, placement=ds.PlacementConfig(chains_per_actor=2))
    assert ray.is_initialized()


def test_a_pool_whose_ray_is_gone_is_as_new_once_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from distsampler.execution import ray_pool

    pool, rows = ds.RayPool(), as_rows(torch.zeros(3))
    gone: Any = object()
    cluster = pool._cluster
    pool._slots[0], pool._spec, cluster._owned, cluster._shelf[rows] = gone, gone, True, gone
    monkeypatch.setattr(ray_pool.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_pool.ray, "shutdown", lambda: pytest.fail("it is not ours any more"))
    pool.stop()
    assert (pool._slots, pool._spec, cluster._owned, len(cluster._shelf)) == ({}, None, False, 0)


def test_shared_data_are_not_copied_and_runs_of_the_same_send_them_once(ray_cluster: None) -> None:
    import ray

    def owns_its_memory(spec: ChainSpec) -> bool:
        return bool(spec.rows._tree.array.flags.writeable)  # type: ignore[attr-defined]

    model, data = regression()
    rows = as_rows(torch.zeros(10**6))
    spec = replace(prepare(model, data, squared_error, config()), rows=rows)
    assert owns_its_memory(spec)
    with ds.RayPool().joined() as joined:
        first, second = (joined.sharing(deque(), 1) for _ in range(2))
        assert first._cluster.stored(rows) == second._cluster.stored(rows)
        assert first._cluster.stored(rows) != first._cluster.stored(as_rows(torch.zeros(10**6)))
        for pool in (first, second):
            there = ray.remote(owns_its_memory).remote(ray.put(pool._cluster.located(spec)))
            assert not ray.get(there)


def test_model_and_loss_are_called_by_actors_alone(tmp_path: Path) -> None:
    """The driver may have no GPU, and too little memory for the model."""
    calls = tmp_path / "calls"

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with calls.open("a") as file:
            file.write(f"{os.getpid()} {len(batch[0])}\n")
        return squared_error(model, batch)

    ds.sample(*regression(), loss, config(draws=3), store=tmp_path / "run", quiet=True)
    pids, sizes = zip(*map(str.split, calls.read_text().splitlines()), strict=True)
    assert "1" in sizes, "it was inspected"
    assert str(os.getpid()) not in pids
