"""Ends a driver at every step of every write, resumes it, and compares the bits.

Run as a program, in a process that has never touched zarr or Ray: its children are forks of it.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import distsampler as ds
from distsampler import inference_data
from distsampler.files import Files
from distsampler.pool import SerialPool
from distsampler.run import _Job, prepare
from tests.faults.digest import digest
from tests.problems import config, regression, squared_error


class Silent:
    """An observer that shows nothing."""

    def show(self, snapshot: object) -> None:
        """Nothing."""


def sample(store: Path, at: Callable[[str], None], max_state_mb: float) -> ds.Run:
    """A run of many small commits; every write passes ``at``."""
    model, data = regression(n=40)
    settings = config(
        draws=20, burn_in=6, thin=1, probe=8, commit_seconds=1e-9, max_state_mb=max_state_mb,
        placement=ds.PlacementConfig(block=9),
    )  # fmt: skip
    spec = prepare(model, data, squared_error, settings)
    job = _Job(spec, Files(store, fsync=True, at=at), SerialPool(), "auto")
    return job.run(Silent(), lambda: None)


def in_a_fork(work: Callable[[], str]) -> tuple[int, str]:
    """Exit code and text of a function run in a child process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, work().encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        text = stream.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def undisturbed(folder: Path, max_state_mb: float) -> tuple[list[str], str]:
    """The steps of a run, and its digest."""

    def work() -> str:
        points: list[str] = []
        run = sample(folder / "undisturbed", points.append, max_state_mb)
        return json.dumps([points, digest(run)])

    code, text = in_a_fork(work)
    assert code == 0
    points, found = json.loads(text)
    return points, found


def cut(store: Path, step: int, max_state_mb: float) -> tuple[int, int, str]:
    """Dies at one step, goes on: the exit codes, and the digest of the second."""

    def die() -> str:
        seen = [0]

        def at(point: str) -> None:
            seen[0] += 1
            if seen[0] == step:
                os._exit(9)

        sample(store, at, max_state_mb)
        return ""

    first, _ = in_a_fork(die)
    second, text = in_a_fork(lambda: digest(sample(store, lambda point: None, max_state_mb)))
    return first, second, text


def main(every: int, max_state_mb: float) -> None:
    """Prints one JSON object: the number of steps, and what went wrong at which."""
    torch.set_num_threads(1)
    inference_data.arviz_module()  # imported once, not in every child
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        points, expected = undisturbed(folder, max_state_mb)
        wrong, tried = [], 0
        for step in range(1, len(points) + 1, every):
            first, second, found = cut(folder / f"cut-{step}", step, max_state_mb)
            tried += 1
            if (first, second, found) != (9, 0, expected):
                wrong.append([step, points[step - 1], first, second])
    sys.stdout.write(json.dumps({"points": points, "tried": tried, "wrong": wrong}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
