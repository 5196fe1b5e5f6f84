"""The law of a sampler's chain on a quadratic, from which its bias is predicted.

Around a point the loss is taken as quadratic. In a direction of curvature h, with
``kappa = nbeta h + gamma + lam``, the LLC is ``1/2 nbeta h / kappa``, and a discretised chain has
that times a factor, which the ``law`` of each sampler states. In these factors x = lr kappa / 4, v
is the gradient's variance between examples in that direction, and ``u = lr nbeta^2 / (4 m)``, m the
batch size. What differs from 1 at v = 0 is the discretisation; what v adds is heat. Directions of
negative curvature contribute nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STEEPEST = 0.9  # of lr kappa / 4, in a prediction: at 1 a chain has no law

Array = NDArray[np.float64]


class Bias(NamedTuple):
    """Predicted errors of the LLC."""

    discretisation: float
    heat: float


class LocalQuadratic(NamedTuple):
    """A quadratic and a step on it; the arrays have one entry a direction."""

    lr: float
    kappa: Array
    share: Array
    """The LLC of a direction, ``1/2 nbeta h / kappa``."""
    weights: Array
    """``weights @ f`` is the sum of f over all directions,"""
    noise: Array
    """``noise @ f`` that of v f,"""
    removed: Array
    """``removed @ f`` that of d f, d what a heat correction takes from v."""
    mean_noise: float
    """v, averaged over all directions."""
    heat: float
    """u: the heat of a v of 1, beside the injected noise."""
    steps: float
    """Steps that the chain has made."""


class QuadraticLaw(NamedTuple):
    """What is known of a sampler's chain on a quadratic."""

    name: str
    """What the law is called where it is recorded."""
    limit: float | None
    """``lr kappa`` at which the chain diverges; None: it never does."""
    safe: float | None
    """``lr kappa`` that leaves the curvature room to grow; None: calibration does not choose it."""
    bias: Callable[[LocalQuadratic], Bias]
    friction_bias: float = 0.0
    """Discretisation bias by friction, relative to the LLC."""


def inflation(x: Array) -> Array:
    """Return ``1 / (1 - x)``, large where the chain has no law."""
    return np.asarray(1 / (1 - np.minimum(x, STEEPEST)))
