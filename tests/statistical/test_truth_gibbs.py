"""Block Gibbs against everything else that is known of deep linear networks."""

import math

import pytest
import torch
from torch import Tensor

from distsampler.truth import coefficients, gibbs, networks
from distsampler.truth.gibbs import BlockGibbs, DeepLinear, ReplicaMean, block_gibbs
from distsampler.truth.quadrature import linear_regression, quadrature
from tests.assertions import assert_mean

pytestmark = pytest.mark.statistical


def energy(net: DeepLinear, read_at: DeepLinear, **options: int) -> ReplicaMean:
    """Mean of t K as ``read_at`` has it, over chains that sample ``net``."""
    o = {"replicas": 200, "burn_in": 150, "sweeps": 250, "seed": 0} | options
    chains = BlockGibbs(net, o["replicas"], torch.Generator().manual_seed(o["seed"]))
    chains.run(o["burn_in"])
    found = ReplicaMean.over(chains.run(o["sweeps"]))
    return ReplicaMean(found.mean * read_at.t / net.t, found.se * read_at.t / net.t)


# Widths, rank, t, and the published value with its error. [2,2,2,2] at t = 100 was published
# without error as 1.107; 8 million draws of the prior, weighted, give what stands here.
TABLE = [
    ((2, 2, 2), 0, 1e4, 1.466, 0.009),
    ((2, 2, 2), 1, 1e4, 1.898, 0.010),
    ((2, 2, 2), 2, 1e4, 1.972, 0.010),
    ((2, 2, 2, 2), 0, 1e2, 1.1233, 0.0038),
    ((2, 2, 2, 2), 0, 1e4, 1.290, 0.005),
    ((3, 3, 3, 3), 0, 1e4, 2.903, 0.015),
    ((3, 3, 3, 3), 1, 1e4, 3.775, 0.017),
    ((5, 3, 5), 0, 1e4, 6.350, 0.022),
    ((5, 4, 5), 2, 1e4, 10.443, 0.027),
]


QUICK = 4
ROWS = [
    pytest.param(*row, marks=[] if i < QUICK else pytest.mark.slow) for i, row in enumerate(TABLE)
]


@pytest.mark.parametrize(("widths", "rank", "t", "published", "error"), ROWS)
def test_gibbs_reproduces_the_published_values(
    widths: tuple[int, ...], rank: int, t: float, published: float, error: float
) -> None:
    net = DeepLinear.of_rank(widths, rank, t)
    found = energy(net, net)
    both = math.hypot(float(found.se), error)
    assert_mean(float(found.mean), published, both)
    wrong = energy(DeepLinear.of_rank(widths, rank, 1.1 * t), net)
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_mean(float(wrong.mean), published, both)


@pytest.mark.parametrize("t", [1e4, 1e6])
@pytest.mark.parametrize(("widths", "rank"), [((2, 2, 2), 0), ((2, 2, 2), 1), ((2, 2, 2), 2)])
def test_gibbs_approaches_the_expansion(t: float, widths: tuple[int, ...], rank: int) -> None:
    found = block_gibbs(DeepLinear.of_rank(widths, rank, t), sweeps=250)
    expected = coefficients.deep_linear(widths, rank).at(t)
    assert float(found.mean) == pytest.approx(expected, rel=0.02)


def two_weights(t: float, gamma: float, a: float, b: float) -> float:
    """t E[(x y - a b)^2] around (a, b): given x, y is Gaussian, and one integral is left."""
    x = torch.linspace(a - 9, a + 9, 400_001, dtype=torch.float64)
    precision = gamma + 2 * t * x**2
    mean = (gamma * b + 2 * t * x * a * b) / precision
    log_density = (precision * mean**2 - precision.log() - gamma * (x - a) ** 2) / 2
    density = (log_density - log_density.max()).exp()
    tk = t * (x**2 / precision + (x * mean - a * b) ** 2)
    return float((density * tk).sum() / density.sum())


# A regular minimum at large t returns 1/2 whatever gamma is: no control there.
TWO_WEIGHTS = [
    pytest.param(anchor, t, *factors, id=f"{name}-{t:g}-{anchor}")
    for anchor in [(0.0, 0.0), (1.0, 0.0), (1.5, 0.7)]
    for t in [30.0, 579.0, 1e4]
    for name, factors in {"right": (1.0, 1.0), "t": (1.05, 1.0), "gamma": (1.0, 9.0)}.items()
    if name != "gamma" or anchor[1] == 0.0
]


@pytest.mark.parametrize(("anchor", "t", "factor_t", "factor_gamma"), TWO_WEIGHTS)
def test_gibbs_of_two_weights_is_an_integral(
    anchor: tuple[float, float], t: float, factor_t: float, factor_gamma: float
) -> None:
    """Right to a third of a per cent; t 5 % off, or gamma, is refused."""
    a, b = anchor
    layers = (torch.full((1, 1), a).double(), torch.full((1, 1), b).double())
    net = DeepLinear(layers, t)
    exact = two_weights(t, 1.0, a, b)
    if b == 0.0:
        assert quadrature(lambda x, y: (x * y) ** 2, t, 1.0, anchor).mean == pytest.approx(
            exact, rel=1e-6
        )
    used = DeepLinear(layers, factor_t * t, factor_gamma)
    found = energy(used, net, replicas=1_000, sweeps=500)
    assert float(found.se) < 4e-3 * exact
    if factor_t == factor_gamma == 1.0:
        assert_mean(float(found.mean), exact, float(found.se))
    else:
        with pytest.raises(AssertionError, match="standard errors off"):
            assert_mean(float(found.mean), exact, float(found.se))


