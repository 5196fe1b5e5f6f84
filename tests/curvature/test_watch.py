"""The curvature along a chain: when it is measured, what is recorded, that nothing else moves."""

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import distsampler as ds
from distsampler.analysis import bias
from distsampler.chains.chain import Chain
from distsampler.chains.observables import variables
from distsampler.cli import app
from distsampler.curvature.watch import due
from distsampler.errors import StepTooLargeWarning
from distsampler.models.sampler import facts_of
from distsampler.sampling.prepare import prepare
from tests.assertions import assert_same, assert_same_blocks
from tests.fakes import FlakyPool
from tests.problems import Tilted, anchored, config, regression, squared_error, tilted

WATCHED = ("curvature", "discretisation_bias", "heat_bias")


def chain(index: int = 0, **fields: Any) -> Chain:
    """Draws are 100 steps apart, so that looks fall among the first twenty of them."""
    model, data = regression()
    spec = prepare(model, data, squared_error, config(**{"thin": 100, **fields}))
    return Chain(spec, index, anchored(spec))


def changes(values: Any) -> list[int]:
    """Draws at which a recorded value is another than before."""
    return (np.flatnonzero(np.diff(values)) + 1).tolist()


class Own(torch.optim.Optimizer):
    """Somebody's sampler."""

    def __init__(
        self, params: Any, lr: float = 1e-3, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.generator = generator

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                noise = torch.randn(p.shape, generator=self.generator)
                p.add_(p.grad, alpha=-group["lr"] / 2).add_(noise, alpha=group["lr"] ** 0.5)


def test_looks_are_a_factor_apart_and_depend_on_nothing_else() -> None:
    found = [step for step in range(4000) if due(step, step + 1)]
    assert found == [400, 600, 900, 1350, 2025, 3038]
    assert all(due(a, a + 7) == any(a <= p < a + 7 for p in found) for a in range(3000))


def test_each_draw_holds_what_was_last_measured() -> None:
    block = chain().advance(15)
    for name in WATCHED:
        assert np.isfinite(block.values[name]).all()
    # Draw d covers the steps 100 d to 100 d + 99, and step 400 lies in that of draw 4.
    assert changes(block.values["curvature"]) == [4, 6, 9, 13]


def test_it_is_the_curvature_of_the_mean_loss() -> None:
    _, (x, _) = regression()
    exact = float(torch.linalg.eigvalsh(2 * x.T @ x / len(x))[-1])
    found = chain(batch_size=300).advance(1).values["curvature"][0]
    assert found == pytest.approx(exact, rel=1e-5)


def test_watching_changes_no_draw() -> None:
    on, off = chain().advance(8), chain(watch=False).advance(8)
    assert not set(WATCHED) & set(off.values)
    for name, values in off.values.items():
        assert np.array_equal(values, on.values[name]), name


@pytest.mark.parametrize("correct_heat", [True, False])
def test_blocks_and_restarts_leave_the_bits_alone(correct_heat: bool) -> None:
    sampler = ds.SamplerConfig(name="lmsgld", lr=1e-3, localization=10.0, correct_heat=correct_heat)
    whole, parts, other = (chain(sampler=sampler) for _ in range(3))
    blocks = [parts.advance(3), parts.advance(2), parts.advance(6)]
    assert_same_blocks(whole.advance(11), *blocks)
    other.restore(blocks[1].state)
    assert_same_blocks(blocks[2], other.advance(6))


def run(store: Path, pool: Any, resume: Any = "never", **fields: Any) -> ds.Run:
    model, data = regression()
    given = config(**{"thin": 100, "draws": 12, "burn_in": 2, **fields})
    return ds.sample(
        model, data, squared_error, given, store=store, pool=pool, resume=resume, quiet=True
    )


def test_a_run_that_was_cut_and_extended_has_the_same_bits(tmp_path: Path) -> None:
    blocks = {"placement": ds.PlacementConfig(block=7)}
    whole = run(tmp_path / "whole", ds.SerialPool(), draws=20, **blocks)
    assert run(tmp_path / "cut", FlakyPool(2, [4, 6]), placement=ds.PlacementConfig(block=3))
    longer = run(tmp_path / "cut", ds.SerialPool(), "must", draws=20)
    assert_same(longer, whole)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"sampler": ds.SamplerConfig(name="sgnht", lr=1e-4)}, WATCHED),
        ({"sampler": ds.SamplerConfig(name="sghmc", lr=1e-4)}, WATCHED),
        ({"sampler": ds.SamplerConfig(name="rmsprop_sgld", lr=1e-4)}, WATCHED[:1]),
        (
            {"sampler": ds.SamplerConfig(name="tests.curvature.test_watch:Own", lr=1e-4)},
            WATCHED[:1],
        ),
        ({"batches": "epoch"}, WATCHED[:2]),
        ({"watch": False}, ()),
    ],
)
def test_what_is_not_predicted_is_not_recorded(fields: dict[str, Any], names: Any) -> None:
    model, data = regression()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = prepare(model, data, squared_error, config(**fields))
    assert [v.name for v in variables(spec) if v.name in WATCHED] == list(names)


