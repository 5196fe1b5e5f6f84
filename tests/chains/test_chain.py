"""Exact claims about one chain."""

import copy
import pickle
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distsampler as ds
from distsampler.chains.chain import Chain
from distsampler.chains.observables import variables
from distsampler.chains.steps import ChainDiverged
from distsampler.errors import ConfigError
from distsampler.sampling.prepare import prepare
from tests.assertions import assert_same_blocks
from tests.problems import (
    Net,
    anchored,
    chain,
    config,
    mean_squared_error,
    regression,
    squared_error,
)


def net_chain(mode: str, index: int = 0) -> Chain:
    torch.manual_seed(0)
    _, data = regression()
    spec = prepare(Net(), data, squared_error, config(mode=mode))
    return Chain(spec, index, anchored(spec))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("batches", ["replacement", "epoch"])
@pytest.mark.parametrize("mean", [False, True])
def test_a_chain_that_does_not_move_has_an_llc_of_zero(mode: str, batches: str, mean: bool) -> None:
    """Whatever dropout and batch norm make of an example, w* is measured in the same batch.

    257 rows leave one over in the pass over all data, of which batch norm has no variance.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        losses = squared_error(model, batch)
        return losses.mean() if mean else losses

    torch.manual_seed(0)
    x, y = regression(n=257)[1]
    still = ds.SamplerConfig(lr=1e-30)
    fields = {"sampler": still, "batches": batches, "mode": mode, "divergence_factor": None}
    spec = prepare(Net(), (x, y), loss, config(**fields))
    block = Chain(spec, 0, anchored(spec)).advance(20)
    assert np.ptp(block.values["loss"]) > 0.1, "batches differ"
    largest = float(np.abs(block.values["excess_loss"]).max())
    if mean and mode == "eval":  # no example's loss is known: the noise of its batch stays
        assert largest > 0.1
    else:
        assert largest < 1e-6


@pytest.mark.parametrize("sampler", ["sgld", "sgnht"])
@pytest.mark.parametrize("batches", ["replacement", "epoch"])
def test_advance_a_then_b_is_advance_a_plus_b(sampler: str, batches: str) -> None:
    fields = {"sampler": ds.SamplerConfig(name=sampler, lr=1e-4), "batches": batches}
    whole, parts = chain(**fields), chain(**fields)
    assert_same_blocks(whole.advance(30), parts.advance(7), parts.advance(1), parts.advance(22))


@pytest.mark.parametrize("sampler", ["sgld", "sgnht"])
def test_a_restored_chain_goes_on_to_the_bit(sampler: str) -> None:
    fields = {"sampler": ds.SamplerConfig(name=sampler, lr=1e-4, localization=3.0)}
    first, other = chain(**fields), chain(**fields)
    other.restore(first.advance(11).state)
    assert other.draw == 11
    assert_same_blocks(first.advance(9), other.advance(9))


def test_two_chains_differ() -> None:
    one, other = chain(0).advance(5), chain(1).advance(5)
    assert not np.array_equal(one.values["loss"], other.values["loss"])
    assert not np.array_equal(one.values["distance"], other.values["distance"])


def test_a_draw_is_one_point() -> None:
    """Everything a draw records is measured at the weights of its step, before that step."""
    model, data = regression()
    spec = prepare(model, data, squared_error, config(thin=1))
    at_anchor = anchored(spec)
    walker = Chain(spec, 0, at_anchor)
    walker.advance(12)
    before = walker.replica.flats[0].detach().clone()
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
    assert_same_blocks(one, other)


def test_dropout_acts_in_train_mode_only() -> None:
    train, quiet = net_chain("train"), net_chain("eval")
    assert train.spec.stochastic
    assert not quiet.spec.stochastic


def test_batch_norm_statistics_do_not_drift() -> None:
    walker = net_chain("train")
    before = [buffer.clone() for buffer in walker.replica.model.buffers()]
    walker.advance(4)
    after = walker.replica.model.buffers()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("pattern", ["layers.0.weight", r"layers\.0\..*", ("layers.0.weight",)])
def test_a_restricted_chain_moves_what_it_names_only(pattern: Any) -> None:
    _, data = regression()
    model = Net()
    spec = prepare(model, data, squared_error, config(restrict_to=pattern))
    walker = Chain(spec, 0, anchored(spec))
    walker.advance(5)
    for name, parameter in walker.replica.model.named_parameters():
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
    # kappa / 4 is about 60 at the start, and what was met asks for much less than half
    lower = re.search(r"lower sampler.lr from 1 to (\S+) as a start, or raise", str(caught.value))
    assert lower is not None
    assert 0 < float(lower[1]) < 0.01
    assert "sampler.localization from 100" in str(caught.value)
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


@pytest.mark.parametrize("sampler", ["sgld", "sgnht"])
def test_each_norm_is_recorded_and_belongs_to_its_draw(sampler: str) -> None:
    norms = ("noise_norm", "grad_norm", "weight_norm", "distance")
    asked = {name: True for name in norms if (sampler, name) != ("sgnht", "noise_norm")}
    chosen = ds.SamplerConfig(name=sampler, lr=1e-4, localization=3.0, save_noise=True, **asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SGNHT's noise
        walker = chain(sampler=chosen, thin=1)
    stats = {v.name for v in variables(walker.spec) if v.group == "sample_stats"}
    assert stats >= set(asked)
    walker.advance(9)
    flat = walker.replica.flats[0].detach().clone()
    rows = walker._batches.indices(9)
    model, (x, y) = regression()
    start = model.weight.detach().view(-1).clone()
    with torch.no_grad():
        model.weight.copy_(flat.view(1, 5))
    squared_error(model, (x[rows], y[rows])).mean().backward()
    block = walker.advance(1)
    assert block.values["grad_norm"][0] == pytest.approx(model.weight.grad.norm().item(), rel=1e-5)
    assert block.values["weight_norm"][0] == pytest.approx(flat.norm().item(), rel=1e-5)
    assert block.values["distance"][0] == pytest.approx((flat - start).norm().item(), rel=1e-5)
    if "noise_norm" in asked:
        noise = walker.sampler.noise[0][0].norm().item()
        assert block.values["noise_norm"][0] == pytest.approx(noise, rel=1e-5)


def potential(w: Tensor, batch: Any, nbeta: float, gamma: float, anchor: Tensor) -> Tensor:
    x, y = batch
    return nbeta * (x @ w - y[:, 0]).square().mean() + gamma / 2 * (w - anchor).square().sum()


def test_the_acceptance_of_a_step_is_that_of_metropolis_on_its_own_batch() -> None:
    """Against a plain float64 computation from the weights on both sides."""
    lr, nbeta, gamma = 4e-3, 30.0, 10.0
    chosen = ds.SamplerConfig(lr=lr, nbeta=nbeta, localization=gamma, save_mala_vars=True)
    walker = chain(sampler=chosen, thin=1)
    anchor = walker.replica.flats[0].detach().double().clone()
    x, y = (part.double() for part in regression()[1])
    found, expected = [], []
    for step in range(30):
        before = walker.replica.flats[0].detach().double().requires_grad_()
        found.append(walker.advance(1).values["acceptance"][0])
        after = walker.replica.flats[0].detach().double().requires_grad_()
        rows = walker._batches.indices(step)
        u = [potential(w, (x[rows], y[rows]), nbeta, gamma, anchor) for w in (before, after)]
        ahead, back = (
            torch.autograd.grad(v, w)[0] for v, w in zip(u, (before, after), strict=True)
        )
        forth = (after - before + lr / 2 * ahead).square().sum()
        return_ = (before - after + lr / 2 * back).square().sum()
        log = u[0] - u[1] + (forth - return_) / (2 * lr)
        expected.append(min(1.0, log.exp().item()))
    assert found == pytest.approx(expected, rel=1e-3)
    assert min(expected) < 0.9
    assert max(expected) == 1.0


def test_an_acceptance_costs_one_gradient_a_draw_and_changes_no_bit() -> None:
    calls = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        losses = squared_error(model, batch)
        calls.append(losses.requires_grad)
        return losses

    blocks, costs = [], []
    for asked in (False, True):
        chosen = ds.SamplerConfig(lr=1e-3, localization=10.0, save_mala_vars=asked)
        walker = chain(loss=counted, sampler=chosen, watch=False)
        calls.clear()
        blocks.append(walker.advance(10))
        costs.append(sum(calls))
    assert costs == [30, 40]
    assert all(np.array_equal(v, blocks[1].values[k]) for k, v in blocks[0].values.items())


@pytest.mark.parametrize(
    "option", [{"bounding_box_size": 1.0}, {"noise_level": 0.5}, {"correct_heat": True}]
)
@pytest.mark.filterwarnings("ignore:noise_level")
def test_an_acceptance_is_refused_where_the_step_is_no_proposal(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a MALA acceptance needs plain Langevin steps"):
        chain(sampler=ds.SamplerConfig(lr=1e-3, save_mala_vars=True, **option))


def test_sgnht_warns_of_an_acceptance_and_records_none() -> None:
    with pytest.warns(UserWarning, match="use SGLD for that diagnostic"):
        walker = chain(sampler=ds.SamplerConfig(name="sgnht", lr=1e-5, save_mala_vars=True))
    assert "acceptance" not in walker.advance(1).values


@pytest.mark.parametrize("name", ["rmsprop_sgld", "adam_sgld"])
@pytest.mark.parametrize(("given", "frozen_at"), [({}, 30), ({"freeze_after": 7}, 7)])
def test_a_preconditioner_is_fixed_from_the_first_kept_draw_on(
    name: str, given: dict[str, int], frozen_at: int
) -> None:
    chosen = ds.SamplerConfig(name=name, lr=1e-4, localization=3.0, **given)
    walker = chain(sampler=chosen, thin=3, burn_in=10)
    found = []
    for _ in range(14):
        walker.advance(1)
        (entry,) = walker.sampler.state.values()
        found.append(entry["square_avg"].clone())
    (group,) = walker.sampler.param_groups
    assert (group["freeze_after"], group["adapted"], group["steps"]) == (frozen_at, frozen_at, 42)
    fixed = -(-frozen_at // 3)  # draws whose steps all adapt, or some
    assert not torch.equal(found[fixed - 2], found[fixed - 1])
    assert all(torch.equal(found[fixed - 1], later) for later in found[fixed:])


def test_what_adapts_beyond_burn_in_is_refused() -> None:
    for fields, sentence in (
        ({"freeze_after": 31}, r"at most burn_in \* thin = 30 steps.*got 31"),
        ({"burn_in": 0}, "burn_in must be at least 1 draw, got 0"),
    ):
        burn_in = fields.pop("burn_in", 10)
        with pytest.raises(ConfigError, match=sentence):
            chain(sampler=ds.SamplerConfig(name="rmsprop_sgld", lr=1e-4, **fields), burn_in=burn_in)


@pytest.mark.parametrize("name", ["rmsprop_sgld", "adam_sgld", "lmsgld", "sghmc", "mala"])
def test_every_other_sampler_goes_on_to_the_bit_too(name: str) -> None:
    size = 300 if name == "mala" else 16
    chosen = ds.SamplerConfig(name=name, lr=1e-4, localization=3.0)
    first, other = (chain(sampler=chosen, batch_size=size) for _ in range(2))
    other.restore(first.advance(6).state)  # amid burn-in, where preconditioners still adapt
    assert_same_blocks(first.advance(9), other.advance(9))


def test_mala_takes_all_data_and_records_its_acceptance() -> None:
    chosen = ds.SamplerConfig(name="mala", lr=3e-3, localization=3.0)
    block = chain(sampler=chosen, batch_size=300, thin=1).advance(40)
    assert 0 < block.values["acceptance"].min() < 0.99
    refused = np.diff(block.values["distance"]) == 0
    assert 0 < refused.sum() < 39
    full = block.values["excess_loss"]
    assert np.all(full >= -1e-6)  # of all data, at whose minimum the chain began


def test_mala_without_all_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size must be 300, .* got 16.*'lmsgld'"):
        chain(sampler=ds.SamplerConfig(name="mala", lr=1e-3))
    mala = ds.SamplerConfig(name="mala", lr=1e-3)
    drops_out = config(sampler=mala, batch_size=300, mode="train")
    with pytest.raises(ConfigError, match="needs a loss that is a function of the weights"):
        prepare(Net(), regression()[1], squared_error, drops_out)


@pytest.mark.statistical
def test_mala_is_exact_where_sgld_is_not() -> None:
    """1/2 sum nbeta h / (nbeta h + gamma) on a linear regression, at a step of 1 / kappa_max."""
    _, (x, _) = regression()
    nbeta, gamma = 30.0, 10.0
    h = torch.linalg.eigvalsh(2 * x.double().T @ x.double() / 300)
    lr = 1 / float(nbeta * h.max() + gamma)
    exact = float((nbeta * h / (nbeta * h + gamma)).sum() / 2)
    for name, passes in (("mala", True), ("sgld", False)):
        chosen = ds.SamplerConfig(name=name, lr=lr, nbeta=nbeta, localization=gamma)
        fields = {"sampler": chosen, "batch_size": 300, "batches": "epoch", "chains": 16, "thin": 4}
        model, data = regression()
        spec = prepare(model, data, squared_error, config(**fields))
        at_anchor = anchored(spec)
        found = [
            nbeta * Chain(spec, index, at_anchor).advance(70).values["excess_loss"][10:].mean()
            for index in range(16)
        ]
        mean, error = np.mean(found), np.std(found, ddof=1) / 4
        assert error < 0.05 * exact
        assert (abs(mean - exact) < 5 * error) == passes, (name, mean, exact, error)


def test_a_batch_of_all_data_is_its_own_readout() -> None:
    walker = chain(batches="epoch", batch_size=300, thin=1)
    assert walker._readout is None
    assert walker.advance(1).values["excess_loss"][0] == pytest.approx(0.0, abs=1e-6)
