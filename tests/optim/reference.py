"""The samplers as plain loops: one parameter at a time, float64, the papers' equations.

``advance`` takes the noise it shall use, so that a sampler and its reference can be compared
number by number.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Reference:
    """One parameter of one chain."""

    w: Tensor
    anchor: Tensor
    mask: Tensor | None
    momentum: Tensor | None = None
    last_noise: Tensor | None = None
    thermostat: float = 0.0
    square: Tensor = field(default_factory=lambda: torch.zeros(()))
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    steps: int = 0

    def advance(self, name: str, o: dict[str, float], g: Tensor, noise: Tensor) -> None:
        """One step of the sampler ``name`` with options ``o``."""
        prior = o["localization"] * (self.w - self.anchor) + o["weight_decay"] * self.w
        self.steps += 1
        move = getattr(self, f"_{name}")(o, g, prior, noise)
        if self.mask is not None:
            move = torch.where(self.mask, move, 0.0)
        self.w = self.w + move
        if (b := o["bounding_box_size"]) is not None:
            outside = (self.w - self.anchor).abs() > b
            if self.mask is not None:
                outside &= self.mask
            if self.momentum is not None:
                self.momentum = torch.where(outside, -self.momentum, self.momentum)
            walled = self.w.clamp(self.anchor - b, self.anchor + b)
            self.w = torch.where(outside, walled, self.w)

    def _sgld(self, o: dict[str, float], g: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
        drift = o["nbeta"] * g + prior
        return -o["lr"] / 2 * drift + math.sqrt(o["lr"]) * o["noise_level"] * noise

    def _lmsgld(self, o: dict[str, float], g: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
        pair = (self.last_noise + noise) / 2
        self.last_noise = noise
        return self._sgld(o, g, prior, pair)

    def _rmsprop_sgld(self, o: dict[str, float], g: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
        scale = self._preconditioner(o, g)
        drift = o["nbeta"] * g + prior
        return self._preconditioned(o, drift, noise, scale)

    def _adam_sgld(self, o: dict[str, float], g: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
        scale = self._preconditioner(o, g)
        self.mean = o["beta1"] * self.mean + (1 - o["beta1"]) * g
        unbiased = self.mean / (1 - o["beta1"] ** self.steps)
        return self._preconditioned(o, o["nbeta"] * unbiased + prior, noise, scale)

    def _preconditioner(self, o: dict[str, float], g: Tensor) -> Tensor:
        updates = min(self.steps, int(o["freeze_after"]))
        if self.steps == 1:
            self.square = torch.full_like(g, o.get("initial_scale", 0.0))
        if self.steps <= o["freeze_after"]:
            self.square = o["beta2"] * self.square + (1 - o["beta2"]) * g**2
        learnt = 1 - o["beta2"] ** updates if o.get("bias_correction", True) else 1.0
        return 1 / ((self.square / learnt).sqrt() + o["stability"])

    def _preconditioned(
        self, o: dict[str, float], drift: Tensor, noise: Tensor, scale: Tensor
    ) -> Tensor:
        return -o["lr"] / 2 * scale * drift + (o["lr"] * scale).sqrt() * o["noise_level"] * noise

    def _sghmc(self, o: dict[str, float], g: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
        self.momentum = (
            (1 - o["friction"]) * self.momentum
            - o["lr"] * (o["nbeta"] * g + prior)
            + math.sqrt(2 * o["lr"] * o["friction"]) * noise
        )
        return self._masked_momentum()

    def _sgnht(self, o: dict[str, float], g: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
        """Without the thermostat's own step, which needs all parameters of the group."""
        self.momentum = (
            self.momentum
            - o["lr"] * (o["nbeta"] * g + prior)
            - self.thermostat * self.momentum
            + math.sqrt(2 * o["lr"] * o["diffusion_factor"]) * noise
        )
        return self._masked_momentum()

    def _masked_momentum(self) -> Tensor:
        if self.mask is not None:
            self.momentum = torch.where(self.mask, self.momentum, 0.0)
        return self.momentum
