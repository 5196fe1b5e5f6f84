"""Stochastic gradient Hamiltonian Monte Carlo."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks
from distsampler.optim.kernels import add_force, add_momentum, kick, settle_and_reflect
from distsampler.optim.law import Bias, LocalQuadratic, QuadraticLaw, inflation
from distsampler.optim.layout import Layout
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
    """

    friction_option = "friction"
    pilot_options: ClassVar[Mapping[str, object]] = {"friction": 0.1}

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
        super().__init__(locals())

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.fraction(group, "friction", "pass alpha, for example 0.1")
        checks.positive(group, "friction", "pass alpha, for example 0.1")

    def _begin(self, layout: Layout) -> None:
        self._start(layout, "momentum", math.sqrt(layout.group["lr"]))

    def _step_group(self, layout: Layout) -> None:
        lr, alpha = layout.group["lr"], layout.group["friction"]
        for at in self._points(layout):
            v = at.column("momentum")
            self._draw(at, math.sqrt(2 * lr * alpha))  # step = N(0, 2 lr alpha)
            add_force(at, lr)  # step -= lr (nbeta g + gamma (w - w*) + lam w)
            kick(at, v, 1 - alpha)  # v = (1 - alpha) v + step
            add_momentum(at, v)  # w += v
            settle_and_reflect(at, v)

    @classmethod
    def law(cls, options: Mapping[str, Any]) -> QuadraticLaw:
        """Return the exact law: ``(1 + (2/alpha) u v) / (1 - 2 x / (2 - alpha))`` times the LLC."""
        alpha = float(options["friction"])
        return QuadraticLaw("sghmc", 4 * (1 - alpha / 2), safe=0.2, bias=partial(_bias, alpha))


def _bias(alpha: float, q: LocalQuadratic) -> Bias:
    over = inflation(q.lr * q.kappa / 2 / (2 - alpha))
    return Bias(
        discretisation=float(q.weights @ (q.share * (over - 1))),
        heat=float(2 / alpha * q.heat * q.noise @ (q.share * over)),
    )
