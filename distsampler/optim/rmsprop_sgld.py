"""Langevin dynamics preconditioned by the squares of the gradients."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim.adaptive import Adaptive
from distsampler.optim.heat_correction import HeatCorrected
from distsampler.optim.kernels import add_preconditioned_force, move
from distsampler.optim.layout import Layout


class RMSPropSGLD(Adaptive, HeatCorrected):
    """SGLD with a step size for each coordinate: drift and noise both use lr P_i.

    ``v <- beta2 v + (1 - beta2) g^2``;
    ``P = 1 / (sqrt(v / (1 - beta2^t)) + stability)``;
    ``dw = sqrt(lr P) sigma N(0, I) - (lr/2) P (nbeta g + gamma (w - w*) + lam w)``

    Source: Li et al. 2016, algorithm 1; Hitchcock & Hoogland 2507.21449, algorithm 3. Once frozen,
    a quadratic with curvature kappa has variance 1 / (kappa (1 - lr P kappa / 4)).

    Args:
        params: See :class:`Sampler`, as for every option not listed here.
        beta2, stability, freeze_after: See :class:`Adaptive`.
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
        gradient_variance: float | list[Tensor | None] | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(locals())

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
