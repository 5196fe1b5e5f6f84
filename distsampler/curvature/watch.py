"""The curvature along a chain, and the biases that its step has there.

It is measured at a chain's start, at step 400, and then at steps a factor 1.5 apart: positions that
depend on nothing but ``thin``, so that a longer run repeats a shorter one. A measurement is one
walk of Lanczos on a few rows, drawn for it alone, and holds until the next.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distsampler.analysis.bias import PREDICTED, unpredicted
from distsampler.curvature.hessian import Curvature, Ritz, measure
from distsampler.draws import CURVATURE, DISCRETISATION_BIAS, HEAT_BIAS, Variable
from distsampler.errors import WorkFailedError
from distsampler.facts import Posterior
from distsampler.models.replica import ChainSpec, Replica
from distsampler.models.sampler import law_of, signature_options
from distsampler.optim.law import Bias, LocalQuadratic, QuadraticLaw
from distsampler.seeding import Stream, generator

FIRST, FACTOR = 400, 1.5  # steps
LEAST, MOST = 128, 512  # rows of a measurement; between them, those of a batch

MEANINGS = {
    CURVATURE: "largest curvature of the mean loss, as last measured at or before w_t",
    DISCRETISATION_BIAS: "error of the LLC that the step size brings, predicted there",
    HEAT_BIAS: "error of the LLC that minibatch noise brings, predicted there",
}


def watched(spec: ChainSpec) -> tuple[Variable, ...]:
    """Return what a draw holds of the curvature."""
    if not spec.config.watch:
        return ()
    left_out = unpredicted(spec.config, spec.facts.law)
    return tuple(
        Variable(name, "sample_stats", meaning)
        for name, meaning in MEANINGS.items()
        if name not in left_out
    )


def due(first: int, stop: int) -> bool:
    """Return whether a measurement falls into the steps from ``first`` to before ``stop``."""
    position = FIRST
    while position < first:
        position = math.ceil(position * FACTOR)
    return position < stop


class Step(NamedTuple):
    """A sampler's step: what its biases depend on beside the curvature."""

    law: QuadraticLaw
    lr: float
    posterior: Posterior
    batch_size: int

    @property
    def heat(self) -> float:
        """``u = lr nbeta^2 / (4 m)``, the heat beside the injected noise where v is 1."""
        return self.lr * self.posterior.nbeta**2 / (4 * self.batch_size)


class Watch:
    """What is known of the curvature along one chain.

    ``variance`` is the gradient's between examples at w*, for each flat tensor; None: unknown.
    """

    def __init__(
        self, spec: ChainSpec, replica: Replica, chain: int, variance: list[Tensor] | None
    ) -> None:
        self._spec, self._replica, self._chain = spec, replica, chain
        self._names = [variable.name for variable in watched(spec)]
        self._step = step_of(spec)
        self._removed = None if self._step is None else _removed(spec, self._step, variance)
        self.values: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Return whether the draw that ends in a step needs a measurement."""
        return due(step - self._spec.config.thin + 1, step + 1)

    def measure(self, step: int, span: tuple[int, int]) -> None:
        """Measure at the present weights, on rows of the span that the chain draws from there."""
        rng = generator(self._spec.config.seed, Stream.WATCH, self._chain, step)
        n = span[1] - span[0]
        rows = span[0] + np.sort(rng.choice(n, min(n, count(self._spec)), replace=False))
        signs = torch.Generator(self._replica.device)
        signs.manual_seed(int(rng.integers(2**62)))
        try:
            curvature = Curvature(self._replica, self._spec, rows, (self._chain, step))
            ritz = measure(curvature, signs, removed=self._removed)
        except torch.OutOfMemoryError:
            raise  # the place's fault, not the loss's
        except RuntimeError as error:
            raise WorkFailedError(
                f"chain {self._chain} could not measure the curvature at step {step}: "
                f"{type(error).__name__}: {error}; set watch=False to go without"
            ) from error
        values = {CURVATURE: ritz.largest}
        if self._step is not None:
            bias = predict(self._step, ritz, step)
            values |= {DISCRETISATION_BIAS: bias.discretisation, HEAT_BIAS: bias.heat}
        self.values = {name: values[name] for name in self._names}


def count(spec: ChainSpec) -> int:
    """Return how many rows are measured: a batch, within bounds; where it is one thing, two."""
    batch = spec.config.batch_size
    size = min(max(batch, LEAST), MOST)
    if spec.config.mode == "train" or spec.kind.coupled:
        size = max(size, 2 * batch)
    return min(size, len(spec.rows), max(2, spec.config.microbatch or size))


def obstacle(spec: ChainSpec, device: torch.device) -> str:
    """Return why the curvature cannot be watched; empty if it can, or is not asked for.

    A double backward is tried, on four examples.
    """
    if not spec.config.watch:
        return ""
    rows = np.arange(min(4, len(spec.rows)))
    try:
        Curvature(Replica(spec, device), spec, rows).check()
    except torch.OutOfMemoryError:
        raise  # the place's fault, not the loss's
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def step_of(spec: ChainSpec) -> Step | None:
    """Return the step of a run's sampler; None where nothing is predicted of it."""
    config, law = spec.config, law_of(spec.config.sampler)
    if law is None or unpredicted(config, spec.facts.law).keys() >= set(PREDICTED):
        return None
    lr = signature_options(config.sampler)["lr"]
    return Step(law, lr, spec.posterior, config.batch_size)


def predict(step: Step, ritz: Ritz, made: float = math.inf) -> Bias:
    """Return the biases of a step around the point where the spectrum was measured.

    ``made`` is the number of steps so far: a thermostat needs about A / lr of them to answer.
    """
    up = ritz.values > 0
    h, weights, noise, removed = (array[up] for array in ritz)
    kappa = step.posterior.kappa(h)
    share = step.posterior.nbeta * h / kappa / 2
    mean_noise = float(ritz.noise.sum() / ritz.weights.sum())
    around = LocalQuadratic(
        step.lr, kappa, share, weights, noise, removed, mean_noise, step.heat, made
    )
    return step.law.bias(around)


def _removed(spec: ChainSpec, step: Step, variance: list[Tensor] | None) -> Tensor | None:
    """The gradient variance that the heat correction takes away: at most all injected noise."""
    options = signature_options(spec.config.sampler)
    fixed, limit = options.get("gradient_variance"), 1 / max(step.heat, 1e-300)
    if variance is not None:
        return torch.cat(variance).clamp(max=limit)
    if fixed is None:
        return None
    batch = options.get("batch_size") or step.batch_size
    return torch.tensor(min(fixed * step.batch_size / batch, limit))
