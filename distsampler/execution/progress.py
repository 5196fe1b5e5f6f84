"""The progress of a run: what a snapshot holds, and the running sums that it is made of.

The driver does not hold the trace, so it adds up blocks as they come. A run that is followed from
its store (``report.watch``) gives snapshots of the same type.
"""

import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from distsampler.analysis import arviz_bridge
from distsampler.analysis.verdict import Verdict
from distsampler.draws import EXCESS_LOSS, LOSS, PROBE_LOSS, DrawBlock
from distsampler.store.events import Lost

SERIES = 1024  # values of a chain kept for R-hat and ESS; thinned by two whenever there are more
SHORTEST = 8  # values of each chain without which they are not computed
ENDED = ("finished", "interrupted", "failed")


@dataclass(frozen=True)
class ChainProgress:
    """One chain at one moment."""

    chain: int  # index of the chain
    draws: int  # draws made so far, burn-in included
    total: int  # draws to be made
    rate: float  # draws per second, over the chain's recent blocks
    loss: float  # mean minibatch loss of the last block
    llc: float  # running mean after burn-in; NaN before
    retired: bool  # whether the chain was taken out
    restarting: bool = False  # whether its place was lost, and it has not made a draw since
    restarts: int = 0  # how often its place was lost

    @property
    def state(self) -> str:
        """Lost, restarting, done or running."""
        if self.retired:
            return "lost"
        if self.restarting:
            return "restarting"
        return "done" if self.draws >= self.total else "running"


