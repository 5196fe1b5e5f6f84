"""Every sampler on targets beyond the axis-parallel quadratic."""

import math

import pytest
import torch
from torch import Tensor

from distsampler.optim import MALA, SAMPLERS, SGLD, mala_acceptance
from tests.assertions import assert_mean, assert_variance
from tests.targets import CorrelatedGaussian, Power, Quadratic, parameter, run

pytestmark = pytest.mark.statistical

STOCHASTIC = {
    "sgld": {"lr": 0.002},
    "lmsgld": {"lr": 0.01},
    "rmsprop_sgld": {"lr": 0.001, "freeze_after": 300, "stability": 0.5},
    "adam_sgld": {"lr": 0.0002, "freeze_after": 300, "stability": 0.5, "beta1": 0.5},
    "sghmc": {"lr": 0.003, "friction": 0.1},
    "sgnht": {"lr": 0.003, "diffusion_factor": 0.01},
}


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def singular_energy(name: str, k: int, nbeta: float) -> float:
    """Mean of 2 w^(2k) over 100,000 chains that target nbeta w^(2k)."""
    w, target = parameter(100_000), Power(k)
    sampler = SAMPLERS[name]([w], nbeta=nbeta, generator=source(), **STOCHASTIC[name])
    run(sampler, w, target.gradient, 3_000)
    return float(2 * target.loss(w.detach().double())) / w.numel()


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("k", [2, 3])
def test_a_singular_minimum_has_its_learning_coefficient(name: str, k: int) -> None:
    """nbeta E[w^(2k)] = 1/(2k): gamma-distributed, so its standard deviation is sqrt(1/(2k)).

    nbeta is 2, of which the answer knows nothing; the steps are short, so that discretisation
    stays below the standard error.
    """
    error = math.sqrt(1 / (2 * k) / 100_000)
    assert_mean(singular_energy(name, k, nbeta=2.0), 1 / (2 * k), error)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_sampler_that_is_given_another_nbeta_is_refused(name: str) -> None:
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_mean(singular_energy(name, 2, nbeta=2.2), 1 / 4, math.sqrt(1 / 4 / 100_000))


@pytest.mark.parametrize("name", ["sgld", "lmsgld"])
@pytest.mark.parametrize("nbeta", [1.5, 1.65])
def test_a_correlated_gaussian_in_50_dimensions(name: str, nbeta: float) -> None:
    """2,000 chains, variance by eigenvector, for nbeta 1.5; a chain with 10 % more is refused."""
    target, lr = CorrelatedGaussian.make(50, condition=30.0), 0.8
    w = parameter(2_000, 50)
    sampler = SAMPLERS[name]([w], lr, nbeta=nbeta, generator=source())
    run(sampler, w, target.gradient, 300)
    values, principal = target.principal(w.detach())
    kappa = 1.5 * values
    exact = 1 / kappa if name == "lmsgld" else 1 / (kappa * (1 - lr * kappa / 4))
    if nbeta == 1.5:
        assert_variance(principal, exact)
    else:
        with pytest.raises(AssertionError, match="standard errors off"):
            assert_variance(principal, exact)


def mala_energies(lr: float, adjusted: bool) -> tuple[Tensor, float]:
    """Mean of U for 16 chains in 50 correlated dimensions, and the mean acceptance."""
    target = CorrelatedGaussian.make(50, condition=10.0)
    means, accepted = [], []
    for seed in range(16):
        w = parameter(50, dtype=torch.float64)
        make = MALA if adjusted else SGLD
        sampler = make([w], lr, nbeta=2.0, generator=source(seed))

        def closure(w: torch.nn.Parameter = w) -> Tensor:
            w.grad = target.gradient(w.detach())
            return target.loss(w.detach())

        energies = []
        for step in range(1_200):
            energies.append(2.0 * float(sampler.step(closure)))
            if adjusted and step >= 200:
                accepted.append(float(sampler.acceptance))
        means.append(sum(energies[200:]) / 1_000)
    return torch.tensor(means), sum(accepted) / max(len(accepted), 1)


@pytest.mark.parametrize("adjusted", [True, False])
def test_mala_is_exact_where_its_proposal_alone_is_not(adjusted: bool) -> None:
    """E[U] = d/2 at a step size whose Langevin chain is far off."""
    means, acceptance = mala_energies(0.35, adjusted)
    error = float(means.std()) / 4
    if adjusted:
        assert 0.3 < acceptance < 0.9
        assert_mean(float(means.mean()), 25.0, error)
    else:
        with pytest.raises(AssertionError, match="standard errors off"):
            assert_mean(float(means.mean()), 25.0, error)


@pytest.mark.parametrize(("lr", "low", "high"), [(0.001, 0.99, 1.0), (0.5, 0.0, 0.7)])
def test_the_acceptance_of_sgld_tells_short_steps_from_long_ones(
    lr: float, low: float, high: float
) -> None:
    target = Quadratic(torch.linspace(0.5, 2.0, 50))
    w = parameter(50)
    sampler = SGLD([w], lr, nbeta=2.0, localization=1.0, weight_decay=0.5, generator=source())

    def loss() -> Tensor:
        w.grad = target.gradient(w.detach())
        return target.loss(w.detach())

    found = []
    for _ in range(300):
        before = sampler.side(loss())
        sampler.step()
        found.append(float(mala_acceptance(before, sampler.side(loss()))))
    assert low < sum(found[100:]) / 200 < high
