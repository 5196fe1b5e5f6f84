"""Which models can be copied, and that a copy shares no memory with its model."""

import copy
import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune

from distsampler.errors import ConfigError
from distsampler.models.copies import check_model, copied
from tests.models.test_inspection import state_of

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def linear(**attributes: Any) -> nn.Module:
    model = nn.Linear(4, 4)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def pair(one: Tensor, other: Tensor) -> nn.Module:
    """Two parameters of these tensors' memory."""
    model = nn.Module()
    model.one, model.other = nn.Parameter(one), nn.Parameter(other)
    return model


def with_buffer() -> nn.Module:
    model = linear()
    model.register_buffer("kept", model.get_parameter("weight").detach()[1:])
    return model


def computed() -> nn.Module:
    model = linear()
    model._parameters["weight"] = model.weight * 2  # type: ignore[assignment]
    return model


def sharded() -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    weight = distribute_tensor(torch.randn(4, 4), mesh, [Replicate()])
    return linear(weight=nn.Parameter(weight))


def scripted(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(model)


def traced(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, X)


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules are new
        return nn.LazyLinear(4)


BLOCK = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (lambda: scripted(linear()), "it is a RecursiveScriptModule: give the module before it was scripted or traced"),
    "a scripted part": (lambda: nn.Sequential(linear(), scripted(linear())), "but its part '1' is a RecursiveScriptModule"),
    "traced": (lambda: traced(linear()), "it is a TopLevelTracedModule: give the module before it was scripted or traced"),
    "DataParallel": (lambda: nn.DataParallel(linear()), "it is a DataParallel: give the module in it (model.module)"),
    "DistributedDataParallel": (lambda: DistributedDataParallel(linear()), "give the module in it (model.module)"),
    "compiled": (lambda: torch.compile(linear(), backend="eager"), "before it was compiled (model._orig_mod), and compile=True"),
    "a compiled part": (lambda: nn.Sequential(torch.compile(linear(), backend="eager")), "its part '0' is a OptimizedModule"),
    "meta": (lambda: linear().to("meta"), "'weight' must hold numbers, but it lies on the meta device"),
    "lazy": (lazy, "'weight' must have a shape, but its lazy module has seen no data: call the model on a batch"),
    "sharded": (sharded, "'weight' must be whole, but it is a DTensor that is sharded over devices: give full_tensor()"),
    "computed": (computed, "'weight' must be a leaf of autograd, but it is computed from others"),
    "expanded": (lambda: linear(bias=nn.Parameter(torch.ones(1).expand(4))), "'bias' must have memory for each of its entries"),
    "tied by memory": (lambda: pair(BLOCK, BLOCK.detach()), "'one' and 'other' must not share memory"),
    "tied by a transposed view": (lambda: pair(BLOCK, BLOCK.t()), "of a transposed or sliced one, compute it in forward()"),
    "slices that overlap": (lambda: pair(BLOCK[:3], BLOCK[2:]), "make them one parameter (module.other = module.one)"),
    "a buffer that is a part of a parameter": (with_buffer, "'weight' and 'kept' must not share memory"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Any:
    """A process group of this process alone, which wrappers and shards ask for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_a_copy_would_not_be_like_is_refused_by_the_name_of_its_cause(
    kind: str,
) -> None:
    made, sentence = REFUSED[kind]
    model = made()
    with pytest.raises(ConfigError) as caught:
        check_model(model, names_of(model))
    assert sentence in str(caught.value)


def test_what_stays_may_share_memory() -> None:
    check_model(pair(BLOCK, BLOCK.t()), [])


@pytest.mark.parametrize("value", [(i for i in range(3)), Path(__file__).open()], ids=type)  # noqa: SIM115
def test_an_attribute_that_cannot_be_copied_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.0\.value, a \w+, is not: .*__deepcopy__"):
        copied(nn.Sequential(linear(value=value)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.other(self.one(x)))


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.flatten_parameters()
        return super().forward(x)[0]


class Sliced(nn.Module):
    """Two parameters on one storage, that have no entry in common."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.randn(8, 4)
        self.one, self.other = nn.Parameter(both[:4]), nn.Parameter(both[4:])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.one @ self.other


def pruned() -> nn.Module:
    model = linear()
    prune.l1_unstructured(model, "weight", 0.5)
    return model


def normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old form is deprecated
        return nn.utils.weight_norm(linear())


def remembering() -> nn.Module:
    model = linear()
    model.last = {"out": [model(X)]}  # type: ignore[assignment]  # with its graph
    return model


def hooked() -> nn.Module:
    """Adds what a hook has kept, which holds the model in its closure."""
    model = nn.Sequential(linear(), nn.Linear(4, 4))
    model[0].kept = {}  # type: ignore[assignment]
    model[1].register_forward_hook(lambda *args: model[0].kept.update(out=args[-1].clone()))
    model[1].register_forward_hook(lambda *args: args[-1] + model[0].kept["out"])
    return model


def patched() -> nn.Module:
    """Its forward pass is a function that holds the one before."""
    model = linear()
    before = model.forward
    model.forward = lambda x: before(x) * 2  # type: ignore[method-assign]
    return model


def method() -> nn.Module:
    model = linear()
    model.forward = MethodType(lambda self, x: x @ self.weight + self.bias, model)  # type: ignore[method-assign]
    return model


def strided() -> nn.Module:
    model = nn.Linear(4, 1)
    model.bias = nn.Parameter(torch.ones(1).as_strided((1,), (256,)))
    return model


WORKS: dict[str, Callable[[], nn.Module]] = {
    "a lock": lambda: linear(lock=threading.Lock()),
    "an event": lambda: linear(event=threading.Event()),
    "a logger": lambda: linear(log=logging.getLogger("of a model")),
    "an imported module": lambda: linear(warnings=warnings),
    "pruned": pruned,
    "old weight norm": normed,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)).eval(),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)).eval(),
    "an output of before": remembering,
    "one entry with a stride of 256": strided,
    "slices apart": Sliced,
    "one parameter twice": Tied,
    "LSTM": lambda: Recurrent(4, 4),
    "a hook that holds the model": hooked,
    "a function for forward": patched,
    "a method for forward": method,
}


