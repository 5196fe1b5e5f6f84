"""Batches as trees: tensors in tuples, lists and dicts."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def map_leaves(kind: type[T], function: Callable[[T], object], tree: object) -> object:
    """Return a tree with a function applied to each leaf of one type."""
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
    """Return a batch with a function applied to each of its tensors."""
    return map_leaves(torch.Tensor, function, tree)


def tensors_of(tree: object) -> list[torch.Tensor]:
    """Return the tensors of a batch, in order."""
    tensors: list[torch.Tensor] = []
    map_tensors(tensors.append, tree)
    return tensors


def with_tensors(tree: object, tensors: Sequence[torch.Tensor]) -> object:
    """Return a batch with other tensors in the places of its own."""
    following = iter(tensors)
    return map_tensors(lambda _: next(following), tree)


def select(tree: object, index: torch.Tensor) -> object:
    """Return the batch of some examples of a batch."""
    return map_leaves(torch.Tensor, lambda tensor: tensor.index_select(0, index), tree)


def to_device(tree: object, device: torch.device) -> object:
    """Return a batch on a device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), tree)
