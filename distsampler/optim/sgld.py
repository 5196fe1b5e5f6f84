"""Stochastic gradient Langevin dynamics."""

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
from distsampler.optim.metropolis import LangevinProposal, Side

_NOT_LANGEVIN = ("bounding_box_size", "gradient_variance")


class SGLD(HeatCorrected, LangevinProposal):
    """Langevin dynamics on minibatch gradients, localised at w*.

    ``dw = -(lr/2) (nbeta g + gamma (w - w*) + lam w) + sqrt(lr) sigma N(0, I)``

    Source: Welling & Teh 2011, eq. 4; localisation: Lau et al. 2308.12108. On a quadratic with
    curvature kappa the stationary variance is 1 / (kappa (1 - lr kappa / 4)): the error is first
    order in lr, and the chain is stable for lr kappa < 4.

    Args:
        params: See :class:`Sampler`, as for every option not listed here.
        noise_level: sigma; at any value other than 1 the law is not the posterior, and a warning
            says so.
        gradient_variance: Variance v of the gradient between single examples, a number or one
            tensor a parameter (its shape); the noise is reduced by the heat of the minibatch,
            see :mod:`distsampler.optim.heat_correction`. None: no correction.
        batch_size: Examples a minibatch, m; needed with ``gradient_variance``.

    Raises:
        ConfigError: See :class:`Sampler`.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> sampler = SGLD([w], lr=1e-3, nbeta=100.0, localization=1.0)
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
        }
        super().__init__(params, defaults, generator)

    @torch.no_grad()
    def side(self, loss: Tensor | float) -> Side:
        """The present point, as :func:`mala_acceptance` wants it.

        Args:
            loss: The minibatch loss at the present weights, 0-d, whose gradient lies in ``p.grad``.

        Returns:
            Copies of the trainable weights and of grad U, and U.

        Raises:
            ConfigError: With a box, a heat correction or a noise level other than 1 the step is no
                Langevin proposal; with a callable nbeta the two sides would have different targets.
        """
        for group in self.param_groups:
            bent = [name for name in _NOT_LANGEVIN if group[name] is not None]
            if bent or group["noise_level"] != 1.0 or callable(group["nbeta"]):
                checks.refuse(
                    "a MALA acceptance needs plain Langevin steps with one fixed nbeta",
                    ", ".join(bent) or "another noise_level or a callable nbeta",
                    "leave these options out to measure it",
                )
        return self._side(loss)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.not_negative(group, "noise_level", "leave it at 1 to sample the posterior")

    def _cautions(self, group: dict[str, Any]) -> list[str]:
        return super()._cautions(group) + checks.noise_caution(group)

    def _std(self, group: dict[str, Any]) -> float:
        return math.sqrt(group["lr"]) * float(group["noise_level"])

    def _increment(
        self, group: dict[str, Any], plan: Plan, chunk: Chunk, at: Point, u: Potential
    ) -> None:
        self._cool(group, plan, chunk, u)
        kernels.sgld(chunk, at, u, group["lr"])
