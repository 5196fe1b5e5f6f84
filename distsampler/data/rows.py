"""The data as numbered rows: how they are kept in memory, and how batches are made of them.

A chain needs two things of the data: how many examples there are, and the batch of some rows.
Tensors in memory are kept as numpy arrays, which travel through shared memory without a copy, and
are indexed at once; any other map-style dataset goes through its own ``__getitem__`` and collate.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, cast

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

from distsampler.config import RunConfig
from distsampler.data.batches import Batches, BatchStream
from distsampler.data.trees import map_leaves, map_tensors, select, tensors_of, to_device
from distsampler.errors import ConfigError

log = logging.getLogger(__name__)
RESIDENT = 0.25  # of a GPU's free memory: data that take no more are kept there
Take = Callable[[NDArray[np.int64]], object]


class Rows(ABC):
    """Numbered examples, whole or in shards, through which they are numbered in order."""

    batch_size: int | None = None  # of the DataLoader that they come from
    shard_sizes: tuple[int, ...] = ()  # N_s, examples of each shard; empty: the data are whole
    dealt = True  # whether the rows were dealt to the shards at random
    pack_obstacle: str | None = None  # why chains cannot take their batches in one; None: they can

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def take(self, rows: NDArray[np.int64]) -> object:
        """Return the batch of these rows, as the loss function gets it, on the CPU."""

    @abstractmethod
    def digest(self) -> str:
        """Return a text that tells one data set from another, the same in every process."""

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First row of each shard (or of the whole), and the row behind its last."""
        return tuple(pairwise(accumulate(self.shard_sizes or (len(self),), initial=0)))

    def stream(self, config: RunConfig, chain: int) -> Batches:
        """Return the minibatches of a chain."""
        epochs = config.batches == "epoch"
        return BatchStream(config.seed, chain, len(self), config.batch_size, epochs=epochs)

    def taker(self, device: torch.device) -> Take:
        """Return a function that gives the batch of some rows on a device."""
        if device.type == "cpu":
            return self.take
        return lambda rows: to_device(self.take(rows), device)

    def picked(self, rows: NDArray[np.int64]) -> Rows:
        """Return some of the rows as rows of their own."""
        return _PickedRows(self, rows)

    def located(self, place: Callable[[Rows], Source]) -> Rows:
        """Return what stands for the rows in a recipe that is sent, and is unpickled as the rows.

        ``place`` puts rows somewhere, and returns what fetches them from there.
        """
        return cast(Rows, _Elsewhere(place(self)))


Source = Callable[[], Rows]


