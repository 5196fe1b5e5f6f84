"""Copies of the user's model: which models can be copied, and a copy that shares nothing with it.

The user's own model is only read: what runs and moves are copies of it.
"""

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import combinations
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distsampler.errors import ConfigError

LOCKS = ("_thread", "threading", "queue")  # modules of types that every copy may share
WRAPPERS = {  # class of a module -> what to give in its place
    "DataParallel": "the module in it (model.module)",
    "DistributedDataParallel": "the module in it (model.module)",
    "FullyShardedDataParallel": "the module before it was sharded",
    "OptimizedModule": "the module before it was compiled (model._orig_mod), and compile=True",
}
OF_MODULES = ("_parameters", "_buffers", "_modules")

_OF_TORCH = vars(nn.Module()).keys()
_FIXED = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy that shares no memory with the model, only its locks.

    What a forward pass has left in attributes, such as an auxiliary loss, is copied without its
    graph, where ``copy.deepcopy`` alone would fail.

    Raises:
        ConfigError: names the attribute that cannot be copied.
    """
    memo: dict[int, object] = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for tensor in _tensors(vars(module))
        if not tensor.is_leaf
    }
    try:
        return _copied(model, dict(memo))
    except (TypeError, RuntimeError):
        for path, value in _attributes(model):
            memo |= _shared(path, value, memo)
    return _copied(model, memo)


def _copied(model: nn.Module, memo: dict[int, object]) -> nn.Module:
    """A deep copy, in which functions that hold parts of the model hold those of the copy."""
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        for name, value in vars(module).items():
            if isinstance(value, FunctionType):
                vars(module)[name] = _rebound(value, memo)
            elif isinstance(value, dict | list) and name not in OF_MODULES:
                places = value if isinstance(value, dict) else range(len(value))
                for place in places:  # hooks, above all
                    if isinstance(value[place], FunctionType):
                        value[place] = _rebound(value[place], memo)
    return made


def _rebound(function: FunctionType, memo: dict[int, object]) -> FunctionType:
    """A function that holds in its closure what stands in the copy for modules of the model."""
    cells = function.__closure__ or ()
    values = [_held(cell, memo) for cell in cells]
    if all(value is cell for value, cell in zip(values, cells, strict=True)):
        return function
    rebound = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__,
        tuple(values),
    )  # fmt: skip
    rebound.__kwdefaults__ = function.__kwdefaults__
    vars(rebound).update(vars(function))
    return rebound


def _held(cell: CellType, memo: dict[int, object]) -> CellType:
    """The cell itself, unless a module, its method or a function that holds one is in it."""
    try:
        value = cell.cell_contents
    except ValueError:  # not yet filled
        return cell
    match value:
        case nn.Module() | nn.Parameter() if id(value) in memo:
            return CellType(memo[id(value)])
        case MethodType() if id(value.__self__) in memo:
            return CellType(MethodType(value.__func__, memo[id(value.__self__)]))
        case FunctionType():
            rebound = _rebound(value, memo)
            return cell if rebound is value else CellType(rebound)
        case _:
            return cell


class Attributes:
    """What a model's modules hold beside weights and buffers, such as caches and counters."""

    def __init__(self, model: nn.Module) -> None:
        kept = [*model.modules(), *model.parameters()]
        self._memo: dict[int, object] = {id(each): each for each in kept}
        self._modules = [(module, self._copied(self._own(module))) for module in model.modules()]

    def put_back(self) -> None:
        """Give every module what it had."""
        for module, values in self._modules:
            for name in self._own(module).keys() - values.keys():
                delattr(module, name)
            vars(module).update(self._copied(values))

    def size(self) -> int:
        """Return how many entries the lists and dicts among them have."""
        values = (value for module, _ in self._modules for value in self._own(module).values())
        return sum(len(value) for value in values if isinstance(value, list | dict | deque | set))

    def _own(self, module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if name not in _OF_TORCH}

    def _copied(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values that nobody else changes; those that cannot be copied, as they are."""
        return {name: self._one_copied(value) for name, value in values.items()}

    def _one_copied(self, value: object) -> object:
        if isinstance(value, _FIXED):
            return value
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return value.detach().clone()
        try:
            return copy.deepcopy(value, dict(self._memo))
        except (TypeError, RuntimeError):
            return value


def check_model(model: nn.Module, moving: Iterable[str]) -> None:
    """Check that copies of a model are models of their own, with the weights that it has.

    Args:
        model: the user's model, which is only read.
        moving: names of the parameters that move.

    Raises:
        ConfigError: if they would not be.
    """
    for name, module in model.named_modules():
        instead = WRAPPERS.get(type(module).__name__)
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted or (instead and type(module).__module__.startswith("torch")):
            where = f"its part {name!r} is" if name else "it is"
            raise ConfigError(
                f"the model must be a plain module, but {where} a {type(module).__name__}: give "
                f"{'the module before it was scripted or traced' if scripted else instead}"
            )
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        _check_weights(name, p)
    devices = sorted({str(p.device) for p in parameters.values()})
    if len(devices) > 1:
        raise ConfigError(
            f"the model must lie on one device, as a chain does, got {', '.join(devices)}: load it "
            "onto one (without device_map), and leave the choice to RunConfig(device=...)"
        )
    _check_apart({**parameters, **dict(model.named_buffers())}, set(moving))


def _check_weights(name: str, p: Tensor) -> None:
    """Check that a parameter holds numbers, and is a leaf that a copy can have too."""
    if is_lazy(p):
        raise ConfigError(
            f"the parameter {name!r} must have a shape, but its lazy module has seen no data: call "
            "the model on a batch first"
        )
    if p.is_meta:
        raise ConfigError(
            f"the parameter {name!r} must hold numbers, but it lies on the meta device (offloaded, "
            "or not loaded): load the whole model into memory"
        )
    if hasattr(p, "device_mesh"):
        raise ConfigError(
            f"the parameter {name!r} must be whole, but it is a {type(p.data).__name__} that is "
            "sharded over devices: give full_tensor() of each parameter"
        )
    if any(n > 1 and step == 0 for n, step in zip(p.shape, p.stride(), strict=True)):
        raise ConfigError(
            f"the parameter {name!r} must have memory for each of its entries, but it was expanded "
            "from fewer: make what is free the parameter, and expand() it in forward()"
        )
    if not p.is_leaf:
        raise ConfigError(
            f"the parameter {name!r} must be a leaf of autograd, but it is computed from others: "
            "give the model before it was traced or copied"
        )


def _check_apart(tensors: dict[str, Tensor], moving: set[str]) -> None:
    """Check that what moves shares no entry with another tensor: in a copy the two would part."""
    shelves: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.layout is torch.strided and tensor.numel() and not tensor.is_meta:
            place = tensor.device, tensor.dtype, tensor.untyped_storage().data_ptr()
            shelves.setdefault(place, []).append(name)
    pairs = (pair for names in shelves.values() for pair in combinations(names, 2))
    for one, other in pairs:
        if moving & {one, other} and _overlap(tensors[one], tensors[other]):
            raise ConfigError(
                f"{one!r} and {other!r} must not share memory: they are two tensors on one "
                "storage, which a copy of the model would not have, so that what is tied here "
                f"would move apart; make them one parameter (module.{other} = module.{one}), or, "
                "of a transposed or sliced one, compute it in forward()"
            )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have an entry in common."""
    first, second = _span(a), _span(b)
    if first[1] <= second[0] or second[1] <= first[0]:
        return False
    start, stop = min(first[0], second[0]), max(first[1], second[1])
    touched = torch.zeros(stop - start, dtype=torch.uint8, device=a.device)
    for tensor in (a, b):
        place = tensor.storage_offset() - start
        touched.as_strided(tensor.shape, tensor.stride(), place).add_(1)
    return bool((touched > 1).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first element of a storage that a tensor uses, and the one behind its last."""
    start = int(tensor.storage_offset())
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + int(reach) + 1


def _tensors(value: object) -> Iterator[Tensor]:
    """Tensors in an attribute, however deep in lists and dicts."""
    match value:
        case Tensor():
            yield value
        case dict():
            for each in value.values():
                yield from _tensors(each)
        case list() | tuple() | set():
            for each in value:
                yield from _tensors(each)


def attribute_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that are neither parameters nor buffers, with paths that a copy has too."""
    for path, value in _attributes(model):
        for number, tensor in enumerate(_tensors(value)):
            if not isinstance(tensor, nn.Parameter):
                yield f"{path}[{number}]" if tensor is not value else path, tensor


def _attributes(model: nn.Module) -> Iterator[tuple[str, object]]:
    """What each module holds of its own, with its path."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in OF_MODULES:
                yield f"{name}.{key}".lstrip("."), value


def _shared(path: str, value: object, memo: dict[int, object]) -> dict[int, object]:
    """What stands for an attribute in a copy, if the attribute cannot be copied: a lock itself."""
    try:
        copy.deepcopy(value, dict(memo))
    except (TypeError, RuntimeError) as error:
        kind: Any = type(value)
        if kind.__module__ in LOCKS or isinstance(value, ModuleType):
            return {id(value): value}
        raise ConfigError(
            f"the model must be one that copy.deepcopy can copy, for each chain to have its own, "
            f"but model.{path}, a {kind.__name__}, is not: {error}; take it out, or give its class "
            "a __deepcopy__"
        ) from None
    return {}
