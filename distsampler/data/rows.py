"""The data as numbered rows: how they are held, cut into blocks, and turned into batches.

A chain needs two things of the data: how many examples there are, and the batch of some rows.
Tensors in memory are held as numpy arrays, which travel through shared memory without a copy, and
are indexed at once; any other map-style dataset goes through its own ``__getitem__`` and collate.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from distsampler.errors import ConfigError

BLOCK = 1024  # rows of a block of the anchor pass: fixed, so that its bits are too
log = logging.getLogger(__name__)
RESIDENT = 0.25  # of a GPU's free memory: data that take no more are kept there
T = TypeVar("T")
Take = Callable[[NDArray[np.int64]], object]


class Rows(Protocol):
    """Numbered examples."""

    def __len__(self) -> int:
        """How many examples."""
        ...

    def take(self, rows: NDArray[np.int64]) -> object:
        """The batch of these rows, as the loss function gets it, on the CPU."""
        ...

    def digest(self) -> str:
        """Tells one data set from another; the same in every process."""
        ...


def map_leaves(kind: type[T], function: Callable[[T], object], tree: object) -> object:
    """A tree (tuples, lists and dicts) with a function applied to each leaf of one type."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_leaves(kind, function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        leaves = [map_leaves(kind, function, value) for value in tree]
        make: Any = type(tree)
        return make(*leaves) if hasattr(tree, "_fields") else make(leaves)
    return tree


def map_tensors(function: Callable[[torch.Tensor], object], tree: object) -> object:
    """A batch with a function applied to each of its tensors."""
    return map_leaves(torch.Tensor, function, tree)


