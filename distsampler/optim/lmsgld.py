"""Langevin dynamics in the form of Leimkuhler and Matthews."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks
from distsampler.optim.heat_correction import HeatCorrected
from distsampler.optim.kernels import add_force, add_noise_pair, add_preconditioned_force, move
from distsampler.optim.law import Bias, LocalQuadratic, QuadraticLaw, inflation
from distsampler.optim.layout import Layout


class LMSGLD(HeatCorrected):
    """SGLD with the mean of two successive noises: second order at the same cost.

    ``dw = sqrt(lr) sigma (R_t + R_(t+1)) / 2 - (lr/2) (nbeta g + gamma (w - w*) + lam w)``

    Source: Leimkuhler & Matthews 2013, the large-friction limit of BAOAB. On a quadratic the
    stationary variance is exactly 1 / kappa at every stable step (lr kappa < 4); elsewhere the
    error is second order in lr. Takes one buffer more than SGLD, the last noise.

    With a ``preconditioner`` P (fixed, positive) drift and noise use lr P_i in place of lr.

    Args:
        params: See :class:`Sampler`, as for every option not listed here.
        gradient_variance, batch_size: See :class:`HeatCorrected`.
        preconditioner: One tensor a parameter (its shape), multipliers of lr; None: all 1.
    """

    hop_bias_known = True
    tensor_options: ClassVar[Mapping[str, str]] = {
        **HeatCorrected.tensor_options,
        "preconditioner": (
            "use the optimizer in a loop of your own, or rmsprop_sgld, which learns one"
        ),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        noise_level: float = 1.0,
        weight_decay: float = 0.0,
        localization: float = 0.0,
        nbeta: float | Callable[[int], float] = 1.0,
        bounding_box_size: float | None = None,
        save_noise: bool = False,
        save_mala_vars: bool = False,
        optimize_over: Tensor | list[Tensor | None] | None = None,
        noise_norm: bool = False,
        grad_norm: bool = False,
        weight_norm: bool = False,
        distance: bool = False,
        *,
        gradient_variance: float | list[Tensor | None] | None = None,
        batch_size: int | None = None,
        preconditioner: list[Tensor | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(locals())

    def _normalise(self, group: dict[str, Any]) -> None:
        super()._normalise(group)
        tensors = checks.per_parameter(group["preconditioner"], group["params"], "preconditioner")
        if not all(bool((t > 0).all()) for t in tensors or [] if t is not None):
            checks.refuse("a preconditioner must be positive", "an entry not above 0", "mend it")
        group["preconditioner"] = tensors

    def _begin(self, layout: Layout) -> None:
        self._start(layout, "last_noise", 1.0)
        if (multipliers := layout.group["preconditioner"]) is not None:
            pairs = zip((multipliers[i] for i in layout.positions), layout.weights, strict=True)
            layout.columns["root"] = [
                torch.ones_like(w) if t is None else t.to(w).sqrt() for t, w in pairs
            ]

    def _step_group(self, layout: Layout) -> None:
        lr, sigma = layout.group["lr"], layout.group["noise_level"]
        for at in self._points(layout):
            self._draw(at, 1.0)  # step = R_(t+1)
            add_noise_pair(at, at.column("last_noise"))  # step += R_t
            at.flat.mul_(math.sqrt(lr) * sigma / 2)  # step *= sqrt(lr) sigma / 2
            if "root" not in layout.columns:
                self._cool(at)
                add_force(at, lr / 2)  # step -= (lr/2) (nbeta g + gamma (w - w*) + lam w)
            else:
                root = at.column("root")
                self._cool(at, root)
                add_preconditioned_force(at, lr / 2, root)  # and all of it with lr P for lr
            move(at)  # w += step

    @classmethod
    def law(cls, options: Mapping[str, Any]) -> QuadraticLaw:
        """Return the exact law: ``1 + u v / (1 - x) - u d`` times the LLC."""
        return QuadraticLaw("lmsgld", limit=4.0, safe=0.7, bias=_bias)


def _bias(q: LocalQuadratic) -> Bias:
    hot = q.share * inflation(q.lr * q.kappa / 4)
    return Bias(0.0, float(q.heat * (q.noise @ hot - q.removed @ q.share)))
