"""Langevin dynamics preconditioned by the squares of the gradients."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks
from distsampler.optim.adaptive import Adaptive
from distsampler.optim.heat_correction import HeatCorrected
from distsampler.optim.kernels import add_preconditioned_force, move
from distsampler.optim.layout import Layout


class RMSPropSGLD(Adaptive, HeatCorrected):
    """SGLD with a step size for each coordinate: drift and noise both use lr P_i.

    ``v <- beta2 v + (1 - beta2) g^2``;
    ``P = 1 / (sqrt(v / (1 - beta2^t)) + stability)``, or of v itself without bias correction;
    ``dw = sqrt(lr P) sigma N(0, I) - (lr/2) P (nbeta g + gamma (w - w*) + lam w)``

    Source: Li et al. 2016, algorithm 1; Hitchcock & Hoogland 2507.21449, algorithm 3. They differ
    in where v starts and in what v is divided by:

    ================================ ================= ===================
    form                             ``initial_scale`` ``bias_correction``
    ================================ ================= ===================
    corrected as Adam's (default)    0                 True
    Hitchcock & Hoogland 2507.21449  1                 False
    devinterp 1.3.2 and 2.0.1        0                 False
    ================================ ================= ===================

    All have the same law once frozen: a quadratic with curvature kappa has variance
    1 / (kappa (1 - lr P kappa / 4)). devinterp's ``eps`` is ``stability``, outside the root, and
    its ``alpha`` is ``beta2``; both of its defaults are ours.

    Args:
        params: See :class:`Sampler`, as for every option not listed here.
        beta2, stability, freeze_after: See :class:`Adaptive`.
        initial_scale: v before the first step, at least 0.
        bias_correction: Divide v by 1 - beta2^t, which is right for a v that starts at 0; without
            it v itself is used.
        gradient_variance, batch_size: See :class:`HeatCorrected`.
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
        beta2: float = 0.99,
        stability: float = 0.1,
        freeze_after: int | None = None,
        initial_scale: float = 0.0,
        bias_correction: bool = True,
        gradient_variance: float | list[Tensor | None] | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(locals())

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.not_negative(group, "initial_scale", "pass what v starts at: 0 or 1")
        corrected = group["bias_correction"]
        if not isinstance(corrected, bool):
            checks.refuse("bias_correction must be True or False", repr(corrected), "pass one")
        if corrected and group["initial_scale"] > 0:
            checks.refuse(
                "bias_correction is for a second moment that starts at 0",
                f"initial_scale={group['initial_scale']!r}",
                "pass bias_correction=False with it, or leave initial_scale out",
            )

    def _begin(self, layout: Layout) -> None:
        new = [self.state[p] for p in layout.params if "square_avg" not in self.state[p]]
        super()._begin(layout)
        for state in new:
            state["square_avg"].fill_(layout.group["initial_scale"])

    def _learnt(self, group: dict[str, Any]) -> float:
        return super()._learnt(group) if group["bias_correction"] else 1.0

    def _step_group(self, layout: Layout) -> None:
        lr, sigma = layout.group["lr"], float(layout.group["noise_level"])
        self._adapt(layout)  # v and P
        for at in self._points(layout):
            root = at.column("root")
            self._draw(at, math.sqrt(lr) * sigma)  # step = sqrt(lr) sigma N(0, I),
            self._cool(at, root)  # less the heat that the minibatch brings, where it is corrected
            # step = sqrt(P) step - (lr/2) P (nbeta g + gamma (w - w*) + lam w)
            add_preconditioned_force(at, lr / 2, root)
            move(at)  # w += step
