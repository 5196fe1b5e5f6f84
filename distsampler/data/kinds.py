"""The kinds of data that a user may give, each made to rows; what is none is a ConfigError.

Tensors, arrays and data frames in memory are columns: the first dimension of each counts examples.
A map-style dataset, or a longer list, gives one example at an index.
"""

import logging
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from distsampler.data.rows import DatasetRows, Rows, TensorRows, collate_lists, from_numpy
from distsampler.errors import ConfigError

log = logging.getLogger(__name__)
FEW = 8  # tensors in a list that are rather columns than examples
Columns = dict[str, torch.Tensor]  # where each stands in the data -> the column
# Kind of a numpy dtype that no tensor has -> what to do.
_NO_NUMBERS = {
    "O": "give arrays of one kind of number, such as .astype('float32'); None and texts are none",
    "U": "encode the texts, or give a Dataset with a collate_fn that does",
    "S": "encode the texts, or give a Dataset with a collate_fn that does",
    "V": "give its fields as a dict of arrays",
    "M": "give numbers, such as .astype('int64')",
    "m": "give numbers, such as .astype('int64')",
}


def as_rows(data: object) -> Rows:
    """Return numbered examples from what ``sample`` takes as data; rows as they are."""
    rows = data if isinstance(data, Rows) else _rows(data)
    try:
        n = len(rows)
    except Exception as error:  # the user's code: anything can come
        raise ConfigError(
            "the data must have a __len__ that gives the number of examples, but that of "
            f"{type(data).__name__} raised {type(error).__name__}: {error}"
        ) from error
    if n == 0:
        raise ConfigError("the data must hold at least one example, got none")
    return rows


def _rows(data: object) -> Rows:
    match data:
        case DataLoader():
            return _of_loader(data)
        case IterableDataset():
            raise ConfigError(
                "data must be map-style, so that a chain can return to any batch after a fault; "
                f"got the IterableDataset {type(data).__name__}: give a Dataset with __len__ and "
                "__getitem__, or tensors"
            )
        case Subset():
            return _of_subset(data)
        case TensorDataset() if type(data).__getitem__ is TensorDataset.__getitem__:
            return _of_columns(data.tensors)
        case list():
            _check_examples(data)
        case torch.Tensor() | np.ndarray() | tuple() | Mapping():
            return _of_columns(data)
        case _ if _is_frame(data):
            return _of_columns(data)
    no_data = isinstance(data, type | str | bytes | PathLike)
    if not no_data and hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        collate = collate_lists if _is_plain(data) else default_collate
        return DatasetRows(data, collate)  # type: ignore[arg-type]
    raise ConfigError(
        "data must be a map-style Dataset, a tensor, a tuple or dict of tensors, or a DataLoader, "
        f"got {_named(data)}"
    )


def _is_plain(data: object) -> bool:
    """Whether data are a datasets.Dataset without a format, whose arrays come as lists."""
    form = getattr(data, "format", None)
    return hasattr(data, "with_format") and isinstance(form, dict) and form.get("type") is None


def _named(data: object) -> str:
    """What was given as data, and what to do."""
    kind = type(data).__name__
    match data:
        case type():
            return f"the class {data.__name__}: give an object of it"
        case str() | bytes() | PathLike():
            return f"the {kind} {data!r}: load what it names, and give that"
        case _ if callable(data):
            return f"the function {data!r}: call it, or set data_mode='hop' if it makes shards"
        case _ if hasattr(data, "__next__"):
            return f"a {kind}, which can be read once: give list(data)"
        case _:
            return kind


def _of_loader(loader: DataLoader[Any]) -> Rows:
    dataset: object = loader.dataset
    if isinstance(dataset, IterableDataset):
        return as_rows(dataset)
    batches: object = loader.batch_sampler
    if batches is None:
        raise ConfigError(
            "a DataLoader with batch_size=None makes no batches of examples: give its dataset, "
            "whose items must be single examples, or a DataLoader with a batch_size"
        )
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    if not isinstance(sampler, RandomSampler | SequentialSampler):
        part = ": for a part of it give Subset(dataset, indices)"
        warnings.warn(
            f"the DataLoader's sampler {type(sampler).__name__} is not used: every chain draws its "
            "own batches, uniformly over the dataset"
            + (part if isinstance(sampler, SubsetRandomSampler) else ""),
            stacklevel=4,
        )
    if loader.worker_init_fn is not None:
        warnings.warn("the DataLoader's worker_init_fn is not called", stacklevel=4)
    log.info("taking dataset, collate_fn and batch_size of the DataLoader, not its sampler")
    if not hasattr(dataset, "__len__"):
        raise ConfigError(f"the DataLoader's dataset must have __len__: {type(dataset).__name__}")
    whole = loader.collate_fn is default_collate
    rows = as_rows(dataset) if whole else DatasetRows(loader.dataset, loader.collate_fn)
    rows.batch_size = getattr(batches, "batch_size", None)
    return rows


