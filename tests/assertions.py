"""Assertions that know their standard error, and assertions of equal bits."""

import math

import numpy as np
from torch import Tensor

import distsampler as ds

SIGMAS = 5.0


def assert_mean(got: float, expected: float, standard_error: float) -> None:
    """A mean of known standard error lies within five of them."""
    z = (got - expected) / standard_error
    assert abs(z) <= SIGMAS, f"{got:.6g} for {expected:.6g} is {z:+.1f} standard errors off"


def assert_variance(values: Tensor, expected: Tensor | float) -> None:
    """Independent Gaussian values of mean zero have the expected variance.

    ``values / sqrt(expected)`` squared is chi-square: mean 1, standard error sqrt(2 / count).
    """
    ratio = (values.double().square() / expected).mean()
    assert_mean(float(ratio), 1.0, math.sqrt(2 / values.numel()))


def assert_same(one: ds.Run, other: ds.Run) -> None:
    """Two runs hold the same draws, bit for bit, warm-up included."""
    for group in ("warmup_posterior", "warmup_sample_stats", "posterior", "sample_stats"):
        for variable in one.manifest.variables:
            if group.endswith(variable.group):
                a, b = (run._trace.read(group, variable.name) for run in (one, other))
                assert a.size
                assert np.array_equal(a, b), (group, variable.name)
