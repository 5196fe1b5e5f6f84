"""The targets are what they say: data, losses, ranks, seeds, and their exact answers."""

import math
import pickle

import numpy as np
import pytest
import torch

import distsampler as ds
from distsampler.errors import ConfigError
from distsampler.truth import networks, targets
from distsampler.truth.gibbs import DeepLinear, block_gibbs
from distsampler.truth.quadrature import linear_regression
from tests.assertions import assert_mean


def test_a_quadratic_has_the_gradient_noise_it_says() -> None:
    target = targets.quadratic([0.5, 2.0], variance=4.0, n=64)
    w = target.model.get_parameter("w")
    losses = target.loss(target.model, target.data)
    gradients = torch.stack([torch.autograd.grad(x, w, retain_graph=True)[0] for x in losses])
    torch.testing.assert_close(gradients.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients.var(0, correction=0), torch.full((2,), 4.0))
    torch.nn.init.ones_(w)
    assert target.loss(target.model, target.data).mean().item() == pytest.approx(1.25, rel=1e-5)


def test_a_quadratic_law_is_the_closed_formula() -> None:
    target = targets.quadratic(np.logspace(-1, 1, 20), variance=4.0, localization=100.0)
    lr, m = 0.3 / float(target.kappa.max()), 64
    options = {"lr": lr, "localization": target.localization, "nbeta": target.nbeta}
    share = target.nbeta * target.curvature / target.kappa
    heat = 1 + lr * target.nbeta**2 * target.variance / (4 * m)
    plain = share * heat / (1 - lr * target.kappa / 4) / 2

    def law(name: str, **fields: float) -> float:
        sampler = ds.SamplerConfig(name=name, **options, **fields)
        found = target.law(ds.RunConfig(sampler=sampler, batch_size=m))
        assert found is not None
        return found.mean

    assert law("sgld") == pytest.approx(float(plain.sum()), rel=1e-9)
    assert law("sgld") > law("lmsgld") > target.exact.mean
    assert law("sgld", noise_level=1.1) == law("sgld")  # what it should return
    corrected = ds.SamplerConfig(name="lmsgld", correct_heat=True, **options)
    found = target.law(ds.RunConfig(sampler=corrected, batch_size=m))
    assert found is not None
    assert found.mean == pytest.approx(target.exact.mean, rel=1e-2)
    assert target.law(ds.RunConfig(sampler=ds.SamplerConfig(name="sgnht"))) is None


@pytest.mark.parametrize(
    ("halves", "anchor", "value", "exact"),
    [
        ((2,), None, (1 / 4, 1), 0.2465),
        ((1, 1), None, (1 / 2, 2), 0.3833),
        ((1, 1), (1.0, 0.0), (1 / 2, 1), 0.3974),
        ((2, 2), None, (1 / 4, 2), 0.1614),
    ],
)
def test_a_normal_crossing_knows_its_answers(
    halves: tuple[int, ...], anchor: tuple[float, ...] | None, value: object, exact: float
) -> None:
    target = targets.normal_crossing(halves, anchor=anchor, copies=3)
    assert target.coefficient == value
    assert target.exact.mean == pytest.approx(exact, abs=5e-5)
    assert target.model.get_parameter("w").shape == (len(halves), 3)
    losses = target.loss(target.model, target.data)
    assert not losses.any()
    with torch.no_grad():
        target.model.get_parameter("w").fill_(0.5)
    expected = 3 * 0.5 ** (2 * sum(halves))
    assert target.loss(target.model, target.data)[0].item() == pytest.approx(expected)


def test_a_network_computes_its_product_and_copies_add() -> None:
    one, three = (networks.unit_network((4, 3, 2), 1, copies=copies) for copies in (1, 3))
    source = torch.Generator().manual_seed(0)
    layers = [torch.randn(w.shape, generator=source) for w in one.layers]
    with torch.no_grad():
        for target in (one, three):
            for parameter, w in zip(target.model.parameters(), layers, strict=True):
                parameter.copy_(w)
    x, y = one.data  # type: ignore[misc]
    by_hand = (x @ layers[0].T @ layers[1].T - y).square().sum(1)
    torch.testing.assert_close(one.loss(one.model, one.data), by_hand)
    torch.testing.assert_close(three.loss(three.model, three.data), 3 * by_hand)
    tk = one.posterior.tk([w.double() for w in layers])
    assert one.nbeta * by_hand.mean().item() == pytest.approx(float(tk), rel=1e-5)


def test_inputs_of_a_unit_network_have_the_identity_as_second_moment() -> None:
    x, _ = networks.unit_network((5, 2, 3), 1).data  # type: ignore[misc]
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(5), atol=1e-5, rtol=0)


def test_benchmark_nets_follow_from_their_seed() -> None:
    one, again, other = (networks.deep_linear_1k(seed, n=200) for seed in (3, 3, 4))
    assert one.widths == again.widths != other.widths
    for a, b in zip(one.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.data[0], again.data[0])  # type: ignore[index]


