"""Curvature and gradient noise by Lanczos, and the biases that follow, against dense algebra."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from distsampler.curvature.hessian import Curvature, Ritz, measure
from distsampler.curvature.watch import Step, predict
from distsampler.facts import Posterior
from distsampler.models.replica import ChainSpec, Replica
from distsampler.optim import SAMPLERS
from distsampler.optim.law import Bias, QuadraticLaw
from distsampler.sampling.prepare import prepare
from distsampler.truth import discretised_laws
from tests.problems import Tilted, config, mean_squared_error, regression, squared_error, tilted

ALL = np.arange(300)


def around(model: nn.Module, data: Any, loss: Any = squared_error, **fields: Any) -> Curvature:
    spec = prepare(model, data, loss, config(**fields))
    rows = np.arange(len(spec.rows))
    return Curvature(Replica(spec, torch.device("cpu")), spec, rows)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(curvature: Curvature, size: int) -> NDArray[np.float64]:
    columns = [curvature.times(e) for e in torch.eye(size, dtype=torch.float64)]
    return torch.stack(columns).numpy()


def test_hessian_and_noise_are_those_of_a_linear_regression() -> None:
    model, (x, y) = regression()
    found = around(model, (x, y))
    hessian = 2 * x.double().T @ x.double() / 300
    residual = x.double() @ model.weight.detach().double().T - y
    covariance = torch.cov((2 * residual * x).T.double(), correction=0)
    for v in torch.eye(5, dtype=torch.float64):
        assert torch.allclose(found.times(v), hessian @ v, atol=1e-5)
        assert torch.allclose(found.noise_times(v), covariance @ v, atol=1e-4)
    assert found.gradient().abs().max() < 1e-5


def test_the_noise_among_some_rows_stands_for_that_of_all_data() -> None:
    """Over random sets of rows its mean is the covariance, not (rows - 1) / rows of it."""
    model, (x, y) = regression()
    spec = prepare(model, (x, y), squared_error, config())
    replica, rng = Replica(spec, torch.device("cpu")), np.random.default_rng(0)
    residual = x @ model.weight.detach().T - y
    exact = float((2 * residual * x).double().var(0, correction=0)[0])
    first = torch.eye(5, dtype=torch.float64)[0]

    def once() -> float:
        rows = rng.choice(300, 8, replace=False)
        return float(Curvature(replica, spec, rows).noise_times(first)[0])

    values = np.array([once() for _ in range(800)])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - exact) < 5 * error
    assert abs(values.mean() * 7 / 8 - exact) > error


def test_without_per_example_losses_the_noise_is_seen_between_parts() -> None:
    model, data = regression(4000)
    single, parts = (around(model, data, loss) for loss in (squared_error, mean_squared_error))
    basis = torch.eye(5, dtype=torch.float64)
    assert torch.allclose(single.times(basis[0]), parts.times(basis[0]), atol=1e-5)
    one, other = (sum(c.noise_times(e) @ e for e in basis) for c in (single, parts))
    assert abs(float(other / one) - 1) < 5 * math.sqrt(2 / (15 * 5))


def test_with_as_many_steps_as_dimensions_ritz_values_are_eigenvalues() -> None:
    torch.manual_seed(0)
    model, (_, data) = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)), regression()
    found = around(model.double(), tuple(t.double() for t in data))
    exact = np.linalg.eigvalsh(dense(found, 22))
    ritz = measure(found, generator(), steps=22)
    assert exact[0] < -0.01  # no minimum: the values of either sign are there
    np.testing.assert_allclose(ritz.values, exact, atol=1e-8)
    assert ritz.weights.sum() == pytest.approx(22)
    assert measure(found, generator(), steps=12).largest == pytest.approx(exact[-1], rel=1e-3)


def test_a_space_that_is_left_invariant_ends_the_walk() -> None:
    model = Tilted(50)
    model.hessian.copy_(torch.eye(50))
    ritz = measure(around(model, torch.randn(40, 50, generator=generator()), tilted), generator())
    assert ritz.values == pytest.approx([1.0])
    assert ritz.weights == pytest.approx([50.0])


def test_traces_are_right_in_the_mean() -> None:
    torch.manual_seed(1)
    model, (_, data) = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)), regression()
    found = around(model, data)
    hessian, identity = dense(found, 22), torch.eye(22, dtype=torch.float64)
    covariance = torch.stack([found.noise_times(e) for e in identity]).numpy()
    diagonal = torch.arange(22.0).double()
    walks = [measure(found, generator(seed), 5, diagonal) for seed in range(200)]
    matrices = {"weights": np.eye(22), "noise": covariance, "removed": np.diag(diagonal)}
    for name, matrix in matrices.items():
        sums = np.array([getattr(ritz, name) @ ritz.values**2 for ritz in walks])
        exact = np.trace(hessian @ hessian @ matrix)
        error = sums.std() / math.sqrt(len(sums))
        assert abs(sums.mean() - exact) < 5 * error, name
        assert abs(1.5 * sums.mean() - exact) > 5 * error, name


@pytest.mark.parametrize("restrict_to", [r"2\..*", "masks"])
def test_only_what_moves_has_a_curvature(restrict_to: str) -> None:
    torch.manual_seed(0)
    model, (_, data) = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)), regression()
    whole = dense(around(model, data), 22)
    if restrict_to == "masks":
        masks = {"0.weight": torch.zeros(3, 5, dtype=torch.bool)}
        masks["0.weight"][1, 2] = masks["0.weight"][2, 4] = True
        moving, found = [7, 14], around(model, data, restrict_to=masks)
    else:
        moving, found = [18, 19, 20, 21], around(model, data, restrict_to=restrict_to)
    assert found.dimension == len(moving)
    exact = np.linalg.eigvalsh(whole[np.ix_(moving, moving)])
    np.testing.assert_allclose(measure(found, generator()).values, exact, atol=1e-5)


def test_weights_and_gradients_stay_as_they_are() -> None:
    model, data = regression()
    spec = prepare(model, data, squared_error, config())
    replica = Replica(spec, torch.device("cpu"))
    replica.backward(replica.losses(spec.rows.take(ALL[:16])))
    before = [(flat.detach().clone(), flat.grad.clone()) for flat in replica.flats]
    measure(Curvature(replica, spec, ALL), generator())
    for flat, (weights, gradient) in zip(replica.flats, before, strict=True):
        assert torch.equal(flat, weights)
        assert torch.equal(flat.grad, gradient)


def test_a_loss_that_is_not_finite_gives_numbers_that_are_not() -> None:
    model, data = regression()
    found = around(model, data, lambda m, b: squared_error(m, b) * float("nan"))
    assert math.isnan(measure(found, generator()).largest)


def test_channels_last_weights_and_dead_ones_are_in_their_places() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 2), nn.SiLU(), nn.Conv2d(3, 2, 2), nn.Flatten()]
    plain = nn.Sequential(*layers)
    plain.dead = nn.Parameter(torch.ones(7))
    images = torch.randn(40, 2, 3, 3)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum(1)

    before = measure(around(plain, images, loss), generator(), 20).values
    other = plain.to(memory_format=torch.channels_last)
    found = around(other, images, loss)
    assert found.dimension == sum(p.numel() for p in plain.parameters())
    assert measure(found, generator(), 20).largest == pytest.approx(before[-1], rel=1e-3)


def test_attention_has_a_curvature() -> None:
    """Its fused kernels lack a double backward: plain products stand in for them."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.outward = nn.Linear(4, 24), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.inward(x).chunk(3, -1)
            return self.outward(F.scaled_dot_product_attention(q, k, v).mean(1))

    x = torch.randn(40, 6, 4)
    found = around(Net(), (x, torch.randn(40, 1)))
    assert math.isfinite(measure(found, generator()).largest)


