"""What a step can be asked to tell: norms, energies, noise, drift.

Readings are taken on the chunk's buffer before the noise is drawn into it, so they need no memory
of their own and change no bit of the trajectory. Nothing here waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distsampler.optim import kernels
from distsampler.optim.kernels import Potential
from distsampler.optim.layout import Chunk, Plan, Point, working_dtype

NORMS = ("noise_norm", "grad_norm", "weight_norm", "distance")
KEPT = {"noise": "save_noise", "drift": "save_mala_vars"}
QUIET = dict.fromkeys((*NORMS, *KEPT.values()), False)
"""Options of a group that asks for nothing."""


class Readings:
    """The readings of the last step, by group."""

    def __init__(self) -> None:
        self._scalars: list[dict[str, Tensor]] = []
        self._tensors: dict[str, list[list[Tensor]]] = {}

    def clear(self, groups: Sequence[dict[str, Any]]) -> None:
        """Forget the scalars of the step before; make room for tensors that are asked for."""
        self._scalars = [{} for _ in groups]
        for name, option in KEPT.items():
            if any(group[option] for group in groups):
                self._make_room(name, option, groups)

    def add(self, plan: Plan, name: str, value: Tensor) -> None:
        """Add a chunk's share of a scalar; norms come as squares."""
        found = self._scalars[plan.index]
        found[name] = found[name] + value if name in found else value

    def point(
        self, group: dict[str, Any], plan: Plan, chunk: Chunk, at: Point, u: Potential
    ) -> None:
        """Norms, energy and drift at the present weights, where asked."""
        if group["grad_norm"]:
            kernels.put_gradient(chunk, at)
            self.add(plan, "grad_norm", _sum_of_squares(chunk.flat))
        if group["weight_norm"]:
            kernels.put_weights(chunk, at)
            self.add(plan, "weight_norm", _sum_of_squares(chunk.flat))
        if group["distance"] or group["save_mala_vars"]:
            kernels.put_displacement(chunk, at)
            squares = _sum_of_squares(chunk.flat)
            if group["distance"]:
                self.add(plan, "distance", squares)
            if group["save_mala_vars"]:
                self.add(plan, "localization_loss", squares * (u.gamma / 2))
        if group["save_mala_vars"]:
            kernels.put_drift(chunk, at, u)
            self._keep("drift", plan, chunk)

    def noise(self, group: dict[str, Any], plan: Plan, chunk: Chunk, std: float) -> None:
        """The noise in the buffer, in units of its standard deviation, where asked."""
        if not (group["noise_norm"] or group["save_noise"]):
            return
        chunk.freeze(0.0)
        unscaled = 1.0 / std if std else 0.0
        if group["noise_norm"]:
            self.add(plan, "noise_norm", _sum_of_squares(chunk.flat) * unscaled**2)
        if group["save_noise"]:
            kept = self._keep("noise", plan, chunk)
            torch._foreach_mul_(kept, unscaled)

    def total(self, name: str) -> Tensor:
        """One number for all groups: norms by Pythagoras, others summed."""
        parts = [scalars[name] for scalars in self._scalars if name in scalars]
        if not parts:
            raise AttributeError(f"{name} is read where its option is set, from the first step on")
        total = sum(parts[1:], start=parts[0])
        return total.sqrt() if name in NORMS else total

    def totals(self) -> dict[str, Tensor]:
        """All scalars there are."""
        names = dict.fromkeys(name for scalars in self._scalars for name in scalars)
        return {name: self.total(name) for name in names}

    def tensors(self, name: str, groups: Sequence[dict[str, Any]]) -> list[list[Tensor]]:
        """What was kept, a list per group of a tensor per parameter; empty where not asked."""
        option = KEPT[name]
        kept = self._tensors.get(name, [])
        if not any(group[option] for group in groups[: len(kept)]):
            raise AttributeError(f"{name} is kept by {option}=True, from the first step on")
        return [k if g[option] else [] for k, g in zip(kept, groups, strict=False)]

    def _keep(self, name: str, plan: Plan, chunk: Chunk) -> list[Tensor]:
        """Copy the buffer into the tensors kept for it."""
        kept = self._tensors[name][plan.index]
        targets = chunk.part([kept[i] for i in plan.positions])
        torch._foreach_copy_(targets, chunk.views)
        return targets

    def _make_room(self, name: str, option: str, groups: Sequence[dict[str, Any]]) -> None:
        """One tensor a parameter of the groups that ask: made once, written over every step."""
        kept = self._tensors.setdefault(name, [])
        kept.extend([] for _ in range(len(kept), len(groups)))
        for i, group in enumerate(groups):
            if group[option] and not kept[i]:
                kept[i] = [
                    torch.zeros(p.shape, dtype=working_dtype(p), device=p.device)
                    for p in group["params"]
                ]


def _sum_of_squares(flat: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(flat)
    return norm.square()
