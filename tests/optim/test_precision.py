"""Steps far below the spacing of floating-point numbers still count."""

import math

import pytest
import torch
from torch import Tensor

from distsampler.optim import SAMPLERS, SGLD
from tests.assertions import assert_mean

N, LR, STEPS, AWAY = 100_000, 5e-7, 300, 0.01


def start() -> Tensor:
    return 1 + torch.rand(N, generator=torch.Generator().manual_seed(1))


def mean_pull(localization: float) -> float:
    """How far a chain at the published step size went because of the pull: the noise is shared."""
    finals = []
    for gamma in (0.0, localization):
        p = torch.nn.Parameter(start())
        group = {"params": [p], "anchors": [start() - AWAY]}
        source = torch.Generator().manual_seed(0)
        sampler = SGLD([group], LR, nbeta=2.0, localization=gamma, generator=source)
        for _ in range(STEPS):
            sampler.step()
        finals.append(p.detach().double())
    return float((finals[1] - finals[0]).mean())


def naive_pull(localization: float) -> float:
    """The same with the pull added to w by itself."""
    finals = []
    for gamma in (0.0, localization):
        w, anchor = start(), start() - AWAY
        source = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            pull = (w - anchor).mul_(-LR / 2 * gamma)
            w.add_(torch.randn(N, generator=source), alpha=math.sqrt(LR)).add_(pull)
        finals.append(w.double())
    return float((finals[1] - finals[0]).mean())


def test_a_pull_below_the_last_bit_of_w_arrives_because_the_noise_dithers_it() -> None:
    """At w = 1 to 2 a float32 has steps of 1.2e-7; the pull is 2.5e-9 a step.

    Each of 2 STEPS roundings has a standard deviation of 1.2e-7 / sqrt(12).
    """
    expected = -STEPS * LR / 2 * AWAY
    error = 2**-23 / math.sqrt(12) * math.sqrt(2 * STEPS) / math.sqrt(N)
    assert error < 0.01 * abs(expected)
    assert_mean(mean_pull(1.0), expected, error)
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_mean(naive_pull(1.0), expected, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fp32_master_moves_where_a_naive_half_precision_chain_stalls(
    dtype: torch.dtype,
) -> None:
    steps, lr = 100, 1e-8
    p = torch.nn.Parameter(torch.full((N,), 1.5, dtype=dtype))
    naive = p.detach().clone()
    source = torch.Generator().manual_seed(0)
    sampler = SGLD([p], lr, nbeta=2.0, generator=source)
    for _ in range(steps):
        p.grad = torch.zeros_like(p)
        sampler.step()
        naive.add_(torch.randn(N, generator=source).to(dtype), alpha=math.sqrt(lr))
    master = sampler.state[p]["master"]
    travelled = float((master - 1.5).double().square().mean())
    assert_mean(travelled, steps * lr, steps * lr * math.sqrt(2 / N))
    assert master.dtype == torch.float32
    assert torch.equal(p, master.to(dtype))
    assert float((naive != 1.5).double().mean()) < 1e-3


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "mala"])
def test_state_of_half_precision_parameters_is_fp32(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    frozen = {"freeze_after": 2} if name in ("rmsprop_sgld", "adam_sgld") else {}
    sampler = SAMPLERS[name]([p], nbeta=2.0, localization=1.0, **frozen)
    p.grad = torch.ones_like(p)
    sampler.step()
    saved = sampler.state_dict()
    sampler.load_state_dict(saved)
    for state in (saved["state"][0], sampler.state[p]):
        kinds = {key: value.dtype for key, value in state.items() if key != "thermostat"}
        assert set(kinds.values()) == {torch.float32}, kinds


def test_float64_parameters_are_sampled_in_float64() -> None:
    p = torch.nn.Parameter(torch.zeros(10_000, dtype=torch.float64))
    sampler = SGLD([p], lr=1.0, nbeta=2.0)
    sampler.step()
    assert (p.detach() != p.detach().float().double()).any()


def test_a_state_saved_without_masters_takes_them_from_the_parameters() -> None:
    p = torch.nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    sampler = SGLD([p], nbeta=2.0)
    saved = sampler.state_dict()
    del saved["state"][0]["master"]
    p.data.fill_(3.0)
    sampler.load_state_dict(saved)
    assert (sampler.state[p]["master"] == 3.0).all()
