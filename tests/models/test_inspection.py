"""What model and loss do is seen before a run, on copies, in few calls."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distsampler.chains.worker import Inspect, Worker
from distsampler.errors import ConfigError
from distsampler.models.loss import LossKind
from distsampler.sampling.prepare import draft
from tests.problems import Net, config, mean_squared_error, regression, squared_error

CPU = torch.device("cpu")


class Wrapped(nn.Module):
    """The regression, with something done around its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = regression()[0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x))


class Caching(Wrapped):
    """Multiplies with the weights of its first call for ever."""

    cached: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = self.inner.weight.detach().clone()
        return super().forward(x) * self.cached.sum()


class Counting(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Averaging(Wrapped):
    """Moves a buffer in every mode, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x - self.mean)
        self.mean: Tensor = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return out


class Auxiliary(Wrapped):
    aux: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.aux = out.square().mean(1)
        return out


class Clipping(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight.data.mul_(0.99)
        return super().forward(x)


class Rematerialised(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(
            checkpoint(self.inner, x.clone().requires_grad_(), use_reentrant=True)
        )


class Penalised(Wrapped):
    """Has a gradient in it, with respect to its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = super().forward(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return out + gradient.square().sum(1, keepdim=True)


class Experts(Wrapped):
    """One expert is never asked."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(5, 1)


class Holding(Wrapped):
    """Calls its part by way of a closure, which ``copy.deepcopy`` leaves with the original."""

    def __init__(self) -> None:
        super().__init__()
        own = self.inner
        self.calls = [lambda x: own(x)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.calls[0](x))


class Hooked(Wrapped):
    """Returns what a hook has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = dict[str, Tensor]()
        self.inner.register_forward_hook(lambda *args: self.kept.update(out=args[-1].clone()))

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return self.kept["out"]


class Frozen(Experts):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = super().forward(x)
        return out * torch.as_tensor(self.unused(x))


class Turned(Wrapped):
    def __init__(self, read: bool) -> None:
        super().__init__()
        self.read, self.turned = read, self.inner.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x @ self.turned if self.read else 0)


class Rehoming(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight.data = self.inner.weight.data.clone()
        return super().forward(x)


class Gathering(nn.RNN):
    """Does in every pass what CUDA makes of the weights of cells."""

    def __init__(self) -> None:
        super().__init__(5, 1, batch_first=True)

    def flatten_parameters(self) -> None:
        for p in self.parameters():
            p.data = p.data.clone()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        self.flatten_parameters()
        return super().forward(x[:, None])


class Freezing(Experts):
    def forward(self, x: Tensor) -> Tensor:
        self.inner.requires_grad_(False)
        return super().forward(x) * torch.as_tensor(self.unused(x))


class Late(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Parameter(torch.ones(1))
        return super().forward(x) * self.late


class Shaping(Wrapped):
    """A buffer without entries at first, as observers of quantisation have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.resize_(5).copy_(x.detach().mean(0))
        return super().forward(x)


class Once(torch.autograd.Function):
    """Has no backward pass."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.clone()


class Stopping(Once):
    """Gives no gradient, as quantised layers."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        return None


def zeroing(model: nn.Module, batch: Any) -> Tensor:
    model.zero_grad()
    return squared_error(model, batch)


def halved(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return mean_squared_error(model, batch)


def weighted(model: nn.Module, batch: Any) -> Tensor:
    losses = squared_error(model, batch)
    weights = 1 + batch[0][:, 0].abs()
    return (weights * losses).sum() / weights.sum()


def contrasted(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(-(out - batch[1].T).square(), torch.arange(len(out)), reduction="none")


def dropped(model: nn.Module, batch: Any) -> Tensor:
    return squared_error(lambda x: F.dropout(model(x)), batch)  # type: ignore[arg-type]


def in_numpy(model: nn.Module, batch: Any) -> Tensor:
    return squared_error(model, batch) * float(np.random.rand())


def in_python(model: nn.Module, batch: Any) -> Tensor:
    return squared_error(model, batch) * random.random()


class OwnGenerator:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return squared_error(model, batch) * torch.rand((), generator=self.generator)


def popping(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    inputs.mul_(2)
    return squared_error(model, (inputs, targets))


def squeezed(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().squeeze()


def two_at_least(model: nn.Module, batch: Any) -> Tensor:
    if len(batch[0]) < 2:
        raise ValueError("expected more than one example")
    return squared_error(model, batch)


OUTER = regression()[0]
TINY = torch.tensor(1e-5)


@torch.no_grad()
def own_outputs(x: Tensor) -> Tensor:
    return torch.as_tensor(OUTER(x))


@dataclass
class Case:
    """A model or loss, and what must be seen of it."""

    kind: LossKind = field(default_factory=LossKind)
    refused: str = ""
    note: str = ""
    model: Callable[[], nn.Module] = lambda: regression()[0]
    loss: Any = squared_error
    mode: str = "eval"


MEAN = LossKind(per_example=False)
CASES = {
    "one value per example": Case(),
    "the mean": Case(MEAN, loss=mean_squared_error),
    "the mean and a constant": Case(MEAN, loss=lambda m, b: mean_squared_error(m, b) + m.weight.square().sum()),
    "tiny losses": Case(loss=lambda m, b: squared_error(m, b) * TINY**2),
    "the sum": Case(refused="it returns their sum: rows 0 and 1 have", loss=lambda m, b: squared_error(m, b).sum()),
    "the sum of tiny losses": Case(refused="returns their sum", loss=lambda m, b: (squared_error(m, b) * TINY**2).sum()),
    "the sum of perfect losses": Case(refused="returns their sum", loss=lambda m, b: (m(b[0]) - OUTER(b[0]).detach()).square().sum()),
    "shares of the mean": Case(refused="divided by the number of examples", loss=lambda m, b: squared_error(m, b) / len(b[0])),
    "pairs of everything": Case(refused="(n, 1) and (n,) make (n, n)", loss=lambda m, b: (m(b[0]) - b[1][:, 0]).square().mean()),
    "a column": Case(refused="got shape (2, 1) for 2 examples", loss=lambda m, b: (m(b[0]) - b[1]).square()),
    "a mean over the examples": Case(refused="which is right for 2 by chance", model=lambda: nn.Linear(5, 2), loss=lambda m, b: m(b[0]).square().mean(0)),
    "whole numbers": Case(refused="of real numbers: got torch.int64", loss=lambda m, b: squared_error(m, b).long()),
    "no gradient": Case(refused="needs no gradient", loss=lambda m, b: squared_error(m, b).detach()),
    "the outer model": Case(refused="its gradient reaches none of them", loss=lambda m, b: squared_error(OUTER, b)),
    "a closure over the model": Case(model=Holding),
    "a hook that holds the model": Case(model=Hooked),
    "your own model, beside the copy": Case(refused="it uses your own", model=lambda: OUTER, loss=lambda m, b: squared_error(m, b) + OUTER.weight.square().sum()),
    "your own model, without a gradient": Case(note="calls your own model beside its argument", model=lambda: OUTER, loss=lambda m, b: (m(b[0]) - own_outputs(b[0])).square().sum(1) + squared_error(m, b)),
    "the mean over pairs, of rows alike": Case(MEAN._replace(coupled=True), note="halves of a batch have", loss=lambda m, b: (m(b[0]) - b[1][:, 0].sort().values.sign().cumsum(0).clamp(0, 1)).square().mean()),
    "the mean of the first four": Case(MEAN._replace(coupled=True), note="halves of a batch have", loss=lambda m, b: squared_error(m, b)[:4].mean()),
    "the mean of four, whatever came": Case(refused="where a mean gives", loss=lambda m, b: squared_error(m, b).sum() / min(len(b[0]), 4)),
    "four losses, and zeros": Case(LossKind(coupled=True), note="among 16, and", loss=lambda m, b: squared_error(m, b) * (torch.arange(len(b[0])) < 4)),
    "multiples of the mean": Case(refused="multiplied by the number of examples", loss=lambda m, b: squared_error(m, b) * len(b[0])),
    "a part without a gradient": Case(refused="depends on 'inner.weight' past autograd", model=Frozen),
    "a layer that lets no gradient through": Case(refused="depends on 'weight' past autograd", loss=lambda m, b: squared_error(lambda x: Stopping.apply(m(x)), b)),
    "an attribute that is a view of weights": Case(refused="model.turned must not share memory with the parameter 'inner.weight'", model=lambda: Turned(read=True)),
    "such an attribute, not read": Case(model=lambda: Turned(read=False)),
    "weights in new memory": Case(refused="it moves 'inner.weight' to other memory", model=Rehoming),
    "cells that gather their weights": Case(model=Gathering, loss=lambda m, b: (m(b[0])[0][:, 0] - b[1]).square().sum(1)),
    "weights that are frozen in forward": Case(refused="requires_grad=False for 'inner.weight'", model=Freezing),
    "a parameter that is made in forward": Case(refused="it makes 'late'", model=Late),
    "gradients that are taken away": Case(refused="it takes away that of 'weight'", loss=zeroing),
    "no backward pass": Case(refused="backward() raised NotImplementedError", loss=lambda m, b: squared_error(m, b) + Once.apply(m.weight).sum()),
    "a buffer that gets its shape in forward": Case(LossKind(moves_buffers=True), note="changes the buffer 'mean'", model=Shaping),
    "a perfect fit behind a checkpoint": Case(model=Rematerialised, loss=lambda m, b: (m(b[0]) - OUTER(b[0]).detach()).square().sum(1)),
    "half precision within the loss": Case(MEAN, loss=halved),
    "a weighted mean": Case(MEAN._replace(coupled=True), note="examples weigh differently", loss=weighted),
    "a contrastive loss": Case(LossKind(coupled=True), note="depends on the others of its batch", loss=contrasted),
    "batch norm": Case(note="in mode 'train'", mode="train", model=lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), kind=LossKind(least=2, moves_buffers=True)),
    "batch norm and dropout": Case(note="in mode 'train'", mode="train", model=Net, kind=LossKind(stochastic=True, least=2, moves_buffers=True)),
    "batch norm in mode eval": Case(model=Net),
    "dropout in every mode": Case(LossKind(stochastic=True), loss=dropped),
    "numpy's generator": Case(note="draws from numpy.random", loss=in_numpy),
    "Python's generator": Case(note="draws from Python's random", loss=in_python),
    "a generator of its own": Case(note="a generator of its own", loss=OwnGenerator()),
    "a cache": Case(LossKind(moves_attributes=True), note="starts from what the model had at first", model=Caching),
    "a counter": Case(LossKind(moves_attributes=True), note="starts from what the model had at first", model=Counting),
    "a buffer that moves": Case(LossKind(moves_buffers=True), note="changes the buffer 'mean'", model=Averaging),
    "a loss in an attribute": Case(model=Auxiliary, loss=lambda m, b: squared_error(m, b) + m.aux),
    "weights that a forward pass changes": Case(refused="it changes 'inner.weight'", model=Clipping),
    "a gradient in the model": Case(LossKind(needs_graph=True), model=Penalised),
    "other values without a graph": Case(LossKind(needs_graph=True), note="other values under torch.no_grad()", loss=lambda m, b: squared_error(m, b) * (2 if torch.is_grad_enabled() else 1)),
    "checkpointed activations": Case(model=Rematerialised),
    "an expert that is never asked": Case(model=Experts),
    "a batch that is changed": Case(LossKind(changes_batch=True), loss=popping),
    "a dimension that is dropped": Case(loss=squeezed),
    "no single example": Case(LossKind(least=2), loss=two_at_least),
    "not a number away from w*": Case(loss=lambda m, b: squared_error(m, b) + (0 if torch.equal(m.weight, OUTER.weight) else torch.nan)),
}  # fmt: skip


def state_of(model: nn.Module) -> list[Any]:
    """All that a user could see of a model."""
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [(id(t), t._version, t.detach().clone().tolist()) for t in tensors],
        [(p.grad, p.requires_grad) for p in model.parameters()],
        [(m.training, dict(vars(m)), [dict(d) for d in vars(m).values() if isinstance(d, dict)])
         for m in model.modules()],
    ]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_loss_does_is_seen_on_copies_in_few_calls(name: str) -> None:
    case, calls = CASES[name], list[int]()
    model = case.model()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return torch.as_tensor(case.loss(model, batch))

    spec = draft(model, regression()[1], loss, config(mode=case.mode, watch=False))
    before = (
        state_of(model),
        torch.get_rng_state(),
        np.random.get_state()[1].sum(),
        random.getstate(),
    )
    if case.refused:
        with pytest.raises(ConfigError) as caught:
            Worker(spec, CPU).perform(Inspect())
        assert case.refused in str(caught.value)
    else:
        seen: Any = Worker(spec, CPU).perform(Inspect())
        assert seen.kind == case.kind
        assert len(seen.notes) == bool(case.note), seen.notes
        assert all(case.note in note for note in seen.notes)
    after = (
        state_of(model),
        torch.get_rng_state(),
        np.random.get_state()[1].sum(),
        random.getstate(),
    )
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    few = [size for size in calls if size <= 3]
    assert len(few) <= 32
    assert sorted(size for size in calls if size > 3) in ([], [8, 8, 16])
