"""Learning coefficients: the free energy is ``n L(w*) + lambda log n - (m - 1) log log n``."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from distsampler.errors import ConfigError


class LearningCoefficient(NamedTuple):
    """The real log canonical threshold lambda, and its multiplicity m."""

    value: float
    multiplicity: int

    def at(self, t: float) -> float:
        """Return two terms of ``t E[K]``, lambda - (m - 1) / log t (Watanabe 2009, theorem 6.6).

        Args:
            t: inverse temperature times n, above 1.
        """
        return self.value - (self.multiplicity - 1) / math.log(t)


def deep_linear(widths: Sequence[int], rank: int) -> LearningCoefficient:
    """Return that of a deep linear network, ``y = W_L ... W_1 x`` (Aoyagi 2024, theorem 1).

    Two layers are reduced-rank regression.

    With ``M_s = H_s - r`` sorted, l + 1 of them enter: as many as keep the sum S of those before at
    least (number before - 1) times the next. ``c = ceil(S / l)``, ``a = S - (c - 1) l``,
    ``lambda = (r (H_0 + H_L) - r^2) / 2 + a (l - a) / (4 l) - (l - 1) S^2 / (4 l)
    + 1/2 sum_{i<j<=l} M_i M_j``, ``m = a (l - a) + 1``.

    Args:
        widths: H_0 .. H_L, from input to output.
        rank: r, rank of the true product.

    Raises:
        ConfigError: there are fewer than two widths, or the rank does not fit through all of them.
    """
    if len(widths) < 2 or not 0 <= rank <= min(widths):
        raise ConfigError(
            f"a deep linear net must have 2 widths or more, and a rank that fits: got {widths}, "
            f"rank {rank}"
        )
    excess = sorted(width - rank for width in widths)
    k, s = 2, excess[0] + excess[1]
    while k < len(excess) and s >= (k - 1) * excess[k]:
        s += excess[k]
        k += 1
    ell = k - 1
    c = -(-s // ell)
    a = s - (c - 1) * ell
    pairs = sum(x * y for x, y in combinations(excess[:k], 2))
    regular_part = rank * (widths[0] + widths[-1]) - rank**2
    value = regular_part / 2 + (a * (ell - a) - (ell - 1) * s**2) / (4 * ell) + pairs / 2
    return LearningCoefficient(value, a * (ell - a) + 1)


def normal_crossing(halves: Sequence[int]) -> LearningCoefficient:
    """Return that of ``K = prod_i w_i^(2 k_i)`` at 0: 1 / (2 max k), m the number of maxima.

    Args:
        halves: k_1, k_2, ...; 0 for a direction that does nothing.

    Raises:
        ConfigError: none is above 0.
    """
    if not halves or min(halves) < 0 or (top := max(halves)) == 0:
        raise ConfigError(f"a normal crossing must have an exponent above 0: got {halves}")
    return LearningCoefficient(1 / (2 * top), list(halves).count(top))


def regular(dimensions: int) -> LearningCoefficient:
    """Return d / 2, that of a model with d identifiable parameters."""
    return LearningCoefficient(dimensions / 2, 1)
