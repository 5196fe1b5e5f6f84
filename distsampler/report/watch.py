"""Watching a run that another process writes, from its store alone; nothing is ever written.

What is read between two writes of the run can be torn: it is read again.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from distsampler.analysis import diagnosis, inference_data
from distsampler.analysis.convergence import GATED, MIN_FOR_R_HAT
from distsampler.errors import StoreError
from distsampler.execution.display import PLAIN_SECONDS, grid, number, pace
from distsampler.execution.progress import ChainProgress
from distsampler.report import listing
from distsampler.schedule import Schedule
from distsampler.store.files import Files
from distsampler.store.lease import heartbeat
from distsampler.store.trace import MANIFEST, Trace

EVERY = 2.0  # seconds between two looks
TRIES, PAUSE = 5, 0.3  # at a store that another process is writing
LAST = 20  # draws of a chain that its loss is the mean of
WINDOW = 120.0  # seconds that a rate is taken over


@dataclass(frozen=True)
class View:
    """A run at one moment, as its store has it.

    Args:
        name: of the run.
        status: as ``listing.status`` gives it.
        reason: why it ended.
        seconds: since its first start, or that it took.
        heartbeat: age of the driver's last sign of life in seconds; None: nobody drives it.
        chains: each.
        llc: mean over chains, of the draws so far; provisional until there is a verdict.
        r_hat: the worst of what the gate reads, over the draws so far.
        ess: the smallest, likewise.
        verdict: of the gate's last look; empty: it has not looked.
        lost: places lost, of which each was started again or given up.
        committed: draws of each chain.
    """

    name: str
    status: str
    reason: str
    seconds: float
    heartbeat: float | None
    chains: tuple[ChainProgress, ...]
    llc: float
    r_hat: float
    ess: float
    verdict: str
    lost: int
    committed: tuple[int, ...]

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.status not in ("running", "silent")


class Follower:
    """Looks at a run again and again; what takes time is read only when there are new draws.

    Args:
        store: the run directory.

    Raises:
        StoreError: if it is none.
    """

    def __init__(self, store: str | Path) -> None:
        self._files = Files(store)
        self._files.guard = _never
        self._seen: deque[tuple[float, tuple[int, ...]]] = deque()
        self._view = self._patiently()

    def look(self) -> View:
        """The run now."""
        self._view = self._patiently(self._view)
        return self._view

    def _patiently(self, before: View | None = None) -> View:
        for attempt in range(TRIES):
            try:
                return self._read(Trace(self._files), before)
            except StoreError:
                if attempt == TRIES - 1 or not self._files.exists(MANIFEST):
                    raise
                time.sleep(PAUSE)
        raise AssertionError("unreachable")

    def _read(self, trace: Trace, before: View | None) -> View:
        manifest, events = trace.manifest, trace.events()
        now = time.monotonic()
        self._seen.append((now, trace.committed))
        while now - self._seen[0][0] > WINDOW:
            self._seen.popleft()
        starts = [float(e["time"]) for e in events if e["event"] == "started"]
        seconds = manifest.seconds or (time.time() - starts[0] if starts else 0.0)
        looks = [f"{e['status']} at {e['draws']} draws" for e in events if e["event"] == "verdict"]
        view = View(
            self._files.name,
            listing.status(trace),
            manifest.reason,
            seconds,
            heartbeat(self._files),
            (),
            *(math.nan,) * 3,
            looks[-1] if looks else "",
            sum(e["event"] == "lost" for e in events),
            trace.committed,
        )
        if before is not None and before.committed == view.committed and not view.over:
            return replace(
                view, chains=before.chains, llc=before.llc, r_hat=before.r_hat, ess=before.ess
            )
        return _with_draws(view, trace, self._rates(view))

    def _rates(self, view: View) -> NDArray[np.float64]:
        """Draws a second of each chain: while it was watched, else since the run's start."""
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        if now > began and first != last:
            return np.asarray((np.array(last) - np.array(first)) / (now - began))
        return np.array(last) / view.seconds if view.seconds > 0 else np.full(len(last), np.nan)


