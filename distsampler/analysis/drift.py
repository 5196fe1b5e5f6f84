"""Block means of a trace: does it still drift, does a chain lie apart, where does burn-in end?

All that is judged here is an average over a block of draws: long enough, its errors are nearly
independent and Gaussian, whatever the law of a draw. What correlation is left between neighbouring
blocks widens the error, as it does for an AR(1) process: by (1 + rho) / (1 - rho).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLOCKS = 16  # of a chain, for the drift and the chains' errors
FINE = 64  # of a chain, for the end of burn-in
FALSE_ALARMS = 0.01  # over all that is tested together, if nothing is wrong


@dataclass(frozen=True)
class Drift:
    """How a quantity changed from the first draw to the last, chains pooled.

    Args:
        size: the change, in the quantity's own unit; above zero: it rises.
        error: standard error of that.
        critical: the ratio of the two beyond which it is called a drift.
    """

    size: float
    error: float
    critical: float

    @property
    def found(self) -> bool:
        """Whether the change is beyond chance."""
        return abs(self.size) > self.critical * self.error


@dataclass(frozen=True)
class Outlier:
    """A chain whose mean lies apart from the other chains'.

    Args:
        chain: index.
        name: of the quantity.
        z: distance of its mean from the median of the others', in standard errors of its own mean
            and of a usual one.
    """

    chain: int
    name: str
    z: float


def critical(tests: int, dof: float) -> float:
    """The |t| that so many tests together exceed by chance in 1 % of cases (Bonferroni).

    Student's quantile by its expansion around the normal one (Abramowitz & Stegun 26.7.5).

    Args:
        tests: made together, two-sided.
        dof: degrees of freedom of each.
    """
    z = NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * max(tests, 1)))
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / dof + second / dof**2 + third / dof**3


def block_means(values: Floats, blocks: int) -> Floats:
    """Means of equal blocks, shape (chain, blocks); what does not fill a block is left out first.

    Args:
        values: (chain, draw), at least as many draws as blocks.
        blocks: of each chain.
    """
    size = values.shape[1] // blocks
    used = values[:, values.shape[1] - size * blocks :]
    means: Floats = used.reshape(len(values), blocks, size).mean(axis=2)
    return means


def drift(values: Floats, tests: int) -> Drift:
    """Regresses the block means on time: ``m_cb = a_c + size t_b + error``, t from -1/2 to 1/2.

    Every chain has a level of its own, the slope is common.

    Args:
        values: (chain, draw).
        tests: quantities tested together.
    """
    means = block_means(values, BLOCKS)
    time = (np.arange(BLOCKS) + 0.5) / BLOCKS - 0.5
    spread = float(time @ time)
    size = float(means.mean(axis=0) @ time) / spread
    residuals = means - means.mean(axis=1, keepdims=True) - size * time
    dof = len(values) * (BLOCKS - 1) - 1
    variance = float(np.square(residuals).sum()) / dof * _widened(residuals)
    return Drift(size, math.sqrt(variance / (len(values) * spread)), critical(tests, dof))


def outliers(name: str, values: Floats, chains: Sequence[int], tests: int) -> list[Outlier]:
    """The chains whose mean lies apart from the median of the others'.

    Args:
        name: of the quantity.
        values: (chain, draw).
        chains: their indices.
        tests: quantities tested together, a chain each.
    """
    means = block_means(values, BLOCKS)
    levels = means.mean(axis=1)
    residuals = means - levels[:, None]
    squares = np.square(residuals).sum(axis=1) / ((BLOCKS - 1) * BLOCKS) * _widened(residuals)
    limit, found = critical(tests, BLOCKS - 1), list[Outlier]()
    if len(chains) < 2:
        return found
    usual, scatter = medians_of_others(levels), medians_of_others(squares)
    for row, chain in enumerate(chains):
        away = float(levels[row] - usual[row])
        error = math.sqrt(squares[row] + scatter[row])
        if abs(away) > limit * error:
            found.append(Outlier(chain, name, away / error if error else math.copysign(1e9, away)))
    return found


def medians_of_others(values: Floats) -> Floats:
    """For each of at least two values the median of all the others; they are sorted once."""
    if np.isnan(values).any():
        return np.full(len(values), np.nan)
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.arange(len(values))
    sizes, ordered = len(values) - 1, values[order]
    middles = [
        ordered[place + (place >= ranks)]  # behind its own place, the others are one further on
        for place in ((sizes - 1) // 2, sizes // 2)
    ]
    found: Floats = np.mean(middles, axis=0)
    return found


def settled(series: Sequence[Floats], earliest: int = 0) -> int:
    """Draws until the drift ends: at least ``earliest``, at most half.

    The rule is MSER (White 1997, Simulation 69), on the means of 64 blocks with chains pooled: drop
    the b blocks that make ``sum_{i >= b} (m_i - mean)^2 / (blocks - b)^2`` smallest, the squared
    error of the mean of what is left. It is applied to the first quantity alone and to all of them
    together (the geometric mean of theirs); the later one counts.

    Args:
        series: quantities, each (chain, draw), the one that matters most first.
        earliest: draws that are dropped in any case.
    """
    draws = int(series[0].shape[1])
    if draws < FINE:
        return max(earliest, draws // 2)
    curves = np.array([_mser(block_means(values, FINE).mean(axis=0)) for values in series])
    with np.errstate(divide="ignore"):  # a constant has no error, and says nothing
        logs = np.log(curves[np.isfinite(curves).all(axis=1) & (curves > 0).all(axis=1)])
    if not len(logs):
        return max(earliest, draws // 2)
    ends = (int(curves[0].argmin()), int(logs.mean(axis=0).argmin()))
    size, rest = draws // FINE, draws % FINE
    dropped = max(ends) * size + (rest if max(ends) else 0)
    return max(earliest, min(dropped, draws // 2))


def _mser(means: Floats) -> Floats:
    """The squared error of the mean behind each possible end of burn-in, up to half."""
    left = [means[first:] for first in range(len(means) // 2 + 1)]
    return np.array([np.square(m - m.mean()).sum() / len(m) ** 2 for m in left])


def _widened(residuals: Floats) -> float:
    """(1 + rho) / (1 - rho) of the neighbouring blocks' correlation, and never below one."""
    total = float(np.square(residuals).sum())
    if total <= 0:
        return 1.0
    rho = float((residuals[:, 1:] * residuals[:, :-1]).sum()) / total
    rho = min(max(rho + 1 / BLOCKS, 0.0), 0.9)  # residuals of a fit lean to -1/blocks
    return (1 + rho) / (1 - rho)
