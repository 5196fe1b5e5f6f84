"""One number for all that a run has drawn."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

import distsampler as ds
from distsampler.analysis.inference_data import datasets


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