def follow(store: str | Path, once: bool = False, stream: TextIO | None = None) -> View:
    """Shows a run until it ends: a live table on a terminal, elsewhere a line every 30 s.

    Args:
        store: the run directory.
        once: only as it is now.
        stream: where to; None: standard output.

    Returns:
        The last look.
    """
    follower, console = Follower(store), Console(file=stream or sys.stdout, highlight=False)
    view = follower.look()
    if once or view.over:
        console.print(table(view), soft_wrap=True)
    elif console.is_terminal:
        with Live(table(view), console=console, refresh_per_second=4) as live:
            while not view.over:
                time.sleep(EVERY)
                view = follower.look()
                live.update(table(view))
    else:
        view = _plainly(follower, view, console)
    return view


def _plainly(follower: Follower, view: View, console: Console) -> View:
    said = -math.inf
    while not view.over:
        if time.monotonic() - said >= PLAIN_SECONDS:
            said = time.monotonic()
            console.print(line(view), soft_wrap=True)
        time.sleep(EVERY)
        view = follower.look()
    console.print(line(view), soft_wrap=True)
    return view


def line(view: View) -> str:
    """The run in one line."""
    parts = [
        f"{view.name} {view.status}{f' ({view.reason})' if view.reason else ''}",
        f"{view.seconds:.0f} s",
        pace(view.chains),
        f"{'' if view.over else 'provisional '}LLC {number(view.llc)}",
        f"worst R-hat {number(view.r_hat)}, smallest ESS {number(view.ess)}",
        f"{view.lost} actors lost",
        f"verdict: {view.verdict or 'none yet'}",
    ]
    if not view.over:
        parts.append(
            f"last heartbeat {listing.ago(view.heartbeat)} ago"
            if view.heartbeat is not None
            else "no driver"
        )
    return ", ".join(parts)


def table(view: View) -> Group:
    """The run as a table."""
    return Group(grid(view.chains), Text(line(view)))


def _with_draws(view: View, trace: Trace, rates: NDArray[np.float64]) -> View:
    """The view, with all that is read from the draws."""
    config, found, losses = trace.manifest.config, listing.llcs(trace), _losses(trace)
    total = Schedule.of(config).total
    if trace.manifest.kept is not None:
        total = trace.burn_in + trace.manifest.kept
    chains = tuple(
        ChainProgress(
            chain,
            min(draws, total),
            total,
            float(rates[chain]),
            losses.get(chain, math.nan),
            found.get(chain, math.nan),
            chain in trace.manifest.retired,
        )
        for chain, draws in enumerate(trace.committed)
    )
    llc = float(np.mean(list(found.values()))) if found else math.nan
    r_hat, ess = _convergence(trace)
    return replace(view, chains=chains, llc=llc, r_hat=r_hat, ess=ess)


def _convergence(trace: Trace) -> tuple[float, float]:
    """Worst R-hat and smallest ESS of what the gate reads."""
    start = trace.burn_in
    if trace.kept < MIN_FOR_R_HAT or not trace.chains:
        return math.nan, math.nan
    posterior = inference_data.between(trace, "posterior", start, start + trace.kept)
    gated = [name for name in GATED if name in posterior]
    found = diagnosis.diagnose(posterior[gated])
    return found.r_hat, found.ess


def _losses(trace: Trace) -> dict[int, float]:
    """Mean minibatch loss of each chain's last draws."""
    kept = trace.manifest.kept
    end = math.inf if kept is None else trace.burn_in + kept  # where the run was sealed
    counts = {c: int(min(draws, end)) for c, draws in enumerate(trace.committed) if draws}
    if not counts:
        return {}
    start, stop = max(0, min(counts.values()) - LAST), max(counts.values())
    values = np.asarray(trace.between("posterior", "loss", start, stop), np.float64)
    ends = {chain: min(draws, start + values.shape[1]) - start for chain, draws in counts.items()}
    return {c: float(values[c, max(0, end - LAST) : end].mean()) for c, end in ends.items() if end}


def _never() -> None:
    raise AssertionError("watching a run writes nothing")
