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
        """The first two terms of ``t E[K]``: lambda - (m - 1) / log t (Watanabe 2009, theorem 6.6).

        Args:
            t: Inverse temperature times n, above 1.
        """
        return self.value - (self.multiplicity - 1) / math.log(t)


def deep_linear(widths: Sequence[int], rank: int) -> LearningCoefficient:
    """Of a deep linear network, ``y = W_L ... W_1 x`` (Aoyagi 2024, theorem 1).

    With ``M_s = H_s - r`` sorted, l + 1 of them enter: as many as keep the sum S of those before at
    least (number before - 1) times the next. ``c = ceil(S / l)``, ``a = S - (c - 1) l``,
    ``lambda = (r (H_0 + H_L) - r^2) / 2 + a (l - a) / (4 l) - (l - 1) S^2 / (4 l)
    + 1/2 sum_{i<j<=l} M_i M_j``, ``m = a (l - a) + 1``.

    Args:
        widths: H_0 .. H_L, from input to output.
        rank: r of the true product.

    Raises:
        ConfigError: There are fewer than two widths, or the rank does not fit through all of them.
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


def reduced_rank(inputs: int, hidden: int, outputs: int, rank: int) -> LearningCoefficient:
    """Of reduced-rank regression, ``y = B A x`` (Aoyagi & Watanabe 2005).

    Args:
        inputs: M.
        hidden: H, rows of A and columns of B.
        outputs: N.
        rank: r of the true product.

    Raises:
        ConfigError: The rank does not fit.
    """
    m, h, n, r = inputs, hidden, outputs, rank
    if not 0 <= r <= min(m, h, n):
        raise ConfigError(f"the rank must be at most {min(m, h, n)}, the least width: got {r}")
    if m + h < n + r:  # C2
        return LearningCoefficient((h * m - h * r + n * r) / 2, 1)
    if n + h < m + r:  # C3
        return LearningCoefficient((h * n - h * r + m * r) / 2, 1)
    if m + n < h + r:  # C4
        return LearningCoefficient(m * n / 2, 1)
    eighths = -((h + r) ** 2) - m**2 - n**2 + 2 * (h + r) * (m + n) + 2 * m * n  # C1
    odd = (m + h + n + r) % 2
    return LearningCoefficient((eighths + odd) / 8, 1 + odd)


def normal_crossing(halves: Sequence[int]) -> LearningCoefficient:
    """Of ``K = prod_i w_i^(2 k_i)`` at 0: lambda = 1 / (2 max k), m how often the maximum occurs.

    Args:
        halves: k_1, k_2, ...; 0 for a direction that does nothing.

    Raises:
        ConfigError: None is above 0.
    """
    if not halves or min(halves) < 0 or (top := max(halves)) == 0:
        raise ConfigError(f"a normal crossing must have an exponent above 0: got {halves}")
    return LearningCoefficient(1 / (2 * top), list(halves).count(top))


def regular(dimensions: int) -> LearningCoefficient:
    """Of a model with d identifiable parameters: d / 2.

    Args:
        dimensions: d.
    """
    return LearningCoefficient(dimensions / 2, 1)
