"""Langevin dynamics in the form of Leimkuhler and Matthews."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks, kernels
from distsampler.optim.heat_correction import HeatCorrected
from distsampler.optim.kernels import Potential
from distsampler.optim.layout import Chunk, Plan, Point


class LMSGLD(HeatCorrected):
    """SGLD with the mean of two successive noises: second order at the same cost.

    ``dw = -(lr/2) (nbeta g + gamma (w - w*) + lam w) + sqrt(lr) sigma (R_t + R_(t+1)) / 2``

    Source: Leimkuhler & Matthews 2013, the large-friction limit of BAOAB. On a quadratic the
    stationary variance is exactly 1 / kappa at every stable step (lr kappa < 4); elsewhere the
    error is second order in lr. Takes one buffer more than SGLD, the last noise.

    With a ``preconditioner`` P (fixed, positive) drift and noise use lr P_i in place of lr.

    Args:
        params: See :class:`Sampler`, as for every option not listed here.
        noise_level: sigma; any value other than 1 warns.
        gradient_variance: As for :class:`SGLD`.
        batch_size: As for :class:`SGLD`.
        preconditioner: One tensor a parameter (its shape), multipliers of lr; None: all 1.

    Raises:
        ConfigError: See :class:`Sampler`.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> sampler = LMSGLD([w], lr=1e-3, nbeta=100.0, localization=1.0)
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
        gradient_variance: float | list[Tensor | None] | None = None,
        batch_size: int | None = None,
        preconditioner: list[Tensor | None] | None = None,
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
            "gradient_variance": gradient_variance,
            "batch_size": batch_size,
            "preconditioner": preconditioner,
        }
        super().__init__(params, defaults, generator)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.not_negative(group, "noise_level", "leave it at 1 to sample the posterior")

    def _cautions(self, group: dict[str, Any]) -> list[str]:
        return super()._cautions(group) + checks.noise_caution(group)

    def _normalise(self, group: dict[str, Any]) -> None:
        super()._normalise(group)
        found = checks.per_parameter(group["preconditioner"], group["params"], "preconditioner")
        if found and any(t is not None and not bool((t > 0).all()) for t in found):
            checks.refuse("a preconditioner must be positive", "an entry not above 0", "mend it")
        group["preconditioner"] = found

    def _begin(self, group: dict[str, Any], plan: Plan) -> None:
        self._start(plan, "last_noise", 1.0)
        if (given := group["preconditioner"]) is not None:
            pairs = [(given[i], w) for i, w in zip(plan.positions, plan.weights, strict=True)]
            plan.columns["root"] = [
                torch.ones_like(w) if t is None else t.to(w).sqrt() for t, w in pairs
            ]

    def _increment(
        self, group: dict[str, Any], plan: Plan, chunk: Chunk, at: Point, u: Potential
    ) -> None:
        kernels.add_noise_pair(chunk.views, chunk.part(plan.column(self.state, "last_noise")))
        chunk.flat.mul_(math.sqrt(group["lr"]) * group["noise_level"] / 2)
        if "root" in plan.columns:
            root = chunk.part(plan.columns["root"])
            self._cool(group, plan, chunk, u, root)
            kernels.preconditioned(chunk, at, u, group["lr"], root)
        else:
            self._cool(group, plan, chunk, u)
            kernels.sgld(chunk, at, u, group["lr"])
