"""Drivers that race for one directory end as if one had been alone."""

import json
import subprocess
import sys

import pytest


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
