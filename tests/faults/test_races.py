"""Drivers that race for one directory end as if one had been alone."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import distsampler as ds
from distsampler.execution.pool import PoolEvent
from distsampler.store.files import StoreFault
from tests.assertions import digest
from tests.faults.races import contents
from tests.problems import config, regression, squared_error
from tests.processes import committed


def sample(store: Path, pool: ds.SerialPool | None = None, **fields: Any) -> ds.Run:
    resume = fields.pop("resume", "never")
    short = {"draws": 12, "burn_in": 2, "thin": 1, "probe": 8, "commit_seconds": 1e-9}
    settings = config(**{**short, "placement": ds.PlacementConfig(block=3), **fields})
    return ds.sample(
        *regression(n=40), squared_error, settings, store=store, pool=pool or ds.SerialPool(),
        resume=resume, quiet=True,
    )  # fmt: skip


def test_a_run_that_comes_to_lie_at_the_path_of_another_is_not_touched(tmp_path: Path) -> None:
    """Between two blocks, where the driver had just checked that the directory is its own."""
    store, moved, other = (tmp_path / name for name in ("run", "moved", "other"))
    clean, theirs = digest(sample(tmp_path / "clean")), digest(sample(other, seed=7))
    before = contents(other)

    class Exchanged(ds.SerialPool):
        def wait(self, timeout: float) -> Sequence[PoolEvent]:
            if other.exists() and committed(store) > 6:
                store.rename(moved)
                other.rename(store)
            return super().wait(timeout)

    with pytest.raises(StoreFault, match="moved, exchanged or deleted while in use"):
        sample(store, Exchanged())
    assert contents(store) == before
    assert digest(ds.open(store)) == theirs
    assert digest(sample(moved, resume="must")) == clean


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_races_of_drivers_lose_repeat_and_overwrite_nothing() -> None:
    """``races.main`` wants a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.races", "8", "4", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not report["wrong"], done.stderr
    assert report["happened"] == {
        "woken": 8, "exchanged": 4, "made again": 4, "started at once": 2
    }  # fmt: skip
