"""Langevin dynamics preconditioned by the squares of the gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import kernels
from distsampler.optim.adaptive import Adaptive
from distsampler.optim.heat_correction import HeatCorrected
from distsampler.optim.kernels import Potential
from distsampler.optim.layout import Chunk, Plan, Point


class RMSPropSGLD(Adaptive, HeatCorrected):
    """SGLD with a step size for each coordinate: drift and noise both use lr P_i.

    ``v <- beta2 v + (1 - beta2) g^2``;
    ``P = 1 / (sqrt(v / (1 - beta2^t)) + stability)``;
    ``dw = -(lr/2) P (nbeta g + gamma (w - w*) + lam w) + sqrt(lr P) sigma N(0, I)``

    Source: Li et al. 2016, algorithm 1; Hitchcock & Hoogland 2507.21449, algorithm 3. Once frozen,
    a quadratic with curvature kappa has variance 1 / (kappa (1 - lr P kappa / 4)).

    Args:
        params: See :class:`Sampler`, as for every option not listed here.
        noise_level: sigma; any value other than 1 warns.
        beta2: Memory of v, in [0, 1).
        stability: a, added to the root of v; above 0.
        freeze_after: Steps after which v is fixed; keep draws only from then on. None: never, with
            a warning.
        gradient_variance: As for :class:`SGLD`.
        batch_size: As for :class:`SGLD`.

    Raises:
        ConfigError: See :class:`Sampler`.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> sampler = RMSPropSGLD([w], lr=1e-3, nbeta=100.0, freeze_after=500)
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
        beta2: float = 0.99,
        stability: float = 0.1,
        freeze_after: int | None = None,
        gradient_variance: float | list[Tensor | None] | None = None,
        batch_size: int | None = None,
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
            "beta2": beta2,
            "stability": stability,
            "freeze_after": freeze_after,
            "gradient_variance": gradient_variance,
            "batch_size": batch_size,
        }
        super().__init__(params, defaults, generator)

    def _learn(self, group: dict[str, Any], plan: Plan) -> None:
        super()._learn(group, plan)
        self._factors.clear()

    def _increment(
        self, group: dict[str, Any], plan: Plan, chunk: Chunk, at: Point, u: Potential
    ) -> None:
        root = chunk.part(plan.columns["root"])
        self._cool(group, plan, chunk, u, root)
        kernels.preconditioned(chunk, at, u, group["lr"], root)
