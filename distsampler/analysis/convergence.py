"""How well the draws determine each quantity: R-hat, ESS and MCSE, nested R-hat, drift.

The statistics are ArviZ's, in float64. A row is one scalar quantity; which of the rows decide the
verdict is said here, in ``GATED``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from distsampler.analysis import arviz_bridge, drift
from distsampler.analysis.drift import Drift
from distsampler.draws import DISTANCE, EXCESS_LOSS, PROBE_LOSS, PROJECTIONS, WEIGHT_PROJECTIONS

GATED = (PROBE_LOSS, PROJECTIONS)
ENTERS_ERROR = (EXCESS_LOSS,)  # it decides nothing, and carries the LLC
ADVISORY = (DISTANCE, WEIGHT_PROJECTIONS)
MIN_FOR_R_HAT, MIN_FOR_MOMENTS = 4, 2


@dataclass(frozen=True)
class Row:
    """One diagnosed quantity."""

    name: str  # name of the variable, with an index where it has several entries
    gated: bool  # whether the quantity decides the verdict
    mean: float  # mean over chains and draws
    sd: float  # standard deviation over chains and draws
    mcse: float  # Monte-Carlo standard error of the mean
    r_hat: float  # rank-normalised split R-hat; NaN: undetermined
    ess_bulk: float  # effective sample size of the bulk
    ess_tail: float  # smaller effective sample size of the 5 % and 95 % quantiles
    # R-hat of the even and the odd chains as superchains; None: not asked for
    nested_r_hat: float | None = None
    # change from the first draw to the last, of the side (see ``sides``) that drifts most
    # clearly; None: not tested
    drift: Drift | None = None

    @property
    def ess(self) -> float:
        """The smaller effective sample size; NaN if either is."""
        return float(np.minimum(self.ess_bulk, self.ess_tail))

    @property
    def drifts(self) -> bool:
        """Whether the drift is beyond chance."""
        return self.drift is not None and self.drift.significant


def rows(
    data: xr.Dataset, sides: list[list[int]], averaged: xr.Dataset | None = None
) -> tuple[Row, ...]:
    """Diagnose every scalar quantity of a posterior.

    Args:
        data: variables of dims (chain, draw, ...), float64.
        sides: positions of the chains that started alike, as ``sides`` gives them.
        averaged: variables whose MCSE is to be that of these means over draws.
    """
    if not data.data_vars:
        return ()
    enough = data.sizes["chain"] and data.sizes["draw"] >= MIN_FOR_R_HAT
    statistics = _statistics(data, averaged) if enough else []
    tests = sum(1 for _ in gated_values(data)) * sum(1 for side in sides if side)
    diagnosed = []
    for name in data.data_vars:
        gated = name in GATED
        for label, index, values in _entries(data[name]):
            mean, sd = math.nan, math.nan
            if values.size >= MIN_FOR_MOMENTS:
                mean, sd = float(values.mean()), float(values.std(ddof=1))
            looked_up = [float(each[name].values[index]) for each in statistics]
            mcse, r_hat, bulk, tail = looked_up or [math.nan] * 4
            nested = nested_r_hat([values[s] for s in sides]) if gated and len(sides) > 1 else None
            moved = _drift(values, sides, tests) if gated else None
            row = Row(label, gated, mean, sd, mcse, r_hat, bulk, tail, nested, moved)
            diagnosed.append(row)
    return tuple(diagnosed)


def sides(chains: list[int], dispersed: bool) -> list[list[int]]:
    """Return the positions of chains that started alike: all; or the even and the odd ones."""
    if not dispersed:
        return [list(range(len(chains)))]
    return [[row for row, chain in enumerate(chains) if chain % 2 == odd] for odd in (0, 1)]


def gated_values(data: xr.Dataset) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield label and values of each gated quantity, the probe's loss first."""
    for name in GATED:
        if name in data:
            for label, _, values in _entries(data[name]):
                yield label, np.asarray(values, np.float64)


def nested_r_hat(superchains: list[NDArray[np.float64]]) -> float:
    """Return ``sqrt(1 + B / W)`` (Margossian et al. 2022, arXiv 2110.13017, eq. 6).

    B is the variance of the superchains' means; W the mean over superchains of the variance of
    their chains' means plus the mean of their chains' variances.

    The superchains are of shape (chain, draw). NaN: one has no chain, or nothing varies.
    """
    if len(superchains) < 2 or not all(len(values) for values in superchains):
        return math.nan
    between = float(np.var([values.mean() for values in superchains], ddof=1))
    within = [
        (values.mean(axis=1).var(ddof=1) if len(values) > 1 else 0.0)
        + values.var(axis=1, ddof=1).mean()
        for values in superchains
    ]
    total = float(np.mean(within))
    return math.sqrt(1 + between / total) if total > 0 else math.nan


def _drift(values: NDArray[np.float64], sides: list[list[int]], tests: int) -> Drift | None:
    """The clearest drift of any side; None where it cannot be tested."""
    if values.shape[1] < drift.SEGMENTS or not np.isfinite(values).all():
        return None
    drifts = [drift.drift(values[side], tests) for side in sides if side]
    return max(drifts, key=lambda each: each.ratio, default=None)


@np.errstate(invalid="ignore", divide="ignore")  # a constant trace gives NaN: undetermined
def _statistics(data: xr.Dataset, averaged: xr.Dataset | None) -> list[xr.Dataset]:
    """MCSE, R-hat, bulk and tail ESS of every variable, in the order of Row's fields."""
    mcse = arviz_bridge.mcse(data)
    if averaged:
        mcse.update(arviz_bridge.mcse(averaged))
    several = data.sizes["chain"] > 1
    return [
        mcse,
        arviz_bridge.r_hat(data) if several else xr.full_like(mcse, np.nan),
        arviz_bridge.ess(data, "bulk"),
        arviz_bridge.ess(data, "tail"),
    ]


def _entries(array: xr.DataArray) -> Iterator[tuple[str, tuple[int, ...], NDArray[np.float64]]]:
    """Label, index and values of each scalar quantity of a variable."""
    for index in np.ndindex(*array.shape[2:]):
        label = f"{array.name}{list(index)}" if index else str(array.name)
        yield label, index, array.values[(slice(None), slice(None), *index)]
