"""One number for all that a run has drawn."""

import hashlib

import numpy as np

import distsampler as ds
from distsampler.arrays import WARMUP


def digest(run: ds.Run) -> str:
    """Of every committed value of every chain, warm-up included, and of the estimate."""
    state = hashlib.blake2b(digest_size=16)
    for variable in run.manifest.variables:
        for prefix in ("", WARMUP):
            values = run._trace.read(prefix + variable.group, variable.name)
            if not prefix:
                values = values[:, : run._trace.kept]
            assert not np.isnan(values).any()
            state.update(np.ascontiguousarray(values).tobytes())
    state.update(repr(run.llc("ignore").mean).encode())
    return state.hexdigest()
