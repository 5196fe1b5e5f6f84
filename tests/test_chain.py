"""Exact claims about one chain."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distsampler as ds
from distsampler.chain import Chain, ChainDiverged
from distsampler.draws import DrawBlock
from distsampler.run import prepare
from tests.problems import anchored, chain, config, mean_squared_error, regression, squared_error


def assert_same(one: DrawBlock, *others: DrawBlock) -> None:
    """A block equals the others put together, bit for bit, state included."""
    for name, values in one.values.items():
        joined = np.concatenate([other.values[name] for other in others])
        assert np.array_equal(values, joined), name
    assert one.state == others[-1].state


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


def net_chain(mode: str, index: int = 0) -> Chain:
    torch.manual_seed(0)
    _, data = regression()
    spec = prepare(Net(), data, squared_error, config(mode=mode))
    return Chain(spec, index, anchored(spec))


@pytest.mark.parametrize("sampler", ["sgld", "sgnht"])
@pytest.mark.parametrize("batches", ["replacement", "epoch"])
def test_advance_a_then_b_is_advance_a_plus_b(sampler: str, batches: str) -> None:
    fields = {"sampler": ds.SamplerConfig(name=sampler, lr=1e-4), "batches": batches}
    whole, parts = chain(**fields), chain(**fields)
    assert_same(whole.advance(30), parts.advance(7), parts.advance(1), parts.advance(22))


@pytest.mark.parametrize("sampler", ["sgld", "sgnht"])
def test_a_restored_chain_goes_on_to_the_bit(sampler: str) -> None:
    fields = {"sampler": ds.SamplerConfig(name=sampler, lr=1e-4, localization=3.0)}
    first, other = chain(**fields), chain(**fields)
    other.restore(first.advance(11).state)
    assert other.draw == 11
    assert_same(first.advance(9), other.advance(9))


def test_two_chains_differ() -> None:
    one, other = chain(0).advance(5), chain(1).advance(5)
    assert not np.array_equal(one.values["loss"], other.values["loss"])
    assert not np.array_equal(one.values["distance"], other.values["distance"])


def test_a_draw_is_one_point() -> None:
    """Everything a draw records is measured at the weights of its step, before that step."""
    model, data = regression()
    spec = prepare(model, data, squared_error, config(thin=1))
    anchor = anchored(spec)
    walker = Chain(spec, 0, anchor)
    walker.advance(12)
    before = walker._replica.flats[0].detach().clone()
    rows = walker._batches.indices(12).copy()
    block = walker.advance(1)
    moved = nn.Linear(5, 1, bias=False)
    with torch.no_grad():
        moved.weight.copy_(before.view(1, 5))
    x, y = data
    batch = (x[rows], y[rows])
    there, start = (squared_error(m, batch).double().mean().item() for m in (moved, model))
    assert block.values["step"][0] == 12
    assert block.values["loss"][0] == pytest.approx(there, rel=1e-6)
    assert block.values["excess_loss"][0] == pytest.approx(there - start, abs=1e-6)
    distance = (before - model.weight.detach().view(-1)).norm().item()
    assert block.values["distance"][0] == pytest.approx(distance, rel=1e-6)


def test_the_first_draw_of_a_chain_that_keeps_every_step_is_the_anchor() -> None:
    block = chain(thin=1).advance(1)
    for name in ("excess_loss", "distance", "projections", "weight_projections"):
        assert np.all(block.values[name] == 0), name


def test_the_excess_loss_of_a_mean_loss_is_read_against_the_full_anchor() -> None:
    per_example, means = chain(thin=1).advance(9), chain(loss=mean_squared_error, thin=1).advance(9)
    assert np.allclose(per_example.values["loss"], means.values["loss"], rtol=1e-6)
    shifts = means.values["excess_loss"] - per_example.values["excess_loss"]
    assert np.std(shifts) > 0.01  # the anchor's minibatch noise, which per-example losses cancel
    assert np.allclose(per_example.values["probe_loss"], means.values["probe_loss"], rtol=1e-6)


def test_the_model_that_was_given_is_not_changed() -> None:
    model, data = regression()
    before = copy.deepcopy(model.state_dict())
    spec = prepare(model, data, squared_error, config())
    Chain(spec, 0, anchored(spec)).advance(5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_seeded_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    one = net_chain("train").advance(6)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other_chain = net_chain("train")
    torch.set_rng_state(before)
    other = other_chain.advance(6)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(one, other)


def test_dropout_acts_in_train_mode_only() -> None:
    train, quiet = net_chain("train"), net_chain("eval")
    assert train._spec.stochastic
    assert not quiet._spec.stochastic


def test_batch_norm_statistics_do_not_drift() -> None:
    walker = net_chain("train")
    before = [buffer.clone() for buffer in walker._replica.model.buffers()]
    walker.advance(4)
    after = walker._replica.model.buffers()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("pattern", ["layers.0.weight", r"layers\.0\..*", ("layers.0.weight",)])
def test_a_restricted_chain_moves_what_it_names_only(pattern: Any) -> None:
    _, data = regression()
    model = Net()
    spec = prepare(model, data, squared_error, config(restrict_to=pattern))
    walker = Chain(spec, 0, anchored(spec))
    walker.advance(5)
    for name, parameter in walker._replica.model.named_parameters():
        same = torch.equal(parameter, dict(model.named_parameters())[name])
        assert same == (
            not name.startswith("layers.0.") or (name.endswith("bias") and "w" in str(pattern))
        ), name


def test_a_chain_that_leaves_for_good_is_retired_before_it_overflows() -> None:
    warm = ds.SamplerConfig(lr=0.08, localization=10.0)
    with pytest.raises(ChainDiverged, match=r"beyond divergence_factor \* d/2 = 25 ") as caught:
        chain(sampler=warm, thin=1, divergence_factor=10.0).advance(400)
    assert np.isfinite(caught.value.block.values["loss"]).all()
    assert chain(sampler=ds.SamplerConfig(lr=1e-3), divergence_factor=10.0).advance(40).draws == 40


def test_a_diverged_chain_keeps_its_finite_draws_and_names_the_step() -> None:
    hot = ds.SamplerConfig(lr=1.0, localization=100.0)
    walker = chain(sampler=hot, divergence_factor=None)
    with pytest.raises(
        ChainDiverged, match=r"chain 0 diverged at step \d+: \w+ is not finite.*lower sampler.lr"
    ) as caught:
        walker.advance(400)
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    assert 0 < error.block.draws < 400
    assert all(np.isfinite(values).all() for values in error.block.values.values())
    assert error.step == (error.block.draws + 1) * 3 - 1
    assert np.isfinite(error.last_loss)


def test_where_a_chain_diverges_does_not_depend_on_the_blocks() -> None:
    def steps(block: int) -> int:
        walker = chain(sampler=ds.SamplerConfig(lr=1.0, localization=100.0))
        while True:
            try:
                walker.advance(block)
            except ChainDiverged as error:
                return int(error.step)

    assert steps(7) == steps(50)


def test_an_epoch_reads_its_excess_loss_on_an_independent_batch() -> None:
    walker = chain(batches="epoch", thin=1)
    assert walker._readout is not None
    own, read = walker._batches.indices(3), walker._readout.indices(3)
    assert not np.array_equal(own, read)
    block = walker.advance(4)
    x, y = regression()[1]
    with torch.no_grad():
        start = F.mse_loss(
            regression()[0](x[walker._readout.indices(0)]), y[walker._readout.indices(0)]
        )
    assert block.values["loss"][0] == pytest.approx(start.item(), rel=1e-6)


def test_norms_that_the_sampler_is_asked_for_are_recorded() -> None:
    sampler = ds.SamplerConfig(lr=1e-4, grad_norm=True, noise_norm=True)
    block = chain(sampler=sampler).advance(3)
    assert {"grad_norm", "noise_norm"} <= set(block.values)
    assert np.all(block.values["noise_norm"] > 0)
