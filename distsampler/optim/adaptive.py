"""Step sizes by coordinate, learnt from the squares of the gradients."""

import math
from typing import Any

import torch

from distsampler.optim import checks, kernels
from distsampler.optim.layout import Plan
from distsampler.optim.sampler import Sampler


class Adaptive(Sampler):
    """A Langevin sampler whose step size at coordinate i is ``lr P_i``.

    ``v <- beta2 v + (1 - beta2) g^2``, ``P = 1 / (sqrt(v / (1 - beta2^t)) + stability)``

    g is the gradient of the loss alone: localisation and decay are known and need no learning.
    After ``freeze_after`` steps v stays as it is, and the chain has the law of a fixed matrix.
    While it adapts, P depends on the gradients that the step uses, and the law is biased however
    small the step (2403.08609).

    ``state[p]["square_avg"]`` holds v, ``group["adapted"]`` the number t of updates.
    """

    _learnt: dict[int, int]  # group -> how many updates its P has seen

    def _forget(self) -> None:
        super()._forget()
        self._learnt = {}

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.fraction(group, "beta2", "pass the memory of the squared gradients, such as 0.99")
        checks.positive(group, "stability", "pass what is added to the root of v, such as 0.1")
        checks.not_negative(group, "noise_level", "leave it at 1 to sample the posterior")
        if group["freeze_after"] is not None:
            checks.whole(group, "freeze_after", "pass a number of steps of at least 1", least=1)

    def _normalise(self, group: dict[str, Any]) -> None:
        super()._normalise(group)
        group.setdefault("adapted", 0)

    def _cautions(self, group: dict[str, Any]) -> list[str]:
        found = super()._cautions(group)
        found.extend(checks.noise_caution(group))
        if group["freeze_after"] is None:
            found.append(
                "freeze_after is None: a preconditioner that adapts for ever biases the law "
                "however small the step; pass the number of burn-in steps"
            )
        return found

    def _begin(self, group: dict[str, Any], plan: Plan) -> None:
        self._start(plan, "square_avg", 0.0)

    def _std(self, group: dict[str, Any]) -> float:
        return math.sqrt(group["lr"]) * float(group["noise_level"])

    def _step_group(self, group: dict[str, Any], plan: Plan) -> None:
        adapting = group["freeze_after"] is None or group["steps"] < group["freeze_after"]
        if adapting:
            group["adapted"] += 1
            self._average(group, plan)
        if self._learnt.get(plan.index) != group["adapted"] or "root" not in plan.columns:
            self._learn(group, plan)
        super()._step_group(group, plan)

    def _average(self, group: dict[str, Any], plan: Plan) -> None:
        grads, anchors = plan.grads(), plan.column(self.state, "anchor")
        averages = plan.column(self.state, "square_avg")
        for chunk in plan.chunks:
            at = plan.point(chunk, grads, anchors)
            kernels.average_squares(chunk, at, chunk.part(averages), group["beta2"])

    def _learn(self, group: dict[str, Any], plan: Plan) -> None:
        """Root <- sqrt(P) from v, kept beside the plan: it follows from the state."""
        averages = plan.column(self.state, "square_avg")
        if "root" not in plan.columns:
            plan.columns["root"] = [torch.empty_like(v) for v in averages]
        self._learnt[plan.index] = group["adapted"]
        unbiased = 1 - group["beta2"] ** group["adapted"]
        kernels.preconditioner_root(plan.columns["root"], averages, unbiased, group["stability"])
