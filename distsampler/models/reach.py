"""What a loss depends on: the leaves of its graph, and what it reads past them.

A chain moves the parameters of a copy, each a view of one flat tensor, along the gradient of the
loss. So a loss must reach them through autograd, and a forward pass must leave them in their place.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distsampler.errors import ConfigError
from distsampler.models.copies import attribute_tensors

LOW = (torch.bfloat16, torch.float16)


class Graph(NamedTuple):
    """What the gradient of a loss walks through."""

    leaves: frozenset[int]  # ids of the tensors that it reaches
    opaque: bool  # whether a function of the user's, or a checkpoint, may hide more of them
    low: bool  # whether something in it is computed in low precision


def graph_of(losses: Tensor) -> Graph:
    """Return what the gradient of a loss walks through."""
    leaves, opaque, low, seen = {id(losses)} if losses.is_leaf else set[int](), False, False, set()
    todo: list[Any] = [losses.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        opaque = opaque or isinstance(node, torch.autograd.function.BackwardCFunction)
        low = low or any(each.dtype in LOW for each in getattr(node, "_input_metadata", ()))
        todo += [following for following, _ in node.next_functions]
    return Graph(frozenset(leaves), opaque, low)


Places = dict[str, tuple[object, ...]]
"""By name: which object a parameter is, where its entries and its gradient lie, if it moves."""


def places_of(model: nn.Module) -> Places:
    """Return where a replica's parameters lie."""
    return {
        name: (id(p), p.data_ptr(), p.grad.data_ptr() if p.grad is not None else None, True)
        if p.requires_grad
        else (id(p), p.data_ptr(), None, False)
        for name, p in model.named_parameters()
    }


def check_places(before: Places, after: Places) -> None:
    """Check that calls have left the parameters that move where they were.

    Raises:
        ConfigError: names the first that is elsewhere.
    """
    for name, place in after.items():
        if name not in before:
            raise ConfigError(
                f"a forward pass must find all parameters there, but it makes {name!r}: call the "
                "model once before you give it"
            )
        was, is_now = before[name], place
        if was == is_now or not was[3]:
            continue
        if not is_now[3]:
            raise ConfigError(
                f"what moves must keep its gradient, but the forward pass sets requires_grad=False "
                f"for {name!r}: set it before you give the model, or name what moves (restrict_to)"
            )
        if was[:2] == is_now[:2]:
            raise ConfigError(
                f"loss(model, batch) must leave gradients alone, but it takes away that of {name!r}"
                ": remove zero_grad() from it, gradients are zeroed before each step"
            )
        raise ConfigError(
            f"a forward pass must leave the weights as they are, but it moves {name!r} to other "
            "memory: remove what sets .data, or converts the model, from forward() and the loss"
        )


def moving_in(replica_model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a replica that move, by name."""
    return {name: p for name, p in replica_model.named_parameters() if p.requires_grad}


def unreached(replica_model: nn.Module, graph: Graph) -> dict[str, nn.Parameter]:
    """Return the parameters that move and that the gradient does not reach, as far as is seen."""
    if graph.opaque:
        return {}
    moving = moving_in(replica_model)
    return {name: p for name, p in moving.items() if id(p) not in graph.leaves}


def aliases(model: nn.Module, replica_model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield attributes of the model that share memory with a parameter that moves.

    Yields:
        The attribute's path, the name of the parameter, and the tensor that stands for the
        attribute in the replica, where it has memory of its own.
    """
    moving = moving_in(replica_model)
    homes = {
        p.untyped_storage().data_ptr(): name
        for name, p in model.named_parameters()
        if name in moving
    }
    of_copy = dict(attribute_tensors(replica_model))
    for path, tensor in attribute_tensors(model):
        if tensor.layout is torch.strided and tensor.numel() and path in of_copy:
            name = homes.get(tensor.untyped_storage().data_ptr())
            if name is not None:
                yield path, name, of_copy[path]
