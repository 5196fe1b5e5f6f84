"""Heat correction: inject less noise where the minibatch gradient already brings some.

A minibatch gradient of batch size m has variance v/m, v the variance between examples. Over a step
it adds ``(lr^2/4) nbeta^2 v / m`` to the variance of w, beside the ``lr`` that Langevin dynamics
injects: the chain is too hot. Injecting that much less removes the heat to first order::

    factor^2 = max(0, 1 - lr nbeta^2 v / (4 m))

per coordinate, as the noise terms of SGHMC (Chen et al. 2014, section 3.3) and SGFS (Ahn,
Korattikara & Welling 2012) do. Where the minibatch brings more than the step may inject nothing is
left to take away: those entries are clipped, and their share is reported as ``noise_clipped``. Only
the diagonal is removed; correlated gradient noise keeps its other part.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distsampler.optim import checks
from distsampler.optim.kernels import Potential
from distsampler.optim.layout import Chunk, Plan
from distsampler.optim.sampler import Sampler


class Factor(NamedTuple):
    """What remains of a chunk's noise."""

    chunk: Chunk
    variance: object
    heat: float
    flat: Tensor
    clipped: Tensor
    """Number of entries that have none left, 0-d."""

    def fits(self, chunk: Chunk, variance: object, heat: float) -> bool:
        """Whether it was computed from these."""
        return self.chunk is chunk and self.variance is variance and self.heat == heat


class HeatCorrected(Sampler):
    """A sampler with the options ``gradient_variance`` and ``batch_size``."""

    _factors: dict[tuple[int, int], Factor]

    @property
    def noise_clipped(self) -> Tensor:
        """Share of the trainable entries that get no noise: their heat cannot be removed; 0-d."""
        return self._readings.total("noise_clipped")

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        variance = group["gradient_variance"]
        if variance is None:
            return
        if isinstance(variance, float | int):
            checks.not_negative(group, "gradient_variance", "pass the variance between examples")
        checks.whole(group, "batch_size", "pass the number of examples of a minibatch", least=1)

    def _normalise(self, group: dict[str, Any]) -> None:
        super()._normalise(group)
        variance = group["gradient_variance"]
        if not isinstance(variance, float | int):
            group["gradient_variance"] = checks.per_parameter(
                variance, group["params"], "gradient_variance"
            )

    def _forget(self) -> None:
        super()._forget()
        self._factors = {}

    def _cool(
        self,
        group: dict[str, Any],
        plan: Plan,
        chunk: Chunk,
        u: Potential,
        root: list[Tensor] | None = None,
    ) -> None:
        """Buffer <- N sqrt(max(0, 1 - lr P nbeta^2 v / (4 m sigma^2))), ``root`` that of P.

        The factors are kept until something they rest on changes; a sampler whose P changes
        empties ``_factors``.
        """
        variance, sigma = group["gradient_variance"], group["noise_level"]
        if variance is None or not sigma:
            return
        heat = group["lr"] * u.nbeta**2 / (4 * group["batch_size"] * sigma**2)
        key = (plan.index, chunk.number)
        factor = self._factors.get(key)
        if factor is None or not factor.fits(chunk, variance, heat):
            factor = _factor(variance, plan, chunk, heat, root)
            self._factors[key] = factor
        chunk.flat.mul_(factor.flat)
        self._readings.add(plan, "noise_clipped", factor.clipped / self._dimension)


def _factor(
    variance: float | list[Tensor | None],
    plan: Plan,
    chunk: Chunk,
    heat: float,
    root: list[Tensor] | None,
) -> Factor:
    flat = torch.empty_like(chunk.flat)
    pieces = chunk.view(flat)
    if isinstance(variance, list):
        chunk.gather([variance[i] for i in plan.positions], flat)
    else:
        flat.fill_(variance)
    if root is not None:
        torch._foreach_mul_(pieces, root)
        torch._foreach_mul_(pieces, root)
    flat.mul_(-heat).add_(1.0)
    below = flat <= 0
    if chunk.frozen is not None:
        below.logical_and_(~chunk.frozen)
    return Factor(chunk, variance, heat, flat.clamp_(min=0.0).sqrt_(), below.sum())
