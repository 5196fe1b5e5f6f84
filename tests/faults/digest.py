"""One number for all that a run has drawn."""

import hashlib

import numpy as np

import distsampler as ds
from distsampler.inference_data import datasets


def digest(run: ds.Run) -> str:
    """Of every value that a run gives: of which the LLC is made, warm-up included."""
    state = hashlib.blake2b(digest_size=16)
    for group, dataset in datasets(run._trace).items():  # which refuses what is damaged
        for name in sorted(dataset.data_vars):
            values = np.ascontiguousarray(dataset[name].values)
            state.update(f"{group}/{name} {values.dtype} {values.shape}".encode())
            state.update(values.tobytes())
    return state.hexdigest()