def prior_average(net: DeepLinear, draws: int) -> tuple[float, float]:
    """E[t K] from independent draws of the prior, weighted with exp(-t K), in 16 parts."""
    source, parts = torch.Generator().manual_seed(9), []
    for _ in range(16):
        weights = [
            w + torch.randn(draws // 16, *w.shape, dtype=w.dtype, generator=source)
            / math.sqrt(net.localization)
            for w in net.anchors
        ]  # fmt: skip
        tk = net.tk(weights)
        parts.append(float(((-tk).exp() * tk).sum() / (-tk).exp().sum()))
    found = torch.tensor(parts, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / 4


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_gibbs_of_unequal_widths_agrees_with_draws_of_the_prior(factor: float) -> None:
    """Widths 2, 3, 1, 2 and a random w*: every shape, every product, the orbit's Jacobian."""
    source = torch.Generator().manual_seed(2)
    shapes = [(3, 2), (1, 3), (2, 1)]
    layers = tuple(torch.randn(s, dtype=torch.float64, generator=source) for s in shapes)
    net = DeepLinear(layers, t=5.0, localization=2.0)
    expected, error = prior_average(net, 1_600_000)
    found = energy(DeepLinear(layers, factor * 5.0, 2.0), net, replicas=1_000)
    both = math.hypot(error, float(found.se))
    assert both < 0.015 * expected
    if factor == 1.0:
        assert_mean(float(found.mean), expected, both)
    else:
        with pytest.raises(AssertionError, match="standard errors off"):
            assert_mean(float(found.mean), expected, both)


def test_moves_along_the_orbit_leave_product_and_law_alone_and_shorten_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At t = 1e6 the Gaussian draws alone have hardly left w* after 200 sweeps."""
    net = DeepLinear.of_rank((2, 2, 2), 2, 1e6)

    def way() -> float:
        chains = BlockGibbs(net, 100, torch.Generator().manual_seed(0))
        chains.run(200)
        return float((chains.weights[0] - net.anchors[0]).norm(dim=(-2, -1)).mean())

    chains = BlockGibbs(net, 100, torch.Generator().manual_seed(0))
    before = gibbs.product(chains.weights)
    chains._trade(0)
    torch.testing.assert_close(gibbs.product(chains.weights), before)
    free = way()
    monkeypatch.setattr(BlockGibbs, "_trade", lambda self, s: None)
    assert way() < free / 10


def test_several_networks_at_once_are_the_same_as_one_by_one() -> None:
    source = torch.Generator().manual_seed(1)

    def layer(rows: int, columns: int) -> Tensor:
        return torch.randn(3, rows, columns, dtype=torch.float64, generator=source)

    layers = (layer(3, 2), layer(2, 3))
    short = {"replicas": 64, "sweeps": 150, "burn_in": 50}
    together = block_gibbs(DeepLinear(layers, 50.0), **short)
    assert together.mean.shape == together.se.shape == (3,)
    for i in range(3):
        one = DeepLinear(tuple(w[i] for w in layers), 50.0)
        alone = block_gibbs(one, seed=1 + i, **short)
        both = math.hypot(float(alone.se), float(together.se[i]))
        assert_mean(float(together.mean[i]), float(alone.mean), both)


def test_one_layer_is_a_linear_regression() -> None:
    """K = |W - T|^2 is a quadratic of curvature 2 in every entry."""
    net = DeepLinear((torch.ones(2, 3, dtype=torch.float64),), t=7.0, localization=3.0)
    found = block_gibbs(net, sweeps=1_000)
    exact = linear_regression(torch.full((6,), 2.0), nbeta=7.0, localization=3.0)
    assert_mean(float(found.mean), exact.mean, float(found.se))
    assert float(found.se) == pytest.approx(math.sqrt(exact.variance / 200_000), rel=0.25)


def test_in_a_deep_net_rounding_stays_below_gamma(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine layers whose free directions multiply: the eigenvectors of squares are not enough."""
    net = networks.deep_linear_10k(5).posterior

    def largest() -> float:
        chains = BlockGibbs(net, 16, torch.Generator().manual_seed(0))
        chains.run(2)
        return max(float(w.abs().max()) for w in chains.weights)

    assert largest() < 10
    monkeypatch.setattr(gibbs, "ROUNDING", math.inf)
    assert largest() > 100, "squares were enough"


def test_the_curvature_is_the_hessians_where_the_loss_is_zero() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 4), (5, 3), (2, 5)]
    net = DeepLinear(
        tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes), t=7.0
    )

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([w.numel() for w in net.anchors])
        return net.tk([p.view(s) for p, s in zip(parts, shapes, strict=True)])

    flat = torch.cat([w.flatten() for w in net.anchors])
    hessian = torch.autograd.functional.hessian(loss, flat)
    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    assert float(net.curvature(net.anchors)) == pytest.approx(largest, rel=1e-6)
    moved = [w.expand(2, *w.shape) for w in net.anchors]
    moved[0] = torch.stack([moved[0][0], 2 * moved[0][1]])
    at_both = net.curvature(moved)  # leading dimensions are kept, and other weights tell
    assert float(at_both[0]) == pytest.approx(largest, rel=1e-6)
    assert float(at_both[1]) > 1.5 * largest
    assert float(net.curvature([torch.zeros_like(w) for w in net.anchors])) == 0.0
