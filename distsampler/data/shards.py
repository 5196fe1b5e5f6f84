"""Data cut into shards, of which a process holds one at a time.

Rows are numbered through the shards in order, so that whoever asks for rows need not know of them.
A chain asks for rows of the shard it sits on. What lies in several shards, the probe, is gathered
once, before the run, and travels with the recipe.
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
from distsampler.data.rows import Rows, TensorRows, as_rows, map_tensors
from distsampler.errors import ConfigError
from distsampler.seeding import Stream, generator, probe_rows

MakeShard = Callable[[int, int], object]
Source = Callable[[], Rows]
FIRST = 4  # rows that are kept for the checks before a run


@dataclass(frozen=True)
class Held:
    """A shard in memory.

    Args:
        rows: of the shard.
    """

    rows: Rows

    def __call__(self) -> Rows:
        """The shard."""
        return self.rows


@dataclass(frozen=True)
class Made:
    """A shard that is made where it is needed.

    Args:
        make: ``make_shard(index, count)`` gives the data of one shard.
        index: which.
        count: of all.
    """

    make: MakeShard
    index: int
    count: int

    def __call__(self) -> Rows:
        """Makes the shard."""
        return as_rows(self.make(self.index, self.count))


@dataclass(frozen=True)
class Seen:
    """What a look at a shard told.

    Args:
        size: examples.
        digest: tells it from others; empty where examples were asked for, all bytes not read again.
        examples: the batch of the rows that were asked for; None if none were.
    """

    size: int
    digest: str
    examples: object | None


def see(source: Source, rows: NDArray[np.int64] | None) -> Seen:
    """Looks at a shard: its size, and its digest (rows None) or some of its examples."""
    shard = source()
    if rows is None:
        return Seen(len(shard), shard.digest(), None)
    return Seen(len(shard), "", _of_tensors(shard.take(rows)) if len(rows) else None)


def see_here(sources: Sequence[Source], rows: Sequence[NDArray[np.int64] | None]) -> Sequence[Seen]:
    """Looks at shards in this process, one after another."""
    return [see(*pair) for pair in zip(sources, rows, strict=True)]


Look = Callable[[Sequence[Source], Sequence[NDArray[np.int64] | None]], Sequence[Seen]]


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
        """The batch of these rows; None if one of them is not kept."""
        places = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        if not np.array_equal(self.rows[places], rows):
            return None
        index = torch.from_numpy(places)
        return map_tensors(lambda tensor: tensor.index_select(0, index), self.examples)


class ShardedRows:
    """Rows of several shards.

    Args:
        sources: of the shards.
        seen: what a look at each told.
        kept: examples that need no shard.
        dealt: whether the rows were dealt to the shards at random.
    """

    def __init__(
        self, sources: Sequence[Source], seen: Sequence[Seen], kept: _Kept, dealt: bool
    ) -> None:
        self._sources, self._kept, self.dealt = tuple(sources), kept, dealt
        self.sizes = tuple(each.size for each in seen)
        self._digests = [each.digest for each in seen]
        self._ends = np.cumsum(self.sizes)
        ends = self._ends.tolist()
        self.spans: tuple[tuple[int, int], ...] = tuple(zip([0, *ends[:-1]], ends, strict=True))
        """First row of each shard, and the row behind its last."""
        self._current: tuple[int, Rows] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: NDArray[np.int64]) -> object:
        """The batch of these rows; cheapest where all lie in the shard that was asked for last."""
        shards = np.searchsorted(self._ends, [rows.min(), rows.max()], side="right")
        first, last = map(int, shards)
        if first != last or self._current is None or self._current[0] != first:
            kept = self._kept.take(rows)
            if kept is not None:
                return kept
        if first == last:
            return self._shard(first).take(rows - self.spans[first][0])
        return self._gathered(rows)

    def digest(self) -> str:
        """A digest of the shards' sizes and digests."""
        told = repr((self.sizes, self._digests)).encode()
        return hashlib.blake2b(told, digest_size=16).hexdigest()

    def located(self, place: Callable[[Rows], Source]) -> ShardedRows:
        """The same, its shards in memory put somewhere else."""
        sources = [place(s.rows) if isinstance(s, Held) else s for s in self._sources]
        other = object.__new__(ShardedRows)
        other.__dict__.update(self.__getstate__() | {"_sources": tuple(sources)})
        return other

    def _shard(self, index: int) -> Rows:
        if self._current is None or self._current[0] != index:
            self._current = None  # before the next comes, not after
            self._current = (index, self._sources[index]())
        return self._current[1]

    def _gathered(self, rows: NDArray[np.int64]) -> object:
        """A batch that lies in several shards."""
        shards = np.searchsorted(self._ends, rows, side="right")
        order = np.argsort(shards, kind="stable")
        pieces = [
            _of_tensors(self._shard(int(s)).take(rows[shards == s] - self.spans[s][0]))
            for s in np.unique(shards)
        ]
        back = torch.from_numpy(np.argsort(order))
        return map_tensors(lambda tensor: tensor.index_select(0, back), _joined(pieces))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_current": None}


