"""What the samplers' bench measures is what it says: memory, and steps without noise."""

import pytest
import torch

from scripts.benchmarks import samplers

pytestmark = pytest.mark.filterwarnings("ignore:freeze_after")


STATE = {
    "sgld": 1,
    "lmsgld": 2,
    "rmsprop_sgld": 3,
    "rmsprop_sgld from 1": 3,
    "adam_sgld": 4,
    "sghmc": 2,
    "sgnht": 2,
    "sgnht badodab": 2,
    "mala": 1,
}


@pytest.mark.parametrize("name", STATE)
def test_state_in_units_of_the_parameters(name: str) -> None:
    """w*, momentum or last noise, squares and what follows from them; nothing of that size else."""
    params = list(samplers.mlp().parameters())
    sampler = samplers.make(name, params)
    for p in params:
        p.grad = torch.zeros_like(p)
    sampler.step(lambda: torch.zeros(()))
    assert samplers.memory(sampler) == pytest.approx(STATE[name], abs=1e-3)


def test_every_sampler_is_timed() -> None:
    assert {name.split()[0] for name in samplers.TIMED} == set(samplers.SAMPLERS)


def test_a_silent_step_moves_and_draws_nothing() -> None:
    w = torch.nn.Parameter(torch.zeros(5))
    w.grad = torch.ones(5)
    sampler = samplers.SGLD([w], lr=0.1, nbeta=10.0)
    sampler._current_layouts()[0].chunks[0].flat.zero_()
    before = sampler.generator.get_state()
    samplers.silent_step(sampler)()
    assert torch.equal(sampler.generator.get_state(), before)
    torch.testing.assert_close(w.detach(), torch.full((5,), -0.5))


def test_ratios_are_taken_within_a_round() -> None:
    race = samplers.Race({"a": lambda: None, "b": lambda: None}, calls=1)
    race.seconds = {"a": [1.0, 30.0, 3.0], "b": [2.0, 60.0, 1.0]}
    assert race.ratio("a", "b") == 0.5
    assert race.microseconds("b", less="a") == 1e6


@pytest.mark.slow
def test_sgld_on_50_million_parameters_takes_one_copy_and_64_megabytes() -> None:
    megabytes = samplers.memory_of_a_large_model()
    assert megabytes["parameters"] > 200
    assert megabytes["parameters"] * 0.99 < megabytes["extra"] < megabytes["parameters"] + 64