# The biases

N, BATCH, NBETA, GAMMA, D = 1024, 64, 150.0, 30.0, 200
POSTERIOR = Posterior(NBETA, GAMMA)
SHARES = (0.1, 0.3, 0.6, 1.0)  # lr kappa_max


def law(name: str, friction: float = 0.1) -> QuadraticLaw:
    """The law of a sampler; that of SGNHT's second scheme by the scheme's name."""
    options = {"friction": friction, "diffusion_factor": friction, "scheme": name}
    found = SAMPLERS["sgnht" if name == "badodab" else name].law(options)
    assert found is not None
    return found


def known(corrected: bool) -> Ritz:
    """A spectrum given in full."""
    h = np.linspace(0.1, 10, 60)
    v = 4 + np.cos(h)
    return Ritz(h, np.ones(60), v, v * corrected)


def exact_bias(step: Step, ritz: Ritz) -> float:
    """By the stationary law of each direction."""
    exact = {"sgld": discretised_laws.sgld, "lmsgld": discretised_laws.lmsgld}[step.law.name]
    total = 0.0
    for h, weight, v, d in zip(*ritz, strict=True):
        kappa, u = step.posterior.kappa(h), step.heat
        heat, left = step.lr * u * v / weight, 1 - u * d / weight
        total += (
            weight * step.posterior.nbeta * h / 2 * (exact(step.lr, kappa, heat, left) - 1 / kappa)
        )
    return total


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", ["sgld", "lmsgld"])
def test_the_bias_of_a_known_spectrum_is_that_of_the_stationary_law(
    name: str, corrected: bool, share: float
) -> None:
    ritz = known(corrected)
    step = Step(law(name), share / (NBETA * 10 + GAMMA), POSTERIOR, BATCH)
    assert sum(predict(step, ritz)) == pytest.approx(exact_bias(step, ritz), rel=1e-9)


