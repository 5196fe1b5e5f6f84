"""Which runs lie in a folder and its subfolders, read from the stores alone.

Nothing is diagnosed here, and neither torch nor Ray nor ArviZ is loaded: the verdict is the one
that a run's own gate gave in its last round.
"""

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
from distsampler.store.events import gate_rounds
from distsampler.store.files import Files, is_url
from distsampler.store.lease import EXPIRY_SECONDS, ago, heartbeat
from distsampler.store.manifest import MANIFEST
from distsampler.store.reader import TraceReader
from distsampler.table import Column, Table

COLUMNS = tuple(
    Column(heading, "label")
    for heading in ("run", "status", "draws", "chains", "LLC", "verdict", "age")
)


@dataclass(frozen=True)
class Entry:
    """One run, as its store has it."""

    name: str  # path of the run, from the folder that was listed
    # running, silent (it says that it runs, and no driver is alive), finished, interrupted,
    # failed, or damaged
    status: str
    draws: int = 0  # draws that every chain has, burn-in included
    total: int = 0  # draws that every chain will have
    chains: int = 0  # number of chains of the posterior
    lost: int = 0  # number of chains that were retired
    llc: float | None = None  # nbeta times the mean excess loss so far; None: not known yet
    verdict: str | None = None  # verdict of the last gate round; None: there has been none
    looked: int = 0  # draws that it judged
    age: float | None = None  # seconds since the run was last written
    reason: str = ""  # why the run ended, or what is damaged

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """Return what ``ls`` prints in each column."""
        verdict = self.verdict or "-"
        if self.verdict and self.status != "finished":
            verdict += f" at {self.looked}"
        return (
            self.name,
            self.status,
            f"{self.draws}/{self.total}",
            f"{self.chains} ({self.lost} retired)" if self.lost else f"{self.chains}",
            "-" if self.llc is None else f"{self.llc:.4g}",
            verdict if self.status != "damaged" else self.reason,
            ago(self.age),
        )


def entries(folder: str | Path) -> list[Entry]:
    """Return the runs in a folder, or the run that it is, sorted by name.

    Raises:
        StoreError: if there is no such folder, or no run in it.
    """
    root = Files(folder)
    if not is_url(root.root) and not Path(root.root).is_dir():
        raise StoreError(f"{root} must be a folder of runs, but there is no such folder")
    runs = [_entry(root, name) for name in sorted(_run_folders(root))]
    if not runs:
        raise StoreError(
            f"{root} must hold runs, but no {MANIFEST} lies in it or beneath it: give the store "
            "of a run, of a sweep, or a folder of them"
        )
    return runs


def table(runs: Sequence[Entry]) -> Table:
    """Return the table that ``ls`` prints, one row per run."""
    return Table(COLUMNS, [run.cells() for run in runs])


def status(trace: TraceReader) -> str:
    """Return the status of a run; silent, if it says that it runs and no driver is alive."""
    stored = trace.manifest.status
    if stored != "running":
        return stored
    age = heartbeat(trace.files)
    return "silent" if age is None or age > EXPIRY_SECONDS else stored


def total_draws(trace: TraceReader) -> int:
    """Return the draws that every chain will have, burn-in included: the budget, or the end."""
    if trace.manifest.kept is not None:
        return trace.burn_in + trace.manifest.kept
    return Schedule.of(trace.manifest.config).total


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


def _entry(root: Files, name: str) -> Entry:
    files = root if name == "." else Files(root.path(name))
    name = root.name if name == "." else name
    try:
        return _read(TraceReader(files), name)
    except StoreError as error:
        return Entry(name, "damaged", reason=str(error))


def _read(trace: TraceReader, name: str) -> Entry:
    manifest, total, llc = trace.manifest, total_draws(trace), list(llcs(trace).values())
    draws = min((trace.committed[chain] for chain in trace.chains), default=0)
    events = trace.events()
    rounds = gate_rounds(events)
    return Entry(
        name,
        status(trace),
        draws if manifest.kept is None else total,
        total,
        len(trace.chains),
        len(manifest.retired),
        float(np.mean(llc)) if llc else None,
        rounds[-1].status if rounds else None,
        rounds[-1].draws if rounds else 0,
        _age(trace.files, events),
        manifest.reason,
    )


def _age(files: Files, events: Sequence[dict[str, Any]]) -> float | None:
    """Seconds since the last commit; at a URL, since the last event."""
    last = max((float(event["time"]) for event in events), default=-math.inf)
    if not is_url(files.root):
        last = max(last, os.stat(files.path(MANIFEST)).st_mtime)
    return max(0.0, time.time() - last) if math.isfinite(last) else None


def _run_folders(root: Files) -> Iterator[str]:
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
