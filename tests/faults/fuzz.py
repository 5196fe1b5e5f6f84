"""Damaged and hostile run directories: every reader gives the right number, or one StoreError.

One file is changed at a time, at random by a seed; all readers read the store; the file is put
back. ``sealed anew`` means that the digest was made to fit: what a stranger could have written. Any
number is right then, but nothing other than a StoreError may be raised.
"""

import io
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import distsampler as ds
from distsampler.errors import StoreError
from distsampler.execution import display
from distsampler.report import listing, run_report, summary, sweep_report, watch
from distsampler.store import integrity
from distsampler.store.files import Files
from distsampler.store.manifest import write_as
from distsampler.sweeps.manifest import CELL, CellRecord
from distsampler.sweeps.results import open_sweep
from tests.problems import config, regression, squared_error

SLOW = 20  # seconds that the readers of one store may take, all together
REPORT_EVERY = 50
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 7, 10**12, 10**30, -0.5, 1e308, math.inf, math.nan, "", "x", "0",
    "x" * 1000, "\x1b[31m", "\ud800", "../../..", [], {}, [[]], [None], {"x": None}, [1, 2, 3],
]  # fmt: skip
Change = Callable[[random.Random, bytes], bytes]
Numbers = dict[str, object]  # what a reader says, by what it is of; None: said to be damaged
Reader = Callable[[Path], Numbers]


def finished_run(store: Path) -> Path:
    """A small run that holds all that a run can hold."""
    settings = config(
        draws=3, burn_in=2, thin=1, probe=8, watch=False, save_losses=True, save_weights_every=2
    )
    model, data = regression(n=60)
    ds.sample(model, data, squared_error, settings, store=store, pool=ds.SerialPool(), quiet=True)
    return store


def finished_sweep(store: Path) -> Path:
    """A small sweep of two cells."""
    settings = config(draws=3, burn_in=1, thin=1, probe=8)
    ds.sweep(
        *regression(n=60), squared_error, settings, settings={"a": {}, "b": {"seed": 1}},
        store=store, pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    for cell in open_sweep(store).cells:
        write_as(Files(store / "cells" / cell.name), CELL, CellRecord(cell=asdict(cell)))
    return store


def read_run(store: Path) -> Numbers:
    """What ``llc``, ``diagnose`` and Python say."""
    run = ds.open(store)
    estimate = run.llc("ignore")
    json.dumps([summary.diagnosis_as_dict(run), estimate.as_dict()])
    summary.diagnosis_text(run)
    wide = [float(run.losses.sum()), *(float(each.sum()) for each in run.weights.values())]
    rows = [(row.name, row.mean, row.r_hat) for row in run.diagnosis.rows]
    return {"": (estimate.mean, estimate.interval, str(estimate.verdict.status), rows, wide)}


def read_listing(store: Path) -> Numbers:
    entries = listing.entries(store)
    listing.table(entries).text()
    json.dumps([entry.as_dict() for entry in entries])
    return {e.name: _said(e.status, e.reason, e.draws, e.llc) for e in entries}


def read_progress(store: Path) -> Numbers:
    snapshot = watch.Follower(store, tries=1).read()
    Console(file=io.StringIO()).print(display.table(snapshot))
    return {"": (snapshot.llc, snapshot.committed)}


def read_run_report(store: Path) -> Numbers:
    run_report.render(ds.open(store)).encode()
    return {}


def read_sweep(store: Path) -> Numbers:
    """The number of each cell; one that is damaged has none, and hides no other."""
    rows = open_sweep(store).rows()
    return {row["cell"]: _said(row["status"], row["reason"], row["llc"]) for row in rows}


def read_sweep_report(store: Path) -> Numbers:
    sweep_report.render("sweep", open_sweep(store).collect()).encode()
    return {}


def _said(status: str, reason: str, *numbers: object) -> object:
    named = status in ("damaged", "waiting") or (status == "failed" and reason)
    return None if named else (status, *numbers)


RUN_READERS: tuple[Reader, ...] = (read_run, read_listing, read_progress)
SWEEP_READERS: tuple[Reader, ...] = (read_sweep, read_listing)


def change_json(chance: random.Random, data: bytes) -> bytes:
    """One value, key or order of a document is another."""
    document = json.loads(data)
    parent, key = chance.choice(list(_places(document)))
    others = [p[k] for p, k in _places(document)]
    match chance.randrange(5):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[f"{key}{chance.choice('x_ ')}"] = parent.pop(key)
        case 2:
            parent[key] = chance.choice(others)
        case 3 if isinstance(parent[key], int | float):
            parent[key] += chance.choice([-1, 1, 0.5, 100])
        case _:
            parent[key] = chance.choice(STRANGE)
    try:
        return json.dumps(document).encode()
    except (ValueError, RecursionError):  # a value within itself
        return b"{}"


def change_text(chance: random.Random, data: bytes) -> bytes:
    """Bytes are lost, added or others."""
    at, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    match chance.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[end:]
        case 2:
            return data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:]
        case 3:
            return data[:at] + chance.choice([b"[", b"{", b'{"x":', b"9"]) * 100_000 + data[at:]
    return bytes(len(data))


def change_line(chance: random.Random, data: bytes) -> bytes:
    """One line of a log is another, or one more."""
    lines = data.splitlines()
    at = chance.randrange(len(lines))
    if chance.random() < 0.5:
        lines.insert(at, lines[at])
    lines[at] = chance.choice([change_json, change_text])(chance, lines[at])
    return b"\n".join(lines) + b"\n"


