"""The Slurm script of cluster/, run among tools that only say what they are asked."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "cluster/slurm.sbatch"
TOOLS = {
    "srun": 'while [ "$1" != ray ]; do shift; done; exec "$@"',
    "ray": 'while [ "$1" != -- ]; do shift; done; shift; "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo a; echo b; else echo "$@" >requeued; fi',
}
INTERRUPTED = (
    "trap 'touch committed; exit 130' TERM; touch started; for _ in {1..999}; do sleep 0.05; done"
)


def slurm_job(folder: Path, driver: str) -> subprocess.Popen[bytes]:
    """slurm.sbatch, as Slurm would start it, among tools that only say what they are asked."""
    for name, script in {**TOOLS, "distsampler": driver}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    variables = {"JOB_NAME": "a", "JOB_ID": "17", "JOB_NODELIST": "a,b", "JOB_NUM_NODES": "2"}
    variables |= {"CPUS_PER_TASK": "4", "GPUS_ON_NODE": "1"}
    slurm = {f"SLURM_{name}": value for name, value in variables.items()}
    environment = {**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", SLURM], cwd=folder, env=environment)


def test_a_slurm_job_that_is_told_to_end_commits_and_comes_back(tmp_path: Path) -> None:
    with slurm_job(tmp_path, INTERRUPTED) as job:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 130
    assert (tmp_path / "committed").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


@pytest.mark.parametrize("code", [0, 1, 3, 130])
def test_a_slurm_job_that_ends_by_itself_has_its_drivers_exit_code_and_stays(
    tmp_path: Path, code: int
) -> None:
    with slurm_job(tmp_path, f"exit {code}") as job:
        assert job.wait(60) == code
    assert not (tmp_path / "requeued").exists()
