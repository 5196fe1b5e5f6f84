"""Small models with data and loss, for tests that are not about statistics."""

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.chains.chain import Chain
from distsampler.chains.worker import AnchorPass
from distsampler.execution.pool import SerialPool, WorkDone
from distsampler.models.replica import ChainSpec
from distsampler.sampling.prepare import prepare


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return (model(inputs) - targets).square().sum(1)


def mean_squared_error(model: nn.Module, batch: Any) -> Tensor:
    return squared_error(model, batch).mean()


def regression(n: int = 300, inputs: int = 5) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A linear model at its least-squares solution, and its data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, inputs, generator=generator)
    y = x @ torch.randn(inputs, 1, generator=generator) + torch.randn(n, 1, generator=generator)
    model = nn.Linear(inputs, 1, bias=False)
    with torch.no_grad():
        # LAPACK's last bits depend on where its memory lies: solved in double, they are cut off.
        model.weight.copy_(torch.linalg.lstsq(x.double(), y.double()).solution.T)
    return model, (x, y)


def config(**fields: Any) -> ds.RunConfig:
    """A short run that moves."""
    sampler = fields.pop("sampler", ds.SamplerConfig(lr=1e-3, localization=10.0))
    defaults = {"chains": 2, "draws": 40, "burn_in": 10, "thin": 3, "batch_size": 16, "probe": 32}
    return ds.RunConfig(**{"sampler": sampler, "device": "cpu", **defaults, **fields})


def anchored(spec: ChainSpec) -> Any:
    """The anchor of a spec, measured in this process."""
    from distsampler.chains import anchor_pass

    pool, parts = SerialPool(), []
    pool.start(spec, [0])
    pool.wait(0)
    for part in anchor_pass.parts_of(spec, 1):
        pool.submit(0, AnchorPass(part))
        (done,) = pool.wait(0)
        assert isinstance(done, WorkDone), done
        parts.append(done.result)
    return anchor_pass.reduce(parts, spec)


def chain(index: int = 0, loss: Any = squared_error, **fields: Any) -> Chain:
    """One chain of the regression."""
    model, data = regression()
    spec = prepare(model, data, loss, config(**fields))
    return Chain(spec, index, anchored(spec))


def both(settings: ds.RunConfig, path: Path) -> tuple[ds.Run, ds.Run]:
    """The same run in this process and on Ray."""
    serial, ray = (
        ds.sample(*regression(), squared_error, settings, store=path / kind, pool=pool, quiet=True)
        for kind, pool in (("serial", ds.SerialPool()), ("ray", None))
    )
    return serial, ray


class Net(nn.Module):
    """Dropout and batch norm: what draws at random, and what keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Tilted(nn.Module):
    """Weights at the minimum of a quadratic that examples tilt."""

    def __init__(self, dimensions: int, seed: int = 0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dimensions))
        source = torch.Generator().manual_seed(seed)
        turn, _ = torch.linalg.qr(torch.randn(dimensions, dimensions, generator=source).double())
        h = torch.logspace(-1, 1, dimensions, dtype=torch.float64)
        self.register_buffer("hessian", (turn @ torch.diag(h) @ turn.T).float())


def tilted(model: Tilted, batch: Tensor) -> Tensor:
    """``l_i(w) = 1/2 w^T H w + z_i . w``: the gradient's covariance is that of z, everywhere."""
    return model.w @ model.hessian @ model.w / 2 + batch @ model.w


class Exploding:
    """A loss that is not finite for one chain of a process after some of its steps."""

    def __init__(self, chain: int, after: int) -> None:
        self.chain, self.after = chain, after
        self.models: dict[int, int] = {}

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        losses = squared_error(model, batch)
        if len(losses) != 16 or not losses.requires_grad:  # inspection, anchor pass and probe
            return losses
        calls = self.models[id(model)] = self.models.get(id(model), 0) + 1
        mine = list(self.models).index(id(model)) == self.chain
        return losses * float("nan") if mine and calls > self.after else losses


class Held:
    """A loss that takes its time while a file exists; its values are always the same.

    Meanwhile the first step that takes away the file "hang" beside it does not return.

    Args:
        held: the file.
        seconds: a call takes.
        memory: bytes that a call holds meanwhile, on the device of the batch.
    """

    def __init__(self, held: Path, seconds: float, memory: int = 0) -> None:
        self.held, self.seconds, self.memory = held, seconds, memory

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if self.held.exists():
            steps = len(batch[0]) == 16 and torch.is_grad_enabled()  # not inspection, nor anchor
            size = self.memory if steps else 0
            eaten = torch.ones(size, dtype=torch.uint8, device=batch[0].device)
            time.sleep(self.seconds)
            if steps:
                self._hang_if_asked()
            del eaten
        return squared_error(model, batch)

    def _hang_if_asked(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.held.with_name("hang").unlink()
            time.sleep(10**6)
