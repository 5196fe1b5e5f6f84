"""Which rows a chain takes at which step, as a function of the step alone: no state is kept."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distsampler.seeding import Stream

GROUP_STEPS = (
    64  # steps whose batch indices are drawn together: a generator costs more than its numbers
)


class Batches(ABC):
    """The minibatches of one chain, from n examples, whole unless a subclass says otherwise."""

    def __init__(self, n: int) -> None:
        self._n = n

    @abstractmethod
    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the rows of the batch of one step, shape (batch_size,)."""

    def shard(self, step: int) -> int:
        """Return the index of the shard that a step draws from."""
        return 0

    def span(self, step: int) -> tuple[int, int]:
        """Return the first row that a step may draw, and the row behind the last."""
        return 0, self._n


class BatchStream(Batches):
    """Minibatches drawn with replacement, or one permutation of the data an epoch.

    Philox keyed by (seed, chain); its counter is the group of 64 steps, or the epoch. The rest of
    an epoch that fills no batch is not used.
    """

    def __init__(self, seed: int, chain: int, n: int, batch_size: int, *, epochs: bool) -> None:
        super().__init__(n)
        sequence = np.random.SeedSequence(seed, spawn_key=(chain, Stream.BATCHES))
        self._key = sequence.generate_state(2, np.uint64)
        self._batch_size, self._epochs = batch_size, epochs
        self._group_steps = n // batch_size if epochs else GROUP_STEPS
        self._group = -1
        self._indices = np.empty((0, 0), np.int64)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the rows of the batch of one step, shape (batch_size,)."""
        group, offset = divmod(step, self._group_steps)
        if group != self._group:
            self._indices, self._group = self._draw(group), group
        rows: NDArray[np.int64] = self._indices[offset]
        return rows

    def _draw(self, group: int) -> NDArray[np.int64]:
        rng = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, 0, group]))
        shape = (self._group_steps, self._batch_size)
        if self._epochs:
            order: NDArray[np.int64] = rng.permutation(self._n)
            return order[: shape[0] * shape[1]].reshape(shape)
        drawn: NDArray[np.int64] = rng.integers(0, self._n, shape)
        return drawn


class HopStream(Batches):
    """Minibatches of a chain that hops over shards, drawn with replacement within each.

    A visit lasts ``hop_every`` steps. Its shard is drawn with probability N_s / n, so that over
    visits every example is equally likely at every step; batches and shards have their own keys.
    """

    def __init__(
        self, seed: int, chain: int, sizes: Sequence[int], batch_size: int, hop_every: int
    ) -> None:
        self._ends = np.cumsum(sizes)
        super().__init__(int(self._ends[-1]))
        self._keys = [
            np.random.SeedSequence(seed, spawn_key=(chain, stream)).generate_state(2, np.uint64)
            for stream in (Stream.HOPS, Stream.BATCHES)
        ]
        self._batch_size, self._hop_every = batch_size, hop_every
        self._visits: tuple[int, NDArray[np.float64]] = (-1, np.empty(0))  # the last group
        self._rows = self._visits

    def shard(self, step: int) -> int:
        """Return the index of the shard that a step draws from."""
        group, offset = divmod(step // self._hop_every, GROUP_STEPS)
        if self._visits[0] != group:
            self._visits = (group, self._uniform(0, group, GROUP_STEPS))
        row = int(self._visits[1][offset] * self._n)
        return int(np.searchsorted(self._ends, row, side="right"))

    def span(self, step: int) -> tuple[int, int]:
        """Return the first row of the shard at one step, and the row behind its last."""
        shard = self.shard(step)
        return int(self._ends[shard - 1]) if shard else 0, int(self._ends[shard])

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the rows of the batch of one step, shape (batch_size,), all of one shard."""
        group, offset = divmod(step, GROUP_STEPS)
        if self._rows[0] != group:
            self._rows = (group, self._uniform(1, group, GROUP_STEPS * self._batch_size))
        start, stop = self.span(step)
        drawn = self._rows[1][offset * self._batch_size : (offset + 1) * self._batch_size]
        return start + (drawn * (stop - start)).astype(np.int64)

    def _uniform(self, stream: int, group: int, count: int) -> NDArray[np.float64]:
        philox = np.random.Philox(key=self._keys[stream], counter=[0, 0, 0, group])
        return np.random.Generator(philox).random(count)


class AllRows(Batches):
    """All rows, in order, at every step."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self._rows = np.arange(n)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return every row, shape (n,)."""
        return self._rows
