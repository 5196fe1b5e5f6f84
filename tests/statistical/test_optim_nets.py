"""Every sampler against samplers without step size: block Gibbs on deep nets, MALA on a Gaussian.

No law is known for a discretised chain on a deep linear net, so the error is measured: 512
independent copies in one vector, started at draws of the posterior. The steps are so short that
Euler's bias stays below half a per cent. Noise that is 3 % too large is 6 % too much energy,
whatever the singularity; SGNHT's thermostat takes such noise out, and is given another nbeta.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from distsampler.optim import MALA, SAMPLERS, Sampler
from distsampler.truth.gibbs import BlockGibbs, DeepLinear, ReplicaMean, block_gibbs
from distsampler.truth.many_copies import sample_copies
from tests.assertions import assert_mean
from tests.targets import CorrelatedGaussian, parameter, run

pytestmark = [pytest.mark.statistical, pytest.mark.slow]

COPIES = 512
REGULAR = DeepLinear.of_rank((3, 3, 3), 3, t=100.0, localization=5.0)
SINGULAR = DeepLinear.of_rank((2, 2, 2, 2), 1, t=100.0, localization=5.0)


@dataclass(frozen=True)
class Case:
    """A sampler and its options."""

    name: str
    lr: float
    options: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.options.get("scheme", self.name))

    def make(self, params: list[torch.nn.Parameter], nbeta: float, gamma: float) -> Sampler:
        generator = torch.Generator().manual_seed(1)
        return SAMPLERS[self.name](
            params, self.lr, nbeta=nbeta, localization=gamma, generator=generator, **self.options
        )


ADAPTIVE = {"freeze_after": 500, "stability": 1.0}
CASES = [
    Case("sgld", 3e-5),
    Case("lmsgld", 2e-4),
    Case("rmsprop_sgld", 5e-5, ADAPTIVE),
    Case("adam_sgld", 2e-5, {"beta1": 0.5, **ADAPTIVE}),
    Case("sghmc", 3e-5, {"friction": 0.1}),
    Case("sgnht", 4e-5, {"diffusion_factor": 0.005}),
    Case("sgnht", 2e-4, {"diffusion_factor": 0.1, "scheme": "badodab"}),
]


@pytest.fixture(scope="module")
def truths() -> dict[str, tuple[ReplicaMean, list[Tensor]]]:
    """Of each net by its widths: t E[K], and draws to start from."""
    found = {}
    for net in (REGULAR, SINGULAR):
        chains = BlockGibbs(net, COPIES, torch.Generator().manual_seed(0))
        chains.run(200)
        start = [w.float() for w in chains.weights]
        found[str(net.widths)] = block_gibbs(net, replicas=200, sweeps=400, seed=3), start
    return found


def against_gibbs(
    case: Case,
    net: DeepLinear,
    truths: dict[str, tuple[ReplicaMean, list[Tensor]]],
    nbeta: float = 1.0,
) -> None:
    """Assert that the sampler's t E[K] is that of Gibbs; ``nbeta`` is a factor on its own."""
    exact, start = truths[str(net.widths)]
    got = sample_copies(
        net,
        lambda weights: case.make(weights, nbeta * net.t, net.localization),
        start,
        steps=2_500,
        burn_in=600,
    )
    error = math.hypot(float(got.se), float(exact.se))
    assert error < 0.015 * exact.mean
    assert_mean(float(got.mean), float(exact.mean), error)


def spoil(case: Case, monkeypatch: pytest.MonkeyPatch) -> float:
    """Three per cent more noise; or, what a thermostat cannot take out, a factor on nbeta."""
    if case.name == "sgnht":
        return 1.1
    sampler, draw = SAMPLERS[case.name], SAMPLERS[case.name]._draw
    monkeypatch.setattr(sampler, "_draw", lambda self, at, std: draw(self, at, 1.03 * std))
    return 1.0


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "net", [REGULAR, pytest.param(SINGULAR, marks=pytest.mark.slow)], ids=["two", "three"]
)
def test_a_deep_linear_net_has_the_energy_of_block_gibbs(
    case: Case, net: DeepLinear, truths: dict[str, tuple[ReplicaMean, list[Tensor]]]
) -> None:
    against_gibbs(case, net, truths)


SHORT = (CASES[0], CASES[1], CASES[-1])
CONTROLS = [
    pytest.param(case, marks=() if case in SHORT else pytest.mark.slow, id=str(case))
    for case in CASES
]


@pytest.mark.parametrize("case", CONTROLS)
def test_a_sampler_that_is_wrong_by_a_little_is_refused(
    case: Case,
    truths: dict[str, tuple[ReplicaMean, list[Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factor = spoil(case, monkeypatch)
    with pytest.raises(AssertionError, match="standard errors off"):
        against_gibbs(case, REGULAR, truths, factor)


GAUSSIAN = CorrelatedGaussian.make(50, condition=10.0)
NBETA = 2.0
ON_GAUSSIAN = [
    Case("sgld", 0.02),
    Case("lmsgld", 0.5),
    Case("rmsprop_sgld", 0.02, ADAPTIVE),
    Case("adam_sgld", 0.01, {"beta1": 0.5, **ADAPTIVE}),
    Case("sghmc", 0.02, {"friction": 0.2}),
    Case("sgnht", 0.02, {"diffusion_factor": 0.01}),
    Case("sgnht", 0.2, {"diffusion_factor": 0.1, "scheme": "badodab"}),
]


@pytest.fixture(scope="module")
def mala() -> ReplicaMean:
    """E[nbeta L] in 50 correlated dimensions, from 16 chains that accept or refuse."""
    means = []
    for seed in range(16):
        w = parameter(50, dtype=torch.float64)
        chain = MALA([w], 0.35, nbeta=NBETA, generator=torch.Generator().manual_seed(seed))

        def closure(w: torch.nn.Parameter = w) -> Tensor:
            w.grad = GAUSSIAN.gradient(w.detach())
            return GAUSSIAN.loss(w.detach())

        energies = [NBETA * float(chain.step(closure)) for _ in range(1_000)]
        means.append(sum(energies[200:]) / 800)
    return ReplicaMean.over(torch.tensor(means, dtype=torch.float64))


def against_mala(case: Case, mala: ReplicaMean, nbeta: float = 1.0) -> None:
    """Assert that 2,000 chains have the energy of MALA at their last point."""
    w = parameter(2_000, 50)
    run(case.make([w], nbeta * NBETA, 0.0), w, GAUSSIAN.gradient, 2_000)
    at = w.detach().double()
    got = ReplicaMean.over(NBETA * (at * GAUSSIAN.gradient(at)).sum(1) / 2)
    error = math.hypot(float(got.se), float(mala.se))
    assert error < 0.012 * float(mala.mean)
    assert_mean(float(got.mean), float(mala.mean), error)


@pytest.mark.parametrize("case", ON_GAUSSIAN, ids=str)
def test_a_correlated_gaussian_has_the_energy_of_mala(case: Case, mala: ReplicaMean) -> None:
    against_mala(case, mala)


@pytest.mark.parametrize("case", ON_GAUSSIAN, ids=str)
def test_and_not_if_the_sampler_is_wrong_by_a_little(
    case: Case, mala: ReplicaMean, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = spoil(case, monkeypatch)
    with pytest.raises(AssertionError, match="standard errors off"):
        against_mala(case, mala, factor)


def test_mala_itself_is_right(mala: ReplicaMean) -> None:
    assert float(mala.se) < 0.011 * 25
    assert_mean(float(mala.mean), 25.0, float(mala.se))
