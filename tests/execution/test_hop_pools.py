"""Shards on Ray: made in actors only, shared and not copied, the same bits after a kill."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distsampler as ds
from tests.assertions import assert_same
from tests.problems import Held, config, regression, squared_error
from tests.processes import actors, committed, end, events, until

pytestmark = pytest.mark.ray
HERE = str(os.getpid())


def hopping(**fields: Any) -> ds.RunConfig:
    placement = ds.PlacementConfig(cpus_per_chain=1, chains_per_actor=2, block=5)
    return config(data_mode="hop", hop_every=4, chains=4, placement=placement, **fields)


class MakeShard:
    """A quarter of the regression's rows; leaves the number of the process that asked for it."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, index: int, count: int) -> tuple[Tensor, Tensor]:
        (self.log / f"{os.getpid()}-{index}").touch()
        _, (x, y) = regression()
        rows = torch.arange(len(x)) % count == index
        return x[rows], y[rows]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> ds.Run:
    folder = tmp_path_factory.mktemp("serial")
    model, _ = regression()
    args = (model, MakeShard(folder), squared_error, hopping(shards=4))
    return ds.sample(*args, store=folder / "run", pool=ds.SerialPool(), quiet=True)


def test_shards_are_made_in_actors_only_and_the_bits_are_those_of_one_process(
    ray_cluster: None, serial: ds.Run, tmp_path: Path
) -> None:
    model, _ = regression()
    args = (model, MakeShard(tmp_path), squared_error, hopping(shards=4))
    done = ds.sample(*args, store=tmp_path / "run", quiet=True)
    makers = {path.name.partition("-")[0] for path in tmp_path.glob("*-*")}
    assert makers
    assert HERE not in makers
    assert_same(done, serial)
    in_this_process = {path.name for path in serial_log(serial).glob(f"{HERE}-*")}
    assert len(in_this_process) == 4  # the log names this process when it makes shards


def serial_log(run: ds.Run) -> Path:
    return Path(run.store).parent


def test_a_killed_actor_returns_to_its_shard_and_position(
    ray_cluster: None, serial: ds.Run, tmp_path: Path
) -> None:
    model, _ = regression()
    held, store = tmp_path / "held", tmp_path / "run"
    held.touch()
    fields = hopping(shards=4, commit_seconds=0.05)
    running = ds.start(model, MakeShard(tmp_path), Held(held, 0.02), fields, store=store)
    until(lambda: committed(store) and actors(store))
    end(actors(store)[0])
    until(lambda: events(store, "lost"))
    held.unlink()
    assert_same(running.wait(), serial)


def test_a_shard_that_cannot_be_made_is_one_error(ray_cluster: None, tmp_path: Path) -> None:
    def make(index: int, count: int) -> object:
        raise FileNotFoundError(f"no file of shard {index}")

    model, _ = regression()
    store = tmp_path / "run"
    with pytest.raises(ds.ConfigError, match=r"cannot be made.*no file of shard"):
        ds.sample(model, make, squared_error, hopping(shards=2), store=store, quiet=True)
    assert not store.exists()
