"""Drift, outliers and the end of burn-in, on AR(1) traces whose truth is known. No torch."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from distsampler.analysis import drift

RHO = 0.7


def autoregressive(runs: int, chains: int, draws: int, seed: int = 0) -> NDArray[np.float64]:
    """Stationary AR(1) chains of mean 0 and variance 1: (run, chain, draw)."""
    rng = np.random.default_rng(seed)
    x = np.empty((runs, chains, draws))
    x[..., 0] = rng.standard_normal((runs, chains))
    for t in range(1, draws):
        noise = rng.standard_normal((runs, chains))
        x[..., t] = RHO * x[..., t - 1] + math.sqrt(1 - RHO**2) * noise
    return x


def slope_error(chains: int, draws: int) -> float:
    """Standard error of a change over a trace, from the AR(1) law."""
    ess = chains * draws * (1 - RHO) / (1 + RHO)
    return math.sqrt(12 / ess)


@pytest.mark.parametrize(
    ("tests", "dof", "quantile"),
    [(1, 1e9, 2.5758), (1, 15, 2.9467), (10, 30, 3.6460), (10, 60, 3.4602)],
)
def test_the_critical_value_is_students(tests: int, dof: float, quantile: float) -> None:
    assert drift.critical(tests, dof) == pytest.approx(quantile, rel=2e-3)


@pytest.mark.parametrize("square", [False, True])
def test_stationary_chains_are_said_to_drift_in_one_of_a_hundred_cases(square: bool) -> None:
    runs = 1500
    x = autoregressive(runs, 4, 400)
    found = [drift.drift(run**2 if square else run, tests=1) for run in x]
    rate = np.mean([each.significant for each in found])
    assert rate < 0.01 + 5 * math.sqrt(0.01 * 0.99 / runs)
    z = np.array([each.size / each.error for each in found])
    assert 0.85 < z.std() < 1.15  # neither blind nor nervous


@pytest.mark.parametrize("way", [1.0, -1.0])
def test_a_drift_is_found_with_its_size_and_direction(way: float) -> None:
    runs, chains, draws = 200, 4, 400
    error = slope_error(chains, draws)
    moved = way * 6 * error * (np.arange(draws) / draws)
    found = [drift.drift(run + moved, tests=9) for run in autoregressive(runs, chains, draws)]
    assert np.mean([each.significant for each in found]) > 0.95
    sizes = np.array([each.size for each in found])
    assert abs(sizes.mean() - way * 6 * error) < 5 * error / math.sqrt(runs)
    small = [drift.drift(run + moved / 6, tests=9) for run in autoregressive(runs, chains, draws)]
    assert np.mean([each.significant for each in small]) < 0.2  # of the size of its error: not told


def test_a_chain_that_lies_apart_is_named_and_no_other() -> None:
    x = autoregressive(1, 6, 800)[0]
    error = math.sqrt((1 + RHO) / (1 - RHO) / 800)
    assert drift.outliers("a", x, range(6), tests=9 * 6) == []
    x[4] -= 15 * error
    (found,) = drift.outliers("a", x, (0, 1, 2, 3, 7, 9), tests=9 * 6)
    assert (found.chain, found.name) == (7, "a")
    assert found.z < -5


def test_healthy_chains_are_seldom_named() -> None:
    runs = 400
    named = [drift.outliers("a", x, range(4), tests=4) for x in autoregressive(runs, 4, 400)]
    assert np.mean([bool(each) for each in named]) < 0.01 + 5 * math.sqrt(0.01 / runs)


def test_burn_in_ends_where_a_known_transient_does() -> None:
    draws, tau, height = 3200, 100.0, 5.0
    transient = -height * np.exp(-np.arange(draws) / tau)
    ends, biases = [], []
    for series in autoregressive(12, 12, draws).reshape(12, 3, 4, draws):
        end = drift.settled([values + transient for values in series])
        ends.append(end)
        biases.append(transient[end:].mean())
    assert min(ends) > tau
    assert np.mean(ends) < 8 * tau
    error = math.sqrt((1 + RHO) / (1 - RHO) / (4 * draws))
    assert abs(np.mean(biases)) < error  # what is left of it lies within the Monte-Carlo error
    assert abs(transient.mean()) > 5 * error  # which it would not, had nothing been dropped


def test_without_a_transient_little_is_dropped_and_never_more_than_half() -> None:
    draws = 1280
    ends = [drift.settled(list(x)) for x in autoregressive(60, 4, draws).reshape(30, 2, 4, draws)]
    assert np.mean(ends) < 0.12 * draws
    ramp = np.broadcast_to(np.arange(float(draws)), (4, draws))
    assert drift.settled([ramp]) == draws // 2
    assert drift.settled([autoregressive(1, 4, draws)[0]], earliest=300) >= 300
    assert drift.settled([np.zeros((4, 40))]) == 20
    assert drift.settled([np.zeros((4, draws))]) == draws // 2


def test_what_is_read_of_a_constant_is_nothing() -> None:
    assert not drift.drift(np.ones((4, 100)), 9).significant
    assert drift.outliers("a", np.ones((4, 100)), range(4), 9) == []


@pytest.mark.parametrize("count", [2, 3, 4, 7, 64])
def test_medians_of_the_others_are_numpys_to_the_bit(count: int) -> None:
    rng = np.random.default_rng(count)
    for values in (rng.standard_normal(count), np.repeat(rng.standard_normal(1), count)):
        found = drift.medians_of_others(values)
        wanted = [np.median(np.delete(values, row)) for row in range(count)]
        assert found.tolist() == wanted
