"""Stochastic gradient Langevin dynamics."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks
from distsampler.optim.heat_correction import HeatCorrected
from distsampler.optim.kernels import add_force, move
from distsampler.optim.law import Bias, LocalQuadratic, QuadraticLaw, inflation
from distsampler.optim.layout import Layout
from distsampler.optim.metropolis_ratio import LangevinProposal, Side


class SGLD(HeatCorrected, LangevinProposal):
    """Langevin dynamics on minibatch gradients, localised at w*.

    ``dw = sqrt(lr) sigma N(0, I) - (lr/2) (nbeta g + gamma (w - w*) + lam w)``

    Source: Welling & Teh 2011, eq. 4; localization: Lau et al. 2308.12108. On a quadratic with
    curvature kappa the stationary variance is 1 / (kappa (1 - lr kappa / 4)): the error is first
    order in lr, and the chain is stable for lr kappa < 4.

    Args:
        params: See :class:`Sampler`, as for every option not listed here.
        gradient_variance, batch_size: See :class:`HeatCorrected`.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> sampler = SGLD([w], lr=1e-3, nbeta=100.0, localization=1.0)
        >>> loss = w.square().sum()
        >>> loss.backward()
        >>> sampler.step()
    """

    has_side = True
    hop_bias_known = True

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
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(locals())

    def _step_group(self, layout: Layout) -> None:
        lr, sigma = layout.group["lr"], float(layout.group["noise_level"])
        for at in self._points(layout):
            self._draw(at, math.sqrt(lr) * sigma)  # step = sqrt(lr) sigma N(0, I),
            self._cool(at)  # less the heat that the minibatch brings, where it is corrected
            add_force(at, lr / 2)  # step -= (lr/2) (nbeta g + gamma (w - w*) + lam w)
            move(at)  # w += step

    @classmethod
    def law(cls, options: Mapping[str, Any]) -> QuadraticLaw:
        """Return the exact law: ``(1 + u (v - d)) / (1 - x)`` times the LLC."""
        return QuadraticLaw("sgld", limit=4.0, safe=0.2, bias=_bias)

    @torch.no_grad()
    def side(self, loss: Tensor | float) -> Side:
        """Return the present point, as :func:`mala_acceptance` wants it.

        Args:
            loss: The minibatch loss at the present weights, 0-d, whose gradient lies in ``p.grad``.

        Returns:
            Copies of the trainable weights and of grad U, and U.

        Raises:
            ConfigError: With a box, a heat correction or a noise level other than 1 the step is no
                Langevin proposal; with a callable nbeta the two sides would have different targets.
        """
        for group in self.param_groups:
            bent = [n for n in ("bounding_box_size", "gradient_variance") if group[n] is not None]
            if bent or group["noise_level"] != 1.0 or callable(group["nbeta"]):
                checks.refuse(
                    "a MALA acceptance needs plain Langevin steps with one fixed nbeta",
                    ", ".join(bent) or "another noise_level or a callable nbeta",
                    "leave these options out to measure it",
                )
        return self._side(loss)


def _bias(q: LocalQuadratic) -> Bias:
    over = inflation(q.lr * q.kappa / 4)
    hot = q.share * over
    return Bias(
        discretisation=float(q.weights @ (q.share * (over - 1))),
        heat=float(q.heat * (q.noise @ hot - q.removed @ hot)),
    )
