"""Calibration on problems whose spectrum, noise and answer are known."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import distsampler as ds
from distsampler import recipe
from distsampler.analysis.heatmap import Heatmap
from distsampler.errors import ConfigError, RunFailed
from distsampler.report.plots import plot_heatmap
from distsampler.sampling.calibration import SHARE, Calibration, continued
from distsampler.sampling.pilots import read_pilot
from distsampler.sampling.tuning import REHEARSAL, SOFTEST
from distsampler.truth import discretised_laws
from tests.problems import regression, squared_error
from tests.processes import CONFIG, command, written

N, D, GAMMA, BATCH = 1024, 40, 10.0, 128
CURVATURE = torch.logspace(-0.5, 1, D)
NOISE = 0.2  # standard deviation of an example's gradient
NBETA = N / math.log(N)


class Bowl(nn.Module):
    """w* = 0 of a quadratic whose examples pull in different directions."""

    def __init__(self, power: int = 2) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(D))
        self.power = power


def bowl_loss(model: nn.Module, batch: Any) -> Tensor:
    w = model.w
    assert isinstance(w, Tensor)
    return (CURVATURE * w**model.power).sum() / 2 + batch @ w  # type: ignore[operator]


def examples() -> Tensor:
    noise = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean(0)
    return NOISE * noise / noise.std(0, correction=0)


def config(**fields: Any) -> ds.RunConfig:
    sampler = fields.pop("sampler", ds.SamplerConfig(localization=GAMMA))
    fixed = {"device": "cpu", "batch_size": BATCH, "probe": 64}
    return ds.RunConfig(sampler=sampler, **{**fixed, **fields})


def calibrated(power: int = 2, **fields: Any) -> Calibration:
    return ds.calibrate(Bowl(power), examples(), bowl_loss, config(**fields), pool=ds.SerialPool())


@pytest.fixture(scope="module")
def free() -> Calibration:
    return calibrated()


def exact() -> float:
    kappa = NBETA * CURVATURE + GAMMA
    return float((NBETA * CURVATURE / kappa).sum() / 2)


def law(sampler: ds.SamplerConfig) -> float:
    """The LLC of the discretised chain, minibatches included, in closed form."""
    lr = float(sampler.options["lr"])
    heat = lr**2 * NBETA**2 * NOISE**2 / (4 * BATCH)
    left = 1 - heat / lr if sampler.correct_heat else 1.0
    one = {"sgld": discretised_laws.sgld, "lmsgld": discretised_laws.lmsgld}[sampler.name]
    variances = [one(lr, NBETA * h + GAMMA, heat, left) for h in CURVATURE.tolist()]
    return float(NBETA / 2 * np.dot(CURVATURE.tolist(), variances))


@pytest.mark.parametrize("name", [pytest.param("sgld", marks=pytest.mark.slow), "lmsgld"])
def test_the_step_has_the_bias_that_was_asked_for_and_that_is_predicted(name: str) -> None:
    found = calibrated(sampler=ds.SamplerConfig(name=name, localization=GAMMA))
    assert found.config.sampler.name == name
    true = law(found.config.sampler) / exact() - 1
    predicted = found.discretisation_bias + found.heat_bias
    assert abs(predicted) <= 2 * 1.3 * 0.005  # step and minibatches, each its part
    assert true == pytest.approx(predicted, abs=0.003)
    lr = found.config.sampler.options["lr"] * (5 if name == "sgld" else 1)
    control = ds.SamplerConfig(name="sgld", lr=lr, localization=GAMMA)
    assert law(control) / exact() - 1 > 2 * 1.3 * 0.005


def test_pilots_cost_less_than_a_fifth_of_the_run_and_say_so(free: Calibration) -> None:
    assert 0 < free.pilot_steps <= SHARE * free.run_steps
    assert f"took {free.pilot_steps} steps" in str(free)
    assert "because the run is short" not in str(free)
    short = dataclasses.replace(free, config=free.config.replaced(draws=10))
    short = dataclasses.replace(short, config=short.config.replaced(burn_in=10))
    assert "because the run is short" in str(short)


def test_everything_that_was_chosen_has_its_reason(free: Calibration) -> None:
    for name in ("sampler.name", "sampler.lr", "burn_in", "draws", "thin"):
        assert free.reasons[name]
        assert name in str(free)
    assert free.reasons["sampler.localization"] == "as given"
    assert json.loads(json.dumps(free.as_dict()))["config"]["sampler"]["localization"] == GAMMA
    assert free.curvature == pytest.approx(float(CURVATURE.max()), rel=0.02)


def test_a_bias_above_the_one_that_was_wished_for_is_marked(free: Calibration) -> None:
    hot = dataclasses.replace(free, bias=1e-9, heat_bias=-0.02, discretisation_bias=0.0)
    assert hot.missed == ("heat",)
    assert "+0.00% by the step, -2.00% by minibatches; MISSED" in str(hot)
    assert "MISSED" in hot.line
    assert hot.as_dict()["missed"] == ["heat"]
    kept = dataclasses.replace(hot, bias=0.03)
    assert not kept.missed
    assert "MISSED" not in str(kept)


def test_the_same_seed_gives_the_same_config(free: Calibration) -> None:
    again = calibrated()
    assert again.config == free.config
    assert again.reasons == free.reasons
    assert again.as_dict() | {"pilot_seconds": 0} == free.as_dict() | {"pilot_seconds": 0}


def test_what_was_given_is_kept() -> None:
    given = ds.SamplerConfig(name="lmsgld", lr=1e-4, localization=3.0)
    found = calibrated(sampler=given, draws=50, burn_in=20, thin=3, chains=3, seed=5)
    assert found.config.sampler.options == given.options
    kept = {"draws": 50, "burn_in": 20, "thin": 3, "chains": 3, "seed": 5, "batch_size": BATCH}
    assert {name: getattr(found.config, name) for name in kept} == kept
    assert all(found.reasons[name] == "as given" for name in ("sampler.lr", "draws", "thin"))


def test_localization_hangs_on_the_problem_alone_and_its_reason_holds_at_the_lr_chosen() -> None:
    free, other = ds.SamplerConfig(name="lmsgld"), {"seed": 4, "batch_size": 300}
    long = calibrated(sampler=free, draws=30_000, burn_in=0, thin=1)
    free = free.replaced(lr=1e-4)
    short = calibrated(sampler=free, draws=1_000, burn_in=0, thin=1, **other)
    gamma = NBETA * float(CURVATURE.max()) / SOFTEST
    for found, steps in ((short, 1_000), (long, 30_000)):
        options, why = found.config.sampler.options, found.reasons["sampler.localization"]
        assert options["localization"] == pytest.approx(gamma, rel=0.05)
        times = options["lr"] * options["localization"] * steps / 2
        assert f"relaxes about {times:.2g} times in the {steps} steps" in why
    needed = math.ceil(20 * 2 / (options["lr"] * options["localization"]))
    assert short.config.sampler.options["localization"] == options["localization"]
    assert ": too few, 20 times take" in short.reasons["sampler.localization"]
    assert "too few" not in why
    assert needed < 30_000


@pytest.mark.slow
def test_a_flat_minimum_gets_a_step_at_which_chains_live() -> None:
    """The curvature at w* is zero and says nothing: pilots find it out."""
    given = ds.SamplerConfig(name="lmsgld", localization=1.0)
    found = calibrated(power=4, sampler=given, draws=60, burn_in=60, thin=10)
    assert any(pilot.diverged for pilot in found.pilots)
    lr, width = found.config.sampler.options["lr"], (2 / (NBETA * CURVATURE.max())) ** 0.25
    kappa = float(6 * NBETA * CURVATURE.max() * width**2)  # of w^4 h / 2, where its energy is 1
    assert 0.02 < lr * kappa < 5


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(ConfigError, match="knows the laws of lmsgld, sghmc, sgld, sgnht"):
        calibrated(sampler=ds.SamplerConfig(name="rmsprop_sgld"))
    with pytest.raises(ConfigError, match="bias must be between 0 and 1"):
        ds.calibrate(Bowl(), examples(), bowl_loss, config(), pool=ds.SerialPool(), bias=0.0)
    with pytest.raises(ConfigError, match=r"set sampler\.localization"):
        calibrated(power=4, sampler=ds.SamplerConfig())
    with pytest.raises(RunFailed, match=r"diverged at sampler\.lr=10: lower it"):
        calibrated(sampler=ds.SamplerConfig(lr=10.0, localization=GAMMA))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"batches": "epoch"}, "less heat"),
        ({"sampler": ds.SamplerConfig(localization=GAMMA, bounding_box_size=1.0)}, "a box"),
        pytest.param(
            {"sampler": ds.SamplerConfig(localization=GAMMA, noise_level=0.5)},
            "noise_level",
            marks=pytest.mark.filterwarnings("ignore:noise_level"),
        ),
    ],
)
def test_what_has_no_predicted_bias_is_not_chosen_by_one(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=f"one cannot be: .*{why}"):
        calibrated(**fields)


class Once(torch.autograd.Function):
    """A square without a double backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