def cut(data: object, config: RunConfig, look: Look = see_here) -> ShardedRows:
    """The data in shards, as a run with data_mode="hop" wants them.

    Args:
        data: what ``as_rows`` takes: its rows are dealt to ``config.shards`` shards at random; a
            list of such things: the shards; or ``make_shard(index, count)``, which makes one.
        config: of the run.
        look: at shards that are made: where they may be.

    Raises:
        ConfigError: if there are not as many shards as asked for, or one is empty.
    """
    match data:
        case ShardedRows():
            return data
        case list():
            sources: list[Source] = [Held(as_rows(each)) for each in data]
            _check_count(len(sources), config.shards)
            return _seen(sources, config, see_here, dealt=False)
        case _ if is_made(data) and callable(data):
            count = _wanted(config)
            return _seen([Made(data, i, count) for i in range(count)], config, look, dealt=False)
        case _:
            return _dealt(as_rows(data), config)


def is_made(data: object) -> bool:
    """Whether data are given as ``make_shard``."""
    return callable(data) and not hasattr(data, "__len__")


def _dealt(rows: Rows, config: RunConfig) -> ShardedRows:
    """The rows dealt at random: hopping is harmless where shards differ by chance alone."""
    count = _wanted(config)
    if count > len(rows):
        raise ConfigError(f"shards must be at most the {len(rows)} examples, got {count}")
    order = generator(config.seed, Stream.SHARDS).permutation(len(rows))
    hands = [np.sort(hand) for hand in np.array_split(order, count)]
    return _seen([Held(_Picked.of(rows, hand)) for hand in hands], config, see_here, dealt=True)


def _seen(sources: Sequence[Source], config: RunConfig, look: Look, dealt: bool) -> ShardedRows:
    seen = look(sources, [None] * len(sources))
    ends = np.cumsum([each.size for each in seen])
    n = int(ends[-1])
    rows = np.union1d(probe_rows(config.seed, n, config.probe), np.arange(min(FIRST, n)))
    parts = np.split(rows, np.searchsorted(rows, ends[:-1]))
    starts = [0, *ends[:-1].tolist()]
    found = look(sources, [part - start for part, start in zip(parts, starts, strict=True)])
    examples = [each.examples for each in found if each.examples is not None]
    return ShardedRows(sources, seen, _Kept(rows, _joined(examples)), dealt)


def _wanted(config: RunConfig) -> int:
    if config.shards is None:
        raise ConfigError(
            "data_mode='hop' needs shards, into how many the data are cut: for example shards=8"
        )
    return config.shards


def _check_count(found: int, wanted: int | None) -> None:
    if wanted not in (None, found):
        raise ConfigError(f"the data are a list of {found} shards, and shards={wanted}")


class _Picked:
    """Some rows of others.

    Args:
        rows: all of them.
        picked: which of them.
    """

    def __init__(self, rows: Rows, picked: NDArray[np.int64]) -> None:
        self._rows, self._picked = rows, picked

    @staticmethod
    def of(rows: Rows, picked: NDArray[np.int64]) -> Rows:
        """Tensors are cut, so that a shard holds no more than it must."""
        if isinstance(rows, TensorRows):
            return TensorRows(rows.take(picked))
        return _Picked(rows, picked)

    def __len__(self) -> int:
        return len(self._picked)

    def take(self, rows: NDArray[np.int64]) -> object:
        """The batch of these rows."""
        return self._rows.take(self._picked[rows])

    def digest(self) -> str:
        """A digest of the choice, and of what was chosen from."""
        chosen = hashlib.blake2b(self._picked.tobytes(), digest_size=16).hexdigest()
        return chosen + self._rows.digest()


def _joined(batches: Sequence[object]) -> object:
    """Several batches as one."""
    leaves: list[list[torch.Tensor]] = []
    for batch in batches:
        found: list[torch.Tensor] = []
        map_tensors(found.append, batch)
        leaves.append(found)
    columns = iter([torch.cat(column) for column in zip(*leaves, strict=True)])
    return map_tensors(lambda _: next(columns), batches[0])


def _of_tensors(batch: object) -> object:
    """A batch that can be joined with others: of tensors alone."""
    match batch:
        case torch.Tensor():
            pass
        case dict():
            _of_tensors(tuple(batch.values()))
        case tuple() | list():
            for each in batch:
                _of_tensors(each)
        case _:
            raise ConfigError(
                "with data_mode='hop' a batch must be made of tensors, got a "
                f"{type(batch).__name__} in it"
            )
    return batch
