"""The gradient's variance between examples at w*, and the chain that is corrected by it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import distsampler as ds
from distsampler.chains import anchor_pass
from distsampler.chains.chain import Chain
from distsampler.chains.state import parse
from distsampler.curvature import gradient_noise
from distsampler.errors import ConfigError
from distsampler.models.replica import ChainSpec, Replica
from distsampler.sampling.prepare import prepare
from distsampler.store.trace import Trace
from distsampler.truth import discretised_laws
from tests.assertions import assert_same, assert_variance
from tests.fakes import FlakyPool
from tests.problems import anchored, config, mean_squared_error, regression, squared_error

HOT = ds.SamplerConfig(lr=1e-3, localization=10.0, correct_heat=True)


def spec(n: int = 300, loss: Any = squared_error, **fields: Any) -> ChainSpec:
    model, data = regression(n)
    return prepare(model, data, loss, config(**{"sampler": HOT, **fields}))


def per_example_gradients(n: int) -> NDArray[np.float64]:
    """2 (w x - y) x, in closed form."""
    model, (x, y) = regression(n)
    weight = next(model.parameters()).detach().double()
    return (2 * (x.double() @ weight.T - y.double()) * x.double()).numpy()


@pytest.mark.parametrize(("n", "size"), [(300, 1), (3000, 11), (8000, 16)])
def test_it_is_what_a_direct_computation_gives(n: int, size: int) -> None:
    recipe = spec(n)
    rows = gradient_noise.batches(recipe.config, n)
    assert rows.shape[1] == size
    means = per_example_gradients(n)[rows].mean(1)
    within = [
        means[a:b].var(0, ddof=1) * (b - a - 1) for a, b in gradient_noise.batch_blocks(len(rows))
    ]
    expected = size * sum(within) / (len(rows) - len(within)) * (n - 1) / n
    found = anchored(recipe).gradient_variance
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float32


def test_it_is_the_variance_between_examples_whatever_the_batch() -> None:
    exact = per_example_gradients(8000).var(0)
    for size in (4, 31):
        found = anchored(spec(8000, batch_size=size)).gradient_variance
        # Of the five entries each has an error of sqrt(2 / batches), and kurtosis adds a little.
        batches = len(gradient_noise.batches(config(batch_size=size), 8000))
        assert np.abs(found / exact - 1).max() < 6 * np.sqrt(2 / batches)
        assert np.abs(found / exact - size).min() > 1  # the variance of a batch is another


def test_no_row_is_taken_twice_and_a_train_batch_keeps_its_size() -> None:
    for fields in ({}, {"mode": "train"}):
        rows = gradient_noise.batches(config(**fields), 3000)
        assert len(np.unique(rows)) == rows.size
    assert rows.shape[1] == 16
    assert not np.array_equal(rows, gradient_noise.batches(config(mode="train", seed=1), 3000))


@pytest.mark.parametrize("loss", [squared_error, mean_squared_error])
def test_its_bits_do_not_depend_on_how_many_share_the_work(loss: Any) -> None:
    recipe = spec(3000, loss)
    found = []
    for places in (1, 3, 20):
        replica = Replica(recipe, torch.device("cpu"))
        plan = anchor_pass.parts_of(recipe, places)
        assert sum(part.what == "gradient noise" for part in plan) == 8
        parts = [anchor_pass.measure(replica, recipe, part) for part in reversed(plan)]
        found.append(anchor_pass.reduce(parts, recipe).gradient_variance)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_a_run_that_does_not_ask_has_none() -> None:
    assert anchored(spec(sampler=ds.SamplerConfig(lr=1e-3))).gradient_variance is None


def test_only_what_moves_is_measured() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    _, data = regression()
    recipe = prepare(model, data, squared_error, config(sampler=HOT, restrict_to=r"1\..*"))
    assert anchored(recipe).gradient_variance.shape == (4,)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sampler": {"name": "sgnht"}}, "has not: use one of sgld, lmsgld, rmsprop_sgld"),
        ({"sampler": {"gradient_variance": 2.0}}, "leave out gradient_variance"),
        ({"sampler": {"batch_size": 16}}, "leave out batch_size"),
        ({"batches": "epoch"}, "batches must be 'replacement', got 'epoch'"),
        ({"mode": "train", "batch_size": 200}, "300 examples hold 1 of 200: lower batch_size"),
    ],
)
def test_where_it_cannot_be_right_it_is_refused(fields: dict[str, Any], sentence: str) -> None:
    options = fields.pop("sampler", {})
    sampler = ds.SamplerConfig(correct_heat=True, lr=1e-3, **options)
    with pytest.raises(ConfigError) as caught:
        spec(sampler=sampler, **fields)
    assert sentence in str(caught.value)


def test_a_number_of_ones_own_gets_the_runs_batch_size() -> None:
    sampler = ds.SamplerConfig(lr=1e-3, gradient_variance=2.0)
    recipe = spec(sampler=sampler)
    group = Chain(recipe, 0, anchored(recipe)).sampler.param_groups[0]
    assert (group["gradient_variance"], group["batch_size"]) == (2.0, 16)


def run(store: Path, pool: Any, resume: Any = "never") -> ds.Run:
    model, data = regression()
    hot = config(sampler=HOT)
    return ds.sample(
        model, data, squared_error, hot, store=store, pool=pool, resume=resume, quiet=True
    )


def test_it_is_written_once_and_read_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", ds.SerialPool())
    with pytest.raises(ds.RunFailed, match="killed by the script"):
        run(tmp_path / "run", FlakyPool(1, [13], kind="fatal"))
    stored = Trace(tmp_path / "run").constants.array("gradient_variance")
    assert stored is not None
    assert stored.shape == (5,)
    monkeypatch.setattr(gradient_noise, "measure", None)  # it is not measured again
    resumed = run(tmp_path / "run", FlakyPool(2), "must")
    assert_same(resumed, whole)
    clipped = resumed.inference_data["sample_stats"]["noise_clipped"]
    assert clipped.shape == (2, 40)
    assert not clipped.any()


def test_the_share_that_cannot_be_corrected_is_in_sample_stats() -> None:
    recipe = spec(sampler=ds.SamplerConfig(lr=0.02, nbeta=50.0, correct_heat=True), thin=1)
    found = anchored(recipe)
    scale = 0.02 * 50.0**2 / (4 * 16)
    share = (found.gradient_variance * scale >= 1).mean()
    assert share > 0
    block = Chain(recipe, 0, found).advance(2)
    assert np.all(block.values["noise_clipped"] == pytest.approx(share))


def test_a_state_does_not_carry_it_and_a_restored_chain_goes_on_to_the_bit() -> None:
    recipe = spec()
    found = anchored(recipe)
    first, other = Chain(recipe, 0, found), Chain(recipe, 0, found)
    state = first.advance(7).state
    assert parse(state)["sampler"]["param_groups"][0]["gradient_variance"] is None
    other.restore(state)
    one, two = first.advance(5), other.advance(5)
    assert all(np.array_equal(one.values[name], two.values[name]) for name in one.values)
    assert one.state == two.state


class Slope(nn.Module):
    """Weights at zero, the minimum of a quadratic that examples tilt."""

    def __init__(self, coordinates: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(coordinates))


def tilted(model: Slope, batch: Tensor) -> Tensor:
    """``l_i(w) = 1/2 |w|^2 + z_i . w``, mean z zero: curvature 1, gradient variance that of z."""
    return model.w.square().sum() / 2 + batch @ model.w


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["sgld", "lmsgld"])
@pytest.mark.parametrize("corrected", [True, False])
def test_a_corrected_chain_has_the_law_without_heat(name: str, corrected: bool) -> None:
    """20,000 coordinates; a quarter of a step's noise comes from the minibatch."""
    n, m, nbeta, gamma = 512, 16, 100.0, 10.0
    kappa = nbeta + gamma
    lr = 0.3 / kappa
    z = torch.randn(n, 20_000, generator=torch.Generator().manual_seed(0)) * 0.77
    z -= z.mean(0)
    sampler = ds.SamplerConfig(
        name=name, lr=lr, nbeta=nbeta, localization=gamma, correct_heat=corrected
    )
    recipe = prepare(
        Slope(20_000), z, tilted, config(sampler=sampler, batch_size=m, thin=150, probe=8)
    )
    walker = Chain(recipe, 0, anchored(recipe))
    walker.advance(1)
    law = discretised_laws.sgld if name == "sgld" else discretised_laws.lmsgld
    heat = lr**2 / 4 * nbeta**2 * float(z.var(0, correction=0).mean()) / m
    without, hot = law(lr, kappa, heat, 1 - heat / lr), law(lr, kappa, heat)
    assert hot / without > 1.2
    weights = walker.replica.flats[0].detach()
    assert_variance(weights, without if corrected else hot)
    with pytest.raises(AssertionError):
        assert_variance(weights, hot if corrected else without)