@pytest.mark.parametrize("kind", WORKS)
def test_a_copy_moves_as_its_model_would_and_leaves_it_alone(kind: str) -> None:
    model = WORKS[kind]()
    before = state_of(model)
    check_model(model, names_of(model))
    made = copied(model)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(1.5)
    out = made(X)
    out.sum().backward()
    gradients = {name: p.grad for name, p in made.named_parameters()}
    assert state_of(model) == before
    assert all(gradient is not None for gradient in gradients.values())
    assert not memory_of(made) & memory_of(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.equal(out, model(X)), "the same function of the same weights"


def memory_of(model: nn.Module) -> set[int]:
    """Where parameters, buffers and attributes lie."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_locks_are_shared_and_nothing_else() -> None:
    model = linear(lock=threading.Lock(), notes=["of the user"])
    made: Any = copied(model)
    assert made.lock is model.lock
    assert made.notes == model.notes
    assert made.notes is not model.notes


def test_a_function_keeps_what_it_holds_beside_the_model() -> None:
    """Its defaults, keywords and attributes, and what is not of the model, which stays the same."""
    seen = list[float]()
    model = linear()

    def hook(_m: Any, _x: Any, out: Tensor, factor: float = 2.0, *, add: float = 1.0) -> Tensor:
        seen.append(float(model.get_parameter("weight").detach().sum()))
        return out * factor + add

    hook.mark = "kept"  # type: ignore[attr-defined]
    model.register_forward_hook(hook)
    made = copied(model)
    with torch.no_grad():
        made.get_parameter("weight").zero_()
    assert torch.equal(made(X), made.get_parameter("bias").expand(3, 4) * 2 + 1)
    assert seen == [0.0]
    (own,) = made._forward_hooks.values()
    assert vars(own) == {"mark": "kept"}
    assert hook in model._forward_hooks.values()


def test_a_model_whose_functions_hold_nothing_of_it_keeps_them() -> None:
    function = copy.deepcopy  # any that holds no model
    made: Any = copied(linear(function=function))
    assert made.function is function
