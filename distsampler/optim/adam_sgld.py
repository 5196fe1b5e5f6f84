"""Langevin dynamics with the two moments of Adam."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks
from distsampler.optim.adaptive import Adaptive
from distsampler.optim.kernels import add_preconditioned_force, move
from distsampler.optim.layout import Layout


class AdamSGLD(Adaptive):
    """RMSPropSGLD whose drift uses a running mean of the gradient.

    ``m <- beta1 m + (1 - beta1) g``; v and P as :class:`RMSPropSGLD`;
    ``dw = sqrt(lr P) sigma N(0, I) - (lr/2) P (nbeta m / (1 - beta1^t) + gamma (w - w*) + lam w)``

    Source: after Kim, Song & Liang 2020 and Hitchcock & Hoogland 2507.21449. m and v see the
    gradient of the loss only. A drift with memory does not leave the posterior invariant, frozen
    or not: on a quadratic the law is that of a linear recursion in (w, m), and its bias is
    (1 + beta1) / (1 - beta1) times SGLD's, to first order: 19 times at beta1 = 0.9. Prefer
    RMSPropSGLD or LMSGLD where the number matters.

    Args:
        params: See :class:`Sampler`, as for every option not listed here.
        beta1: Memory of m, in [0, 1).
        beta2, stability, freeze_after: See :class:`Adaptive`; m is never frozen.
    """

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
        beta1: float = 0.9,
        beta2: float = 0.99,
        stability: float = 0.1,
        freeze_after: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(locals())

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.fraction(group, "beta1", "pass the memory of the mean gradient, such as 0.9")

    def _begin(self, layout: Layout) -> None:
        super()._begin(layout)
        self._start(layout, "mean", 0.0)

    def _step_group(self, layout: Layout) -> None:
        group = layout.group
        lr, sigma, beta1 = group["lr"], float(group["noise_level"]), group["beta1"]
        unbiased = 1 - beta1 ** (group["steps"] + 1)
        self._adapt(layout)  # v and P
        for at in self._points(layout):
            m = at.column("mean")
            self._draw(at, math.sqrt(lr) * sigma)  # step = sqrt(lr) sigma N(0, I)
            torch._foreach_mul_(m, beta1)  # m = beta1 m + (1 - beta1) g
            if at.grads:  # g is 0 where there is none
                torch._foreach_add_(at.pulled(m), at.grads, alpha=1 - beta1)
            u = at.u._replace(nbeta=at.u.nbeta / unbiased)
            smooth = at._replace(grads=m, with_grad=None, u=u)
            # step = sqrt(P) step - (lr/2) P (nbeta m / (1 - beta1^t) + gamma (w - w*) + lam w)
            add_preconditioned_force(smooth, lr / 2, at.column("root"))
            move(at)  # w += step
