import itertools
import math

import numpy as np
import pytest
import torch

from distsampler.errors import ConfigError, DistsamplerError
from distsampler.truth import coefficients
from distsampler.truth.codimension import codimension
from distsampler.truth.gibbs import DeepLinear
from distsampler.truth.quadrature import linear_regression, quadrature

SIZES = range(1, 13)


def reduced_rank(
    inputs: int, hidden: int, outputs: int, rank: int
) -> coefficients.LearningCoefficient:
    """Return that of ``y = B A x`` by a formula of its own (Aoyagi & Watanabe 2005)."""
    m, h, n, r = inputs, hidden, outputs, rank
    if m + h < n + r:  # C2
        return coefficients.LearningCoefficient((h * m - h * r + n * r) / 2, 1)
    if n + h < m + r:  # C3
        return coefficients.LearningCoefficient((h * n - h * r + m * r) / 2, 1)
    if m + n < h + r:  # C4
        return coefficients.LearningCoefficient(m * n / 2, 1)
    eighths = -((h + r) ** 2) - m**2 - n**2 + 2 * (h + r) * (m + n) + 2 * m * n  # C1
    odd = (m + h + n + r) % 2
    return coefficients.LearningCoefficient((eighths + odd) / 8, 1 + odd)


def test_two_formulas_of_two_layers_agree_in_value_and_multiplicity() -> None:
    cases = 0
    for m, h, n in itertools.product(SIZES, repeat=3):
        for r in range(min(m, h, n) + 1):
            assert coefficients.deep_linear((m, h, n), r) == reduced_rank(m, h, n, r)
            cases += 1
    assert cases == 7_812


@pytest.mark.parametrize(
    ("widths", "rank", "value", "multiplicity"),
    [
        ((2, 2, 2), 0, 3 / 2, 1),
        ((2, 2, 2), 1, 2, 2),
        ((2, 2, 2), 2, 2, 1),
        ((2, 2, 2, 2), 0, 3 / 2, 3),
        ((3, 3, 3, 3), 0, 3, 1),
        ((3, 3, 3, 3), 1, 4, 3),
        ((5, 3, 5), 0, 13 / 2, 2),
        ((5, 4, 5), 2, 21 / 2, 1),
        ((3, 7), 2, 21 / 2, 1),
        ((1, 1, 1, 1, 1), 0, 1 / 2, 4),
    ],
)
def test_deep_linear_nets_have_their_published_coefficients(
    widths: tuple[int, ...], rank: int, value: float, multiplicity: int
) -> None:
    assert coefficients.deep_linear(widths, rank) == (value, multiplicity)


def test_a_chain_of_single_weights_is_a_normal_crossing() -> None:
    for layers in range(1, 8):
        chain = coefficients.deep_linear((1,) * (layers + 1), 0)
        assert chain == coefficients.normal_crossing((1,) * layers)


def test_the_coefficient_does_not_know_the_order_of_the_widths_at_rank_zero() -> None:
    for widths in itertools.permutations((2, 3, 5, 7)):
        assert coefficients.deep_linear(widths, 0) == coefficients.deep_linear((2, 3, 5, 7), 0)


def test_crossings_and_regular_models() -> None:
    assert coefficients.normal_crossing((1, 3, 3)) == (1 / 6, 2)
    assert coefficients.normal_crossing((2, 0)) == (1 / 4, 1)
    assert coefficients.regular(10) == (5, 1)


def test_the_expansion_at_finite_t_subtracts_the_multiplicity() -> None:
    assert coefficients.LearningCoefficient(1.5, 3).at(math.e**4) == pytest.approx(1.0)


def square(w: np.ndarray) -> np.ndarray:
    return w**2


def product(k: int) -> object:
    return lambda a, b: (a * b) ** (2 * k)


@pytest.mark.parametrize(
    ("loss", "anchor", "t", "published"),
    [
        (lambda w: w**4, (0.0,), 579.0, 0.2465),
        (lambda w: w**4, (0.0,), 1e4, 0.2492),
        (lambda w: w**6, (0.0,), 579.0, 0.1604),
        (lambda w: w**6, (0.0,), 1e4, 0.1642),
        (product(1), (0.0, 0.0), 579.0, 0.3833),
        (product(1), (0.0, 0.0), 1e4, 0.4123),
        (product(2), (0.0, 0.0), 579.0, 0.1614),
        (product(2), (0.0, 0.0), 1e4, 0.1785),
    ],
)
def test_quadrature_reproduces_the_published_values(
    loss: object, anchor: tuple[float, ...], t: float, published: float
) -> None:
    assert quadrature(loss, t, 1.0, anchor).mean == pytest.approx(published, abs=5e-5)
    for wrong in (
        quadrature(loss, t / 2, 1.0, anchor),
        quadrature(loss, t, 2.0, anchor),
    ):
        assert wrong.mean != pytest.approx(published, abs=5e-5)


