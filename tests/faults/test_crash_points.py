"""A driver that dies at any step of a commit leaves a run that goes on to the same bits."""

import json
import subprocess
import sys
from typing import Any

import pytest

NAMES = ("run.json", "n_committed/c", "checkpoints", "probe_loss/c", "init_loss")


def crash(how: str, every: int, only: str = "", parts: int = 1) -> dict[str, Any]:
    """Dies at every so-manieth step whose name holds something, in some processes side by side."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.faults.crash_points", str(part * every),
             str(every * parts), how, only],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for part in range(parts)
    ]  # fmt: skip
    found: dict[str, Any] = {"tried": 0}
    for process in started:
        out, errors = process.communicate(timeout=1800)
        assert process.returncode == 0, errors
        part = json.loads(out)
        assert not part["wrong"], (part["wrong"], errors)
        found = {"points": part["points"], "tried": found["tried"] + part["tried"]}
    return found


def steps(points: list[str], name: str) -> set[str]:
    return {point.rpartition(": ")[2] for point in points if name in point}


def test_a_crash_at_some_steps_changes_no_bit() -> None:
    found = crash("direct", 150)
    assert found["tried"] > 4
    for name in NAMES:
        assert steps(found["points"], name) >= {"begun", "written", "synced", "renamed", "done"}


def test_a_crash_while_a_chosen_burn_in_is_written_out_changes_no_bit() -> None:
    found = crash("auto", 36, "draw/")  # the coordinates of the groups that are split and cut
    assert found["tried"] > 2
    assert steps(found["points"], "/posterior/probe_loss/c") >= {"begun", "written", "done"}


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("how", ["sent", "auto"])
def test_a_crash_at_every_step_changes_no_bit(how: str) -> None:
    found = crash(how, 1, parts=2)
    assert found["tried"] == len(found["points"]) > 400


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("only", ["checkpoints", "run.json"])
def test_a_crash_at_every_step_of_a_file_that_is_synced_changes_no_bit(only: str) -> None:
    found = crash("direct", 1, only, parts=2)
    assert found["tried"] == sum(only in point for point in found["points"]) > 30
