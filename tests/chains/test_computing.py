"""How a gradient is computed: in microbatches, in bf16, compiled. None of it changes the law."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.chains import anchor_pass
from distsampler.chains.chain import Chain
from distsampler.chains.pack import Pack
from distsampler.models.replica import Replica
from distsampler.sampling.prepare import prepare
from tests import problems
from tests.problems import mean_squared_error, regression, squared_error

CPU = torch.device("cpu")
# torch warns of its own use of torch.jit while it imports its compiler
quiet = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Counting:
    """A loss that remembers how many examples it saw at once."""

    def __init__(self, loss: Any = squared_error) -> None:
        self.loss, self.sizes = loss, list[int]()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.sizes.append(len(batch[0]))
        return self.loss(model, batch)


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))


def spec_of(loss: Any = squared_error, **fields: Any) -> Any:
    return prepare(two_layers(), regression()[1], loss, problems.config(**fields))


@pytest.mark.parametrize("loss", [squared_error, mean_squared_error])
def test_microbatches_give_the_gradient_of_the_batch_and_are_all_that_is_seen(loss: Any) -> None:
    whole, cut = spec_of(loss), spec_of(loss, microbatch=5)
    rows = np.arange(16)
    counting = Counting(loss)
    replicas = [Replica(whole, CPU), Replica(ds_replaced(cut, counting), CPU)]
    losses = [replica.losses_and_gradient(rows, 0, 3) for replica in replicas]
    assert counting.sizes == [5, 5, 5, 1]
    assert torch.allclose(*losses, rtol=1e-6)
    assert losses[0].ndim == (1 if loss is squared_error else 0)
    gradients = [replica.flats[0].grad for replica in replicas]
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
    assert not torch.equal(gradients[0], 2 * gradients[1])


def ds_replaced(spec: Any, loss: Any) -> Any:
    from dataclasses import replace

    return replace(spec, loss=loss)


def test_nothing_of_a_run_sees_more_than_a_microbatch() -> None:
    counting = Counting()
    spec = spec_of(counting, microbatch=6, probe=20, init="dispersed")
    counting.sizes.clear()
    Chain(spec, 1, problems.anchored(spec)).advance(3)
    assert max(counting.sizes) == 6
    assert sum(counting.sizes) > 300 + 3 * (9 * 16 + 20)


def test_the_law_of_a_run_by_microbatches_is_that_of_a_run_by_batches() -> None:
    """The same noise and batches: after a few steps only the last bits differ."""
    values = []
    for fields in ({}, {"microbatch": 5}):
        spec = spec_of(**fields)
        values.append(Chain(spec, 0, problems.anchored(spec)).advance(10).values)
    for name in ("loss", "excess_loss", "probe_loss", "distance"):
        assert np.allclose(values[0][name], values[1][name], rtol=1e-3, atol=1e-5), name


def test_dropout_differs_between_microbatches_and_is_the_same_again() -> None:
    model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x = torch.ones(16, 5)  # equal examples: only dropout tells them apart
    fields = problems.config(mode="train", microbatch=8)
    spec = prepare(model, (x, torch.zeros(16, 1)), squared_error, fields)
    first = Replica(spec, CPU).losses_and_gradient(np.arange(16), 0, 7)
    again = Replica(spec, CPU).losses_and_gradient(np.arange(16), 0, 7)
    assert torch.equal(first, again)
    assert not torch.equal(first[:8], first[8:])


def test_bf16_is_used_forward_and_backward_and_nowhere_else() -> None:
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        found = model(inputs)
        seen.append(found.dtype)
        return (found - targets).square().sum(1)

    spec = spec_of(loss, precision="bf16", watch=True)
    seen.clear()
    found = anchor_pass.measure(Replica(spec, CPU), spec, anchor_pass.Part(0, 300))
    assert set(seen) == {torch.bfloat16}
    assert found.values.dtype == np.float64
    chain = Chain(spec, 0, problems.anchored(spec))
    seen.clear()
    block = chain.advance(2)
    assert seen.count(torch.float32) == 1  # the curvature's
    assert chain.replica.flats[0].dtype == torch.float32
    assert chain.replica.flats[0].grad is not None
    assert chain.replica.flats[0].grad.dtype == torch.float32
    assert np.isfinite(np.asarray(block.values["loss"])).all()


def test_the_excess_loss_in_bf16_is_nothing_at_the_anchor() -> None:
    """Both of its losses are rounded alike: with one of them in fp32 it would not be."""
    spec = spec_of(precision="bf16")
    losses = problems.anchored(spec).losses
    now = Replica(spec, CPU).losses_of_rows(np.arange(300)).numpy()
    assert np.array_equal(losses, now)
    exact = Replica(spec, CPU).losses(spec.rows.take(np.arange(300)), exact=True)
    assert np.abs(now - exact.detach().numpy()).max() > 1e-4


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_does_what_a_plain_one_does(pack: int, precision: str) -> None:
    values = []
    for compiled in (False, True):
        fields = {"pack": pack, "precision": precision, "compile": compiled, "deterministic": False}
        spec = spec_of(**fields)
        base = Replica(spec, CPU)
        done = Pack(spec, range(2) if pack == 2 else [0], problems.anchored(spec), base).advance(5)
        values.append(done.blocks[0].values)
    loose = 1e-4 if precision == "fp32" else 0.05
    for name in ("loss", "probe_loss", "distance"):
        assert np.allclose(values[0][name], values[1][name], rtol=loose), name


@pytest.mark.slow
@quiet
def test_a_run_that_compiles_has_an_llc(tmp_path: Any) -> None:
    runs = [
        ds.sample(
            *(two_layers(), regression()[1], squared_error),
            problems.config(compile=compiled),
            pool=ds.SerialPool(),
            quiet=True,
        ).llc("ignore")
        for compiled in (False, True)
    ]
    assert runs[0].mean == pytest.approx(runs[1].mean, rel=1e-2)
