"""Step sizes by coordinate, learnt from the squares of the gradients."""

from typing import Any

import torch

from distsampler.optim import checks, kernels
from distsampler.optim.layout import Layout
from distsampler.optim.sampler import Sampler


class Adaptive(Sampler):
    """A Langevin sampler whose step size at coordinate i is ``lr P_i``.

    ``v <- beta2 v + (1 - beta2) g^2``, ``P = 1 / (sqrt(v / (1 - beta2^t)) + stability)``

    g is the gradient of the loss alone: localization and decay are known and need no learning.
    After ``freeze_after`` steps v stays as it is, and the chain has the law of a fixed matrix.
    While it adapts, P depends on the gradients that the step uses, and the law is biased however
    small the step (2403.08609).

    ``state[p]["square_avg"]`` holds v, ``group["adapted"]`` the number t of updates.

    Args:
        beta2: Memory of v, in [0, 1).
        stability: a, added to the root of v; above 0.
        freeze_after: Steps after which v is fixed; keep draws only from then on. None: never, with
            a warning.
    """

    counters = ("adapted", *Sampler.counters)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.fraction(group, "beta2", "pass the memory of the squared gradients, such as 0.99")
        checks.positive(group, "stability", "pass what is added to the root of v, such as 0.1")
        if group["freeze_after"] is not None:
            checks.whole(group, "freeze_after", "pass a number of steps of at least 1", least=1)

    def _cautions(self, group: dict[str, Any]) -> list[str]:
        cautions = super()._cautions(group)
        if group["freeze_after"] is None:
            cautions.append(
                "freeze_after is None: a preconditioner that adapts for ever biases the law "
                "however small the step; pass the number of burn-in steps"
            )
        return cautions

    def _begin(self, layout: Layout) -> None:
        self._start(layout, "square_avg", 0.0)

    def _adapt(self, layout: Layout) -> None:
        """Update v and P while they adapt; ``columns["root"]`` holds sqrt(P)."""
        group = layout.group
        if group["freeze_after"] is None or group["steps"] < group["freeze_after"]:
            group["adapted"] += 1
            for at in layout.points(self._potential(group)):
                v, beta2 = at.column("square_avg"), group["beta2"]
                kernels.put_gradient(at)
                torch._foreach_mul_(v, beta2)
                torch._foreach_addcmul_(v, at.step, at.step, value=1 - beta2)
        if layout.derived.get("adapted") != group["adapted"]:
            layout.derived["adapted"] = group["adapted"]
            _put_root(layout, self._learnt(group), group["stability"])

    def _learnt(self, group: dict[str, Any]) -> float:
        """Return the share of v that is of gradients, by which it is divided: 1 - beta2^t."""
        return float(1 - group["beta2"] ** group["adapted"])


def _put_root(layout: Layout, learnt: float, stability: float) -> None:
    """Root <- 1 / sqrt(sqrt(v / learnt) + a), the root of P (Li et al. 2016)."""
    v = layout.column("square_avg")
    if "root" not in layout.columns:
        layout.columns["root"] = [torch.empty_like(each) for each in v]
    root = layout.columns["root"]
    torch._foreach_copy_(root, v)
    torch._foreach_div_(root, learnt)
    torch._foreach_sqrt_(root)
    torch._foreach_add_(root, stability)
    torch._foreach_sqrt_(root)
    torch._foreach_reciprocal_(root)
