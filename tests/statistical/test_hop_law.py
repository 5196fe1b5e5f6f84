"""Hopping leaves the law of replicated data; staying on a shard, or no correction, does not.

16 chains, the standard error from their spread.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.chains import hop
from distsampler.truth import networks

pytestmark = pytest.mark.statistical

CHAINS, SHARDS, SIZE, EACH, BATCH = 16, 8, 50, 64, 16
LR, NBETA, GAMMA = 1e-3, 100.0, 20.0
NEVER = 10**9


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(SIZE))


def bowl(model: Vector, batch: Any) -> Tensor:
    """``1/2 |w - x|^2``: every example pulls to a place of its own."""
    (x,) = batch
    return (model.w - x).square().sum(1) / 2


def bowls(apart: float) -> list[tuple[Tensor]]:
    """Shards of one size whose means lie apart; w* = 0 is the mean of all."""
    generator = torch.Generator().manual_seed(1)
    centres = apart * torch.randn(SHARDS, 1, SIZE, generator=generator)
    x = centres + torch.randn(SHARDS, EACH, SIZE, generator=generator)
    return [(shard,) for shard in x - x.mean((0, 1))]


def law(shards: list[tuple[Tensor]]) -> float:
    """The LLC of SGLD whose batches come from one shard: their noise is that within shards."""
    kappa = NBETA + GAMMA
    v = np.mean([float(shard.var(0, unbiased=False).mean()) for (shard,) in shards])
    heat = LR * NBETA**2 * v / (4 * BATCH)
    return SIZE / 2 * NBETA / kappa * (1 + heat) / (1 - LR * kappa / 4)


def z_of(model: nn.Module, data: object, loss: Any, exact: float, **fields: Any) -> float:
    """How many standard errors the LLC of 16 chains is off."""
    sampler = {"name": "sgld", "lr": LR, "nbeta": NBETA, "localization": GAMMA}
    fields = {
        "sampler": ds.SamplerConfig(**{**sampler, **fields.pop("sampler", {})}),
        "chains": CHAINS, "burn_in": 20, "draws": 60, "thin": 40, "batch_size": BATCH,
        "watch": True, "device": "cpu", "divergence_factor": None, "data_mode": "hop", **fields,
    }  # fmt: skip
    run = ds.sample(model, data, loss, ds.RunConfig(**fields), pool=ds.SerialPool(), quiet=True)
    each = np.array(run.llc("ignore").per_chain)
    return float((each.mean() - exact) / (each.std(ddof=1) / math.sqrt(len(each))))


def test_shards_whose_gradients_differ_give_the_llc_of_all_data() -> None:
    shards = bowls(apart=0.5)
    assert abs(z_of(Vector(), shards, bowl, law(shards), hop_every=10)) < 5


def test_it_would_not_without_the_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hop, "gradient", lambda *_: np.zeros(SIZE, np.float32))
    shards = bowls(apart=0.5)
    assert abs(z_of(Vector(), shards, bowl, law(shards), hop_every=10)) > 10


@pytest.mark.parametrize("corrected", [True, False])
def test_chains_that_stay_need_the_correction_even_on_shards_dealt_at_random(
    monkeypatch: pytest.MonkeyPatch, corrected: bool
) -> None:
    if not corrected:
        monkeypatch.setattr(hop, "gradient", lambda *_: np.zeros(SIZE, np.float32))
    x = torch.cat([shard for (shard,) in bowls(apart=0.0)])
    z = z_of(Vector(), (x,), bowl, law([(x,)]), shards=SHARDS, hop_every=NEVER)
    assert abs(z) < 5 if corrected else abs(z) > 10


@pytest.mark.parametrize("shards", [4, 16])
def test_a_singular_net_on_dealt_shards_has_the_llc_that_gibbs_gives(shards: int) -> None:
    net = networks.unit_network((2, 2, 2, 2), 1, localization=20.0, copies=5)
    z = z_of(
        net.model, net.data, net.loss, net.copies * net.exact.mean,
        shards=shards, hop_every=50, batch_size=64,
        sampler={
            "name": "lmsgld", "lr": 3e-5, "nbeta": net.nbeta, "localization": net.localization,
        },
        burn_in=60, draws=60,
    )  # fmt: skip
    assert abs(z) < 5
