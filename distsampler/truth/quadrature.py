"""Exact finite values: moments of t K under ``p(w) ~ exp(-t K(w) - gamma/2 |w - w*|^2)``."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distsampler.errors import ConfigError, DistsamplerError
from distsampler.facts import Posterior

Array = NDArray[np.float64]

POINTS = {1: 4_000, 2: 1_000}  # on each axis, by dimensions
NEAR, FAR = 1e-7, 12.0  # the finest scale around 0, and how many prior widths are covered
AGREEMENT = 1e-6  # relative, of n and 2 n points


class Exact(NamedTuple):
    """Moments of t K; the standard error of a mean of k independent draws is sqrt(variance / k)."""

    mean: float
    variance: float


def linear_regression(curvature: ArrayLike, nbeta: float, localization: float) -> Exact:
    """Return the moments of a quadratic loss, ``K = 1/2 sum_i h_i (w_i - w*_i)^2``.

    ``t E[K] = 1/2 sum_i nbeta h_i / (nbeta h_i + gamma)``: each direction is Gaussian.

    Args:
        curvature: h, eigenvalues of the Hessian of the mean loss (for squared error, twice the
            second moment of the inputs, once an output).
        nbeta: inverse temperature times n.
        localization: gamma.
    """
    h = np.asarray(curvature, dtype=np.float64)
    share = nbeta * h / Posterior(nbeta, localization).kappa(h)
    return Exact(float(share.sum() / 2), float((share**2).sum() / 2))


def quadrature(
    loss: Callable[..., Array],
    t: float,
    localization: float = 1.0,
    anchor: Sequence[float] = (0.0, 0.0),
) -> Exact:
    """Return the moments of any loss in one or two dimensions that is singular at the axes only.

    The trapezoidal rule in s, ``w = sinh(s) 1e-7``: all scales around 0 are resolved alike, and the
    rule converges exponentially. Computed twice, the second time with twice the points.

    Args:
        loss: K of one array per coordinate, which broadcast.
        t: inverse temperature times n.
        localization: gamma, above 0.
        anchor: w*, one number per dimension.

    Raises:
        ConfigError: there are more than two dimensions, or gamma is not above 0.
        DistsamplerError: the two results differ by more than 1e-6.

    Example:
        >>> round(quadrature(lambda w: w**4, t=579.0, anchor=(0.0,)).mean, 4)
        0.2465
    """
    if len(anchor) not in POINTS or localization <= 0:
        raise ConfigError(
            "quadrature needs one or two dimensions and a localization (gamma) above 0: got "
            f"{len(anchor)}, {localization}"
        )
    points = POINTS[len(anchor)]
    coarse, fine = (_trapezoid(loss, t, localization, anchor, n) for n in (points, 2 * points))
    if not np.allclose(coarse, fine, rtol=AGREEMENT, atol=0.0):
        raise DistsamplerError(
            f"quadrature must not depend on its points: got {coarse} with {points} on an axis, "
            f"{fine} with twice as many; gamma may be too large or K singular off the axes"
        )
    return fine


def _trapezoid(
    loss: Callable[..., Array], t: float, gamma: float, anchor: Sequence[float], points: int
) -> Exact:
    axes = [_axis(center, gamma, points) for center in anchor]
    grids = np.meshgrid(*(w for w, _ in axes), indexing="ij", sparse=True)
    measure = np.ones(())
    for _, dw in axes:
        measure = np.multiply.outer(measure, dw)
    tk = t * loss(*grids)
    prior = sum(gamma / 2 * (w - a) ** 2 for w, a in zip(grids, anchor, strict=True))
    energy = tk + prior
    weight = measure * np.exp(energy.min() - energy)
    weight /= weight.sum()
    mean = float((weight * tk).sum())
    return Exact(mean, float((weight * (tk - mean) ** 2).sum()))


def _axis(center: float, gamma: float, points: int) -> tuple[Array, Array]:
    """Return nodes w and their dw, evenly spaced in s where w = NEAR sinh(s)."""
    end = np.arcsinh((abs(center) + FAR / np.sqrt(gamma)) / NEAR)
    s = np.linspace(-end, end, points)
    return NEAR * np.sinh(s), NEAR * np.cosh(s) * (s[1] - s[0])
