"""Draws that no sampler made, and stores of them as a driver writes them: without torch and Ray."""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import distsampler as ds
from distsampler.draws import AtAnchor, DrawBlock, Variable
from distsampler.facts import Facts, Posterior
from distsampler.store.manifest import Manifest
from distsampler.store.trace import Trace

VARIABLES = (
    Variable("loss", "posterior", "loss"),
    Variable("excess_loss", "posterior", "excess loss"),
    Variable("probe_loss", "posterior", "probe loss"),
    Variable("projections", "posterior", "projections", ("projection",), (2,)),
    Variable("distance", "posterior", "distance"),
    Variable("step", "sample_stats", "step", dtype="int64"),
)
N = 1000
NBETA = N / math.log(N)
COUNTED = (
    Variable("probe_loss", "posterior", "loss"),
    Variable("projections", "posterior", "projections", ("projection",), (3,)),
    Variable("step", "sample_stats", "step", dtype="int64"),
)


def autoregressive(chains: int, draws: int, rho: float, seed: int = 0) -> NDArray[np.float64]:
    """Stationary AR(1) chains of mean 0 and variance 1."""
    rng = np.random.default_rng(seed)
    x = np.empty((chains, draws))
    x[:, 0] = rng.standard_normal(chains)
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * rng.standard_normal(chains)
    return x


def make_run(slow: NDArray[np.float64], noise: float = 0.0, burn_in: int = 20) -> ds.Run:
    """A finished run whose probe loss is slow, and whose minibatch loss is noisy as well."""
    chains, total = slow.shape
    config = ds.RunConfig(chains=chains, min_chains=1, draws=total - burn_in, burn_in=burn_in)
    facts: dict[str, Any] = {"fingerprint": {}, "versions": {"zarr": "3"}}
    store = Path(tempfile.mkdtemp()) / "run"
    trace = Trace.create(
        store,
        Manifest(config=config, variables=VARIABLES, n_committed=(0,) * chains, **facts),
    )
    known = Facts(N, Posterior(NBETA, localization=5.0))
    trace.record_facts(known, AtAnchor(None, 0.5, 0.4, np.zeros(4)))
    rng = np.random.default_rng(1)
    for chain in range(chains):
        excess = 0.1 + 0.01 * slow[chain]
        noisy = excess + noise * rng.standard_normal(total)
        values = {
            "loss": 0.5 + noisy,
            "excess_loss": noisy,
            "probe_loss": 0.4 + excess,
            "projections": np.stack([excess, -excess], 1),
            "distance": np.abs(slow[chain]),
            "step": np.arange(total),
        }
        trace.commit([DrawBlock(chain, 0, values, b"state")])
    trace.seal("finished", "converged", total - burn_in, 1.0)
    return ds.open(store)


def counted(chain: int, first: int, draws: int) -> DrawBlock:
    """Values that say where they belong."""
    at = 1000.0 * chain + np.arange(first, first + draws)
    values = {
        "probe_loss": at,
        "projections": at[:, None] + [0.1, 0.2, 0.3],
        "step": at.astype(int),
    }
    return DrawBlock(chain, first, values, f"state {chain} {first + draws}".encode())


def rising(chain: int, first: int, draws: int) -> DrawBlock:
    at = np.arange(first, first + draws, dtype=float)
    values = {"loss": at, "excess_loss": 0.1 + 0 * at, "probe_loss": np.sin(chain + at)}
    return DrawBlock(chain, first, values, b"")