@dataclass(frozen=True)
class StoreStatus:
    """What only those see who follow a run from its store."""

    name: str  # name of the run
    reason: str  # why the run ended; empty: it has not
    # age of the driver's last sign of life in seconds; None: nobody drives the run
    heartbeat: float | None
    verdict: str  # of the last gate round; empty: there was none
    r_hat: float  # worst R-hat of what the gate reads, over the draws so far
    ess: float  # smallest ESS, likewise


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment."""

    phase: str  # phase of the driver; of a run that is followed, the status in its store
    seconds: float  # time since the start
    chains: tuple[ChainProgress, ...]  # each chain
    llc: float  # mean over chains of the draws so far; provisional until there is a verdict
    committed: tuple[int, ...] = ()  # number of durable draws of each chain
    # thinned probe loss of each chain that is not retired; empty if followed
    series: Sequence[Sequence[float]] = field(default=(), repr=False, compare=False)
    verdict: Verdict | None = None  # of the last gate round; None: there was none
    # parts of the anchor pass -> (number done, number of all), while it is made
    anchor: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    losses: Mapping[str, int] = field(default_factory=dict)  # how often actors were lost, by fault
    waiting: tuple[str, ...] = ()  # places that have not answered for longer than usual
    stored: StoreStatus | None = None  # what only those see who follow the run; None for its driver

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.phase in ENDED

    @property
    def news(self) -> tuple[object, ...]:
        """What changes with a commit or a gate round, and only then."""
        return self.committed, self.verdict

    @cached_property
    def r_hat(self) -> float:
        """Split R-hat of the thinned series, NaN for a single chain; or ``StoreStatus.r_hat``."""
        if self.stored is not None:
            return self.stored.r_hat
        return self._of_series(arviz_bridge.split_r_hat) if len(self.series) > 1 else math.nan

    @cached_property
    def ess(self) -> float:
        """Bulk ESS of the thinned series; or ``StoreStatus.ess``."""
        if self.stored is not None:
            return self.stored.ess
        return self._of_series(lambda data: arviz_bridge.ess(data, "bulk"))

    def _of_series(self, statistic: Callable[[xr.Dataset], xr.Dataset]) -> float:
        """A statistic of the series, all cut to the shortest; NaN if it is too short."""
        shortest = min((len(values) for values in self.series), default=0)
        if shortest < SHORTEST:
            return math.nan
        values = np.array([each[:shortest] for each in self.series])
        data = xr.Dataset({PROBE_LOSS: (("chain", "draw"), values)})
        with np.errstate(invalid="ignore", divide="ignore"):  # a constant series: NaN
            return float(statistic(data)[PROBE_LOSS])


Observer = Callable[[Snapshot], object]
"""Shows the progress of a run; called several times a second."""


def together(*observers: Observer) -> Observer:
    """Return several observers as one."""

    def show(snapshot: Snapshot) -> None:
        for observer in observers:
            observer(snapshot)

    return show


class _Running:
    """The progress of one chain, and the sums and the series behind it."""

    def __init__(self, chain: int, draws: int, total: int) -> None:
        self.progress = ChainProgress(chain, draws, total, *(math.nan,) * 3, retired=False)
        self.count, self._excess = 0, 0.0
        self.series = array("d")  # a quarter of the memory of a list
        self.stride, self._seen, self._since = 1, 0, time.monotonic()

    def add(self, block: DrawBlock, burn_in: int, nbeta: float) -> None:
        kept = slice(max(0, burn_in - block.first_draw), None)
        excess = _floats(block, EXCESS_LOSS)[kept]
        self.count, self._excess = self.count + len(excess), self._excess + float(np.sum(excess))
        for value in _floats(block, PROBE_LOSS)[kept].tolist():
            self._append(value)
        now, before = time.monotonic(), self.progress.rate
        rate = block.draws / max(now - self._since, 1e-3)
        self._since = now
        self.progress = replace(
            self.progress,
            draws=block.end,
            rate=rate if math.isnan(before) else 0.7 * before + 0.3 * rate,
            loss=float(np.mean(_floats(block, LOSS))),
            llc=nbeta * self._excess / self.count if self.count else math.nan,
            restarting=False,
        )

    def _append(self, value: float) -> None:
        if self._seen % self.stride == 0:
            self.series.append(value)
            if len(self.series) >= SERIES:
                self.series, self.stride = self.series[::2], 2 * self.stride
        self._seen += 1


def _floats(block: DrawBlock, name: str) -> NDArray[np.float64]:
    return np.asarray(block.values[name], np.float64)


class Progress:
    """Adds up the blocks of a run.

    Args:
        made: number of draws that each chain begins with.
        burn_in: number of draws before the posterior.
        draws: number of draws after burn-in.
        nbeta: inverse temperature times n.
    """

    def __init__(self, made: Sequence[int], burn_in: int, draws: int, nbeta: float) -> None:
        self._burn_in, self._nbeta = burn_in, nbeta
        self._chains = [_Running(chain, begun, burn_in + draws) for chain, begun in enumerate(made)]
        self._began = time.monotonic()
        self._verdict: Verdict | None = None
        self._losses = Counter[str]()

    def add(self, block: DrawBlock) -> None:
        """Count a block."""
        if block.draws:
            self._chains[block.chain].add(block, self._burn_in, self._nbeta)

    def lost(self, event: Lost) -> None:
        """Count that a place is lost; the chains at work there continue elsewhere."""
        self._losses[event.fault] += 1
        for chain in event.chains or ():
            running = self._chains[chain]
            restarts = running.progress.restarts + 1
            running.progress = replace(running.progress, restarting=True, restarts=restarts)

    def judged(self, verdict: Verdict) -> None:
        """Keep the verdict of a gate round."""
        self._verdict = verdict

    def snapshot(
        self,
        phase: str,
        retired: Container[int],
        committed: tuple[int, ...] = (),
        anchor: Mapping[str, tuple[int, int]] | None = None,
        waiting: tuple[str, ...] = (),
    ) -> Snapshot:
        """Return the run as it is now; see ``Snapshot``."""
        every = [c.progress for c in self._chains]
        chains = tuple(replace(c, retired=True) if c.chain in retired else c for c in every)
        alive = [self._chains[c.chain] for c in chains if not c.retired]
        llcs = [running.progress.llc for running in alive if running.count]
        return Snapshot(
            phase,
            time.monotonic() - self._began,
            chains,
            float(np.mean(llcs)) if llcs else math.nan,
            committed,
            [running.series for running in alive],
            self._verdict,
            anchor or {},
            dict(self._losses),
            waiting,
        )
