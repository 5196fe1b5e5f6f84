"""Stochastic gradient Hamiltonian Monte Carlo."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks, kernels
from distsampler.optim.layout import Plan
from distsampler.optim.sampler import Sampler


class SGHMC(Sampler):
    """Langevin dynamics with momentum and constant friction.

    ``v <- (1 - alpha) v - lr grad U(w) + N(0, 2 lr alpha)``;
    ``w <- w + v``

    with alpha the ``friction`` and v the momentum times sqrt(lr). Start: v ~ sqrt(lr) N(0, I).

    Source: Chen et al. 2014, eq. 15, without an estimate of the gradient noise. On a quadratic the
    variance of w is exactly 1 / (kappa (1 - lr kappa / (2 (2 - alpha)))): first order in lr.

    Args:
        params: See :class:`Sampler`, as for every option not listed here. A box reflects.
        friction: alpha, in (0, 1).

    Raises:
        ConfigError: See :class:`Sampler`.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> sampler = SGHMC([w], lr=1e-4, nbeta=100.0)
        >>> loss = w.square().sum()
        >>> loss.backward()
        >>> sampler.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        friction: float = 0.1,
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
        generator: torch.Generator | None = None,
    ) -> None:
        defaults: dict[str, object] = {
            "lr": lr,
            "friction": friction,
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
        }
        super().__init__(params, defaults, generator)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.fraction(group, "friction", "pass alpha, for example 0.1")
        checks.positive(group, "friction", "pass alpha, for example 0.1")

    def _begin(self, group: dict[str, Any], plan: Plan) -> None:
        self._start(plan, "momentum", math.sqrt(group["lr"]))

    def _std(self, group: dict[str, Any]) -> float:
        return math.sqrt(2 * group["lr"] * group["friction"])

    def _step_group(self, group: dict[str, Any], plan: Plan) -> None:
        grads, u = plan.grads(), self._potential(group)
        anchors, momenta = plan.column(self.state, "anchor"), plan.column(self.state, "momentum")
        for chunk in plan.chunks:
            at, momentum = plan.point(chunk, grads, anchors), chunk.part(momenta)
            self._readings.point(group, plan, chunk, at, u)
            self._draw(group, plan, chunk)
            kernels.add_force(chunk.views, at, u, group["lr"])
            kernels.kick(chunk, momentum, 1 - group["friction"])
            kernels.carry(chunk, at.weights, momentum)
            if group["bounding_box_size"] is not None:
                kernels.turn_at_wall(chunk, at, momentum, group["bounding_box_size"])
            self._settle(group, plan, chunk, at)