def test_quadrature_of_a_product_off_the_origin_agrees_with_the_inner_integral_done_by_hand() -> (
    None
):
    """Given a, b is Gaussian of precision gamma + 2 t a^2: one integral over a is left."""
    t, gamma = 579.0, 1.0
    a = np.linspace(-9, 11, 400_001)
    precision = gamma + 2 * t * a**2
    density = np.exp(-gamma / 2 * (a - 1) ** 2) / np.sqrt(precision)
    by_hand = (density * t * a**2 / precision).sum() / density.sum()
    found = quadrature(product(1), t, gamma, (1.0, 0.0))
    assert found.mean == pytest.approx(by_hand, rel=1e-6)
    assert found.mean == pytest.approx(0.3974, abs=5e-5)


def test_a_strong_anchor_on_a_regular_point_is_regular() -> None:
    """At (1, 0) only the second weight is seen once gamma holds the first away from 0."""
    found = quadrature(product(1), 1e6, 100.0, (1.0, 0.0))
    assert found.mean == pytest.approx(0.5, rel=1e-3)


def test_quadrature_of_a_quadratic_is_the_closed_form() -> None:
    closed = linear_regression([2.0, 2.0], nbeta=30.0, localization=3.0)
    found = quadrature(lambda a, b: a**2 + b**2, 30.0, 3.0)
    assert found == pytest.approx(closed, rel=1e-6)


def test_quadrature_that_cannot_resolve_its_loss_says_so() -> None:
    with pytest.raises(DistsamplerError, match="must not depend on its points"):
        quadrature(lambda w: (w - 1) ** 2, 1e9, anchor=(1.0,))


@pytest.mark.parametrize(
    "call",
    [
        lambda: coefficients.deep_linear((3,), 0),
        lambda: coefficients.deep_linear((3, 2, 3), 3),
        lambda: coefficients.deep_linear((3, 2, 3), -1),
        lambda: coefficients.normal_crossing(()),
        lambda: coefficients.normal_crossing((0, 0)),
        lambda: quadrature(square, 1.0, 0.0, (0.0,)),
        lambda: quadrature(square, 1.0, 1.0, (0.0, 0.0, 0.0)),
        lambda: DeepLinear((), 1.0),
        lambda: DeepLinear((torch.zeros(2, 3), torch.zeros(2, 3)), 1.0),
        lambda: DeepLinear((torch.zeros(2, 3),), 1.0, localization=0.0),
    ],
)
def test_what_has_no_answer_is_refused(call: object) -> None:
    with pytest.raises(ConfigError, match=r"must|needs"):
        call()


def test_the_gradient_of_a_deep_linear_net_is_that_of_autograd() -> None:
    source = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (1, 3), (4, 1), (2, 4)]
    layers = [torch.randn(5, *s, dtype=torch.float64, generator=source) for s in shapes]
    net = DeepLinear(tuple(w[0] + 1 for w in layers), t=3.0)
    leaves = [w.requires_grad_() for w in layers]
    loss, gradients = net.gradient(leaves)
    torch.testing.assert_close(net.t * loss, net.tk(leaves))
    torch.testing.assert_close(gradients, list(torch.autograd.grad(loss.sum(), leaves)))


@pytest.mark.parametrize("ranks", [(3, 3, 3), (3, 1, 3), (1, 3, 2), (2, 0, 3), (0, 0, 1)])
def test_the_codimension_at_w_star_is_the_rank_of_the_jacobian(ranks: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(1)
    layers = []
    for (rows, columns), rank in zip([(4, 3), (5, 4), (3, 5)], ranks, strict=True):
        left = torch.randn(rows, rank, dtype=torch.float64, generator=source)
        layers.append(left @ torch.randn(rank, columns, dtype=torch.float64, generator=source))
    found = torch.autograd.functional.jacobian(lambda a, b, c: c @ b @ a, tuple(layers))
    dense = torch.cat([part.reshape(9, -1) for part in found], 1)
    assert codimension(layers) == torch.linalg.matrix_rank(dense, rtol=1e-9)
