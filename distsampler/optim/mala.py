"""The Metropolis-adjusted Langevin algorithm, for small problems with full gradients."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks, kernels
from distsampler.optim.kernels import Potential
from distsampler.optim.layout import Chunk, Plan, Point, is_half
from distsampler.optim.metropolis import LangevinProposal, log_ratio


class MALA(LangevinProposal):
    """SGLD's step as a proposal, accepted or refused: the law is exact at every step size.

    ``w' = w - (lr/2) grad U(w) + sqrt(lr) N(0, I)``, accepted with probability
    ``min(1, exp(U(w) - U(w') + log q(w|w') - log q(w'|w)))``

    Source: Roberts & Tweedie 1996. The closure must compute the loss of the full data and its
    gradient; with minibatches the law is not the posterior. A step calls it twice, at w and at w',
    and all groups are accepted or refused together. A reference for tests, not a sampler for large
    models: it keeps copies of the weights and of both gradients.

    Args:
        params: See :class:`Sampler`, as for every option not listed here. There is no box, and
            half precision is refused: rounded weights would be another proposal.

    Raises:
        ConfigError: See :class:`Sampler`.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> sampler = MALA([w], lr=1e-2, nbeta=100.0)
        >>> def closure():
        ...     sampler.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = sampler.step(closure)
    """

    needs_closure = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        localization: float = 0.0,
        nbeta: float | Callable[[int], float] = 1.0,
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
            "weight_decay": weight_decay,
            "localization": localization,
            "nbeta": nbeta,
            "bounding_box_size": None,
            "save_noise": save_noise,
            "save_mala_vars": save_mala_vars,
            "optimize_over": optimize_over,
            "noise_norm": noise_norm,
            "grad_norm": grad_norm,
            "weight_norm": weight_norm,
            "distance": distance,
        }
        super().__init__(params, defaults, generator)

    @property
    def acceptance(self) -> Tensor:
        """Probability with which the last proposal was to be accepted; 0-d, in :meth:`metrics`."""
        return self._readings.total("acceptance")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Propose and accept or refuse.

        Args:
            closure: Computes loss and gradients at the present weights; needed.

        Returns:
            The loss at the weights that the step left.

        Raises:
            ConfigError: There is no closure.
        """
        if closure is None:
            checks.refuse(
                "MALA needs a closure that recomputes loss and gradients at the proposal",
                "closure=None",
                "pass step(closure)",
            )
        with torch.enable_grad():
            loss = closure()
        before = self._side(loss)
        self._move()
        with torch.enable_grad():
            proposed = closure()
        self._decide(log_ratio(before, self._side(proposed)), before.weights)
        self._count()
        return loss

    def _decide(self, log_chance: Tensor, before: Sequence[Tensor]) -> None:
        """Keep the proposal with its chance, else put the weights back; nan is refused."""
        plans = self._current_plans()
        self._readings.add(plans[0], "acceptance", log_chance.clamp(max=0.0).exp())
        coin = torch.empty_like(log_chance).uniform_(generator=self._generator)
        accept = coin.log() < log_chance
        weights = [w for plan in plans for w in plan.weights]
        for w, old in zip(weights, before, strict=True):
            w.copy_(torch.where(accept, w, old))

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["bounding_box_size"] is not None:
            checks.refuse("MALA has no box", f"{group['bounding_box_size']}", "pass None")
        if any(is_half(p) for p in group["params"]):
            checks.refuse(
                "MALA needs single or double precision", "half precision", "call model.float()"
            )

    def _std(self, group: dict[str, Any]) -> float:
        return math.sqrt(group["lr"])

    def _increment(
        self, group: dict[str, Any], plan: Plan, chunk: Chunk, at: Point, u: Potential
    ) -> None:
        kernels.sgld(chunk, at, u, group["lr"])
