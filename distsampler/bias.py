"""The biases that a sampler's step can be expected to have, in units of the LLC.

Around a point the loss is taken as quadratic. In a direction of curvature h, with
``kappa = nbeta h + gamma + lam``, the LLC is ``1/2 nbeta h / kappa``, and a discretised chain has
that times a factor. With x = lr kappa / 4, v the gradient's variance between examples there and
``u = lr nbeta^2 / (4 m)``, m the batch size::

    sgld     1/(1 - x) + u v / (1 - x)                    less u d / (1 - x), the heat correction's
    lmsgld   1         + u v / (1 - x)                    less u d
    sghmc    1/(1 - y) + (2 / alpha) u v / (1 - y)        y = 2 x / (2 - alpha)
    sgnht    (A + 2 u v) / xi,  xi = 1 - sqrt(1 - 2 (A + 2 u mean v))
    badodab  (A + 2 u v) / xi,  xi = A + 2 u mean v
    mala     1

(d: what of v the correction removes.) The first three are exact on a quadratic, of the
thermostats, small lr kappa is assumed (badodab: small xi). What is left when v = 0 is the
discretisation; what v adds is heat. Directions of negative curvature contribute nothing.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

STEEPEST = 0.9  # of lr kappa / 4, in a prediction: at 1 a chain has no law
BEARABLE = 0.5  # of lr kappa / 4, beyond which a step is called too large

Law = Literal["sgld", "lmsgld", "sghmc", "sgnht", "badodab", "mala"]


class Ritz(NamedTuple):
    """What one walk of Lanczos saw: sums over it stand for traces over all directions.

    ``sum(weights f(values))`` is tr f(H), ``sum(noise f(values))`` is tr f(H) C, and
    ``sum(removed f(values))`` is tr f(H) D, in expectation over walks.
    """

    values: NDArray[np.float64]
    """Curvatures of the mean loss, rising."""
    weights: NDArray[np.float64]
    noise: NDArray[np.float64]
    """With the covariance C of the gradient between examples."""
    removed: NDArray[np.float64]
    """With the diagonal D that a heat correction takes away."""

    @property
    def largest(self) -> float:
        """The largest curvature, from below."""
        return float(self.values[-1])


class Step(NamedTuple):
    """What of a sampler's step its biases depend on."""

    law: Law
    lr: float
    nbeta: float
    pull: float
    """Localisation and weight decay, gamma + lam."""
    batch_size: int
    friction: float = 0.0
    """Alpha of SGHMC, A of SGNHT."""

    @property
    def heat(self) -> float:
        """U = lr nbeta^2 / (4 m): of v, the heat beside the injected noise."""
        return self.lr * self.nbeta**2 / (4 * self.batch_size)


class Bias(NamedTuple):
    """Predicted errors of the LLC."""

    discretisation: float
    heat: float


def predict(step: Step, ritz: Ritz) -> Bias:
    """The biases of a step around the point where the spectrum was measured."""
    up = ritz.values > 0
    h, weights, noise, removed = (array[up] for array in ritz)
    kappa = step.nbeta * h + step.pull
    share = step.nbeta * h / kappa / 2
    match step.law:
        case "mala":
            return Bias(0.0, 0.0)
        case "sgnht" | "badodab":
            return _thermostat(step, ritz, float(weights @ share), float(noise @ share))
        case "sghmc":
            over = 1 / (1 - np.minimum(step.lr * kappa / 2 / (2 - step.friction), STEEPEST))
            heat = 2 / step.friction * step.heat * noise @ (share * over)
        case "sgld" | "lmsgld":
            over = 1 / (1 - np.minimum(step.lr * kappa / 4, STEEPEST))
            taken = removed @ (share * over if step.law == "sgld" else share)
            heat = step.heat * (noise @ (share * over) - taken)
    second_order = step.law == "lmsgld"
    return Bias(0.0 if second_order else float(weights @ (share * (over - 1))), float(heat))


def _thermostat(step: Step, ritz: Ritz, llc: float, noisy: float) -> Bias:
    """A thermostat keeps the mean temperature: heat only goes from direction to direction."""

    def friction(warmth: float) -> float:
        if step.law == "badodab":
            return warmth
        return 1 - math.sqrt(1 - 2 * min(warmth, STEEPEST / 2))

    mean = float(ritz.noise.sum() / ritz.weights.sum())
    alone = step.friction / friction(step.friction) * llc
    xi = friction(step.friction + 2 * step.heat * max(mean, 0.0))
    whole = (step.friction * llc + 2 * step.heat * noisy) / xi
    return Bias(alone - llc, whole - alone)