def _of_subset(subset: Subset[Any]) -> Rows:
    """Rows of a part of a dataset; of tensors, only those that are in it."""
    indices, whole = np.asarray(subset.indices), subset.dataset
    if indices.dtype == np.bool_:
        raise ConfigError(
            "the indices of a Subset must be numbers of examples, got booleans, which torch takes "
            "for 0 and 1: give mask.nonzero().flatten().tolist()"
        )
    if type(subset) is Subset and type(whole) is TensorDataset and indices.dtype.kind in "iu":
        return _of_columns(tuple(tensor[torch.from_numpy(indices)] for tensor in whole.tensors))
    return DatasetRows(subset, default_collate)


def _check_examples(data: list[Any]) -> None:
    """Check that a list is one of examples, not of the columns of all of them."""
    arrays = [
        each for each in data if isinstance(each, torch.Tensor | np.ndarray) or _is_frame(each)
    ]
    if not 0 < len(arrays) == len(data) <= FEW:
        return
    shapes = [tuple(each.shape) for each in arrays]
    if len(set(shapes)) > 1 or (shapes[0] and shapes[0][0] > len(data)):
        raise ConfigError(
            f"a list is a data set of its elements, and one of {len(data)} tensors, of shapes "
            f"{', '.join(map(str, shapes))}, may be meant as columns: give a tuple, such as (X, y),"
            " if their rows are the examples, and torch.stack(data) if each is an example"
        )


def _of_columns(data: object) -> Rows:
    """Rows of columns in memory."""
    columns: Columns = {}
    tree = _as_tensors(data, "data", columns)
    if not columns:
        raise ConfigError(f"data must hold a tensor, got an empty {type(data).__name__}")
    for where, tensor in columns.items():
        if tensor.ndim == 0:
            raise ConfigError(
                f"tensors given as data must all have one row an example: {where} has no "
                "dimension, it is a single number"
            )
    sizes = {where: len(tensor) for where, tensor in columns.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{where} has {size}" for where, size in sizes.items())
        raise ConfigError(f"tensors given as data must all have one row an example: {shown}")
    return TensorRows(tree)


def _as_tensors(tree: object, where: str, columns: Columns) -> object:
    """The tree with tensors alone, which are entered in ``columns``."""
    match tree:
        case torch.Tensor():
            columns[where] = _dense(tree, where)
            return columns[where]
        case np.ndarray():
            columns[where] = _of_array(tree, where)
            return columns[where]
        case Mapping():
            return {k: _as_tensors(v, f"{where}[{k!r}]", columns) for k, v in tree.items()}
        case tuple() | list():
            leaves = [_as_tensors(v, f"{where}[{i}]", columns) for i, v in enumerate(tree)]
            make: Any = type(tree)
            return make(*leaves) if hasattr(tree, "_fields") else tuple(leaves)
        case _ if _is_frame(tree) or hasattr(tree, "__array__"):
            return _as_tensors(_array(tree, where), where, columns)
        case _:
            raise ConfigError(
                "data in tuples and dicts must be tensors, got "
                f"{type(tree).__name__} at {where}: {_instead(tree)}"
            )


def _instead(tree: object) -> str:
    match tree:
        case None:
            return "leave it out"
        case bool() | int() | float():
            return "make one tensor of the list, torch.tensor(...)"
        case _ if hasattr(tree, "__getitem__") and not isinstance(tree, str | bytes):
            return "a Dataset is given by itself, and gives tuples or dicts as its examples"
        case _:
            return "make a tensor of it, or give a Dataset, with a collate_fn in a DataLoader"


def _is_frame(data: object) -> bool:
    """Whether data are columns of pandas, polars, pyarrow or xarray."""
    return hasattr(data, "to_numpy") and hasattr(data, "__len__") and not isinstance(data, type)


def _array(column: Any, where: str) -> NDArray[Any]:  # noqa: ANN401 (of many libraries)
    """The array of a data frame, or of what numpy reads."""
    try:
        return np.asarray(column.to_numpy() if _is_frame(column) else column)
    except Exception as error:  # another library's: anything can come
        raise ConfigError(
            f"{where} must become an array, but {type(column).__name__} raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _dense(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor, if it has its values in memory, one by one."""
    what = ""
    if tensor.is_nested:
        what, do = "nested", "pad it: torch.nested.to_padded_tensor(data, 0.0)"
    elif tensor.layout != torch.strided:
        what, do = "sparse", "call .to_dense() on it"
    elif tensor.is_quantized:
        what, do = "quantised", "call .dequantize() on it"
    elif tensor.is_meta:
        what, do = "without values, on the device 'meta'", "load it"
    if what:
        raise ConfigError(f"{where} must be a dense tensor, got one that is {what}: {do}")
    return tensor


def _of_array(array: NDArray[Any], where: str) -> torch.Tensor:
    """A tensor of an array, whatever its strides and byte order are."""
    if np.ma.is_masked(array):
        raise ConfigError(
            f"{where} has masked entries, which a tensor has not: call .filled(value)"
        )
    if do := _NO_NUMBERS.get(array.dtype.kind):
        raise ConfigError(f"{where} must hold numbers, got an array of {array.dtype}: {do}")
    native = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
    try:
        return from_numpy(native)
    except ValueError:  # odd strides, of a dimension with one entry
        return from_numpy(native.copy())
    except TypeError as error:
        raise ConfigError(
            f"{where} must hold numbers that torch has, got an array of {array.dtype} ({error}): "
            "give .astype('float32') or the like of it"
        ) from None
