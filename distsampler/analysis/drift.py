"""Means of segments of a trace: does it drift, does a chain lie apart, where does burn-in end?

Everything is judged by means over segments of consecutive draws: of long segments their errors are
nearly independent and Gaussian, whatever the law of a draw. What correlation is left between
neighbouring segments widens the error by (1 + rho) / (1 - rho), as for an AR(1) process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SEGMENTS = 16  # of a chain, for the drift and the errors of chains' means
FINE_SEGMENTS = 64  # of a chain, for the end of burn-in
FALSE_ALARMS = 0.01  # chance of any alarm over all that is tested together, if nothing is wrong


@dataclass(frozen=True)
class Drift:
    """The change of a quantity from the first draw to the last, chains pooled."""

    size: float  # the change, in the quantity's own unit; positive: it rises
    error: float  # standard error of the size
    critical: float  # ratio of size to error beyond which the change is more than chance

    @property
    def significant(self) -> bool:
        """Whether the change is beyond chance."""
        return abs(self.size) > self.critical * self.error

    @property
    def ratio(self) -> float:
        """The size in standard errors, without its sign; the size itself where there is none."""
        return abs(self.size) / (self.error or 1.0)


@dataclass(frozen=True)
class Outlier:
    """A chain whose mean of a quantity lies apart from the median of the other chains' means.

    The distance ``z`` is in standard errors of its own mean and of a usual one.
    """

    chain: int
    name: str
    z: float


def critical(tests: int, dof: float) -> float:
    """Return the |t| that any of several tests exceeds by chance in 1 % of cases (Bonferroni).

    Student's quantile of ``dof`` degrees of freedom, two-sided, by its expansion around the normal
    one (Abramowitz & Stegun 26.7.5).
    """
    z = NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * max(tests, 1)))
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / dof + second / dof**2 + third / dof**3


def segment_means(values: Floats, segments: int) -> Floats:
    """Return the means of equal segments, shape (chain, segments), of values (chain, draw).

    The first draws are left out where the draws cannot be divided evenly.
    """
    size = values.shape[1] // segments
    used = values[:, values.shape[1] - size * segments :]
    means: Floats = used.reshape(len(values), segments, size).mean(axis=2)
    return means


def drift(values: Floats, tests: int) -> Drift:
    """Regress the segment means on time: ``m_cs = a_c + size t_s + error``, t from -1/2 to 1/2.

    Every chain has its own level, the size is common. The values are of shape (chain, draw).
    """
    means = segment_means(values, SEGMENTS)
    time = (np.arange(SEGMENTS) + 0.5) / SEGMENTS - 0.5
    spread = float(time @ time)
    size = float(means.mean(axis=0) @ time) / spread
    residuals = means - means.mean(axis=1, keepdims=True) - size * time
    dof = len(values) * (SEGMENTS - 1) - 1
    variance = float(np.square(residuals).sum()) / dof * _widening(residuals)
    return Drift(size, math.sqrt(variance / (len(values) * spread)), critical(tests, dof))


def outliers(name: str, values: Floats, chains: Sequence[int], tests: int) -> list[Outlier]:
    """Return the chains whose mean lies apart; the values are of shape (chain, draw)."""
    if len(chains) < 2:
        return []
    means = segment_means(values, SEGMENTS)
    levels = means.mean(axis=1)
    residuals = means - levels[:, None]
    squares = np.square(residuals).sum(axis=1) / ((SEGMENTS - 1) * SEGMENTS) * _widening(residuals)
    distances = levels - medians_of_others(levels)
    errors = np.sqrt(squares + medians_of_others(squares))
    limit = critical(tests, SEGMENTS - 1)
    return [
        Outlier(chain, name, away / error if error else math.copysign(1e9, away))
        for chain, away, error in zip(chains, distances.tolist(), errors.tolist(), strict=True)
        if abs(away) > limit * error
    ]


def medians_of_others(values: Floats) -> Floats:
    """Return for each of at least two values the median of all the others, sorting only once."""
    if np.isnan(values).any():
        return np.full(len(values), np.nan)
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.arange(len(values))
    others, ordered = len(values) - 1, values[order]
    middles = [
        ordered[place + (place >= ranks)]  # behind its own place, the others are one further on
        for place in ((others - 1) // 2, others // 2)
    ]
    return np.asarray(np.mean(middles, axis=0))


def settled(series: Sequence[Floats], earliest: int = 0) -> int:
    """Return the number of draws until the drift ends: at least ``earliest``, at most half.

    The rule is MSER (White 1997, Simulation 69), on the means of 64 segments with chains pooled:
    drop the b segments that make ``sum_{i >= b} (m_i - mean)^2 / (segments - b)^2`` smallest, the
    squared error of the mean of what is left. It is applied to the first quantity alone and to all
    quantities together (the geometric mean of their errors); the later end counts.

    Args:
        series: the quantities, each of shape (chain, draw), the most important first.
        earliest: draws that are dropped in any case.
    """
    draws = int(series[0].shape[1])
    if draws < FINE_SEGMENTS:
        return max(earliest, draws // 2)
    curves = np.array([_mser(segment_means(each, FINE_SEGMENTS).mean(axis=0)) for each in series])
    with np.errstate(divide="ignore"):  # a constant has no error, and says nothing
        logs = np.log(curves[np.isfinite(curves).all(axis=1) & (curves > 0).all(axis=1)])
    if not len(logs):
        return max(earliest, draws // 2)
    end = max(int(curves[0].argmin()), int(logs.mean(axis=0).argmin()))
    size, rest = draws // FINE_SEGMENTS, draws % FINE_SEGMENTS
    dropped = end * size + (rest if end else 0)
    return max(earliest, min(dropped, draws // 2))


def _mser(means: Floats) -> Floats:
    """The squared error of the mean behind each possible end of burn-in, up to half."""
    left = [means[first:] for first in range(len(means) // 2 + 1)]
    return np.array([np.square(m - m.mean()).sum() / len(m) ** 2 for m in left])


def _widening(residuals: Floats) -> float:
    """(1 + rho) / (1 - rho) of the correlation of neighbouring segments, at least one."""
    total = float(np.square(residuals).sum())
    if total <= 0:
        return 1.0
    rho = float((residuals[:, 1:] * residuals[:, :-1]).sum()) / total
    rho = min(max(rho + 1 / SEGMENTS, 0.0), 0.9)  # residuals of a fit lean to -1/segments
    return (1 + rho) / (1 - rho)
