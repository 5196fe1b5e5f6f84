"""The variance of the gradient between examples at w*: what the heat correction needs.

Some rows, in an order that follows from the seed, are cut into batches; the batches into at most
eight blocks, each measured anywhere. A block gives ``size`` times the variance between its batches'
gradients, of which the expectation is the variance between examples, whatever the size of batches
and blocks (the variance within, of a random partition). The blocks are averaged in order, so that
the result's bits do not depend on how many workers took part.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.config import RunConfig
from distsampler.errors import ConfigError
from distsampler.models.replica import ChainSpec, Replica
from distsampler.seeding import Stream, generator

BLOCKS = 8
LEAST, MOST = 256, 1024  # batches: 256 give a variance within 9 %, and more than 1,024 little more


def batches(config: RunConfig, n: int) -> NDArray[np.int64]:
    """Return the rows of each batch, shape (batches, size).

    Batches are of the run's size, or smaller where the data would give fewer than 256 of them; in
    mode "train", where a gradient may depend on the size of its batch (batch norm), never smaller.
    """
    small = 1 if config.mode == "eval" else config.batch_size
    size = max(small, min(config.batch_size, n // LEAST))
    count = min(n // size, MOST)
    if count < 2:
        raise ConfigError(
            f"sampler.correct_heat needs two batches to see how their gradients differ, and {n} "
            f"examples hold {count} of {size}: lower batch_size"
        )
    order = generator(config.seed, Stream.GRADIENT_NOISE).permutation(n)
    return np.asarray(order[: count * size].reshape(count, size))


def batch_blocks(count: int) -> list[tuple[int, int]]:
    """Return batches cut into at most eight blocks (start, stop), of two batches at least."""
    parts = np.array_split(np.arange(count), max(1, min(BLOCKS, count // 2)))
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def measure(replica: Replica, spec: ChainSpec, start: int, stop: int) -> NDArray[np.float32]:
    """Return one block's estimate, on a replica at w*: by entry, flat tensor after flat tensor."""
    n = len(spec.rows)
    rows = batches(spec.config, n)[start:stop]
    means = [torch.zeros_like(flat, dtype=torch.float64) for flat in replica.flats]
    squares = [torch.zeros_like(mean) for mean in means]
    for seen, batch in enumerate(rows):
        replica.losses_and_gradient(batch, chain=0, step=start + seen)
        for flat, mean, square in zip(replica.flats, means, squares, strict=True):
            _update(mean, square, flat.grad, seen + 1)  # type: ignore[arg-type]  # never None
    # Rows are taken with replacement by the chains: the variance of all examples over n, not n - 1.
    scale = rows.shape[1] / (len(rows) - 1) * (n - 1) / n
    return torch.cat([square * scale for square in squares]).float().cpu().numpy()


def _update(mean: Tensor, square: Tensor, gradient: Tensor, count: int) -> None:
    """Update mean and sum of squared deviations by one gradient (Welford 1962), in float64."""
    gradient = gradient.double()
    away = gradient - mean
    mean.add_(away, alpha=1 / count)
    square.addcmul_(away, gradient - mean)


def reduce(parts: Sequence[tuple[int, int, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """Return the average of all (start, stop, estimate), weighted with their degrees of freedom."""
    total = np.zeros(parts[0][2].shape)
    for start, stop, estimate in parts:
        total += (stop - start - 1) * estimate.astype(np.float64)
    freedom = sum(stop - start - 1 for start, stop, _ in parts)
    return (total / freedom).astype(np.float32)
