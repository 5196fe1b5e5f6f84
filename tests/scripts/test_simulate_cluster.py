"""scripts/simulate-cluster as it is run."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_script_prints_what_it_found(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.cluster.simulate", "--actors", "10", "20"]
    command += ["--deaths", "1", "--seconds", "60"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--json"], check=True, capture_output=True, text=True, env=environment
    )
    found = json.loads(done.stdout)
    assert [row["actors"] for row in found["clusters"]] == [10, 20]
    assert {"efficiency", "driver_load", "missing", "bottleneck"} <= set(found["clusters"][0])
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert "first bottleneck" in told.stdout
