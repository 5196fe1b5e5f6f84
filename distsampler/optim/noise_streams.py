"""A sampler's own stream of random numbers: where it starts, how it continues, who shares it."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distsampler.optim.layout import Chunk, Plan


@dataclass(frozen=True)
class Owners:
    """Whose each parameter of a group is, where the samplers of several chains step as one.

    Args:
        generators: of the chains' noise.
        owner: of each parameter of the group, the number of its chain.
    """

    generators: tuple[torch.Generator, ...]
    owner: tuple[int, ...]

    @classmethod
    def of(cls, generators: Sequence[torch.Generator], each: int) -> "Owners":
        """Of chains that have so many parameters each, one chain's after another's."""
        owner = [chain for chain in range(len(generators)) for _ in range(each)]
        return cls(tuple(generators), tuple(owner))

    def pieces(self, plan: Plan, chunk: Chunk) -> list[int]:
        """The chain of each piece of a chunk."""
        return [self.owner[plan.positions[piece.parameter]] for piece in chunk.pieces]

    def fill(self, plan: Plan, chunk: Chunk, std: float) -> None:
        """Fills a chunk's buffer with noise, each chain's from its own generator."""
        for chain, view in zip(self.pieces(plan, chunk), chunk.views, strict=True):
            view.normal_(0.0, std, generator=self.generators[chain])


def fresh_generator(device: torch.device) -> torch.Generator:
    """A generator seeded from the system's entropy."""
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
