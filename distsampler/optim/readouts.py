"""What a step can be asked to record: norms, energies, noise, drift.

Readouts are taken in the chunk's buffer before the noise is drawn into it, so they need no memory
of their own and change no bit of the trajectory. Nothing here waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distsampler.optim import kernels
from distsampler.optim.layout import Layout, Point, working_dtype

NORMS = ("noise_norm", "grad_norm", "weight_norm", "distance")
KEPT = {"noise": "save_noise", "drift": "save_mala_vars"}
QUIET = dict.fromkeys((*NORMS, *KEPT.values()), False)
"""Options of a group that asks for nothing."""


class Scalar:
    """A 0-d tensor of the last step, as an attribute of a sampler."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, sampler: Any, owner: type) -> Tensor:  # noqa: ANN401 (a Sampler)
        readouts: Readouts = sampler._readouts
        return readouts.total(self._name)


class Readouts:
    """The readouts of the last step, by group."""

    def __init__(self) -> None:
        self._scalars: list[dict[str, Tensor]] = []
        self._tensors: dict[str, list[list[Tensor]]] = {}

    def clear(self, groups: Sequence[dict[str, Any]]) -> None:
        """Forget the scalars of the step before; make room for tensors that are asked for."""
        self._scalars = [{} for _ in groups]
        for name, option in KEPT.items():
            if any(group[option] for group in groups):
                self._make_room(name, option, groups)

    def add(self, layout: Layout, name: str, value: Tensor) -> None:
        """Add a chunk's share of a scalar; norms come as squares."""
        scalars = self._scalars[layout.index]
        scalars[name] = scalars[name] + value if name in scalars else value

    def take(self, at: Point) -> None:
        """Take norms, energy and drift at the present weights, where asked."""
        group, layout = at.layout.group, at.layout
        if group["grad_norm"]:
            kernels.put_gradient(at)
            self.add(layout, "grad_norm", _sum_of_squares(at.flat))
        if group["weight_norm"]:
            kernels.put_weights(at)
            self.add(layout, "weight_norm", _sum_of_squares(at.flat))
        if group["distance"] or group["save_mala_vars"]:
            kernels.put_displacement(at)
            squares = _sum_of_squares(at.flat)
            if group["distance"]:
                self.add(layout, "distance", squares)
            if group["save_mala_vars"]:
                self.add(layout, "localization_loss", squares * (at.u.localization / 2))
        if group["save_mala_vars"]:
            kernels.put_drift(at)
            self._keep("drift", at)

    def take_noise(self, at: Point, std: float) -> None:
        """Take the noise in the buffer, in units of its standard deviation, where asked."""
        group = at.layout.group
        if not (group["noise_norm"] or group["save_noise"]):
            return
        at.chunk.freeze(0.0)
        unscaled = 1.0 / std if std else 0.0
        if group["noise_norm"]:
            self.add(at.layout, "noise_norm", _sum_of_squares(at.flat) * unscaled**2)
        if group["save_noise"]:
            torch._foreach_mul_(self._keep("noise", at), unscaled)

    def total(self, name: str) -> Tensor:
        """Return one number for all groups: norms by Pythagoras, others summed."""
        parts = [scalars[name] for scalars in self._scalars if name in scalars]
        if not parts:
            raise AttributeError(f"{name} is read where its option is set, from the first step on")
        total = sum(parts[1:], start=parts[0])
        return total.sqrt() if name in NORMS else total

    def totals(self) -> dict[str, Tensor]:
        """Return all scalars there are."""
        names = dict.fromkeys(name for scalars in self._scalars for name in scalars)
        return {name: self.total(name) for name in names}

    def tensors(self, name: str, groups: Sequence[dict[str, Any]]) -> list[list[Tensor]]:
        """Return what was kept: one tensor a parameter, in a list for each group."""
        option = KEPT[name]
        kept = self._tensors.get(name, [])
        if not any(group[option] for group in groups[: len(kept)]):
            raise AttributeError(f"{name} is kept by {option}=True, from the first step on")
        return [k if g[option] else [] for k, g in zip(kept, groups, strict=False)]

    def _keep(self, name: str, at: Point) -> list[Tensor]:
        """Copy the buffer into the tensors kept for it."""
        kept = self._tensors[name][at.layout.index]
        targets = at.chunk.part([kept[i] for i in at.layout.positions])
        torch._foreach_copy_(targets, at.step)
        return targets

    def _make_room(self, name: str, option: str, groups: Sequence[dict[str, Any]]) -> None:
        """Make one tensor a parameter of the groups that ask, once; every step writes over it."""
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