def test_a_loss_without_a_double_backward_says_what_is_missing() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return Once.apply(model.w).sum() + batch @ model.w  # type: ignore[no-any-return]

    with (
        pytest.warns(UserWarning, match="watch is off"),
        pytest.raises(ConfigError, match=r"no double backward: give sampler\.lr"),
    ):
        ds.calibrate(Bowl(), examples(), loss, config(), pool=ds.SerialPool())


def test_a_loss_that_raises_is_not_taken_for_a_step_that_is_too_large() -> None:
    calls: list[int] = []

    def breaks(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 40:
            raise ValueError("out of luck")
        return bowl_loss(model, batch)

    with pytest.raises(RunFailed, match="out of luck"):
        ds.calibrate(Bowl(), examples(), breaks, config(), pool=ds.SerialPool())


@pytest.mark.slow
@pytest.mark.statistical
def test_the_run_that_is_proposed_converges_to_the_truth(free: Calibration) -> None:
    run = ds.sample(Bowl(), examples(), bowl_loss, free.config, pool=ds.SerialPool(), quiet=True)
    found = run.llc()
    assert found.converged, found.verdict
    assert abs(found.mean - exact()) < 5 * found.se + 0.01 * exact()


@pytest.mark.slow
def test_a_heatmap_is_flat_where_the_step_does_not_matter() -> None:
    fields = config(sampler=ds.SamplerConfig(name="lmsgld", localization=GAMMA))
    found = ds.calibrate(Bowl(), examples(), bowl_loss, fields, pool=ds.SerialPool(), heatmap=True)
    chart = found.heatmap
    assert chart is not None
    assert chart.llc.shape == (3, 5)
    assert chart.steps == 15 * 2 * REHEARSAL * 10
    assert chart.llc[1, 2] == pytest.approx(exact(), rel=0.2)
    assert chart.lrs[2] == pytest.approx(found.config.sampler.options["lr"])


def chart() -> Heatmap:
    llc = np.array([[1.0, 2.0], [3.0, np.nan]])
    return Heatmap((0.1, 0.2), (10.0, 20.0), llc, llc / 100, 40)


def test_a_heatmap_prints_and_plots_what_diverged() -> None:
    assert "diverged" in str(chart())
    assert json.loads(json.dumps(chart().as_dict()))["llc"] == [[1.0, 2.0], [3.0, None]]
    words = [text.get_text() for text in plot_heatmap(chart()).texts]
    assert words == ["1\n1.0%", "2\n2.0%", "3\n3.0%", "diverged"]


OPEN = {key: value for key, value in CONFIG.items() if key not in ("draws", "burn_in", "thin")}


def open_file(path: Path, **changes: object) -> Path:
    file = path / "open.yaml"
    file.write_text(yaml.safe_dump({**OPEN, "sampler": {"localization": 5.0}, **changes}))
    return file


def test_a_written_recipe_is_read_again_from_anywhere(tmp_path: Path) -> None:
    loaded = recipe.load(written(tmp_path, loss_kwargs={"scale": 2.0}))
    other = tmp_path / "elsewhere"
    other.mkdir()
    recipe.write(loaded, other / "again.yaml")
    again = recipe.load(other / "again.yaml")
    assert again.config == loaded.config
    assert again.record["loss_kwargs"] == {"scale": 2.0}


def test_a_run_that_exists_is_not_calibrated_anew(tmp_path: Path) -> None:
    asked = recipe.load(open_file(tmp_path, draws=30, burn_in=10, thin=2))
    chosen = asked.config.replaced(
        sampler=ds.SamplerConfig(name="lmsgld", lr=1e-3, localization=5.0)
    )
    ds.sample(
        asked.model,
        asked.data,
        asked.loss,
        chosen,
        store=tmp_path / "run",
        pool=ds.SerialPool(),
        quiet=True,
    )
    assert continued(asked, str(tmp_path / "run")).config == chosen
    changed = recipe.load(open_file(tmp_path, draws=30, burn_in=10, thin=3))
    assert continued(changed, str(tmp_path / "run")).config.thin == 3  # which sample refuses


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_line_calibrates_and_remembers_it(tmp_path: Path) -> None:
    file = open_file(tmp_path, gate={"ess": 50})
    out = command("calibrate", file, "--json", "--out", tmp_path / "done.yaml")
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert recipe.load(tmp_path / "done.yaml").config.sampler.options["localization"] == 5.0
    words = ("run", file, "--calibrate", "--store", tmp_path / "run", "--quiet")
    done = command(*words)
    assert done.returncode in (0, 3), done.stderr
    assert "pilots took" in done.stderr
    manifest = ds.open(tmp_path / "run").manifest
    assert manifest.calibration is not None
    assert manifest.calibration["config"] == found["config"]
    again = command(*words, "--resume", "auto")
    assert again.returncode == done.returncode, again.stderr
    assert "pilots took" not in again.stderr


def test_shards_are_calibrated_on_as_they_are() -> None:
    """And what needs batches of all data at w* is no candidate there."""
    model, data = regression(n=2_000)
    given = ds.RunConfig(data_mode="hop", shards=4, batch_size=16, device="cpu", seed=1)
    found = ds.calibrate(model, data, squared_error, given, pool=ds.SerialPool())
    assert (found.config.data_mode, found.config.shards) == ("hop", 4)
    assert not found.config.sampler.correct_heat
    assert "heat corrected" not in str(found)


def test_heat_is_seen_where_the_llc_is_below_zero() -> None:
    """At weights that are no minimum: what a pilot predicts must not vanish there."""
    sampler = ds.SamplerConfig(lr=1e-4, nbeta=50.0, localization=100.0)
    model, data = regression()
    with torch.no_grad():
        model.weight += 2.0  # type: ignore[operator]  # far up the bowl: chains find lower loss
    given = ds.RunConfig(
        sampler=sampler, chains=2, burn_in=20, draws=100, thin=2, batch_size=8, device="cpu"
    )
    run = ds.sample(model, data, squared_error, given, pool=ds.SerialPool(), quiet=True)
    assert run.llc("ignore").mean < 0
    pilot = read_pilot(run, sampler, 1)
    assert 0 < pilot.heat < 1
