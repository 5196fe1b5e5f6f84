"""A driver that dies at any step of a commit leaves a run that continues to the same bits."""

import json
import subprocess
import sys
from typing import Any

import pytest

NAMES = ("run.json", "n_committed/c", "checkpoints", "probe_loss/c", "init_loss")


def crash(every: int, how: str, only: str = "") -> dict[str, Any]:
    """See ``crash_points.main``, which wants a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.crash_points", str(every), how, only],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert not report["wrong"], (report["wrong"], done.stderr)
    return report


def steps(points: list[str], name: str) -> set[str]:
    return {point.rpartition(": ")[2] for point in points if name in point}


def test_a_crash_at_some_steps_changes_no_bit() -> None:
    report = crash(150, "direct")
    assert report["tried"] > 4
    for name in NAMES:
        assert steps(report["points"], name) >= {"begun", "written", "synced", "renamed", "done"}


def test_a_crash_while_a_chosen_burn_in_is_written_out_changes_no_bit() -> None:
    report = crash(36, "auto", "draw/")  # the coordinates of the groups that are split and cut
    assert report["tried"] > 2
    assert steps(report["points"], "/posterior/probe_loss/c") >= {"begun", "written", "done"}


def test_a_crash_while_an_owner_writes_what_is_wide_changes_no_bit() -> None:
    report = crash(10, "wide", "wide.zarr/")
    assert report["tried"] > 4
    for name in ("losses", "weights/weight", "probes/own", "probe_excess/own"):
        points = steps(report["points"], f"wide.zarr/{name}/c")
        assert points >= {"begun", "written", "done"}


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("how", ["sent", "auto", "wide"])
def test_a_crash_at_every_step_changes_no_bit(how: str) -> None:
    report = crash(0, how)
    assert report["tried"] == len(report["points"]) > 400


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("only", ["checkpoints", "run.json"])
def test_a_crash_at_every_step_of_a_file_that_is_synced_changes_no_bit(only: str) -> None:
    report = crash(0, "direct", only)
    assert report["tried"] == sum(only in point for point in report["points"]) > 15
