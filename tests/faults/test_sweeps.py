"""A sweep whose driver is killed in the middle continues, to the same table to the last digit."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import distsampler as ds
from tests.assertions import assert_same
from tests.faults.job import ROOT
from tests.problems import Held, config, regression, squared_error
from tests.processes import RAY_ENVIRONMENT, committed, events, until

pytestmark = pytest.mark.timeout(600)  # the machine may be busy
CELLS, DRAWS = 4, 60


def sweep(store: Path, held: Path, serial: bool, resume: Any = "never") -> ds.Sweep:
    """Four cells; the loss is slow as long as a file is there."""
    model, data = regression()
    weights = model.state_dict()
    steps = {f"step{k}": {n: v + 0.01 * k for n, v in weights.items()} for k in range(CELLS)}
    placement = ds.PlacementConfig(cpus_per_chain=1, gpus_per_chain=0, block=3)
    sampler = ds.SamplerConfig(localization=10.0)
    base = config(draws=DRAWS, commit_seconds=0.1, placement=placement, sampler=sampler)
    return ds.sweep(
        model, data, Held(held, 0.03), base, store=store, checkpoints=steps, resume=resume,
        settings={"plain": {"sampler.lr": 1e-3}, "wild": {"sampler.lr": 1e6}},
        pool=ds.SerialPool() if serial else None, quiet=True,
    )  # fmt: skip


def main() -> None:
    """What the driver's process does."""
    store, held, serial = json.loads(sys.argv[1])
    sweep(Path(store), Path(held), serial)


def killed(store: Path, held: Path, serial: bool, now: Callable[[], bool]) -> None:
    """Runs a sweep in a process of its own, and kills that once a condition is true."""
    code = "from tests.faults.test_sweeps import main; main()"
    environment = {**os.environ, **RAY_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    log = store.with_suffix(".log").open("wb")
    arguments = json.dumps([str(store), str(held), serial])
    process = subprocess.Popen(
        [sys.executable, "-c", code, arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
    )
    try:
        until(lambda: process.poll() is not None or now(), timeout=240)
        assert process.poll() is None, store.with_suffix(".log").read_text()[-3000:]
    finally:
        process.kill()
        process.wait()
        log.close()


def table(swept: ds.Sweep) -> xr.Dataset:
    """What does not depend on the clock: it says which chain of a wild cell is lost first."""
    rows = swept.collect().drop_attrs()
    assert ["diverged" in reason for reason in rows.reason.values.ravel()] == [False, True] * CELLS
    return rows.drop_vars(["seconds", "reason", "lost_chains"])


@pytest.mark.parametrize("serial", [True, pytest.param(False, marks=pytest.mark.ray)])
def test_a_sweep_whose_driver_was_killed_in_the_middle_gives_the_same_table(
    request: pytest.FixtureRequest, tmp_path: Path, serial: bool
) -> None:
    if not serial:
        request.getfixturevalue("ray_cluster")
    store, held = tmp_path / "s", tmp_path / "held"
    plain = [store / f"cells/step{k}--plain" for k in range(CELLS)]
    held.touch()

    def middle() -> bool:
        """One cell has ended, another has made draws: then that one is made to last."""
        finished = [cell for cell in plain if events(cell, "finished")]
        held.touch() if finished else held.unlink(missing_ok=True)
        return any(
            6 < committed(cell) < DRAWS for cell in plain if cell not in finished and finished
        )

    killed(store, held, serial, middle)
    swept = ds.open_sweep(store)
    counts = swept.counts()
    half = [swept.run(cell.name) for cell in swept.cells if swept.status(cell.name) == "running"]
    assert counts["finished"] >= 1
    assert counts["waiting"] >= 1
    assert any(0 < sum(run.manifest.n_committed) < 2 * (DRAWS + 10) for run in half)
    ended = [cell for cell in plain if events(cell, "finished")]
    before = {cell: (cell / "run.json").read_bytes() for cell in ended}

    held.unlink(missing_ok=True)
    again = sweep(store, held, serial, resume="auto")
    undisturbed = sweep(tmp_path / "undisturbed", held, serial=True)
    assert again.counts() == undisturbed.counts() == {"finished": CELLS, "failed": CELLS}
    assert table(again).equals(table(undisturbed))
    assert np.isfinite(table(again).llc.sel(setting="plain")).all()
    assert {cell: (cell / "run.json").read_bytes() for cell in ended} == before
    for cell in plain:
        assert_same(again.run(cell.name), undisturbed.run(cell.name))


def test_the_loss_that_is_held_is_the_loss(tmp_path: Path) -> None:
    """What the test above changes while it waits is the time alone."""
    model, (x, y) = regression()
    held = Held(tmp_path / "held", 0.001)
    quick = held(model, (x, y))
    held.held.touch()
    assert quick.tolist() == held(model, (x, y)).tolist() == squared_error(model, (x, y)).tolist()
