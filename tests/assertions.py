"""Assertions that know their standard error, and assertions and digests of equal bits."""

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import distsampler as ds
from distsampler.analysis.inference_data import datasets
from distsampler.draws import DrawBlock

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


def assert_same_blocks(one: DrawBlock, *others: DrawBlock) -> None:
    """A block equals the others put together, bit for bit, state included."""
    for name, values in one.values.items():
        joined = np.concatenate([other.values[name] for other in others])
        assert np.array_equal(values, joined), name
    assert one.state == others[-1].state


def _add(state: "hashlib._Hash", name: str, given: NDArray[Any]) -> None:
    values = np.ascontiguousarray(given)
    state.update(f"{name} {values.dtype} {values.shape}".encode())
    state.update(values.tobytes())


def digest(run: ds.Run) -> str:
    """Of every value that a run gives: of which the LLC is made, warm-up and what is wide too."""
    state = hashlib.blake2b(digest_size=16)
    for group, dataset in datasets(run._trace).items():  # which refuses what is damaged
        for name in sorted(dataset.data_vars):
            _add(state, f"{group}/{name}", dataset[name].values)
    for name, array in run.wide.items():
        _add(state, name, array.values)
    return state.hexdigest()
