"""The Metropolis-adjusted Langevin algorithm, for small problems with full gradients."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks
from distsampler.optim.kernels import add_force, move
from distsampler.optim.law import Bias, QuadraticLaw
from distsampler.optim.layout import Layout, is_half
from distsampler.optim.metropolis_ratio import LangevinProposal, log_ratio
from distsampler.optim.readouts import Scalar


class MALA(LangevinProposal):
    """SGLD's step as a proposal, accepted or refused: the law is exact at every step size.

    ``w' = w + sqrt(lr) N(0, I) - (lr/2) grad U(w)``, accepted with probability
    ``min(1, exp(U(w) - U(w') + log q(w|w') - log q(w'|w)))``

    Source: Roberts & Tweedie 1996. The closure must compute the loss of the full data and its
    gradient; with minibatches the law is not the posterior. A step calls it twice, at w and at w',
    and all groups are accepted or refused together. A reference for tests, not a sampler for large
    models: it keeps copies of the weights and of both gradients.

    Args:
        params: See :class:`Sampler`, as for every option not listed here. There is no box, and
            half precision is refused: rounded weights would be another proposal.

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
        super().__init__(locals())

    acceptance = Scalar()
    """Probability of accepting the last proposal."""

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
        layouts = self._current_layouts()
        self._readouts.add(layouts[0], "acceptance", log_chance.clamp(max=0.0).exp())
        coin = torch.empty_like(log_chance).uniform_(generator=self._generator)
        accept = coin.log() < log_chance
        weights = [w for layout in layouts for w in layout.weights]
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

    def _step_group(self, layout: Layout) -> None:
        """Propose."""
        lr = layout.group["lr"]
        for at in self._points(layout):
            self._draw(at, math.sqrt(lr))  # step = sqrt(lr) N(0, I)
            add_force(at, lr / 2)  # step -= (lr/2) grad U(w)
            move(at)  # w' = w + step

    @classmethod
    def law(cls, options: Mapping[str, Any]) -> QuadraticLaw:
        """Return the exact law, which is the posterior's at every step size."""
        return QuadraticLaw("mala", limit=None, safe=None, bias=lambda _: Bias(0.0, 0.0))
