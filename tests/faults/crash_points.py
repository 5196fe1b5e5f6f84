"""Ends a driver at every step of every write, resumes it, and compares the bits.

Run as a program, in a process that has never touched zarr or Ray: its children are forks of it.
"""

import json
import os
import shutil
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


def sample(store: Path, at: Callable[[str], None], how: str) -> ds.Run:
    """A run of many small commits; every write passes ``at``.

    Args:
        store: the run directory.
        at: called at every step.
        how: "direct": states go to the store directly, and everything is synced; "auto": the run
            chooses its burn-in; else "sent".
    """
    model, data = regression(n=40)
    direct, auto = how == "direct", how == "auto"
    settings = config(
        draws=26 if auto else 20, burn_in="auto" if auto else 6, thin=1, probe=8,
        commit_seconds=1e-9, fsync=direct, max_state_mb=0.0 if direct else 64.0,
        placement=ds.PlacementConfig(block=9), gate=ds.GateConfig(every=12 if auto else None),
    )  # fmt: skip
    spec = prepare(model, data, squared_error, settings)
    job = _Job(spec, Files(store, at=at), SerialPool(), "auto")
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


def undisturbed(folder: Path, how: str) -> tuple[list[str], str]:
    """The steps of a run, and its digest."""

    def work() -> str:
        points: list[str] = []
        run = sample(folder / "undisturbed", points.append, how)
        return json.dumps([points, digest(run)])

    code, text = in_a_fork(work)
    assert code == 0
    points, found = json.loads(text)
    return points, found


def cut(store: Path, step: int, how: str) -> tuple[int, int, str]:
    """Dies at one step, goes on: the exit codes, and the digest of the second."""

    def die() -> str:
        seen = [0]

        def at(point: str) -> None:
            seen[0] += 1
            if seen[0] == step:
                os._exit(9)

        sample(store, at, how)
        return ""

    first, _ = in_a_fork(die)
    second, text = in_a_fork(lambda: digest(sample(store, lambda point: None, how)))
    return first, second, text


def main(first: int, every: int, how: str, only: str) -> None:
    """Prints one JSON object: the steps of a run, how many were tried, what went wrong at which.

    Args:
        first: of the steps to die at.
        every: from one such step to the next.
        how: see ``sample``.
        only: steps whose name holds this.
    """
    torch.set_num_threads(1)
    inference_data.arviz_module()  # imported once, not in every child
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        points, expected = undisturbed(folder, how)
        wrong, chosen = [], [n for n, point in enumerate(points, 1) if only in point][first::every]
        for step in chosen:
            store = folder / f"cut-{step}"
            before, after, found = cut(store, step, how)
            if (before, after, found) != (9, 0, expected):
                wrong.append([step, points[step - 1], before, after])
            shutil.rmtree(store)
    sys.stdout.write(json.dumps({"points": points, "tried": len(chosen), "wrong": wrong}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
