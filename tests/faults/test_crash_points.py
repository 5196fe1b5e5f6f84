"""A driver that dies at any step of a commit leaves a run that goes on to the same bits."""

import json
import subprocess
import sys
from typing import Any

import pytest

NAMES = ("run.json", "n_committed/c", "checkpoints", "probe_loss/c", "init_loss")
WHOLE = {"begun", "written", "synced", "renamed", "done"}


def crash(every: int, max_state_mb: float) -> dict[str, Any]:
    out = subprocess.run(
        [sys.executable, "-m", "tests.faults.crash_points", str(every), str(max_state_mb)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert out.returncode == 0, out.stderr
    found: dict[str, Any] = json.loads(out.stdout)
    assert not found["wrong"], out.stderr
    return found


def kinds(points: list[str]) -> set[str]:
    """Which steps of which kinds of file there are."""
    return {
        f"{name} {point.rpartition(': ')[2]}" for point in points for name in NAMES if name in point
    }


@pytest.mark.parametrize("max_state_mb", [64.0, 0.0])
def test_a_crash_at_some_steps_changes_no_bit(max_state_mb: float) -> None:
    found = crash(37, max_state_mb)
    assert found["tried"] > 5
    for name in NAMES:
        assert {f"{name} {step}" for step in WHOLE} <= kinds(found["points"])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("max_state_mb", [64.0, 0.0])
def test_a_crash_at_every_step_changes_no_bit(max_state_mb: float) -> None:
    found = crash(1, max_state_mb)
    assert found["tried"] == len(found["points"]) > 200
