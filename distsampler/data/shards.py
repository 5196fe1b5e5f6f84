"""Data cut into shards, of which a process holds one at a time.

Rows are numbered through the shards in order, so that whoever asks for rows need not know of them.
A chain asks for rows of the shard it sits on. What lies in several shards, the probe, is gathered
once, before the run, and is sent with the recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distsampler.config import RunConfig
from distsampler.data.batches import HopStream
from distsampler.data.rows import Rows, Shards, Source, as_rows
from distsampler.data.trees import select, tensors_of, with_tensors
from distsampler.errors import ConfigError
from distsampler.seeding import Stream, generator, probe_rows

MakeShard = Callable[[int, int], object]
FIRST = 4  # rows that are kept for the checks before a run


@dataclass(frozen=True)
class InMemory:
    """A shard in memory.

    Args:
        rows: the shard.
    """

    rows: Rows

    def __call__(self) -> Rows:
        """Return the shard."""
        return self.rows


@dataclass(frozen=True)
class Made:
    """A shard that is made where it is needed.

    Args:
        make: ``make_shard(index, count)`` gives the data of one shard.
        index: index of the shard.
        count: number of all shards.
    """

    make: MakeShard
    index: int
    count: int

    def __call__(self) -> Rows:
        """Make the shard."""
        return as_rows(self.make(self.index, self.count))


@dataclass(frozen=True)
class ShardSummary:
    """What is known of a shard that is not here.

    Args:
        size: number of examples.
        digest: tells it from others; empty where examples were asked for.
        examples: batch of the rows that were asked for; None if none were.
    """

    size: int
    digest: str
    examples: object | None


def inspect_shard(source: Source, rows: NDArray[np.int64] | None) -> ShardSummary:
    """Return a shard's size, and its digest (rows None) or some of its examples."""
    shard = source()
    if rows is None:
        return ShardSummary(len(shard), shard.digest(), None)
    examples = _checked(shard.take(rows)) if len(rows) else None
    return ShardSummary(len(shard), "", examples)


def inspect_shards(
    sources: Sequence[Source], rows: Sequence[NDArray[np.int64] | None]
) -> Sequence[ShardSummary]:
    """Inspect shards in this process, one after another."""
    return [inspect_shard(*pair) for pair in zip(sources, rows, strict=True)]


InspectShards = Callable[
    [Sequence[Source], Sequence[NDArray[np.int64] | None]], Sequence[ShardSummary]
]


@dataclass(frozen=True)
class _Kept:
    """Examples that every process has.

    Args:
        rows: their numbers, rising.
        examples: the batch of them.
    """

    rows: NDArray[np.int64]
    examples: object

    def take(self, rows: NDArray[np.int64]) -> object | None:
        """Return the batch of these rows; None if one of them is not kept."""
        places = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        if not np.array_equal(self.rows[places], rows):
            return None
        return select(self.examples, torch.from_numpy(places))


