"""scripts/certify-all as it is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_several_processes_share_the_jobs_and_one_command_prints_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.certificate.certify_all", "--only", "honesty"]
    command += ["--part", "1/100", "--out", str(tmp_path)]
    ended = subprocess.run(
        [*command, "--jobs", "2"], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    done = re.findall(r"(\d+)/2  honesty", ended.stderr)
    assert sorted(done) == ["1", "2"], ended.stderr
    assert ended.returncode == 1  # most of the table is not there
    assert "not done" not in ended.stderr
    assert "not run" in ended.stdout
    assert ended.stdout.count("| case | bar |") == 1, ended.stdout
