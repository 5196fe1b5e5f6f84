"""SGLD against the exact law of the discretised chain."""

import pytest
import torch

from distsampler.optim import SGLD
from tests.assertions import assert_variance
from tests.targets import Quadratic, parameter, run

COORDINATES, LR, NBETA, GAMMA = 100_000, 0.05, 10.0, 2.0
TARGET = Quadratic(torch.linspace(0.3, 2.0, COORDINATES))


def final(**options: float) -> torch.Tensor:
    w = parameter(COORDINATES)
    chosen = {"lr": LR, "nbeta": NBETA, "localization": GAMMA, **options}
    run(SGLD([w], generator=torch.Generator().manual_seed(0), **chosen), w, TARGET.gradient, 150)
    return w.detach()


@pytest.mark.statistical
def test_stationary_variance_is_that_of_the_discretised_chain() -> None:
    assert_variance(final(), TARGET.sgld_variance(LR, NBETA, GAMMA))


@pytest.mark.statistical
@pytest.mark.filterwarnings("ignore:noise_level")
@pytest.mark.parametrize("wrong", [{"noise_level": 1.03}, {"noise_level": 2**0.5}, {"nbeta": 11.0}])
def test_a_wrong_sampler_fails_the_same_assertion(wrong: dict[str, float]) -> None:
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_variance(final(**wrong), TARGET.sgld_variance(LR, NBETA, GAMMA))