class ShardedRows(Rows):
    """Rows of several shards.

    Args:
        sources: fetch or make the shards.
        summaries: what is known of each.
        kept: examples that need no shard.
        dealt: whether the rows were dealt to the shards at random.
    """

    pack_obstacle = "the chains of a pack would sit on different shards"
    shards: Shards

    def __init__(
        self,
        sources: Sequence[Source],
        summaries: Sequence[ShardSummary],
        kept: _Kept,
        dealt: bool,
    ) -> None:
        self._sources, self._kept = tuple(sources), kept
        self.shards = Shards(tuple(each.size for each in summaries), dealt)
        self._digests = [each.digest for each in summaries]
        self._ends = np.cumsum(self.shards.sizes)
        self._current: tuple[int, Rows] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: NDArray[np.int64]) -> object:
        """Return the batch of these rows; cheapest from the shard that was asked for last."""
        shards = np.searchsorted(self._ends, [rows.min(), rows.max()], side="right")
        first, last = map(int, shards)
        if first != last or self._current is None or self._current[0] != first:
            kept = self._kept.take(rows)
            if kept is not None:
                return kept
        return self._of_shard(first, rows) if first == last else self._gathered(rows)

    def digest(self) -> str:
        """Return a digest of the shards' sizes and digests."""
        text = repr((self.shards.sizes, self._digests)).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest()

    def stream(self, config: RunConfig, chain: int) -> HopStream:
        """Return the minibatches of a chain that hops over the shards."""
        sizes, visit = self.shards.sizes, config.hop_every or 1  # never None where data are cut
        return HopStream(config.seed, chain, sizes, config.batch_size, visit)

    def located(self, place: Callable[[Rows], Source]) -> ShardedRows:
        """Return the same rows, with the shards in memory put somewhere else one by one."""
        sources = [place(s.rows) if isinstance(s, InMemory) else s for s in self._sources]
        other = object.__new__(ShardedRows)
        other.__dict__.update(self.__getstate__() | {"_sources": tuple(sources)})
        return other

    def _of_shard(self, index: int, rows: NDArray[np.int64]) -> object:
        """A batch of one shard, which is fetched if it is not the current one."""
        if self._current is None or self._current[0] != index:
            self._current = None  # before the next comes, not after
            self._current = (index, self._sources[index]())
        return self._current[1].take(rows - self.shards.spans[index][0])

    def _gathered(self, rows: NDArray[np.int64]) -> object:
        """A batch that lies in several shards."""
        shards = np.searchsorted(self._ends, rows, side="right")
        order = np.argsort(shards, kind="stable")
        parts = [_checked(self._of_shard(int(s), rows[shards == s])) for s in np.unique(shards)]
        return select(_joined(parts), torch.from_numpy(np.argsort(order)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_current": None}


def cut(data: object, config: RunConfig, inspect: InspectShards = inspect_shards) -> ShardedRows:
    """Return the data in shards, as a run with data_mode="hop" needs them.

    Args:
        data: what ``as_rows`` takes: its rows are dealt to ``config.shards`` shards at random; a
            list of such things: the shards; or ``make_shard(index, count)``, which makes one.
        config: config of the run.
        inspect: inspects shards where they are made.

    Raises:
        ConfigError: if there are not as many shards as asked for, or one is empty.
    """
    match data:
        case ShardedRows():
            return data
        case list():
            sources: list[Source] = [InMemory(as_rows(each)) for each in data]
            if config.shards not in (None, len(sources)):
                raise ConfigError(
                    f"the data are a list of {len(sources)} shards, and shards={config.shards}"
                )
            return _sharded(sources, config, inspect_shards, dealt=False)
        case _ if is_made(data) and callable(data):
            count = _count(config)
            made = [Made(data, index, count) for index in range(count)]
            return _sharded(made, config, inspect, dealt=False)
        case _:
            return _dealt(as_rows(data), config)


def is_made(data: object) -> bool:
    """Return whether data are given as ``make_shard``."""
    return callable(data) and not hasattr(data, "__len__")


def _dealt(rows: Rows, config: RunConfig) -> ShardedRows:
    """The rows dealt at random: hopping is harmless where shards differ by chance alone."""
    count = _count(config)
    if count > len(rows):
        raise ConfigError(f"shards must be at most the {len(rows)} examples, got {count}")
    order = generator(config.seed, Stream.SHARDS).permutation(len(rows))
    hands = [np.sort(hand) for hand in np.array_split(order, count)]
    sources = [InMemory(rows.picked(hand)) for hand in hands]
    sharded = _sharded(sources, config, inspect_shards, dealt=True)
    sharded.batch_size = rows.batch_size
    return sharded


def _sharded(
    sources: Sequence[Source], config: RunConfig, inspect: InspectShards, dealt: bool
) -> ShardedRows:
    """Rows of these shards; the probe and the first rows are kept."""
    summaries = inspect(sources, [None] * len(sources))
    ends = np.cumsum([each.size for each in summaries])
    n = int(ends[-1])
    rows = np.union1d(probe_rows(config.seed, n, config.probe), np.arange(min(FIRST, n)))
    parts = np.split(rows, np.searchsorted(rows, ends[:-1]))
    starts = [0, *ends[:-1].tolist()]
    asked = inspect(sources, [part - start for part, start in zip(parts, starts, strict=True)])
    examples = [each.examples for each in asked if each.examples is not None]
    return ShardedRows(sources, summaries, _Kept(rows, _joined(examples)), dealt)


def _count(config: RunConfig) -> int:
    if config.shards is None:
        raise ConfigError(
            "data_mode='hop' needs shards, into how many the data are cut: for example shards=8"
        )
    return config.shards


def _joined(batches: Sequence[object]) -> object:
    """Several batches as one."""
    columns = zip(*map(tensors_of, batches), strict=True)
    return with_tensors(batches[0], [torch.cat(column) for column in columns])


def _checked(batch: object) -> object:
    """A batch that can be joined with others: of tensors alone."""
    match batch:
        case torch.Tensor():
            pass
        case dict():
            _checked(tuple(batch.values()))
        case tuple() | list():
            for each in batch:
                _checked(each)
        case _:
            raise ConfigError(
                "with data_mode='hop' a batch must be made of tensors, got a "
                f"{type(batch).__name__} in it"
            )
    return batch
