"""Where a run may begin, and what is left of one that could not."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.config import RunConfig
from distsampler.errors import StoreError
from distsampler.sampling.directory import check_new
from distsampler.store.files import Files
from distsampler.store.lease import NAME as LEASE
from distsampler.store.lease import Lease
from distsampler.store.manifest import Manifest
from distsampler.store.trace import Trace
from tests.assertions import digest
from tests.problems import config, regression, squared_error
from tests.stores import COUNTED, counted


def sample(store: Path, loss: Any = squared_error, **fields: Any) -> ds.Run:
    resume = fields.pop("resume", "never")
    settings = config(**{"draws": 10, "burn_in": 2, "probe": 8, "watch": False, **fields})
    return ds.sample(
        *regression(n=40), loss, settings, store=store, pool=ds.SerialPool(), resume=resume,
        quiet=True,
    )  # fmt: skip


def fails_at_the_anchor(model: nn.Module, batch: Any) -> Tensor:
    if len(batch[0]) > 16:
        raise ValueError("a slip that shows in the anchor pass alone")
    return squared_error(model, batch)


def fails_at_the_first_step(model: nn.Module, batch: Any) -> Tensor:
    if len(batch[0]) == 16 and torch.is_grad_enabled():
        fails_at_the_first_step.calls += 1  # type: ignore[attr-defined]
        if fails_at_the_first_step.calls > 4:  # type: ignore[attr-defined]
            raise ValueError("a slip that shows in a step")
    return squared_error(model, batch)


fails_at_the_first_step.calls = 0  # type: ignore[attr-defined]


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("loss", [fails_at_the_anchor, fails_at_the_first_step])
@pytest.mark.parametrize("there", [False, True])
def test_a_failed_start_leaves_nothing_and_the_mended_one_runs(
    tmp_path: Path, loss: Callable[..., Tensor], there: bool
) -> None:
    store = tmp_path / "runs/one"
    if there:
        store.mkdir(parents=True)
    with pytest.raises(ds.RunFailed, match="it made no draw: nothing is left in"):
        sample(store, loss)
    assert everything(tmp_path) == (["runs", "runs/one"] if there else [])
    assert digest(sample(store)) == digest(sample(tmp_path / "clean"))


def test_a_pool_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    class Full(ds.SerialPool):
        def start(self, spec: Any, places: Any) -> Any:
            raise ds.PlacementError("no room")

    with pytest.raises(ds.PlacementError):
        ds.sample(*regression(), squared_error, config(), store=tmp_path / "a/run", pool=Full())
    assert everything(tmp_path) == []


def drawless(folder: Path) -> Path:
    """The store that a driver leaves which is killed after the anchor pass, before a commit."""
    store, left = folder / "killed", folder / "left"

    class Killed(ds.SerialPool):
        def wait(self, timeout: float) -> Any:
            if (store / "trace.zarr/constant_data/probe_losses/c").exists():
                shutil.copytree(store, left, ignore=shutil.ignore_patterns(".epoch-*", LEASE))
                raise SystemExit
            return super().wait(timeout)

    settings = config(seed=3, draws=30, save_losses=True)
    problem = (*regression(n=40), squared_error, settings)
    with pytest.raises(SystemExit):
        ds.sample(*problem, store=store, pool=Killed(), quiet=True)
    assert ds.open(left).manifest.status == "running"
    assert (left / "wide.zarr").exists()
    return left


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_store_without_a_draw_is_begun_anew_whatever_was_asked_then(
    tmp_path: Path, resume: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = drawless(tmp_path)
    with caplog.at_level(logging.WARNING):
        run = sample(store, resume=resume)
    lines = [each.getMessage() for each in caplog.records]
    assert lines == [f"the run in {store} had not made a draw: it is replaced"]
    assert digest(run) == digest(sample(tmp_path / "clean"))
    assert not (store / "wide.zarr").exists(), "nothing of the other is left"
    assert [event["event"] for event in run.events].count("started") == 1


def test_one_that_another_driver_has_is_refused_without_a_draw_too(tmp_path: Path) -> None:
    with Lease(Files(tmp_path / "run")) as lease:
        made(lease._files)
        for resume in ("never", "auto"):
            with pytest.raises(StoreError, match="belongs to the driver with pid"):
                sample(tmp_path / "run", resume=resume)
        lease.check(fresh=True)
    assert not any(ds.open(tmp_path / "run").manifest.n_committed)


def made(files: Files) -> Trace:
    """A run that has made no draw."""
    settings = RunConfig(chains=3, draws=50, burn_in=10)
    facts: dict[str, Any] = {"fingerprint": {}, "versions": {}}
    return Trace.create(
        files, Manifest(config=settings, variables=COUNTED, n_committed=(0,) * 3, **facts)
    )


def test_a_run_begins_only_where_nothing_is_that_could_be_lost(tmp_path: Path) -> None:
    trace = made(Files(tmp_path / "run"))
    check_new(Files(tmp_path / "run"))
    trace.commit([counted(chain, 0, 5) for chain in range(3)])
    with pytest.raises(StoreError, match="it holds a run: give another store, read it with"):
        check_new(Files(tmp_path / "run"))
    (tmp_path / "run/run.json").write_text("{")
    with pytest.raises(StoreError, match="it holds a run: give another store, read it with"):
        check_new(Files(tmp_path / "run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(StoreError, match="must be new or an empty folder"):
        check_new(Files(tmp_path / "other"))
    check_new(Files(tmp_path / "new/one"))
    assert not (tmp_path / "new").exists()
