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

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from distsampler.optim import checks
from distsampler.optim.layout import Point
from distsampler.optim.readouts import Scalar
from distsampler.optim.sampler import Sampler


class Factor(NamedTuple):
    """What remains of a chunk's noise."""

    variance: object
    heat: float
    adapted: int | None
    flat: Tensor
    """The factor of each entry."""
    clipped: Tensor
    """Share of all trainable entries that have no noise left, 0-d."""


class HeatCorrected(Sampler):
    """A sampler whose noise can be reduced by the heat of minibatches.

    Args:
        gradient_variance: Variance v of the gradient between single examples, a number or one
            tensor a parameter (its shape); None: no correction.
        batch_size: Examples a minibatch, m; needed with ``gradient_variance``.
    """

    heat_options = ("gradient_variance", "batch_size")
    tensor_options: ClassVar[Mapping[str, str]] = {
        **Sampler.tensor_options,
        "gradient_variance": "pass a number, or correct_heat=True, which measures it",
    }

    noise_clipped = Scalar()
    """Share of the trainable entries that get no noise: their heat cannot be removed."""

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
        name = "gradient_variance"
        if not isinstance(group[name], float | int):
            group[name] = checks.per_parameter(group[name], group["params"], name)

    def _cool(self, at: Point, root: list[Tensor] | None = None) -> None:
        """Step <- step sqrt(max(0, 1 - lr P nbeta^2 v / (4 m sigma^2))), ``root`` that of P."""
        group, layout = at.layout.group, at.layout
        variance, sigma = group["gradient_variance"], group["noise_level"]
        if variance is None or not sigma:
            return
        heat = group["lr"] * at.u.nbeta**2 / (4 * group["batch_size"] * sigma**2)
        adapted = group.get("adapted")  # P changes with the number of its updates
        factor: Factor | None = layout.derived.get(at.chunk.number)
        if factor is None or not (factor[1:3] == (heat, adapted) and factor.variance is variance):
            flat, clipped = _factor(at, variance, heat, root)
            entries = sum(layout.dimension for layout in self._current_layouts())
            factor = Factor(variance, heat, adapted, flat, clipped / entries)
            layout.derived[at.chunk.number] = factor
        at.flat.mul_(factor.flat)
        self._readouts.add(layout, "noise_clipped", factor.clipped)


def _factor(
    at: Point, variance: float | list[Tensor | None], heat: float, root: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return the factor of each entry, and the number of entries where it is clipped at zero."""
    flat = torch.empty_like(at.flat)
    sizes = [view.numel() for view in at.step]
    pieces = [p.view(v.shape) for p, v in zip(torch.split(flat, sizes), at.step, strict=True)]
    if isinstance(variance, list):
        given = zip((variance[i] for i in at.layout.positions), at.layout.weights, strict=True)
        columns = [torch.zeros_like(w) if v is None else v for v, w in given]
        torch._foreach_copy_(pieces, at.chunk.part(columns))
    else:
        flat.fill_(variance)
    if root is not None:
        torch._foreach_mul_(pieces, root)
        torch._foreach_mul_(pieces, root)
    flat.mul_(-heat).add_(1.0)
    below = flat <= 0
    if at.chunk.frozen is not None:
        below.logical_and_(~at.chunk.frozen)
    return flat.clamp_(min=0.0).sqrt_(), below.sum()
