"""Singular losses of known learning coefficient, through the whole road down to ``run.llc()``.

One vector of thousands of coordinates is as many independent copies: the loss is the sum of
theirs, the LLC too, and its standard error is known from the exact variance of one copy.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import distsampler as ds
from tests.assertions import assert_mean
from tests.targets import DATA, Power, Weights

pytestmark = pytest.mark.statistical


def product(model: Weights, batch: Any) -> Tensor:
    """``y = w1 w2 x`` at 0: ``L(w) = sum_i (w1_i w2_i)^2``."""
    return (model.w[0] * model.w[1]).square().sum().expand(len(batch))


def power_llc(store: Path, k: int, noise_level: float = 1.0) -> tuple[float, float]:
    """LLC of one copy of w^(2k) over the exact value, and its standard error.

    Draws lie 500 steps apart, several relaxation times; the error allows for the half again that
    is left of the correlation.
    """
    copies, draws, chains = 20_000, 20, 2
    lr, nbeta = {1: (2e-4, 40.0), 2: (1e-3, 10.0), 3: (1.5e-3, 10.0)}[k]
    config = ds.RunConfig(
        sampler=ds.SamplerConfig(lr=lr, nbeta=nbeta, noise_level=noise_level),
        chains=chains,
        draws=draws,
        burn_in=6,
        thin=500,
        batch_size=1,
        probe=8,
        device="cpu",
    )
    run = ds.sample(
        Weights(copies), DATA, Power(k), config, store=store, pool=ds.SerialPool(), quiet=True
    )
    exact = 1 / (2 * k)
    if k == 1:  # of the discretised chain: kappa = 2 nbeta
        exact /= 1 - lr * 2 * nbeta / 4
    error = 1.5 * math.sqrt(2 * k / (copies * draws * chains))
    return run.llc("ignore").mean / copies / exact, error


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_llc_of_an_even_power_is_one_over_twice_its_half(tmp_path: Path, k: int) -> None:
    ratio, error = power_llc(tmp_path / "run", k)
    assert_mean(ratio, 1.0, error)


@pytest.mark.filterwarnings("ignore:noise_level")
@pytest.mark.parametrize("k", [1, 2, 3])
def test_three_percent_more_noise_is_seen(tmp_path: Path, k: int) -> None:
    ratio, error = power_llc(tmp_path / "run", k, noise_level=1.03)
    with pytest.raises(AssertionError):
        assert_mean(ratio, 1.0, error)


def exact_product(t: float, gamma: float) -> tuple[float, float]:
    """Mean and variance of ``t (w1 w2)^2`` under ``exp(-t (w1 w2)^2 - gamma/2 |w|^2)``.

    Given w1, w2 is Gaussian of precision gamma + 2 t w1^2: one integral over w1 is left.
    """
    w1 = np.linspace(-8, 8, 400_001) / math.sqrt(gamma)
    precision = gamma + 2 * t * w1**2
    density = np.exp(-gamma / 2 * w1**2) / np.sqrt(precision)
    mean = t * w1**2 / precision
    total = density.sum()
    first, second = (density * mean).sum() / total, (density * 3 * mean**2).sum() / total
    return float(first), float(second - first**2)


def test_the_quadrature_is_right() -> None:
    assert exact_product(579, 1.0)[0] == pytest.approx(0.3833, abs=1e-4)
    assert exact_product(1e4, 1.0)[0] == pytest.approx(0.4123, abs=1e-4)


@pytest.mark.ray
def test_the_llc_of_a_product_is_that_of_quadrature(ray_cluster: None, tmp_path: Path) -> None:
    """``y = w1 w2 x`` at t = 579, gamma = 1, within 2 %.

    Half of that is Euler's bias at this step: at 1e-4 it is 1.8 %, at 3e-4 5 %.
    """
    copies, t = 20_000, 579.0
    config = ds.RunConfig(
        sampler=ds.SamplerConfig(lr=5e-5, nbeta=t, localization=1.0),
        chains=2,
        draws=40,
        burn_in=30,
        thin=1000,
        batch_size=1,
        probe=8,
        device="cpu",
    )
    run = ds.sample(Weights(2, copies), DATA, product, config, store=tmp_path / "run", quiet=True)
    estimate = run.llc("ignore")
    exact, _ = exact_product(t, 1.0)
    assert estimate.mean / copies == pytest.approx(exact, rel=0.02)
    assert abs(1.1 * estimate.mean / copies / exact - 1) > 0.02  # nbeta times 1.1 would be seen
