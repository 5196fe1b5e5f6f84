"""Data cut into shards, of which a process holds one at a time.

Rows are numbered through the shards in order, so that whoever asks for rows need not know of them.
A chain asks for rows of the shard it sits on. What lies in several shards, the probe, is gathered
once, before the run, and is sent with the recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distsampler.config import RunConfig
from distsampler.data.batches import HopStream
from distsampler.data.kinds import as_rows
from distsampler.data.rows import Rows, Source, form
from distsampler.data.trees import leaves_of, select, tensors_of, with_tensors
from distsampler.errors import ConfigError
from distsampler.seeding import Stream, generator, probe_rows

FIRST = 4  # rows that are kept for the checks before a run
Shard = Rows | Source  # in memory, or what makes it


@dataclass(frozen=True)
class Made:
    """Makes a shard where it is needed."""

    make: Callable[[int, int], object]  # ``make_shard(index, count)`` gives the data of one shard
    index: int
    count: int  # of all shards

    def __call__(self) -> Rows:
        """Make the shard."""
        return as_rows(self.make(self.index, self.count))


class ShardSummary(NamedTuple):
    """What is known of a shard that is not here."""

    size: int  # number of examples
    digest: str = ""  # tells it from others; empty where examples were asked for
    examples: object = None  # batch of the rows that were asked for; None if none were


def inspect_shard(shard: Shard, rows: NDArray[np.int64] | None) -> ShardSummary:
    """Return a shard's size, and its digest (rows None) or some of its examples."""
    shard = _fetched(shard)
    if rows is None:
        return ShardSummary(len(shard), shard.digest())
    return ShardSummary(len(shard), examples=_checked(shard.take(rows)) if len(rows) else None)


def inspect_shards(
    shards: Sequence[Shard], rows: Sequence[NDArray[np.int64] | None]
) -> Sequence[ShardSummary]:
    """Inspect shards in this process, one after another."""
    return [inspect_shard(*pair) for pair in zip(shards, rows, strict=True)]


InspectShards = Callable[
    [Sequence[Shard], Sequence[NDArray[np.int64] | None]], Sequence[ShardSummary]
]


class ShardedRows(Rows):
    """Rows of several shards; ``kept`` are numbers, rising, and batch of what needs no shard."""

    pack_obstacle = "the chains of a pack would sit on different shards"

    def __init__(
        self,
        shards: Sequence[Shard],
        summaries: Sequence[ShardSummary],
        kept: tuple[NDArray[np.int64], object],
        dealt: bool,
    ) -> None:
        self._shards, self._kept, self.dealt = tuple(shards), kept, dealt
        self.shard_sizes = tuple(each.size for each in summaries)
        self._digests = [each.digest for each in summaries]
        self._ends = np.cumsum(self.shard_sizes)
        self._current: tuple[int, Rows] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: NDArray[np.int64]) -> object:
        """Return the batch of these rows; cheapest from the shard that was asked for last."""
        shards = np.searchsorted(self._ends, [rows.min(), rows.max()], side="right")
        first, last = map(int, shards)
        if first != last or self._current is None or self._current[0] != first:
            numbers, batch = self._kept
            places = np.minimum(np.searchsorted(numbers, rows), len(numbers) - 1)
            if np.array_equal(numbers[places], rows):
                return select(batch, torch.from_numpy(places))
        return self._of_shard(first, rows) if first == last else self._gathered(rows)

    def digest(self) -> str:
        """Return a digest of the shards' sizes and digests."""
        text = repr((self.shard_sizes, self._digests)).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest()

    def stream(self, config: RunConfig, chain: int) -> HopStream:
        """Return the minibatches of a chain that hops over the shards."""
        visit = config.hop_every or 1  # never None where data are cut
        return HopStream(config.seed, chain, self.shard_sizes, config.batch_size, visit)

    def located(self, place: Callable[[Rows], Source]) -> ShardedRows:
        """Return the same rows, with the shards in memory put somewhere else one by one."""
        shards = [place(s) if isinstance(s, Rows) else s for s in self._shards]
        other = object.__new__(ShardedRows)
        other.__dict__.update(self.__getstate__() | {"_shards": tuple(shards)})
        return other

    def _of_shard(self, index: int, rows: NDArray[np.int64]) -> object:
        """A batch of one shard, which is fetched if it is not the current one."""
        if self._current is None or self._current[0] != index:
            self._current = None  # before the next comes, not after
            self._current = (index, _fetched(self._shards[index]))
        return self._current[1].take(rows - (self._ends[index] - self.shard_sizes[index]))

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
        config: tells the number of shards, the seed and the probe.
        inspect: inspects shards where they are made.
    """
    match data:
        case ShardedRows():
            return data
        case list():
            if config.shards not in (None, len(data)):
                raise ConfigError(
                    f"the data are a list of {len(data)} shards, and shards={config.shards}"
                )
            return _sharded([_as_shard(each, i) for i, each in enumerate(data)], config)
        case _ if is_made(data) and callable(data):
            count = _count(config)
            return _sharded([Made(data, i, count) for i in range(count)], config, inspect)
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
    sharded = _sharded([rows.picked(hand) for hand in hands], config, dealt=True)
    sharded.batch_size = rows.batch_size
    return sharded


def _sharded(
    shards: Sequence[Shard],
    config: RunConfig,
    inspect: InspectShards = inspect_shards,
    dealt: bool = False,
) -> ShardedRows:
    """Rows of these shards; the probe and the first rows are kept."""
    summaries = inspect(shards, [None] * len(shards))
    ends = np.cumsum([each.size for each in summaries])
    n = int(ends[-1])
    rows = np.union1d(probe_rows(config.seed, n, config.probe), np.arange(min(FIRST, n)))
    parts = np.split(rows, np.searchsorted(rows, ends[:-1]))
    starts = [0, *ends[:-1].tolist()]
    asked = inspect(shards, [part - start for part, start in zip(parts, starts, strict=True)])
    examples = [each.examples for each in asked if each.examples is not None]
    return ShardedRows(shards, summaries, (rows, _joined(examples)), dealt)


def _fetched(shard: Shard) -> Rows:
    return shard if isinstance(shard, Rows) else shard()


def _count(config: RunConfig) -> int:
    if config.shards is None:
        raise ConfigError(
            "data_mode='hop' needs shards, into how many the data are cut: for example shards=8"
        )
    return config.shards


def _as_shard(data: object, index: int) -> Rows:
    try:
        return as_rows(data)
    except ConfigError as error:
        raise ConfigError(f"data in a list are shards; shard {index}: {error}") from None


def _joined(batches: Sequence[object]) -> object:
    """Several batches as one."""
    try:
        columns = zip(*map(tensors_of, batches), strict=True)
        return with_tensors(batches[0], [torch.cat(column) for column in columns])
    except (ValueError, RuntimeError) as error:
        forms = ", ".join(dict.fromkeys(map(form, batches)))
        raise ConfigError(
            "with data_mode='hop' the batches of all shards must be alike but for the number of "
            f"examples, got {forms} ({type(error).__name__}: {error})"
        ) from None


def _checked(batch: object) -> object:
    """A batch that can be joined with others: of tensors alone, or None."""
    for leaf in leaves_of(batch):
        if not (leaf is None or isinstance(leaf, torch.Tensor)):
            raise ConfigError(
                "with data_mode='hop' a batch must be made of tensors, got a "
                f"{type(leaf).__name__} in it"
            )
    return batch
