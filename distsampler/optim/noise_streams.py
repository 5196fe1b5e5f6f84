"""A sampler's own stream of random numbers: how it starts, continues, and is parted by chains."""

import hashlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from distsampler.optim.layout import Point


@dataclass(frozen=True)
class Owners:
    """Which chain each parameter belongs to, where the samplers of several step as one."""

    generators: tuple[torch.Generator, ...]  # Source of each chain's noise
    owner: tuple[int, ...]  # Number of the chain of each parameter of the group

    def pieces(self, at: Point) -> list[int]:
        """Return the chain of each piece of a chunk."""
        positions = at.layout.positions
        return [self.owner[positions[piece.parameter]] for piece in at.chunk.pieces]

    def fill(self, at: Point, std: float) -> None:
        """Fill a chunk's buffer with noise, each chain's from its own generator."""
        for chain, view in zip(self.pieces(at), at.step, strict=True):
            view.normal_(0.0, std, generator=self.generators[chain])


def fresh_generator(device: torch.device) -> torch.Generator:
    """Return a generator seeded from the system's entropy."""
    return _seeded(torch.Generator(device), os.urandom(8))


def continue_stream(generator: torch.Generator, saved: Tensor) -> None:
    """Continue a saved stream, or derive a new one from it if it is another kind of device's."""
    saved = saved.cpu()
    if saved.shape == generator.get_state().shape:
        generator.set_state(saved)
    else:
        _seeded(generator, hashlib.sha256(saved.numpy().tobytes()).digest()[:8])


def _seeded(generator: torch.Generator, source: bytes) -> torch.Generator:
    return generator.manual_seed(int.from_bytes(source) >> 1)
