"""On Ray: user code that hangs, and what a driver's process has and its actors have not."""

import importlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.execution import deadlines, driver
from tests.assertions import assert_same
from tests.models.test_numerics import double
from tests.problems import config, regression, squared_error
from tests.processes import actors, until

pytestmark = pytest.mark.ray

PLACEMENT = ds.PlacementConfig(cpus_per_chain=1, chains_per_actor=2, block=5, answer_timeout=1.0)
SHORT: dict[str, Any] = {"placement": PLACEMENT, "draws": 30, "commit_seconds": 0.1}


class Hangs:
    """A loss that does not return from its 25th step, with the GIL released, and says so.

    Args:
        flag: a file that is made then.
        once: whether it returns where the file is there already.
    """

    def __init__(self, flag: Path, once: bool) -> None:
        self.flag, self.once, self.steps = flag, once, 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.steps += len(batch[0]) == 16 and torch.is_grad_enabled()  # not the anchor
        if self.steps == 25 and not (self.once and self.flag.exists()):
            self.flag.touch()
            time.sleep(10**6)
        return squared_error(model, batch)


def test_a_loss_that_hangs_in_one_actor_is_run_in_another_and_no_bit_changes(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver.random, "uniform", lambda low, high: 0.0)  # it starts again at once
    model, data = regression()
    loss, other = Hangs(tmp_path / "hangs", once=True), Hangs(tmp_path, once=True)
    run = ds.sample(model, data, loss, config(**SHORT), store=tmp_path / "run", quiet=True)
    (lost,) = [event for event in run.events if event["event"] == "lost"]
    (first, again) = [event["pid"] for event in run.events if event["event"] == "started"]
    assert lost["fault"] == "hung"
    assert f"pid {first}, has not answered for" in lost["reason"]
    assert first != again
    assert_same(
        run, ds.sample(model, data, other, config(**SHORT), pool=ds.SerialPool(), quiet=True)
    )


def test_a_run_is_stopped_though_its_loss_hangs_and_no_actor_is_left(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "ENDING", (0.1, 0.2))
    patient = {**SHORT, "placement": PLACEMENT.replaced(answer_timeout=600.0)}
    loss, store = Hangs(tmp_path / "hangs", once=False), tmp_path / "run"
    running = ds.start(*regression(), loss, config(**patient), store=store)
    until(loss.flag.exists)
    running.stop()
    run = running.wait(60)
    assert run.manifest.status == "interrupted"
    assert max(run.manifest.n_committed) > 0
    until(lambda: not actors(store))


MODULE = """
import torch
def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(1) * torch.tensor(1 / 3)
"""


def test_actors_have_the_drivers_folders_and_its_default_dtype(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_in_this_folder.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    loss = importlib.import_module("only_in_this_folder").loss
    _, (x, y) = regression()
    runs = list[ds.Run]()
    with double():
        torch.manual_seed(0)
        model, data = nn.Linear(5, 1), (x.double(), y.double())
        for pool in (ds.SerialPool(), None):
            runs.append(ds.sample(model, data, loss, config(**SHORT), pool=pool, quiet=True))
    assert_same(*runs)
