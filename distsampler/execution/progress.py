"""How a run goes, from running sums: never from the trace, which the driver does not hold."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from distsampler.analysis import arviz_bridge
from distsampler.analysis.verdict import Verdict
from distsampler.draws import DrawBlock

SERIES = 1024  # values of a chain kept for the online R-hat, thinned ever more


@dataclass(frozen=True)
class ChainProgress:
    """One chain.

    Args:
        chain: index.
        draws: made so far, burn-in included.
        total: to be made.
        rate: draws a second, over its recent blocks.
        loss: minibatch loss, mean of its last block.
        llc: running mean after burn-in; NaN before.
        retired: whether it was taken out.
        restarting: whether its place was lost, and it has not made a draw since.
        restarts: how often its place was lost.
    """

    chain: int
    draws: int
    total: int
    rate: float
    loss: float
    llc: float
    retired: bool
    restarting: bool = False
    restarts: int = 0

    @property
    def state(self) -> str:
        """Lost, restarting, done or running."""
        if self.retired:
            return "lost"
        if self.restarting:
            return "restarting"
        return "done" if self.draws >= self.total else "running"


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Args:
        phase: of the driver.
        seconds: since the start.
        chains: each chain.
        llc: running mean over chains.
        r_hat: split R-hat of the probe's loss from a thinned series; a first look, no verdict.
        committed: durable draws of each chain.
        series: that thinned series, of each chain that is not lost.
        verdict: of the gate's last look; None: it has not looked.
        anchor: while the anchor pass is made: what of it -> (done, of so many).
    """

    phase: str
    seconds: float
    chains: tuple[ChainProgress, ...]
    llc: float
    r_hat: float
    committed: tuple[int, ...] = ()
    series: Sequence[Sequence[float]] = field(default=(), repr=False, compare=False)
    verdict: Verdict | None = None
    anchor: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def ess(self) -> float:
        """Bulk ESS of the thinned series, through ArviZ; NaN for fewer than eight values."""
        shortest = min((len(values) for values in self.series), default=0)
        if shortest < 8:
            return math.nan
        values = np.array([each[:shortest] for each in self.series])
        data = xr.Dataset({"probe_loss": (("chain", "draw"), values)})
        with np.errstate(invalid="ignore", divide="ignore"):  # a constant series: NaN
            return float(arviz_bridge.ess(data, "bulk")["probe_loss"])


class Observer(Protocol):
    """Shows the progress of a run."""

    def show(self, snapshot: Snapshot) -> None:
        """Take the progress; called several times a second."""
        ...


class Observers:
    """Several observers as one.

    Args:
        *observers: who is shown the progress, in this order.
    """

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def show(self, snapshot: Snapshot) -> None:
        """Show the progress to each."""
        for observer in self._observers:
            observer.show(snapshot)


class _Running:
    """Running sums of one chain."""

    def __init__(self, draws: int) -> None:
        self.draws, self.count, self.excess = draws, 0, 0.0
        self.restarting, self.restarts = False, 0
        self.loss = self.rate = math.nan
        self.series = array("d")  # a quarter of the memory of a list
        self.stride, self._seen, self._since = 1, 0, time.monotonic()

    def add(self, block: DrawBlock, burn_in: int) -> None:
        now, self.restarting = time.monotonic(), False
        rate = block.draws / max(now - self._since, 1e-3)
        self.rate = rate if math.isnan(self.rate) else 0.7 * self.rate + 0.3 * rate
        self.draws, self._since = block.end, now
        self.loss = float(np.mean(_floats(block, "loss")))
        kept = slice(max(0, burn_in - block.first_draw), None)
        excess = _floats(block, "excess_loss")[kept]
        self.count, self.excess = self.count + len(excess), self.excess + float(np.sum(excess))
        for value in _floats(block, "probe_loss")[kept].tolist():
            self._append(value)

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
        made: draws that each chain begins with.
        burn_in: draws before the posterior.
        draws: after it.
        nbeta: inverse temperature times n.
    """

    def __init__(self, made: Sequence[int], burn_in: int, draws: int, nbeta: float) -> None:
        self._burn_in, self._total, self._nbeta = burn_in, burn_in + draws, nbeta
        self._chains = [_Running(draws) for draws in made]
        self._began = time.monotonic()
        self._verdict: Verdict | None = None

    def add(self, block: DrawBlock) -> None:
        """Counts a block."""
        if block.draws:
            self._chains[block.chain].add(block, self._burn_in)

    def lost(self, chain: int) -> None:
        """Its place is gone; it goes on elsewhere."""
        self._chains[chain].restarting = True
        self._chains[chain].restarts += 1

    def judged(self, verdict: Verdict) -> None:
        """The gate has looked."""
        self._verdict = verdict

    def snapshot(
        self,
        phase: str,
        retired: Container[int],
        committed: tuple[int, ...] = (),
        anchor: Mapping[str, tuple[int, int]] | None = None,
    ) -> Snapshot:
        """The run now."""
        alive = [c for i, c in enumerate(self._chains) if i not in retired]
        llcs = [self._llc(chain) for chain in alive if chain.count]
        return Snapshot(
            phase,
            time.monotonic() - self._began,
            tuple(
                ChainProgress(
                    i,
                    c.draws,
                    self._total,
                    c.rate,
                    c.loss,
                    self._llc(c),
                    i in retired,
                    c.restarting,
                    c.restarts,
                )
                for i, c in enumerate(self._chains)
            ),
            float(np.mean(llcs)) if llcs else math.nan,
            split_r_hat([chain.series for chain in alive]),
            committed,
            [chain.series for chain in alive],
            self._verdict,
            anchor or {},
        )

    def _llc(self, chain: _Running) -> float:
        return self._nbeta * chain.excess / chain.count if chain.count else math.nan


def split_r_hat(series: Sequence[Sequence[float]]) -> float:
    """Split R-hat (Gelman et al., BDA3, eq. 11.4) of chains of unequal length, cut to the shortest.

    Args:
        series: one a chain.

    Returns:
        NaN for fewer than two chains or eight values.
    """
    half = min((len(values) for values in series), default=0) // 2
    if len(series) < 2 or half < 4:
        return math.nan
    halves: NDArray[np.float64] = np.array(
        [part for values in series for part in (values[:half], values[half : 2 * half])]
    )
    within = float(halves.var(axis=1, ddof=1).mean())
    between = half * float(halves.mean(axis=1).var(ddof=1))
    return math.sqrt((half - 1) / half + between / (half * within)) if within > 0 else math.nan
