"""A sampler's own stream of random numbers: where it starts, how it continues."""

import hashlib
import os

import torch
from torch import Tensor


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
