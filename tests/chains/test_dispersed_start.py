"""Dispersed starts: where they are, and that the two kinds of chains come from two sides."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.chains.chain import Chain
from distsampler.chains.dispersed_start import DispersedStart, distance_at
from distsampler.errors import WorkFailedError
from distsampler.sampling.prepare import prepare
from tests.problems import anchored, config, mean_squared_error, regression, squared_error

D = 20_000
CURVATURE = torch.logspace(-4, 0, D)  # h: nbeta h lies between 0.01 and 100
NBETA, GAMMA = 100.0, 0.1
DATA = torch.zeros(64, 1)


class Weights(nn.Module):
    """A vector at zero, which is w*."""

    def __init__(self, size: int = D) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))


def quadratic(model: Weights, batch: Any) -> Tensor:
    """``L(w) = 1/2 sum h_i w_i^2``, for every example."""
    return (CURVATURE * model.w.square()).sum().div(2).expand(len(batch))


def chain(index: int = 1, loss: Any = quadratic, **fields: Any) -> Chain:
    spec = prepare(Weights(), DATA, loss, settings(**fields))
    return Chain(spec, index, anchored(spec))


def settings(lr: float = 0.004, gamma: float = GAMMA, **fields: Any) -> ds.RunConfig:
    sampler = ds.SamplerConfig(name="lmsgld", lr=lr, nbeta=NBETA, localization=gamma)
    return config(**{"sampler": sampler, "init": "dispersed", "thin": 1, "probe": 8, **fields})


def start(walker: Chain) -> Tensor:
    ground = (walker.spec, walker.replica, walker._anchors, walker._at_anchor, walker.index)
    (found,) = DispersedStart(*ground).weights()
    return found


@pytest.mark.parametrize("wanted", [1e-9, 3.0, 1e6])
def test_the_distance_is_where_the_loss_is_as_wanted(wanted: float) -> None:
    found = distance_at(lambda r: r**2 if r < 1e9 else math.nan, wanted, math.inf)
    assert found == pytest.approx(math.sqrt(wanted), rel=1e-5)
    assert distance_at(lambda r: r**2, wanted, math.sqrt(wanted) / 2) == math.sqrt(wanted) / 2
    assert distance_at(lambda r: wanted / 2, wanted, math.inf) is None
    assert distance_at(lambda r: math.nan if r > 2 else 0.0, wanted, math.inf) == (
        pytest.approx(2.0, rel=1e-5)
    )


def test_a_dispersed_chain_starts_above_any_posteriors_loss_in_flat_directions_too() -> None:
    w = start(chain()).double()
    energy = NBETA * CURVATURE.double() * w**2 / 2
    assert float(energy.sum()) == pytest.approx(D / 2, rel=1e-3)
    assert min(spread(w)) > 1.05  # in variances of the posterior: flat directions too


def test_an_isotropic_start_would_leave_the_flat_directions_behind() -> None:
    radius = math.sqrt(D / (NBETA * float(CURVATURE.mean())))  # nbeta times the excess is d/2
    assert min(spread(start(chain(init_radius=radius)))) < 0.1


def spread(w: Tensor) -> list[float]:
    """Squares over the posterior's variances, means of four groups from flat to steep."""
    squares = w.double() ** 2 * (NBETA * CURVATURE.double() + GAMMA)
    return [float(part.mean()) for part in squares.split(D // 4)]


def test_the_start_is_a_function_of_seed_and_chain() -> None:
    one = start(chain(1))
    assert torch.equal(one, start(chain(1)))
    assert not torch.equal(one, start(chain(3)))
    assert not torch.equal(one, start(chain(1, seed=1)))


def test_even_chains_start_at_the_anchor_and_odd_ones_where_they_are_told() -> None:
    for index in (0, 2):
        assert chain(index).advance(1).values["distance"].tolist() == [0.0]
    given = chain(1, init_radius=0.7)
    assert given.advance(1).values["distance"][0] == pytest.approx(0.7, rel=1e-5)
    assert chain(1, init="anchor").advance(1).values["distance"].tolist() == [0.0]


def test_localisation_caps_the_start() -> None:
    w = start(chain(gamma=1e5))
    assert float(w.norm()) == pytest.approx(math.sqrt(D / 1e5), rel=1e-5)


def test_where_no_distance_is_far_enough_it_is_said_what_to_give() -> None:
    def bounded(model: Weights, batch: Any) -> Tensor:
        return torch.tanh(model.w.square().sum()).expand(len(batch)) / 10

    walker = chain(loss=bounded, gamma=0.0)
    with pytest.raises(WorkFailedError, match="give init_radius"):
        walker.advance(1)
    assert chain(loss=bounded, gamma=0.0, init_radius=0.1).advance(1).draws == 1
    assert chain(loss=bounded, gamma=4.0).advance(1).draws == 1


def test_dead_weights_without_localisation_stay_at_a_finite_distance() -> None:
    def dead(model: Weights, batch: Any) -> Tensor:
        return model.w[: D // 2].square().sum().expand(len(batch))

    assert start(chain(loss=dead, gamma=0.0)).isfinite().all()


def test_masked_entries_stay_and_blocks_do_not_matter() -> None:
    model, data = regression()
    mask = torch.tensor([[True, False, True, True, False]])
    fields = config(init="dispersed", restrict_to={"weight": mask})
    for loss in (squared_error, mean_squared_error):
        spec = prepare(model, data, loss, fields)
        walker, other = (Chain(spec, 1, anchored(spec)) for _ in range(2))
        whole = walker.advance(6)
        assert whole.values["distance"][0] > 0
        moved = walker.replica.model.weight - model.weight
        assert torch.equal(moved[~mask], torch.zeros(2))
        first, second = other.advance(2), other.advance(4)
        for name, values in whole.values.items():
            parts = np.concatenate([first.values[name], second.values[name]])
            assert np.array_equal(parts, values), name


def test_a_half_precision_chain_starts_dispersed_too() -> None:
    model = Weights().to(torch.bfloat16)
    spec = prepare(model, DATA, quadratic, settings(lr=1e-8, init_radius=3.0))
    block = Chain(spec, 1, anchored(spec)).advance(2)
    assert block.values["distance"][1] == pytest.approx(3.0, rel=0.2)


def test_the_bracket_holds_the_answer_between_its_sides(tmp_path: Path) -> None:
    run = ds.sample(
        Weights(), DATA, quadratic, settings(lr=0.01, chains=4, draws=100, burn_in=0),
        store=tmp_path / "run", pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    exact = float((NBETA * CURVATURE.double() / (NBETA * CURVATURE + GAMMA)).sum() / 2)
    bracket = run.diagnosis.bracket
    assert bracket is not None
    even, odd = bracket
    assert even.mean + 5 * even.se < exact < odd.mean - 3 * odd.se
    assert run.verdict.status == "NOT_CONVERGED"
    estimate = run.llc("ignore")
    assert estimate.bracket == (even.mean, odd.mean)
    assert f"bracket {even.mean:.4g} .. {odd.mean:.4g}" in str(estimate)