@pytest.mark.parametrize(
    ("make", "depths", "sizes"),
    [(networks.deep_linear_1k, (2, 5), (5, 50)), (networks.deep_linear_10k, (2, 10), (5, 100))],
)
def test_benchmark_nets_have_the_published_statistics(
    make: object, depths: tuple[int, int], sizes: tuple[int, int]
) -> None:
    """Depths and widths uniform, half of the layers cut, entries of variance 2 / (in + out)."""
    nets = [make(seed, n=64) for seed in range(200)]  # type: ignore[operator]
    for values, (low, high) in [
        ([len(net.layers) for net in nets], depths),
        ([width for net in nets for width in net.widths], sizes),
    ]:
        assert (min(values), max(values)) == (low, high)
        spread = math.sqrt(((high - low + 1) ** 2 - 1) / 12 / len(values))
        assert_mean(float(np.mean(values)), (low + high) / 2, spread)
    layers = [w for net in nets for w in net.layers]
    whole = [bool(w.any(0).all() and w.any(1).all()) for w in layers]
    cut = 1 - np.mean(whole)
    # A layer that was to be cut to its full rank on its shorter side stays whole.
    stays = np.mean([0.25 / (min(w.shape) + 1) * (1 + (w.shape[0] == w.shape[1])) for w in layers])
    assert_mean(float(cut), 0.5 - float(stays), math.sqrt(0.25 / len(layers)))
    scaled = torch.cat([(w * math.sqrt(sum(w.shape) / 2)).flatten() for w in layers])
    alive = scaled[scaled != 0]
    assert_mean(float(alive.square().mean()), 1.0, math.sqrt(2 / len(alive)))


def test_cut_layers_have_uniform_ranks() -> None:
    rng = np.random.default_rng(0)
    found = [int(torch.linalg.matrix_rank(networks._layer(rng, 6, 9))) for _ in range(2_000)]
    full = np.mean([rank == 6 for rank in found])
    assert_mean(float(full), 0.5 + 0.5 / 7, math.sqrt(0.25 / 2_000))
    rest = [rank for rank in found if rank < 6]
    assert_mean(float(np.mean(rest)), 2.5, math.sqrt(35 / 12 / len(rest)))


def test_inputs_of_a_benchmark_net_are_uniform() -> None:
    net = networks.deep_linear_1k(12)
    x, y = net.data  # type: ignore[misc]
    assert len(x) == 100_000
    assert net.nbeta == pytest.approx(1e5 / math.log(1e5))
    assert float(x.abs().max()) < 10
    assert_mean(net.moment, 100 / 3, math.sqrt(100**2 * 4 / 45 / x.numel()))
    torch.testing.assert_close(y, net.model(x), atol=1e-3, rtol=1e-4)


def test_a_rescaled_net_is_the_same_function() -> None:
    net = networks.unit_network((3, 2, 3), 2)
    far = networks.rescaled(net, 4.0)
    x, y = net.data  # type: ignore[misc]
    torch.testing.assert_close(far.model(x), net.model(x))
    torch.testing.assert_close(far.data[1], y)  # type: ignore[index]
    assert float(far.layers[0].norm() / net.layers[0].norm()) == pytest.approx(4.0)
    assert far.coefficient == net.coefficient


def test_dead_weights_add_parameters_and_change_no_loss() -> None:
    net = networks.unit_network((3, 2, 3), 1)
    dead = networks.with_dead_weights(net, 1_000)
    count = sum(p.numel() for p in net.model.parameters())
    assert sum(p.numel() for p in dead.model.parameters()) == count + 1_000
    torch.testing.assert_close(dead.loss(dead.model, net.data), net.loss(net.model, net.data))
    assert dead.coefficient == net.coefficient


def test_gibbs_of_a_network_is_found_once_and_can_be_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(networks, "ENOUGH", 0.02)
    net = networks.unit_network((3, 3, 3), 3, t=200.0)
    assert net.exact is net.exact
    assert 0 < net.exact.se < 0.02 * net.exact.mean
    again = block_gibbs(net.posterior, replicas=50, sweeps=100, burn_in=50, seed=5)
    both = math.hypot(net.exact.se, float(again.se))
    assert_mean(net.exact.mean, float(again.mean), both)
    given = net.known(targets.Known(3.0, 0.1, "elsewhere"))
    assert given.exact == (3.0, 0.1, "elsewhere")
    assert pickle.loads(pickle.dumps(given)).exact.mean == 3.0


def test_a_finite_sample_of_inputs_hardly_changes_the_truth() -> None:
    """One layer, where it has a formula: 10,000 inputs in place of infinitely many."""
    x = networks.uniform_inputs(10_000, 40, seed=1)
    nbeta, gamma, moment = 1_000.0, 1.0, float(x.square().mean())
    h = 2 * torch.linalg.eigvalsh(x.mT @ x / len(x))
    true = linear_regression(h.numpy(), nbeta, gamma).mean
    taken = linear_regression(np.full(40, 2 * moment), nbeta, gamma).mean
    assert taken == pytest.approx(true, rel=1e-3)
    assert DeepLinear((torch.zeros(1, 40).double(),), nbeta * moment, gamma).t > nbeta


@pytest.mark.parametrize(
    "call",
    [
        lambda: targets.quadratic([1.0, -1.0], 0.0),
        lambda: targets.quadratic([1.0], -1.0),
        lambda: targets.normal_crossing((0, 0)),
        lambda: targets.normal_crossing((1, 1), anchor=(1.0, 1.0)),
        lambda: targets.normal_crossing((1, 1), anchor=(0.0,)),
        lambda: networks.rescaled(networks.unit_network((2, 2), 1), 2.0),
        lambda: networks.rescaled(networks.unit_network((2, 2, 2), 1), 0.0),
        lambda: networks.unit_network((2, 1, 2), 2),
    ],
)
def test_what_has_no_answer_is_refused(call: object) -> None:
    with pytest.raises(ConfigError, match=r"must|needs"):
        call()  # type: ignore[operator]