class TensorRows:
    """Rows of tensors in memory: the first dimension of each counts examples.

    Args:
        tree: a tensor, or a tuple, list or dict of tensors.

    Raises:
        ConfigError: if there is no tensor, or their first dimensions differ.
    """

    batch_size: int | None = None  # of the DataLoader that they come from

    def __init__(self, tree: object) -> None:
        sizes: list[int] = []
        map_tensors(lambda tensor: sizes.append(len(tensor) if tensor.ndim else -1), tree)
        self._tree = map_tensors(_Leaf.of, tree)
        if not sizes or len(set(sizes)) > 1 or sizes[0] < 0:
            raise ConfigError(
                "tensors given as data must all have one row an example: got first dimensions "
                f"{sizes}"
            )
        self._n = sizes[0]

    def __len__(self) -> int:
        return self._n

    def take(self, rows: NDArray[np.int64]) -> object:
        """The batch of these rows."""
        index = torch.from_numpy(rows)
        return map_tensors(lambda tensor: tensor.index_select(0, index), self._tensors)

    def digest(self) -> str:
        """A digest of every byte, taken once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        state = hashlib.blake2b(digest_size=16)
        map_tensors(lambda tensor: _feed(state, tensor), self._tensors)
        return state.hexdigest()

    def resident(self, device: torch.device) -> object | None:
        """The tensors on a GPU, moved there once a process; None if they would take too much."""
        if device not in self._residents:
            sizes: list[int] = []
            map_tensors(lambda tensor: sizes.append(tensor.nbytes), self._tensors)
            fits = sum(sizes) <= RESIDENT * torch.cuda.mem_get_info(device)[0]
            moved = map_tensors(lambda tensor: tensor.to(device), self._tensors) if fits else None
            self._residents[device] = moved
        return self._residents[device]

    @cached_property
    def _tensors(self) -> object:
        return map_leaves(_Leaf, _Leaf.tensor, self._tree)

    @cached_property
    def _residents(self) -> dict[torch.device, object]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_tree": self._tree, "_n": self._n}


@dataclass(frozen=True)
class _Leaf:
    """One tensor as numpy; bfloat16, which numpy lacks, as its 16 bits."""

    array: NDArray[Any]
    bfloat16: bool

    @staticmethod
    def of(tensor: torch.Tensor) -> _Leaf:
        tensor = tensor.detach().cpu().contiguous()
        bfloat16 = tensor.dtype == torch.bfloat16
        return _Leaf((tensor.view(torch.int16) if bfloat16 else tensor).numpy(), bfloat16)

    def tensor(self) -> torch.Tensor:
        with warnings.catch_warnings():
            # Shared memory is read-only, of which torch warns; nothing here writes to it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensor = torch.from_numpy(self.array)
        return tensor.view(torch.bfloat16) if self.bfloat16 else tensor


def taker(rows: Rows, device: torch.device) -> Take:
    """What gives the batch of some rows on a device.

    Tensors in memory lie on a GPU if they fit, and are cut there: the CPU then only sends indices.
    """
    if device.type == "cpu":
        return rows.take

    def send(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    resident = rows.resident(device) if isinstance(rows, TensorRows) else None
    if resident is None:
        return lambda picked: map_tensors(send, rows.take(picked))

    def cut(picked: NDArray[np.int64]) -> object:
        index = send(torch.from_numpy(picked))
        return map_tensors(lambda tensor: tensor.index_select(0, index), resident)

    return cut


class DatasetRows:
    """Rows of a map-style dataset.

    Args:
        dataset: with ``__len__`` and ``__getitem__`` (``__getitems__`` is used where there is one).
        collate: examples -> batch.
    """

    batch_size: int | None = None  # of the DataLoader that they come from

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # as_rows has seen its __len__

    def take(self, rows: NDArray[np.int64]) -> object:
        """The collated batch of these rows."""
        getitems = getattr(self._dataset, "__getitems__", None)
        indices = rows.tolist()
        examples = getitems(indices) if getitems else [self._dataset[index] for index in indices]
        return self._collate(examples)

    def digest(self) -> str:
        """A digest of the length and of at most 64 examples spread over the data."""
        state = hashlib.blake2b(f"{len(self)}".encode(), digest_size=16)
        rows = np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))
        map_tensors(lambda tensor: _feed(state, tensor), self.take(rows))
        return state.hexdigest()


def _feed(state: hashlib.blake2b, tensor: torch.Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def as_rows(data: object) -> TensorRows | DatasetRows:
    """Numbered examples from whatever a user calls data.

    Args:
        data: a map-style Dataset, a tensor or numpy array, a tuple, list or dict of these, or a
            DataLoader (its dataset and collate_fn are taken, its sampler is not). What this has
            made before is returned as it is.

    Raises:
        ConfigError: if it is empty, an IterableDataset, or nothing of the kind.
    """
    rows = _as_rows(data)
    if len(rows) == 0:
        raise ConfigError("the data must hold at least one example, got none")
    return rows


def _as_rows(data: object) -> TensorRows | DatasetRows:
    match data:
        case TensorRows() | DatasetRows():
            return data
        case DataLoader():
            return _of_loader(data)
        case IterableDataset():
            raise ConfigError(
                "data must be map-style, so that a chain can return to any batch after a fault; "
                f"got the IterableDataset {type(data).__name__}: give a Dataset with __len__ and "
                "__getitem__, or tensors"
            )
        case TensorDataset():
            return TensorRows(data.tensors)
        case Subset(dataset=TensorDataset() as whole):
            return TensorRows(tuple(tensor[list(data.indices)] for tensor in whole.tensors))
        case torch.Tensor() | np.ndarray() | tuple() | dict():
            return TensorRows(_as_tensors(data))
        case _ if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
            return DatasetRows(data, default_collate)  # type: ignore[arg-type]
        case _:
            raise ConfigError(
                "data must be a map-style Dataset, a tensor, a tuple or dict of tensors, or a "
                f"DataLoader, got {type(data).__name__}"
            )


def _of_loader(loader: DataLoader[Any]) -> TensorRows | DatasetRows:
    dataset: object = loader.dataset
    if isinstance(dataset, IterableDataset):
        return _as_rows(dataset)
    sampler = loader.sampler
    if not isinstance(sampler, RandomSampler | SequentialSampler):
        warnings.warn(
            f"the DataLoader's sampler {type(sampler).__name__} is not used: every chain draws its "
            "own batches, uniformly over the dataset",
            stacklevel=4,
        )
    log.info("taking dataset, collate_fn and batch_size of the DataLoader, not its sampler")
    if not hasattr(dataset, "__len__"):
        raise ConfigError(f"the DataLoader's dataset must have __len__: {type(dataset).__name__}")
    whole = loader.collate_fn is default_collate
    rows = _as_rows(dataset) if whole else DatasetRows(loader.dataset, loader.collate_fn)
    rows.batch_size = loader.batch_size
    return rows


def _as_tensors(tree: object) -> object:
    match tree:
        case torch.Tensor():
            return tree
        case np.ndarray():
            return torch.from_numpy(tree)
        case Mapping():
            return {key: _as_tensors(value) for key, value in tree.items()}
        case tuple() | list():
            return tuple(_as_tensors(value) for value in tree)
        case _:
            raise ConfigError(
                f"data in tuples and dicts must be tensors, got {type(tree).__name__}"
            )


def blocks(n: int) -> Iterator[tuple[int, int]]:
    """The data cut into (start, stop) blocks of 1,024 rows."""
    return ((start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def spread(items: Iterable[tuple[int, int]], places: int) -> list[tuple[int, int]]:
    """Neighbouring blocks joined into about four pieces a place, so that none waits for long."""
    items = list(items)
    size = max(1, -(-len(items) // (4 * places)))
    return [
        (items[first][0], items[min(first + size, len(items)) - 1][1])
        for first in range(0, len(items), size)
    ]
