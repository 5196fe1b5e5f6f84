"""The error budget: its parts, and how often its interval holds the truth."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray

from distsampler.analysis.diagnosis import diagnose
from distsampler.analysis.error_budget import ErrorBudget, budget
from distsampler.curvature.hessian import Ritz
from distsampler.curvature.watch import Step, predict
from distsampler.facts import Posterior
from distsampler.optim import SGLD

PLAIN = ErrorBudget(0.1, 0.1, None, None, 0.0, 0.0, 0.0)


def posterior(excess: NDArray[np.float64]) -> xr.Dataset:
    both = {name: (("chain", "draw"), excess) for name in ("excess_loss", "probe_loss")}
    return xr.Dataset(both, coords={"chain": np.arange(len(excess))})


def stats(like: NDArray[np.float64], **values: float | NDArray[np.float64]) -> xr.Dataset:
    held = {k: (("chain", "draw"), np.zeros_like(like) + v) for k, v in values.items()}
    return xr.Dataset(held)


def test_without_a_bias_the_interval_is_the_normal_one() -> None:
    low, high = replace(PLAIN, llc=3.0).interval
    assert (low, high) == pytest.approx((3 - 1.96 * 0.1, 3 + 1.96 * 0.1), abs=1e-5)


@pytest.mark.parametrize("bias", [-0.5, -0.02, 0.1, 0.3])
def test_the_interval_covers_with_a_bias_as_predicted_and_without_one(bias: float) -> None:
    parts = replace(PLAIN, discretisation=0.4 * bias, heat=0.6 * bias, llc=0.0)
    (low, high), law = parts.interval, NormalDist(0, 0.1)
    assert low < 0 < high
    for true_bias in (bias, 0.0):
        # The estimate is truth + bias + error: it is covered if low < -(bias + error) < high.
        covered = law.cdf(-low - true_bias) - law.cdf(-high - true_bias)
        assert covered == pytest.approx(0.95, abs=1e-6)
    half = law.cdf(-low - bias / 2) - law.cdf(-high - bias / 2)
    assert half > 0.95


def test_the_error_of_a_prediction_widens_the_interval() -> None:
    sure = replace(PLAIN, discretisation=0.2, llc=1.0)
    narrow, wide = (parts.interval for parts in (sure, replace(sure, bias_se=0.3)))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_its_parts_are_those_of_the_run() -> None:
    rng = np.random.default_rng(0)
    shift = np.array([[0.0], [0.1], [0.2], [0.3]])
    excess = 1 + shift + 0.1 * rng.standard_normal((4, 400))
    excess[:, 200:] += 0.5
    told = stats(excess, discretisation_bias=2.0 + 10 * shift, heat_bias=1.0)
    parts = budget(posterior(excess), 10.0, diagnose(posterior(excess)), told)
    assert parts.between == pytest.approx(10 * shift.std(ddof=1) / 2, rel=0.1)
    assert parts.within == pytest.approx(10 * diagnose(posterior(excess)).rows[0].mcse)
    assert parts.se == max(parts.within, parts.between)
    assert (parts.discretisation, parts.heat) == pytest.approx((3.5, 1.0))
    assert parts.bias_se == pytest.approx(10 * shift.std(ddof=1) / 2)
    assert parts.drift == pytest.approx(5.0, abs=5 * parts.drift_se)
    assert parts.drift_se < 0.2
    assert not parts.unpredicted


def test_what_was_not_measured_is_named() -> None:
    excess = np.random.default_rng(0).standard_normal((2, 100))
    parts = budget(posterior(excess), 1.0, diagnose(posterior(excess)))
    assert parts.discretisation is None
    assert parts.bias == 0
    assert "nothing was measured" in parts.unpredicted["heat_bias"]
    assert parts.as_dict()["heat"] is None
    one = budget(posterior(excess[:1]), 1.0, diagnose(posterior(excess[:1])))
    assert math.isnan(one.between)
    assert one.se == one.within


def sampled(step: Step, h: NDArray[np.float64], v: float, runs: int) -> NDArray[np.float64]:
    """Nbeta times the excess loss of SGLD, (runs, chains, draws), from its stationary law on."""
    rng, kappa = np.random.default_rng(1), step.posterior.kappa(h)
    scale = math.sqrt(step.lr * (1 + step.heat * v))
    w = rng.standard_normal((runs, 4, len(h)))
    w *= np.sqrt((1 + step.heat * v) / (kappa * (1 - step.lr * kappa / 4)))
    found = np.empty((runs, 4, 150))
    for draw in range(150):
        for _ in range(3):
            w *= 1 - step.lr * kappa / 2
            w += scale * rng.standard_normal(w.shape)
        found[..., draw] = step.posterior.nbeta / 2 * (w**2 @ h)
    return found


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize(("share", "v"), [(0.3, 1.0), (0.3, 0.0), (1.0, 1.0)])
def test_the_interval_holds_the_truth_in_95_of_100_runs(share: float, v: float) -> None:
    """400 runs on a quadratic with gradient noise, each predicting its bias from four walks."""
    h = np.linspace(0.5, 2, 10)
    step = Step(SGLD.law({}), share / (100 * 2 + 10), Posterior(100.0, 10.0), 32)
    exact = float((100 * h / (100 * h + 10)).sum() / 2)
    rng, covered, naive = np.random.default_rng(2), 0, 0
    for excess in sampled(step, h, v, 400):
        walks = [Ritz(h, np.ones(10), v * rng.normal(1, 0.3, 10), 0 * h) for _ in range(4)]
        biases = np.array([predict(step, ritz) for ritz in walks])
        told = stats(excess, discretisation_bias=biases[:, :1], heat_bias=biases[:, 1:])
        run, diagnosis = posterior(excess), diagnose(posterior(excess))
        for name, given in (("full", told), ("naive", None)):
            low, high = budget(run, 1.0, diagnosis, given).interval
            covered += name == "full" and low < exact < high
            naive += name == "naive" and low < exact < high
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.9
