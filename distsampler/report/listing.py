"""What runs lie beneath a folder, a line each: read from the stores alone, without torch and Ray.

Nothing is diagnosed here: the verdict is the one that a run's own gate gave at its last look.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distsampler.draws import EXCESS_LOSS
from distsampler.errors import StoreError
from distsampler.schedule import Schedule
from distsampler.store.files import Files, is_url
from distsampler.store.lease import EXPIRY_SECONDS, ago, heartbeat
from distsampler.store.manifest import MANIFEST
from distsampler.store.reader import TraceReader

HEADINGS = ("run", "status", "draws", "chains", "LLC", "verdict", "age")


@dataclass(frozen=True)
class Entry:
    """One run, as its store has it.

    Args:
        name: its folder, from the folder that was listed.
        status: running, silent (running, but its driver's heart has stopped), finished,
            interrupted, failed, or damaged.
        draws: that every chain has, burn-in included.
        total: the budget, or what the run was cut to.
        chains: that are not lost.
        lost: chains that are.
        llc: nbeta times the mean excess loss so far; None: not known yet.
        verdict: of the gate's last look; None: it has not looked.
        looked: the draws after burn-in that it looked at.
        age: seconds since the run was last written.
        reason: why it ended, or what is damaged.
    """

    name: str
    status: str
    draws: int = 0
    total: int = 0
    chains: int = 0
    lost: int = 0
    llc: float | None = None
    verdict: str | None = None
    looked: int = 0
    age: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def entries(folder: str | Path) -> list[Entry]:
    """The runs beneath a folder, or the run that it is, by name.

    Raises:
        StoreError: if there is no such folder, or no run in it.
    """
    root = Files(folder)
    if not is_url(root.root) and not Path(root.root).is_dir():
        raise StoreError(f"{root} must be a folder of runs, but there is no such folder")
    found = [_entry(root, name) for name in sorted(_homes(root))]
    if not found:
        raise StoreError(
            f"{root} must hold runs, but no {MANIFEST} lies in it or beneath it: give the store "
            "of a run, of a sweep, or a folder of them"
        )
    return found


def status(trace: TraceReader) -> str:
    """The status of a run; silent, if it says that it runs and nobody drives it."""
    found = trace.manifest.status
    if found != "running":
        return found
    age = heartbeat(trace.files)
    return "silent" if age is None or age > EXPIRY_SECONDS else found


def llcs(trace: TraceReader) -> dict[int, float]:
    """Return the LLC of each chain that has draws after burn-in, from all of them.

    Raises:
        StoreError: if a draw is missing or damaged.
    """
    facts = trace.facts()
    if facts is None:
        return {}
    series = trace.by_chain(EXCESS_LOSS, trace.chains, trace.burn_in)
    return {c: facts.posterior.nbeta * float(values.mean()) for c, values in series.items()}


def table(found: Sequence[Entry]) -> str:
    """A line a run, in columns."""
    rows = [HEADINGS, *(_cells(entry) for entry in found)]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, wide, strict=True)).rstrip()
        for row in rows
    )


def _cells(entry: Entry) -> tuple[str, ...]:
    verdict = entry.verdict or "-"
    if entry.verdict and entry.status != "finished":
        verdict += f" at {entry.looked}"
    lost = f" ({entry.lost} lost)" if entry.lost else ""
    return (
        entry.name,
        entry.status,
        f"{entry.draws}/{entry.total}",
        f"{entry.chains}{lost}",
        "-" if entry.llc is None else f"{entry.llc:.4g}",
        verdict if entry.status != "damaged" else entry.reason,
        ago(entry.age),
    )


def _entry(root: Files, name: str) -> Entry:
    files = root if name == "." else Files(root.path(name))
    name = root.name if name == "." else name
    try:
        return _read(TraceReader(files), name)
    except StoreError as error:
        return Entry(name, "damaged", reason=str(error))


def _read(trace: TraceReader, name: str) -> Entry:
    manifest, chains = trace.manifest, trace.chains
    draws = min((trace.committed[chain] for chain in chains), default=0)
    total = Schedule.of(manifest.config).total
    if manifest.kept is not None:
        total = draws = trace.burn_in + manifest.kept
    found, events = llcs(trace), trace.events()
    looks = [event for event in events if event["event"] == "verdict"]
    return Entry(
        name,
        status(trace),
        draws,
        total,
        len(chains),
        len(manifest.retired),
        float(np.mean(list(found.values()))) if found else None,
        str(looks[-1]["status"]) if looks else None,
        int(looks[-1]["draws"]) if looks else 0,
        _age(trace.files, events),
        manifest.reason,
    )


def _age(files: Files, events: Sequence[dict[str, Any]]) -> float | None:
    """Since the last commit, or where that is not to be had, since the last event."""
    last = max((float(event.get("time", -math.inf)) for event in events), default=-math.inf)
    if not is_url(files.root):
        last = max(last, os.stat(files.path(MANIFEST)).st_mtime)
    return max(0.0, time.time() - last) if math.isfinite(last) else None


def _homes(root: Files) -> Iterator[str]:
    """The folders that hold a run, seen from the root; a run holds no other."""
    if is_url(root.root):
        for name in root.names():
            if name.rpartition("/")[2] == MANIFEST:
                yield name.rpartition("/")[0] or "."
        return
    for folder, inside, names in os.walk(root.root):
        if MANIFEST in names:
            inside.clear()
            yield Path(folder).relative_to(root.root).as_posix()