class Once(torch.autograd.Function):
    """A square whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def once(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return Once.apply(model(inputs) - targets).sum(1)


def test_a_loss_without_double_backward_is_sampled_unwatched(tmp_path: Path) -> None:
    model, data = regression()
    with pytest.warns(UserWarning, match="needs a double backward.*twice") as caught:
        spec = prepare(model, data, once, config())
    assert len(caught) == 1
    assert not spec.config.watch
    block = Chain(spec, 0, anchored(spec)).advance(3)
    assert not set(WATCHED) & set(block.values)

    def go(resume: Any) -> ds.Run:
        store, pool = tmp_path / "run", ds.SerialPool()
        return ds.sample(
            model, data, once, config(), store=store, pool=pool, resume=resume, quiet=True
        )

    with pytest.warns(UserWarning, match="watch is off"):
        assert go("never").manifest.status == "finished"
    assert go("must").llc("ignore").budget.unpredicted["heat_bias"].endswith("watch is off")


@pytest.mark.parametrize("batches", ["replacement", "epoch"])
def test_a_step_that_is_too_large_is_an_event_and_an_advisory(tmp_path: Path, batches: str) -> None:
    _, (x, _) = regression()
    h = float(torch.linalg.eigvalsh(2 * x.T @ x / len(x))[-1])
    sampler = ds.SamplerConfig(lr=2.4 / (50 * h + 10), localization=10.0, nbeta=50.0)
    with pytest.warns(StepTooLargeWarning) as told_at_once:
        found = run(tmp_path / "run", ds.SerialPool(), sampler=sampler, batches=batches)
    assert len(told_at_once) == 1, "once, not for each chain"
    assert re.search(
        rf"lower sampler.lr from {sampler.options['lr']:.3g} to ", str(told_at_once[0].message)
    )
    events = [event for event in found.events if event["event"] == "step_too_large"]
    assert sorted(event["chain"] for event in events) == [0, 1]
    advisory, biased = found.advisories
    assert re.search(r"lower sampler.lr from \S+ to \S+", advisory)
    assert re.search(r"predicted to make the LLC \S+ too large, \d+% of it", biased)
    told = CliRunner().invoke(app, ["diagnose", str(tmp_path / "run")])
    assert f"note: {advisory}" in told.output
    printed = CliRunner().invoke(app, ["llc", str(tmp_path / "run"), "--budget"]).output
    for part in ("discretisation", "minibatch heat", "drift", "95 % interval"):
        assert part in printed
    assert ("not predicted" in printed) == (batches == "epoch")
    read = CliRunner().invoke(app, ["llc", str(tmp_path / "run"), "--json"]).output
    assert json.loads(read)["budget"]["discretisation"] > 0
    gentle = ds.SamplerConfig(lr=0.02 / (50 * h + 10), localization=10.0, nbeta=50.0)
    calm = run(tmp_path / "calm", ds.SerialPool(), sampler=gentle)
    assert calm.advisories == ()
    assert "step_too_large" not in [event["event"] for event in calm.events]


def test_weight_decay_and_momentum_count_for_whether_a_step_is_too_large() -> None:
    def met(**options: Any) -> bias.Steepness:
        sampler = ds.SamplerConfig(lr=0.1, localization=1.0, **options)
        step = bias.steepness(np.array([1.8, np.nan]), facts_of(sampler, 10.0, 100))
        assert step is not None
        return step

    assert not met().too_large  # x = 0.475
    assert met(weight_decay=2.0).too_large
    assert "gamma) / 4 reached 0.53" in met(weight_decay=2.0).reason
    assert not met(name="sghmc").too_large
    assert "gamma) / 2.2 reached 0.86" in met(name="sghmc", friction=0.9).reason


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["sgld", "lmsgld"])
@pytest.mark.parametrize("corrected", [True, False])
def test_a_run_predicts_its_own_bias(name: str, corrected: bool, tmp_path: Path) -> None:
    """A quadratic with gradient noise: what is recorded against what the law says."""
    d, n, m, nbeta, gamma = 40, 512, 32, 100.0, 20.0
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(3)) * 2
    z -= z.mean(0)
    h = np.logspace(-1, 1, d)
    lr = 1.0 / (nbeta * float(h.max()) + gamma)
    sampler = ds.SamplerConfig(
        name=name, lr=lr, nbeta=nbeta, localization=gamma, correct_heat=corrected
    )
    given = config(
        chains=4, draws=40, burn_in=10, thin=50, batch_size=m, sampler=sampler, min_chains=1
    )
    run = ds.sample(
        Tilted(d), z, tilted, given, store=tmp_path / "r", pool=ds.SerialPool(), quiet=True
    )
    kappa, over = nbeta * h + gamma, 1 / (1 - lr * (nbeta * h + gamma) / 4)
    share, v = nbeta * h / kappa / 2, float(z.double().var(0, correction=0).mean())
    heat = lr * nbeta**2 * v / (4 * m)
    discretisation = float((share * (over - 1)).sum()) if name == "sgld" else 0.0
    left = over - 1 if name == "lmsgld" else 0 * over
    exact = float((share * heat * (left if corrected else over)).sum())
    parts, full = run.llc("ignore").budget, float((share * heat * over).sum())
    assert full > 0.3 * share.sum()
    assert parts.discretisation == pytest.approx(discretisation, rel=0.05)
    assert parts.heat is not None
    assert abs(parts.heat - exact) < max(5 * parts.bias_se, 0.05 * full)
    assert math.isfinite(parts.bias_se)