def test_the_bias_of_sghmc_is_that_of_the_stationary_law() -> None:
    ritz, lr, alpha = known(False), 1e-4, 0.1
    step = Step(law("sghmc", alpha), lr, POSTERIOR, BATCH)
    exact = 0.0
    for h, v in zip(ritz.values, ritz.noise, strict=True):
        kappa = NBETA * h + GAMMA
        source = 2 * lr * alpha + (lr * NBETA) ** 2 * v / BATCH
        variance = float(discretised_laws._underdamped(lr, kappa, 1 - alpha, source)[0, 0])
        exact += NBETA * h / 2 * (variance - 1 / kappa)
    assert sum(predict(step, ritz)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("noise", [0.0, 200.0])
def test_the_bias_of_a_thermostat_is_that_of_its_law(noise: float) -> None:
    """Ding's form, lr kappa small; heat only goes from direction to direction."""
    ritz, lr, a = Ritz(*(array[::5] for array in known(False))), 1e-7, 0.1
    ritz = ritz._replace(noise=ritz.noise**2 * noise)

    def moments(xi: float) -> tuple[list[float], float]:
        sources = [2 * lr * a + (lr * NBETA) ** 2 * v / BATCH for v in ritz.noise]
        pairs = zip(ritz.values, sources, strict=True)
        found = [discretised_laws._underdamped(lr, NBETA * h + GAMMA, 1 - xi, s) for h, s in pairs]
        return [float(s[0, 0]) for s in found], sum(float(s[1, 1]) for s in found) / len(found)

    variances, _ = discretised_laws._settled(moments, lr, a)
    kappa = NBETA * ritz.values + GAMMA
    exact = float((NBETA * ritz.values / 2) @ (np.array(variances) - 1 / kappa))
    bias = predict(Step(law("sgnht", a), lr, POSTERIOR, BATCH), ritz)
    assert sum(bias) == pytest.approx(exact, rel=0.001)
    assert bias.discretisation == pytest.approx(-a / 2 * 6, rel=0.1)
    assert (abs(bias.heat) > 0.1) == bool(noise)


@pytest.mark.parametrize("name", ["sgnht", "badodab"])
def test_a_thermostat_that_has_not_answered_yet_leaves_the_heat_of_its_friction(name: str) -> None:
    ritz, lr, a = known(False), 1e-9, 0.01
    step = Step(law(name, a), lr, POSTERIOR, BATCH)
    cold = predict(step._replace(law=law("lmsgld")), ritz).heat * 2 / a
    found = [predict(step, ritz, made).heat for made in (0, 3 * a / lr, 1e3 * a / lr)]
    assert found[0] == pytest.approx(cold, rel=0.01)
    assert found[0] > found[1] > found[2]
    assert found[2] == pytest.approx(predict(step, ritz).heat, rel=1e-6)


def test_badodab_and_mala_have_none_without_noise() -> None:
    quiet = known(False)._replace(noise=np.zeros(60))
    for name in ("badodab", "mala"):
        assert predict(Step(law(name, 0.01), 1e-3, POSTERIOR, BATCH), quiet) == Bias(0.0, 0.0)


def test_a_step_beyond_stability_gives_a_large_number_not_infinity() -> None:
    found = predict(Step(law("sgld"), 1.0, POSTERIOR, BATCH), known(False))
    assert math.isfinite(found.discretisation)
    assert found.discretisation > 8 * 60 / 2 * 0.9


def tilted_spec(**fields: Any) -> tuple[ChainSpec, NDArray[np.float64], NDArray[np.float64]]:
    """A quadratic turned in space, its eigenvectors, and the covariance of its gradients."""
    model = Tilted(D)
    z = torch.randn(N, D, generator=generator()) * torch.linspace(1, 3, D)
    z -= z.mean(0)
    spec = prepare(model, z, tilted, config(batch_size=BATCH, **fields))
    _, vectors = np.linalg.eigh(model.hessian.double().numpy())
    return spec, vectors, np.cov(z.double().numpy().T, bias=True)


def averaged(biases: list[Bias]) -> float:
    return float(np.mean([sum(bias) for bias in biases]))


@pytest.mark.statistical
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", ["sgld", "lmsgld"])
def test_a_measured_spectrum_predicts_the_true_bias_within_five_percent(
    name: str, corrected: bool
) -> None:
    """Sixteen walks, as four chains make them in a run, on rows of which each sees its own."""
    spec, vectors, covariance = tilted_spec()
    values, diagonal = np.logspace(-1, 1, D), np.diag(covariance) * corrected
    along = np.einsum("ji,jk,ki->i", vectors, covariance, vectors)
    taken = np.einsum("ji,j,ji->i", vectors, diagonal, vectors)
    replica, rng = Replica(spec, torch.device("cpu")), np.random.default_rng(0)
    walks = [
        measure(
            Curvature(replica, spec, rng.choice(N, 512, replace=False)),
            generator(seed),
            removed=torch.from_numpy(diagonal) if corrected else None,
        )
        for seed in range(16)
    ]
    for share in SHARES:
        step = Step(law(name), share / (NBETA * 10 + GAMMA), POSTERIOR, BATCH)
        exact = exact_bias(step, Ritz(values, np.ones(D), along, taken))
        without = exact_bias(step, Ritz(values, np.ones(D), along, 0 * taken))
        found = averaged([predict(step, ritz) for ritz in walks])
        assert abs(found - exact) < 0.05 * without, share
        hotter = step._replace(posterior=Posterior(1.1 * NBETA, GAMMA))
        hot = averaged([predict(hotter, ritz) for ritz in walks])
        assert abs(hot - exact) > 0.05 * exact, share
        if not (name == "lmsgld" and corrected):
            assert found == pytest.approx(exact, rel=0.05), share
