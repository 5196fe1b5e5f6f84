"""Randomness as a function of position: (seed, chain, stream, step) -> generators.

Nothing here keeps a state that a restart could lose, and no global seed is set or read.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """Independent uses of one chain's (or one run's) seed."""

    NOISE = 0
    BATCHES = 1
    MODEL = 2
    PROBE = 3
    PROJECTIONS = 4
    GRADIENT_NOISE = 5
    WATCH = 6
    START = 8
    SHARDS = 9
    HOPS = 10


def noise_seed(seed: int, chain: int) -> int:
    """Return a chain's seed of torch: 64 bits, of which the low 32 differ for all chains of a run.

    torch's CPU generator keeps only the low 32 bits of its seed, so a hash would let two of many
    chains draw the same noise; here they count upwards from a hash of the run's seed instead.
    """
    low = int(np.random.SeedSequence(seed, spawn_key=(Stream.NOISE,)).generate_state(1)[0])
    high = int(np.random.SeedSequence(seed, spawn_key=(chain, Stream.NOISE)).generate_state(1)[0])
    return (high >> 1) << 32 | (low + chain) % 2**32


def generator(
    seed: int, stream: Stream, chain: int | None = None, step: int | None = None
) -> np.random.Generator:
    """Return a numpy generator of one stream: of a chain, at a step, or (chain None) of the run."""
    key = tuple(part for part in (chain, stream, step) if part is not None)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def step_seed(seed: int, chain: int, step: int, piece: int = 0) -> int:
    """Return the seed of what a model draws at one step (dropout), in one piece of its batch."""
    key = (chain, Stream.MODEL, step, piece) if piece else (chain, Stream.MODEL, step)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


def probe_rows(seed: int, n: int, size: int) -> NDArray[np.int64]:
    """Return the rows of the probe: a fixed subset, the same for every chain of a run, rising."""
    rows = generator(seed, Stream.PROBE).choice(n, min(size, n), replace=False)
    return np.sort(rows)
