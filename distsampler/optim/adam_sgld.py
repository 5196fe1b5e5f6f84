"""Langevin dynamics with the two moments of Adam."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks, kernels
from distsampler.optim.adaptive import Adaptive
from distsampler.optim.kernels import Potential
from distsampler.optim.layout import Chunk, Plan, Point


class AdamSGLD(Adaptive):
    """RMSPropSGLD whose drift uses a running mean of the gradient.

    ``m <- beta1 m + (1 - beta1) g``; v and P as :class:`RMSPropSGLD`;
    ``dw = -(lr/2) P (nbeta m / (1 - beta1^t) + gamma (w - w*) + lam w) + sqrt(lr P) sigma N(0, I)``

    Source: after Kim, Song & Liang 2020 and Hitchcock & Hoogland 2507.21449. m and v see the
    gradient of the loss only. A drift with memory does not leave the posterior invariant, frozen
    or not: on a quadratic the law is that of a linear recursion in (w, m), and its bias is
    (1 + beta1) / (1 - beta1) times SGLD's, to first order: 19 times at beta1 = 0.9. Prefer
    RMSPropSGLD or LMSGLD where the number matters.

    Args:
        params: See :class:`Sampler`, as for every option not listed here.
        noise_level: sigma; any value other than 1 warns.
        beta1: Memory of m, in [0, 1).
        beta2: Memory of v, in [0, 1).
        stability: a, added to the root of v; above 0.
        freeze_after: Steps after which v is fixed (m goes on). None: never, with a warning.

    Raises:
        ConfigError: See :class:`Sampler`.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> sampler = AdamSGLD([w], lr=1e-3, nbeta=100.0, freeze_after=500)
        >>> loss = w.square().sum()
        >>> loss.backward()
        >>> sampler.step()
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
        defaults: dict[str, object] = {
            "lr": lr,
            "noise_level": noise_level,
            "weight_decay": weight_decay,
            "localization": localization,
            "nbeta": nbeta,
            "bounding_box_size": bounding_box_size,
            "save_noise": save_noise,
            "save_mala_vars": save_mala_vars,
            "optimize_over": optimize_over,
            "noise_norm": noise_norm,
            "grad_norm": grad_norm,
            "weight_norm": weight_norm,
            "distance": distance,
            "beta1": beta1,
            "beta2": beta2,
            "stability": stability,
            "freeze_after": freeze_after,
        }
        super().__init__(params, defaults, generator)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.fraction(group, "beta1", "pass the memory of the mean gradient, such as 0.9")

    def _begin(self, group: dict[str, Any], plan: Plan) -> None:
        super()._begin(group, plan)
        self._start(plan, "mean", 0.0)

    def _increment(
        self, group: dict[str, Any], plan: Plan, chunk: Chunk, at: Point, u: Potential
    ) -> None:
        mean = chunk.part(plan.column(self.state, "mean"))
        kernels.average(at, mean, group["beta1"])
        unbiased = 1 - group["beta1"] ** (group["steps"] + 1)
        smooth = at._replace(grads=mean, with_grad=None)
        root = chunk.part(plan.columns["root"])
        kernels.preconditioned(
            chunk, smooth, u._replace(nbeta=u.nbeta / unbiased), group["lr"], root
        )
