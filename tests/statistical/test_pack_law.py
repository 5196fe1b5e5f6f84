"""The law of chains that advance together is that of chains alone, and is told from a wrong one.

A vector of 20,000 coordinates of curvature 1 is as many copies, so that the standard error is known
as in ``test_road``.
"""

import math
from pathlib import Path
from typing import Any

import pytest

import distsampler as ds
from tests.targets import DATA, Power, Weights

pytestmark = pytest.mark.statistical

COPIES, DRAWS, CHAINS, NBETA = 20_000, 10, 4, 40.0
LR = {"sgld": 2e-4, "lmsgld": 2e-3, "sgnht": 2e-4}
EXACT = {  # of the discretised chain: curvature kappa = 2 nbeta
    "sgld": 1 / (1 - LR["sgld"] * 2 * NBETA / 4),
    "lmsgld": 1.0,
    "sgnht": 1 - 0.01 / 2,  # A, to first order
}


def z(store: Path, name: str, **options: Any) -> float:
    """Standard errors between the LLC of a copy, times two, and the exact value."""
    config = ds.RunConfig(
        sampler=ds.SamplerConfig(name=name, lr=LR[name], nbeta=NBETA, **options),
        chains=CHAINS,
        pack=CHAINS,
        draws=DRAWS,
        burn_in=4,
        thin=400,
        batch_size=1,
        probe=8,
        device="cpu",
        watch=False,
    )
    run = ds.sample(
        Weights(COPIES), DATA, Power(1), config, store=store, pool=ds.SerialPool(), quiet=True
    )
    assert run.manifest.config.pack == CHAINS
    error = 1.5 * math.sqrt(2 / (COPIES * DRAWS * CHAINS))
    return (2 * run.llc("ignore").mean / COPIES / EXACT[name] - 1) / error


@pytest.mark.parametrize("name", LR)
def test_the_llc_of_packed_chains_is_exact(tmp_path: Path, name: str) -> None:
    assert abs(z(tmp_path / "run", name)) < 3


@pytest.mark.filterwarnings("ignore:noise_level")
def test_noise_times_one_and_three_hundredths_is_noticed(tmp_path: Path) -> None:
    assert abs(z(tmp_path / "run", "lmsgld", noise_level=1.03)) > 5
