"""Batches as trees: tensors in tuples, lists, mappings and dataclasses."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What torch does not index -> integers of the same bits, which it does.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def map_leaves(
    is_leaf: Callable[[object], bool], function: Callable[[Any], object], tree: object
) -> object:
    """Return a tree of the same types with a function applied to its leaves of one kind."""
    if is_leaf(tree):
        return function(tree)

    def mapped(value: object) -> object:
        return map_leaves(is_leaf, function, value)

    match tree:
        case Mapping():
            return _filled(tree, {key: mapped(value) for key, value in tree.items()})
        case tuple() | list():
            leaves = [mapped(value) for value in tree]
            make: Any = type(tree)
            return make(*leaves) if hasattr(tree, "_fields") else make(leaves)
        case _ if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
            return _replaced(tree, {name: mapped(value) for name, value in _fields(tree)})
        case _:
            return tree


def leaves_of(tree: object) -> Iterator[object]:
    """Yield the leaves of a batch, in order, whatever they are."""
    match tree:
        case Mapping():
            children: Sequence[object] = list(tree.values())
        case tuple() | list():
            children = tree
        case _ if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
            children = [value for _, value in _fields(tree)]
        case _:
            yield tree
            return
    for child in children:
        yield from leaves_of(child)


def map_tensors(function: Callable[[Tensor], object], tree: object) -> object:
    """Return a batch with a function applied to each of its tensors."""
    return map_leaves(lambda leaf: isinstance(leaf, Tensor), function, tree)


def tensors_of(tree: object) -> list[Tensor]:
    """Return the tensors of a batch, in order."""
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def with_tensors(tree: object, tensors: Sequence[Tensor]) -> object:
    """Return a batch with other tensors in the places of its own."""
    following = iter(tensors)
    return map_tensors(lambda _: next(following), tree)


def select(tree: object, index: Tensor) -> object:
    """Return the batch of some examples of a batch."""

    def selected(tensor: Tensor) -> Tensor:
        bits = _SIGNED.get(tensor.dtype)
        if bits is None:
            return tensor.index_select(0, index)
        return tensor.view(bits).index_select(0, index).view(tensor.dtype)

    return map_tensors(selected, tree)


def to_device(tree: object, device: torch.device) -> object:
    """Return a batch on a device; what moves as a whole, such as a PackedSequence, moves itself."""
    return map_leaves(_moves, lambda leaf: leaf.to(device, non_blocking=True), tree)


def _moves(leaf: object) -> bool:
    return callable(getattr(leaf, "to", None)) and not isinstance(leaf, Mapping)


def _filled(mapping: Mapping[Any, object], values: dict[Any, object]) -> object:
    """The mapping with other values; one that cannot be changed becomes a dict."""
    if type(mapping) is dict or not isinstance(mapping, MutableMapping):
        return values
    filled = copy.copy(mapping)
    for key, value in values.items():
        filled[key] = value
    return filled


def _fields(value: Any) -> list[tuple[str, object]]:  # noqa: ANN401 (a dataclass)
    return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]


def _replaced(value: object, fields: dict[str, object]) -> object:
    """A dataclass with other values, without its ``__init__``, which may do more than keep them."""
    replaced = copy.copy(value)
    for name, field in fields.items():
        object.__setattr__(replaced, name, field)
    return replaced


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor in the order of its entries, uint8, whatever its strides."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() == 1 or flat.stride(0) != 1:  # the stride of a single entry may be any
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)