class _Elsewhere:
    """Rows that lie elsewhere."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __reduce__(self) -> tuple[Source, tuple[()]]:
        return self._source, ()


class TensorRows(Rows):
    """Rows of a tree of tensors in memory: the first dimension of each counts examples."""

    def __init__(self, tree: object) -> None:
        sizes = [len(tensor) if tensor.ndim else -1 for tensor in tensors_of(tree)]
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
        """Return the batch of these rows."""
        return select(self._tensors, torch.from_numpy(rows))

    def digest(self) -> str:
        """Return a digest of every byte, taken once."""
        return self._digest

    def taker(self, device: torch.device) -> Take:
        """Return a function that gives the batch of some rows on a device.

        On a GPU the tensors stay if they fit, and are indexed there: the CPU then only sends rows.
        """
        resident = None if device.type == "cpu" else self._resident(device)
        if resident is None:
            return super().taker(device)
        return lambda rows: select(resident, torch.from_numpy(rows).to(device, non_blocking=True))

    def picked(self, rows: NDArray[np.int64]) -> Rows:
        """Return a copy of some of the rows, so that it holds no more than it must."""
        return TensorRows(self.take(rows))

    @cached_property
    def _tensors(self) -> object:
        return map_leaves(_Leaf, _Leaf.tensor, self._tree)

    @cached_property
    def _digest(self) -> str:
        return _digest_of("", self._tensors)

    @cached_property
    def _residents(self) -> dict[torch.device, object]:
        return {}

    def _resident(self, device: torch.device) -> object | None:
        """The tensors on a GPU, moved there once a process; None if they would take too much."""
        if device not in self._residents:
            size = sum(tensor.nbytes for tensor in tensors_of(self._tensors))
            fits = size <= RESIDENT * torch.cuda.mem_get_info(device)[0]
            self._residents[device] = to_device(self._tensors, device) if fits else None
        return self._residents[device]

    def __getstate__(self) -> dict[str, Any]:
        return {"_tree": self._tree, "_n": self._n}


class DatasetRows(Rows):
    """Rows of a map-style dataset, whose ``__getitems__`` is used where there is one."""

    pack_obstacle = (
        "the batches of a Dataset may differ in shape: give the data as tensors in memory"
    )

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # as_rows has seen its __len__

    def take(self, rows: NDArray[np.int64]) -> object:
        """Return the collated batch of these rows."""
        getitems = getattr(self._dataset, "__getitems__", None)
        indices = rows.tolist()
        examples = getitems(indices) if getitems else [self._dataset[index] for index in indices]
        return self._collate(examples)

    def digest(self) -> str:
        """Return a digest of the length and of at most 64 examples spread over the data."""
        rows = np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))
        return _digest_of(f"{len(self)}", self.take(rows))


class _PickedRows(Rows):
    """Some of the rows of others."""

    def __init__(self, rows: Rows, picked: NDArray[np.int64]) -> None:
        self._rows, self._picked = rows, picked

    def __len__(self) -> int:
        return len(self._picked)

    def take(self, rows: NDArray[np.int64]) -> object:
        return self._rows.take(self._picked[rows])

    def digest(self) -> str:
        chosen = hashlib.blake2b(self._picked.tobytes(), digest_size=16).hexdigest()
        return chosen + self._rows.digest()


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


def _digest_of(prefix: str, tree: object) -> str:
    """A digest of a text and of every byte of a batch."""
    state = hashlib.blake2b(prefix.encode(), digest_size=16)
    for tensor in tensors_of(tree):
        array = tensor.detach().cpu().contiguous()
        state.update(f"{array.dtype}{tuple(array.shape)}".encode())
        state.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def as_rows(data: object) -> Rows:
    """Return numbered examples from what ``sample`` takes as data; rows as they are."""
    match data:
        case Rows():
            rows = data
        case DataLoader():
            rows = _of_loader(data)
        case IterableDataset():
            raise ConfigError(
                "data must be map-style, so that a chain can return to any batch after a fault; "
                f"got the IterableDataset {type(data).__name__}: give a Dataset with __len__ and "
                "__getitem__, or tensors"
            )
        case TensorDataset():
            rows = TensorRows(data.tensors)
        case Subset(dataset=TensorDataset() as whole):
            rows = TensorRows(tuple(tensor[list(data.indices)] for tensor in whole.tensors))
        case torch.Tensor() | np.ndarray() | tuple() | dict():
            rows = TensorRows(_as_tensors(data))
        case _ if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
            rows = DatasetRows(data, default_collate)  # type: ignore[arg-type]
        case _:
            raise ConfigError(
                "data must be a map-style Dataset, a tensor, a tuple or dict of tensors, or a "
                f"DataLoader, got {type(data).__name__}"
            )
    if len(rows) == 0:
        raise ConfigError("the data must hold at least one example, got none")
    return rows


def _of_loader(loader: DataLoader[Any]) -> Rows:
    dataset: object = loader.dataset
    if isinstance(dataset, IterableDataset):
        return as_rows(dataset)
    sampler = loader.sampler
    if not isinstance(sampler, RandomSampler | SequentialSampler):
        warnings.warn(
            f"the DataLoader's sampler {type(sampler).__name__} is not used: every chain draws its "
            "own batches, uniformly over the dataset",
            stacklevel=3,
        )
    log.info("taking dataset, collate_fn and batch_size of the DataLoader, not its sampler")
    if not hasattr(dataset, "__len__"):
        raise ConfigError(f"the DataLoader's dataset must have __len__: {type(dataset).__name__}")
    whole = loader.collate_fn is default_collate
    rows = as_rows(dataset) if whole else DatasetRows(loader.dataset, loader.collate_fn)
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
