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
thermostats, small lr kappa is assumed (badodab: small xi); their xi starts at that of v = 0 and
comes to the one above in about A / lr steps, which at the steps of large problems is never. What is
left when v = 0 is the discretisation; what v adds is heat. Directions of negative curvature
contribute nothing.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distsampler import facts
from distsampler.config import RunConfig
from distsampler.facts import Facts, Posterior

STEEPEST = 0.9  # of lr kappa / 4, in a prediction: at 1 a chain has no law
GENTLE = 0.1  # of lr kappa / 4: what is advised
BEARABLE = 0.5  # of lr kappa / 4, beyond which a step is called too large

Law = Literal["sgld", "lmsgld", "sghmc", "sgnht", "badodab", "mala"]
PREDICTED = ("discretisation_bias", "heat_bias")


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
    posterior: Posterior
    batch_size: int
    friction: float = 0.0
    """Alpha of SGHMC, A of SGNHT."""

    @property
    def heat(self) -> float:
        """U = lr nbeta^2 / (4 m): of v, the heat beside the injected noise."""
        return self.lr * self.posterior.nbeta**2 / (4 * self.batch_size)


class Bias(NamedTuple):
    """Predicted errors of the LLC."""

    discretisation: float
    heat: float


def predict(step: Step, ritz: Ritz, made: float = math.inf) -> Bias:
    """The biases of a step around the point where the spectrum was measured.

    Args:
        step: of the sampler.
        ritz: the spectrum there.
        made: steps that the chain has made: a thermostat needs about A / lr of them to answer.
    """
    up = ritz.values > 0
    h, weights, noise, removed = (array[up] for array in ritz)
    kappa = step.posterior.kappa(h)
    share = step.posterior.nbeta * h / kappa / 2
    match step.law:
        case "mala":
            return Bias(0.0, 0.0)
        case "sgnht" | "badodab":
            return _thermostat(step, ritz, float(weights @ share), float(noise @ share), made)
        case "sghmc":
            over = 1 / (1 - np.minimum(step.lr * kappa / 2 / (2 - step.friction), STEEPEST))
            heat = 2 / step.friction * step.heat * noise @ (share * over)
        case "sgld" | "lmsgld":
            over = 1 / (1 - np.minimum(step.lr * kappa / 4, STEEPEST))
            taken = removed @ (share * over if step.law == "sgld" else share)
            heat = step.heat * (noise @ (share * over) - taken)
    second_order = step.law == "lmsgld"
    return Bias(0.0 if second_order else float(weights @ (share * (over - 1))), float(heat))


def _thermostat(step: Step, ritz: Ritz, llc: float, noisy: float, made: float) -> Bias:
    """A thermostat comes to keep the mean temperature: then heat only changes direction."""

    def friction(warmth: float) -> float:
        if step.law == "badodab":
            return warmth
        return 1 - math.sqrt(1 - 2 * min(warmth, STEEPEST / 2))

    mean = float(ritz.noise.sum() / ritz.weights.sum())
    start = friction(step.friction)
    alone = step.friction / start * llc
    settled = friction(step.friction + 2 * step.heat * max(mean, 0.0))
    xi = start - math.expm1(-step.lr * made / step.friction) * (settled - start)
    whole = (step.friction * llc + 2 * step.heat * noisy) / xi
    return Bias(alone - llc, whole - alone)


def unpredicted(config: RunConfig, law: facts.Law | None) -> dict[str, str]:
    """Return which biases of a run are not predicted, by their names in sample_stats, and why."""
    name, options = config.sampler.name, config.sampler.options
    if not config.watch:
        why = "nothing was measured along the run: watch is off"
    elif law is None:
        why = f"the law of {name!r} on a quadratic is not known here"
    elif options.get("noise_level", 1.0) != 1.0:
        why = "with a noise_level other than 1 the law is not that of the posterior"
    elif options.get("bounding_box_size") is not None:
        why = "a box changes the law"
    else:
        heat = "batches of an epoch bring less heat than independent ones, how much less is unknown"
        return {"heat_bias": heat} if config.batches == "epoch" else {}
    return dict.fromkeys(PREDICTED, why)


def too_large(curvature: NDArray[np.float64], known: Facts) -> str | None:
    """Return a sentence where a step is, or has become, too large; None where it is not.

    Args:
        curvature: of the mean loss, as measured along some chains, any shape.
        known: what is known of the run.
    """
    if known.law is None or known.law.limit is None or known.lr is None or not curvature.size:
        return None
    # For SGLD lr kappa / 4: at 1 the chain has no law.
    steepness = float((known.lr * known.posterior.kappa(curvature) / known.law.limit).max())
    if not steepness > BEARABLE:
        return None
    return (
        f"the step is too large: lr (nbeta h + gamma) / 4 reached {steepness:.2g}, beyond "
        f"{BEARABLE}, where the largest curvature h was {curvature.max():.4g}; lower sampler.lr to "
        f"about {known.lr * GENTLE / steepness:.2g}"
    )
