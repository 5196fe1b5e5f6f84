"""Following a run that another process writes, from its store alone; nothing is ever written.

What is read between two writes of the run can be torn: it is read again.
"""

import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from distsampler.analysis import diagnosis, inference_data
from distsampler.analysis.convergence import GATED, MIN_FOR_R_HAT
from distsampler.draws import LOSS
from distsampler.errors import StoreError
from distsampler.execution.display import Reporter
from distsampler.execution.progress import ChainProgress, Snapshot, StoreStatus
from distsampler.report import listing
from distsampler.store.events import Started, gate_rounds, losses, of_kind
from distsampler.store.files import Files
from distsampler.store.lease import heartbeat
from distsampler.store.manifest import MANIFEST
from distsampler.store.reader import TraceReader

EVERY = 2.0  # seconds between two readings
TRIES, PAUSE = 5, 0.3  # at a store that another process is writing
LAST = 20  # draws of a chain that its loss is the mean of
WINDOW = 120.0  # seconds that a rate is taken over


class _Numbers(NamedTuple):
    """What is read from the draws."""

    chains: tuple[ChainProgress, ...]
    llc: float
    r_hat: float
    ess: float


class Follower:
    """Reads a run again and again; what takes time is read only when there are new draws.

    Args:
        store: the run directory.
        tries: how often it is read before it counts as damaged.
    """

    def __init__(self, store: str | Path, tries: int = TRIES) -> None:
        self._files, self._tries = Files(store), tries
        self._files.guard = _never
        self._seen: deque[tuple[float, tuple[int, ...]]] = deque()
        self._numbers: tuple[tuple[int, ...], _Numbers] | None = None  # of these draws

    def read(self) -> Snapshot:
        """Return the run as it is now.

        Raises:
            StoreError: if there is none, or it is damaged.
        """
        for _ in range(self._tries - 1):
            try:
                return self._read(TraceReader(self._files))
            except StoreError:
                if not self._files.exists(MANIFEST):
                    raise
                time.sleep(PAUSE)
        return self._read(TraceReader(self._files))

    def _read(self, trace: TraceReader) -> Snapshot:
        manifest, events, status = trace.manifest, trace.events(), listing.status(trace)
        starts = [float(event["time"]) for event in of_kind(events, Started)]
        seconds = manifest.seconds or (time.time() - starts[0] if starts else 0.0)
        rates = self._rates(trace.committed, seconds)
        known, numbers = self._numbers or (None, None)
        if numbers is None or known != trace.committed or status not in ("running", "silent"):
            numbers = _numbers(trace, rates)
            self._numbers = trace.committed, numbers
        rounds = [f"{each.status} at {each.draws} draws" for each in gate_rounds(events)]
        stored = StoreStatus(
            self._files.name,
            manifest.reason,
            heartbeat(self._files),
            rounds[-1] if rounds else "",
            numbers.r_hat,
            numbers.ess,
        )
        chains, llc = numbers.chains, numbers.llc
        lost = losses(events)
        return Snapshot(status, seconds, chains, llc, trace.committed, losses=lost, stored=stored)

    def _rates(self, committed: tuple[int, ...], seconds: float) -> NDArray[np.float64]:
        """Draws per second of each chain: while it was followed, else since the run's start."""
        now = time.monotonic()
        self._seen.append((now, committed))
        while now - self._seen[0][0] > WINDOW:
            self._seen.popleft()
        began, first = self._seen[0]
        if now > began and first != committed:
            return np.asarray((np.array(committed) - np.array(first)) / (now - began))
        return np.array(committed) / (seconds if seconds > 0 else math.nan)


def follow(store: str | Path, once: bool = False, stream: TextIO | None = None) -> Snapshot:
    """Show a run until it ends: a live table on a terminal, elsewhere a line every 30 s.

    Args:
        store: the run directory.
        once: show the run only as it is now.
        stream: where to; None: standard output.

    Returns:
        The last snapshot.
    """
    follower, reporter = Follower(store), Reporter(stream=stream or sys.stdout)
    snapshot = follower.read()
    if once or snapshot.over:
        reporter.print(snapshot)
        return snapshot
    with reporter:
        while not snapshot.over:
            reporter.show(snapshot)
            time.sleep(EVERY)
            snapshot = follower.read()
        reporter.show(snapshot, last=True)
    return snapshot


def _numbers(trace: TraceReader, rates: NDArray[np.float64]) -> _Numbers:
    llcs, losses, retired = listing.llcs(trace), _losses(trace), trace.manifest.retired
    total = listing.total_draws(trace)
    chains = list[ChainProgress]()
    for c, draws in enumerate(trace.committed):
        loss, llc = losses.get(c, math.nan), llcs.get(c, math.nan)
        made = (min(draws, total), total, float(rates[c]))
        chains.append(ChainProgress(c, *made, loss, llc, c in retired))
    mean = float(np.mean(list(llcs.values()))) if llcs else math.nan
    return _Numbers(tuple(chains), mean, *_convergence(trace))


def _convergence(trace: TraceReader) -> tuple[float, float]:
    """Worst R-hat and smallest ESS of what the gate reads."""
    start = trace.burn_in
    if trace.kept < MIN_FOR_R_HAT or not trace.chains:
        return math.nan, math.nan
    posterior = inference_data.between(trace, "posterior", start, start + trace.kept)
    diagnosed = diagnosis.diagnose(posterior[[name for name in GATED if name in posterior]])
    return diagnosed.r_hat, diagnosed.ess


def _losses(trace: TraceReader) -> dict[int, float]:
    """Mean minibatch loss of each chain's last draws."""
    start = max(0, min(filter(None, trace.ends), default=0) - LAST)
    series = trace.by_chain(LOSS, range(len(trace.ends)), start)
    return {chain: float(values[-LAST:].mean()) for chain, values in series.items()}


def _never() -> None:
    raise AssertionError("following a run writes nothing")