def flip(chance: random.Random, data: bytes) -> bytes:
    """One byte is another."""
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ chance.randrange(1, 256)]) + data[at + 1 :]


def sealed_anew(change: Change) -> Change:
    """A change of a manifest, and a digest that fits."""

    def changed(chance: random.Random, data: bytes) -> bytes:
        try:
            document = json.loads(change(chance, data))
            return json.dumps(integrity.seal(document)).encode()
        except (ValueError, TypeError, AttributeError, RecursionError):
            return b"{}"

    return changed


def _places(value: object) -> Iterator[tuple[Any, Any]]:
    """Every value of a document, as what holds it and its key there."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def misplace(chance: random.Random, path: Path, outside: Path) -> None:
    """Something that is no file of a run lies in the place of a file."""
    path.unlink()
    match chance.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(chance.choice([outside, "/dev/zero", path, "/nowhere"]))
        case 3:
            with path.open("wb") as file:
                file.truncate(2**40)
        case 4:
            shutil.copy(outside, path)


@dataclass(frozen=True)
class Target:
    """What is changed, and how."""

    name: str
    files: str  # a glob
    changes: tuple[Change | None, ...]  # one of them at a time; None: ``misplace``
    any_number: bool = False  # whether no number is wrong


RUN_TARGETS = {
    Target("run.json", "run.json", (change_json, change_json, change_text, None)): 2000,
    Target("run.json, sealed anew", "run.json", (sealed_anew(change_json),), True): 500,
    Target("zarr.json", "*.zarr/**/zarr.json", (change_json, change_json, change_text, None)): 2000,
    Target("events", "events.jsonl", (change_line, change_line, change_text, None)): 2000,
    Target("lease", "lease.json", (change_json, change_json, change_text, None)): 2000,
    Target("a byte of any file", "**/*", (flip,)): 1000,
}
SWEEP_TARGETS = {
    Target("sweep.json", "sweep.json", (change_json, change_json, change_text, None)): 100,
    Target("sweep.json, sealed anew", "sweep.json", (sealed_anew(change_json),), True): 50,
    Target("cell.json", "cells/*/cell.json", (change_json, change_text, None)): 50,
    Target("a cell's run.json", "cells/*/run.json", (change_json, change_text, None)): 50,
    Target("any file of a sweep", "**/*", (flip, change_text, None)): 100,
}


@dataclass
class Outcome:
    """How often readers said what."""

    right: int = 0
    named: int = 0  # one StoreError
    wrong: list[str] = field(default_factory=list)  # all else, with what it was
    seconds: float = 0.0


class Fuzz:
    """A store, what its readers say of it, and what they say of it when it is damaged."""

    def __init__(self, store: Path, readers: tuple[Reader, ...], *reports: Reader) -> None:
        self._store, self._readers, self._reports = store, readers, reports
        self._truth = {reader: reader(store) for reader in (*readers, *reports)}
        self._outside = store.parent / "outside.json"
        self._outside.write_text('{"schema_version": 1}')
        self._number = 0

    def run(self, target: Target, count: int, seed: int) -> Outcome:
        """Change files so often, one at a time."""
        outcome, began = Outcome(), time.monotonic()
        for number in range(count):
            chance = random.Random(f"{seed} {target.name} {number}")
            files = sorted(path for path in self._store.glob(target.files) if path.is_file())
            path = chance.choice(files)
            before, change = path.read_bytes(), chance.choice(target.changes)
            if change is None:
                misplace(chance, path, self._outside)
            elif before:
                path.write_bytes(change(chance, before))
            self._read(f"{target.name}, seed {seed}, number {number}, {path.name}", target, outcome)
            _put_back(path, before)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _read(self, what: str, target: Target, outcome: Outcome) -> None:
        self._number += 1
        reports = self._reports if self._number % REPORT_EVERY == 0 else ()
        for reader in (*self._readers, *reports):
            try:
                with _deadline():
                    said = reader(self._store)
            except StoreError:
                outcome.named += 1
                continue
            except (Exception, RecursionError) as error:
                outcome.wrong.append(f"{what}: {reader.__name__}: {type(error).__name__}: {error}")
                continue
            truth = self._truth[reader]
            if target.any_number or all(_same(said.get(k), v) for k, v in truth.items()):
                outcome.right += 1
            else:
                outcome.wrong.append(f"{what}: {reader.__name__}: {said} for {truth}")


def _same(said: object, truth: object) -> bool:
    return said is None or repr(said) == repr(truth)


def _put_back(path: Path, data: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(data)


@contextmanager
def _deadline() -> Iterator[None]:
    """A reader that takes too long is ended, with a TimeoutError."""

    def over(*_: object) -> None:
        raise TimeoutError(f"took {SLOW} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(SLOW)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(
    folder: Path, seed: int, share: float = 1.0, reports: bool = True
) -> Iterator[tuple[str, int, Outcome]]:
    """Damage a run and a sweep; yield what was damaged, how often, and what came of it.

    Args:
        folder: for both.
        seed: of what is damaged, and how.
        share: how much of all.
        reports: whether a report is made too, of every 50th.
    """
    of_run, of_sweep = ([read_run_report], [read_sweep_report]) if reports else ([], [])
    run = Fuzz(finished_run(folder / "run"), RUN_READERS, *of_run)
    sweep = Fuzz(finished_sweep(folder / "sweep"), SWEEP_READERS, *of_sweep)
    for fuzzed, targets in ((run, RUN_TARGETS), (sweep, SWEEP_TARGETS)):
        for target, count in targets.items():
            times = math.ceil(count * share)
            yield target.name, times, fuzzed.run(target, times, seed)
