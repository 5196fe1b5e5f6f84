"""Batch streams: which rows a chain takes at which step, as a function of the step alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distsampler.seeding import Stream

GROUP = 64  # steps whose batch indices are drawn together: a generator costs more than its numbers


class BatchStream:
    """The minibatches of one chain: indices as a function of the step.

    Philox keyed by (seed, chain); its counter is the group of 64 steps (with replacement) or the
    epoch (one permutation each; what an epoch leaves over of a batch is not used).

    Args:
        seed: of the run.
        chain: index.
        n: examples in the data.
        batch_size: examples a step.
        epochs: permutations instead of draws with replacement.
    """

    def __init__(self, seed: int, chain: int, n: int, batch_size: int, *, epochs: bool) -> None:
        sequence = np.random.SeedSequence(seed, spawn_key=(chain, Stream.BATCHES))
        self._key = sequence.generate_state(2, np.uint64)
        self._n, self._batch_size, self._epochs = n, batch_size, epochs
        self._group_steps = n // batch_size if epochs else GROUP
        self._group = -1
        self._indices = np.empty((0, 0), np.int64)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Rows of the batch of one step, shape (batch_size,)."""
        group, offset = divmod(step, self._group_steps)
        if group != self._group:
            self._indices, self._group = self._draw(group), group
        rows: NDArray[np.int64] = self._indices[offset]
        return rows

    def span(self, step: int) -> tuple[int, int]:
        """The rows that a step draws from, the first and the one behind the last: all."""
        return 0, self._n

    def _draw(self, group: int) -> NDArray[np.int64]:
        rng = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, 0, group]))
        shape = (self._group_steps, self._batch_size)
        if self._epochs:
            order: NDArray[np.int64] = rng.permutation(self._n)
            return order[: shape[0] * shape[1]].reshape(shape)
        drawn: NDArray[np.int64] = rng.integers(0, self._n, shape)
        return drawn


class HopStream:
    """The minibatches of one chain that hops over shards, with replacement within each.

    A visit lasts ``hop_every`` steps. Its shard is drawn with probability N_s / n, so that over
    visits every example is equally likely at every step; batches and shards have keys of their own.

    Args:
        seed: of the run.
        chain: index.
        sizes: N_s, examples of each shard; rows are numbered through them in order.
        batch_size: examples a step.
        hop_every: steps of a visit.
    """

    def __init__(
        self, seed: int, chain: int, sizes: Sequence[int], batch_size: int, hop_every: int
    ) -> None:
        self._keys = [
            np.random.SeedSequence(seed, spawn_key=(chain, stream)).generate_state(2, np.uint64)
            for stream in (Stream.HOPS, Stream.BATCHES)
        ]
        self._ends = np.cumsum(sizes)
        self._batch_size, self._hop_every = batch_size, hop_every
        self._visits: tuple[int, NDArray[np.float64]] = (-1, np.empty(0))  # the last group
        self._rows = self._visits

    def span(self, step: int) -> tuple[int, int]:
        """The first row of the shard at one step, and the row behind its last."""
        shard = self.shard(step)
        return int(self._ends[shard - 1]) if shard else 0, int(self._ends[shard])

    def shard(self, step: int) -> int:
        """Where the chain sits at one step."""
        group, offset = divmod(step // self._hop_every, GROUP)
        if self._visits[0] != group:
            self._visits = (group, self._uniform(0, group, GROUP))
        row = int(self._visits[1][offset] * self._ends[-1])
        return int(np.searchsorted(self._ends, row, side="right"))

    def indices(self, step: int) -> NDArray[np.int64]:
        """Rows of the batch of one step, shape (batch_size,), all of one shard."""
        group, offset = divmod(step, GROUP)
        if self._rows[0] != group:
            self._rows = (group, self._uniform(1, group, GROUP * self._batch_size))
        start, stop = self.span(step)
        drawn = self._rows[1][offset * self._batch_size : (offset + 1) * self._batch_size]
        return start + (drawn * (stop - start)).astype(np.int64)

    def _uniform(self, stream: int, group: int, count: int) -> NDArray[np.float64]:
        philox = np.random.Philox(key=self._keys[stream], counter=[0, 0, 0, group])
        return np.random.Generator(philox).random(count)


class AllRows:
    """The batches of a chain that takes all data at every step.

    Args:
        n: examples in the data.
    """

    def __init__(self, n: int) -> None:
        self._rows = np.arange(n)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Every row, in order, shape (n,)."""
        return self._rows

    def span(self, step: int) -> tuple[int, int]:
        """All rows."""
        return 0, len(self._rows)
