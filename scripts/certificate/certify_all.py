"""Runs the jobs of the table of bars, each into one JSON file, and prints what came of them."""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from scripts.certificate.bars import BARS, summary
from scripts.certificate.jobs import Job, Truths, jobs

OUT = Path("runs/certify")


def path_of(out: Path, job: Job) -> Path:
    """Where a job's rows lie."""
    return out / job.bar / f"{job.name}.json"


def chosen(part: str, only: str | None) -> list[Job]:
    """The jobs of a part: every k-th of the sorted ones, so that the parts cost about the same."""
    index, count = (int(number) for number in part.split("/"))
    if not 1 <= index <= count:
        raise SystemExit(f"--part must be i/k with i from 1 to k, got {part}")
    todo = [job for job in jobs() if only in (None, job.bar)]
    todo.sort(key=lambda job: -job.cost)  # the long ones first: the last to end is a short one
    return todo[index - 1 :: count]


def perform(job: Job, out: Path, truths: Truths) -> None:
    """Makes a job's rows and writes them, whole or not at all."""
    began = time.monotonic()
    rows = job.make(truths)
    write(path_of(out, job), {"rows": rows, "seconds": time.monotonic() - began})


def write(path: Path, content: object) -> None:
    """A JSON file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(content, indent=1, allow_nan=False))
    new.replace(path)


def read(out: Path) -> dict[str, list[dict[str, object]]]:
    """Bar -> the rows that are there."""
    by_bar: dict[str, list[dict[str, object]]] = {}
    for bar in BARS:
        files = sorted((out / bar).glob("*.json"))
        by_bar[bar] = [row for file in files for row in json.loads(file.read_text())["rows"]]
    return by_bar


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether the job of this file is for us: not done, and no other process is at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            yield not path.exists()
    except Timeout:
        yield False


def run(todo: list[Job], out: Path) -> None:
    """Performs what is not there yet and what no other process is at."""
    truths = Truths(out / "truth", write)
    for number, job in enumerate(todo, 1):
        with claim(path_of(out, job)) as ours:
            if not ours:
                continue
            began = time.monotonic()
            perform(job, out, truths)
            seconds = time.monotonic() - began
        print(
            f"{number}/{len(todo)}  {job.bar} {job.name}: {seconds:.0f} s", file=sys.stderr,
            flush=True,
        )  # fmt: skip


def run_with(others: int, todo: list[Job], out: Path) -> None:
    """Runs the jobs here and in as many other processes, until none is left.

    Raises:
        SystemExit: some are not done when all have ended.
    """
    command = [
        sys.executable,
        "-m",
        "scripts.certificate.certify_all",
        *sys.argv[1:],
        "--jobs",
        "1",
    ]
    with ExitStack() as processes:
        for _ in range(others):
            processes.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        run(todo, out)
    missing = [job for job in todo if not path_of(out, job).exists()]
    if others and missing:  # alone, one leaves to others what they are at
        raise SystemExit(
            f"{len(missing)} of {len(todo)} jobs are not done: a process failed, see above, or "
            "another command is at them; the same command again goes on"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/certify-all", description=__doc__)
    parser.add_argument("--part", default="1/1", help="i/k: every k-th job from the i-th")
    parser.add_argument("--only", choices=BARS, help="one bar's jobs")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)),
        help="how many are run at a time, each on one core (all cores unless options)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of results")
    parser.add_argument("--list", action="store_true", help="the jobs and their estimated seconds")
    parser.add_argument("--summary", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args()
    todo = chosen(options.part, options.only)
    if options.list:
        for job in todo:
            print(f"{job.cost:6.0f}  {job.bar} {job.name}")
        print(f"{sum(job.cost for job in todo):6.0f}  seconds in all, one core")
        return 0
    if not options.summary:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # each run's verdict is in its row
        run_with(options.jobs - 1, todo, options.out)
    text, met = summary(read(options.out))
    print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
