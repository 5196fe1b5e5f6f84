"""The data as numbered rows: how they are kept in memory, and how batches are made of them.

A chain needs two things of the data: how many examples there are, and the batch of some rows.
Tensors in memory are kept as numpy arrays, which travel through shared memory without a copy, and
are indexed at once; any other map-style dataset goes through its own ``__getitem__`` and collate.
"""

from __future__ import annotations

import hashlib
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
from torch.utils.data import Dataset, default_collate

from distsampler.config import RunConfig
from distsampler.data.batches import Batches, BatchStream
from distsampler.data.trees import (
    leaves_of,
    map_leaves,
    map_tensors,
    select,
    tensors_of,
    to_device,
)
from distsampler.errors import ConfigError

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
    def varies(self) -> bool:
        """Whether a row is another one at each reading, as with random augmentation."""
        return False

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
        self._tree = map_tensors(_Leaf.of, tree)
        self._n = len(tensors_of(tree)[0])

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
        return map_leaves(lambda leaf: isinstance(leaf, _Leaf), _Leaf.tensor, self._tree)

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
        """Return the collated batch of these rows, without a graph, on the CPU."""
        examples = self._examples(rows.tolist())
        try:
            batch = self._collate(examples)
        except Exception as error:  # the user's code, or torch's: anything can come
            raise ConfigError(self._collate_failure(examples, error)) from error
        if all(t.device.type == "cpu" and not t.requires_grad for t in tensors_of(batch)):
            return batch
        return map_tensors(lambda tensor: tensor.detach().cpu(), batch)

    @cached_property
    def varies(self) -> bool:
        """Whether the first rows, read twice, are not the same."""
        rows = np.arange(min(3, len(self)))
        with torch.random.fork_rng([]):
            return _digest_of("", self.take(rows)) != _digest_of("", self.take(rows))

    def digest(self) -> str:
        """Return a digest of the length and of at most 64 examples spread over the data."""
        if self.varies:
            return "others at each reading"
        rows = np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))
        return _digest_of(f"{len(self)}", self.take(rows))

    def _examples(self, indices: list[int]) -> list[Any]:
        getitems, asked = getattr(self._dataset, "__getitems__", None), indices
        try:
            if getitems:
                return list(getitems(indices))
            examples = []
            for index in indices:
                asked = [index]
                examples.append(self._dataset[index])
        except Exception as error:  # the user's code: anything can come
            kind, where = type(self._dataset).__name__, ", ".join(map(str, asked[:5]))
            more = ", ..." if len(asked) > 5 else ""
            raise ConfigError(
                f"the data must give each of their {len(self)} examples (their __len__), but "
                f"{kind} raised {type(error).__name__} at index {where}{more}: {error}"
            ) from error
        return examples

    def _collate_failure(self, examples: list[Any], error: Exception) -> str:
        forms = [form(example) for example in examples]
        other = next((i for i, each in enumerate(forms) if each != forms[0]), None)
        shown = f"an example is {forms[0]}" + ("" if other is None else f", another {forms[other]}")
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if self._collate not in (default_collate, collate_lists):
            return (
                f"the collate_fn of the data must make a batch of {len(forms)} examples: {reason}"
            )
        return (
            "the data's examples must be tensors, arrays or numbers of one shape each, in tuples "
            f"or dicts, or torch makes no batch of them: {shown} ({reason}); leave out what is "
            "not, or give a DataLoader whose collate_fn makes batches (pads, encodes)"
        )


def collate_lists(examples: list[Any]) -> object:
    """Return the batch of examples in which a list is an array, as in a plain datasets.Dataset."""
    return default_collate([map_leaves(_is_list, torch.tensor, each) for each in examples])


def _is_list(value: object) -> bool:
    return isinstance(value, list)


class _PickedRows(Rows):
    """Some of the rows of others."""

    def __init__(self, rows: Rows, picked: NDArray[np.int64]) -> None:
        self._rows, self._picked = rows, picked

    def __len__(self) -> int:
        return len(self._picked)

    def take(self, rows: NDArray[np.int64]) -> object:
        return self._rows.take(self._picked[rows])

    @property
    def varies(self) -> bool:
        return self._rows.varies

    def digest(self) -> str:
        chosen = hashlib.blake2b(self._picked.tobytes(), digest_size=16).hexdigest()
        return chosen + self._rows.digest()


@dataclass(frozen=True)
class _Leaf:
    """One tensor as numpy; what numpy lacks, such as bfloat16, as integers of the same bits."""

    array: NDArray[Any]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> _Leaf:
        tensor = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
        try:
            return _Leaf(tensor.numpy(), tensor.dtype)
        except TypeError:
            return _Leaf(tensor.view(_BITS[tensor.itemsize]).numpy(), tensor.dtype)

    def tensor(self) -> torch.Tensor:
        return from_numpy(self.array).view(self.dtype)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # size of an entry in bytes -> integers


def from_numpy(array: NDArray[Any]) -> torch.Tensor:
    """Return a tensor that shares the memory of an array."""
    with warnings.catch_warnings():
        # Shared memory is read-only, of which torch warns; nothing here writes to it.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def form(tree: object) -> str:
    """Return types and shapes of an example, for a sentence."""
    match tree:
        case torch.Tensor() | np.ndarray():
            return f"{type(tree).__name__}{tuple(tree.shape)}"
        case Mapping():
            return "{" + ", ".join(f"{key!r}: {form(value)}" for key, value in tree.items()) + "}"
        case tuple() | list():
            return f"{type(tree).__name__} of ({', '.join(map(form, tree[:4]))}" + (
                f", ... {len(tree)} in all)" if len(tree) > 4 else ")"
            )
        case None:
            return "None"
        case _:
            return type(tree).__name__


def _digest_of(prefix: str, tree: object) -> str:
    """A digest of a text and of every byte of a batch."""
    state = hashlib.blake2b(prefix.encode(), digest_size=16)
    for leaf in leaves_of(tree):
        match leaf:
            case torch.Tensor():
                for part in leaf.unbind() if leaf.is_nested else (leaf,):
                    _add(state, part)
            case np.ndarray() if leaf.dtype.kind in "biufc":
                _add(state, torch.from_numpy(leaf.astype(leaf.dtype.newbyteorder("="))))
            case str() | bytes() | bool() | int() | float() | complex() | np.generic():
                state.update(repr(leaf).encode())
    return state.hexdigest()


def _add(state: hashlib.blake2b, tensor: torch.Tensor) -> None:
    """Add the bytes of a tensor, whatever its strides are, to a digest."""
    dense = tensor.detach().cpu()
    dense = (dense if dense.layout == torch.strided else dense.to_dense()).contiguous()
    state.update(f"{dense.dtype}{tuple(dense.shape)}".encode())
    # A dimension of one entry may have any stride, which view() refuses.
    flat = dense.resolve_conj().resolve_neg().as_strided((dense.numel(),), (1,))
    state.update(flat.view(torch.uint8).numpy().data)
