"""Ends a driver at every step of every write, resumes it, and compares the bits.

Run as a program, in a process that has never touched zarr or Ray: its children are forks of it.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

import distsampler as ds
from distsampler.analysis import arviz_bridge
from distsampler.execution.pool import SerialPool
from distsampler.sampling.directory import Resume
from distsampler.sampling.fingerprint import versions
from distsampler.sampling.job import Job
from distsampler.sampling.prepare import prepare
from distsampler.store.files import Files
from tests.assertions import digest
from tests.problems import config, regression, squared_error

BEATING = shutil.ignore_patterns(".epoch-*")  # may go at any time


def sample(store: Path, at: Callable[[str], None], how: str, resume: Resume = "auto") -> ds.Run:
    """A run of many small commits; every write passes ``at``.

    Args:
        store: the run directory.
        at: called at every step.
        how: "direct": states go to the store directly, and everything is synced; "auto": the run
            chooses its burn-in; "wide": losses, weights and those of a named probe are kept; "all":
            as direct, and wide; else "sent".
        resume: as of ``sample``.
    """
    model, data = regression(n=40)
    direct, auto, wide = how in ("direct", "all"), how == "auto", how in ("wide", "all")
    settings = config(
        draws=26 if auto else 20, burn_in="auto" if auto else 6, thin=1, probe=8,
        commit_seconds=1e-9, watch=not auto, fsync=direct, max_state_mb=0.0 if direct else 64.0,
        save_losses=wide, save_weights_every=3 if wide else None,
        probes={"own": {"every": 2, "rows": 9, "dtype": "float16"}} if wide else {},
        placement=ds.PlacementConfig(block=13), gate=ds.GateConfig(every=12 if auto else None),
    )  # fmt: skip
    probes = {"own": regression(n=40)[1]} if wide else {}
    spec = prepare(model, data, squared_error, settings, probes=probes)
    job = Job(spec, Files(store, at=at), SerialPool(), resume)
    return job.run(lambda snapshot: None, lambda: None)


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
    points, expected = json.loads(text)
    return points, expected


def cut(store: Path, step: int, how: str) -> tuple[int, int, str]:
    """Die at one step and continue: the exit codes, and the digest of the second run."""

    def die() -> str:
        seen = [0]

        def at(point: str) -> None:
            seen[0] += 1
            if seen[0] == step:
                os._exit(9)

        sample(store, at, how)
        return ""

    first, _ = in_a_fork(die)
    second, text = continued(store, how)
    return first, second, text


def continued(store: Path, how: str) -> tuple[int, str]:
    """Continue with what lies in a store: the exit code, and the digest."""
    return in_a_fork(lambda: digest(sample(store, lambda point: None, how)))


def remains(folder: Path, how: str, only: str) -> dict[int, int]:
    """Copy what lies in the store at every step, in a process that has then ended.

    A process that dies at a step leaves just that. Where it is the same as at an earlier step (as
    before a write begins, and after the one before it), there is one copy of it.

    Returns:
        Each step -> the step at which its copy was made.
    """

    def work() -> str:
        store, first, copies, count = folder / "copied", dict[str, int](), dict[int, int](), [0]

        def at(point: str) -> None:
            count[0] += 1
            if only in point:
                step = first.setdefault(contents(store), count[0])
                copies[count[0]] = step
                if step == count[0] and store.exists():
                    shutil.copytree(store, folder / f"cut-{step}", ignore=BEATING)

        sample(store, at, how)
        return json.dumps(list(copies.items()))

    code, text = in_a_fork(work)
    assert code == 0
    return dict(json.loads(text))


def contents(folder: Path) -> str:
    """A digest of all names and bytes in a folder; not of the lease, which has its own thread."""
    digested = hashlib.blake2b()
    for path in sorted(folder.rglob("*")):
        if path.name == "lease.json" or ".epoch-" in str(path):
            continue
        data = path.read_bytes() if path.is_file() else b""
        digested.update(f"{path.relative_to(folder)}\0{len(data)}\0".encode() + data)
    return digested.hexdigest()


def deaths(folder: Path, how: str, chosen: list[int]) -> dict[int, tuple[int, int, str]]:
    """Die at each of some steps and continue."""
    ends = {}
    for step in chosen:
        store = folder / f"cut-{step}"
        ends[step] = cut(store, step, how)
        shutil.rmtree(store)
    return ends


def every_state(folder: Path, how: str, only: str) -> dict[int, tuple[int, int, str]]:
    """Continue from what each step leaves."""
    copies = remains(folder, how, only)
    ends = {step: continued(folder / f"cut-{step}", how) for step in sorted({*copies.values()})}
    return {step: (9, *ends[copy]) for step, copy in copies.items()}


def main(every: int, how: str, only: str) -> None:
    """Prints one JSON object: the steps of a run, how many were tried, what went wrong at which.

    Args:
        every: the process dies at every such step; 0: it continues from what each step leaves.
        how: see ``sample``.
        only: what the names of the steps contain.
    """
    torch.set_num_threads(1)
    # Imported and asked for once, not in every child.
    arviz_bridge.load()
    versions()
    import_module("torch.fx.experimental.symbolic_shapes")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        points, expected = undisturbed(folder, how)
        if every:
            steps = [n for n, point in enumerate(points, 1) if only in point]
            ends = deaths(folder, how, steps[::every])
        else:
            ends = every_state(folder, how, only)
    wrong = [[n, points[n - 1], *end] for n, end in ends.items() if end != (9, 0, expected)]
    sys.stdout.write(json.dumps({"points": points, "tried": len(ends), "wrong": wrong}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
