"""A run without lr: what pilots choose for it, what that costs, and where it is said."""

import json
import re
import signal
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import distsampler as ds
from distsampler.chains.worker import Advance, Work
from distsampler.cli import app
from distsampler.errors import ConfigError
from distsampler.models.replica import ChainSpec
from distsampler.report import run_report
from tests import problems
from tests.problems import regression, squared_error


class CountingPool(ds.SerialPool):
    """Counts the steps of pilots, and of the run itself; ``now`` is called at each block."""

    def __init__(self, now: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.pilots, self.run, self._now = 0, 0, now

    def start(self, spec: ChainSpec, places: Any) -> Any:
        self._spec = spec
        return super().start(spec, places)

    def submit(self, place: int, work: Work) -> None:
        if isinstance(work, Advance):
            steps = len(work.chains) * work.draws * self._spec.config.thin
            self.pilots += steps if self._spec.pilot else 0
            self.run += 0 if self._spec.pilot else steps
            self._now()
        super().submit(place, work)


def short(**fields: Any) -> ds.RunConfig:
    """A run of 240 steps, of which pilots may have 24: the curvature at w*, and no pilot."""
    small = {"draws": 110, "burn_in": 10, "thin": 1}
    return problems.config(**{"sampler": ds.SamplerConfig(), **small, **fields})


def sample(config: ds.RunConfig, pool: Any = None, **how: Any) -> ds.Run:
    how = {"quiet": True, **how}
    return ds.sample(*regression(), squared_error, config, pool=pool or ds.SerialPool(), **how)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ds.Run:
    return sample(short(), store=tmp_path_factory.mktemp("piloted") / "run")


def test_pilots_take_a_tenth_of_the_steps_at_most_and_say_in_one_line_what_they_chose(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pool = CountingPool(lambda: None if pool.run == 0 else signal.raise_signal(signal.SIGTERM))
    config = short(draws=415, thin=10, sampler=ds.SamplerConfig(name="lmsgld"))
    run = sample(config, pool, quiet=False)  # which need not be made to its end
    assert 820 < pool.pilots <= 2 * 425 * 10 / 10
    lr, gamma = (run.sampler[name] for name in ("lr", "localization"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "chose" in line]
    assert line.startswith(f"pilots of {pool.pilots} steps, 9.7% of the run's, chose lmsgld, ")
    assert f"localization {gamma:.4g}, lr {lr:.4g}; predicted bias" in line
    assert run.manifest.calibration is not None
    assert run.manifest.calibration["pilot_steps"] == pool.pilots


def test_where_no_pilot_fits_the_step_follows_from_the_curvature_at_the_anchor(
    run: ds.Run,
) -> None:
    calibration, options = run.manifest.calibration, run.sampler
    assert calibration is not None
    assert calibration["pilot_steps"] == 2
    nbeta, h = run.facts["nbeta"], calibration["curvature"]
    assert options["localization"] == pytest.approx(nbeta * h / 125, rel=0.05)
    kappa = 3 * nbeta * h + options["localization"]
    assert options["lr"] == pytest.approx(0.7 / kappa, rel=0.01)
    assert "too few steps for a pilot, which takes 820" in calibration["reasons"]["sampler.lr"]
    assert calibration["heat_bias"] is None


def test_the_choice_is_a_function_of_the_seed_and_localization_not_even_of_that(
    run: ds.Run,
) -> None:
    again, other = sample(short()), sample(short(seed=7, batch_size=40))
    assert again.manifest.config == run.manifest.config
    assert again.llc("ignore").mean == run.llc("ignore").mean
    assert other.sampler["localization"] == run.sampler["localization"]


def test_every_output_has_the_values_that_made_the_number(run: ds.Run) -> None:
    lr, store = run.sampler["lr"], run.store
    stored = json.loads(Path(store, "run.json").read_text())
    assert stored["config"]["sampler"]["lr"] == stored["sampler"]["lr"] == lr
    assert stored["sampler"]["nbeta"] == run.facts["nbeta"]
    assert f"lmsgld lr {lr:g}" in str(run.llc("ignore"))
    for command in ("llc", "diagnose"):
        text = CliRunner().invoke(app, [command, store]).stdout
        assert f"sampler: lmsgld, lr {lr:g}, noise_level 1, weight_decay 0, localization" in text
        data = json.loads(CliRunner().invoke(app, [command, store, "--json"]).stdout)
        assert data["sampler"] == stored["sampler"]
    page = unescape(run_report.render(run))
    assert run.manifest.calibration is not None
    assert run.manifest.calibration["reasons"]["sampler.lr"] in page
    (lines,) = re.findall(r"(config = ds\.RunConfig\(.*?\)\n)run =", page, re.DOTALL)
    names: dict[str, Any] = {"ds": ds}
    exec(lines, names)
    on = {k: v for k, v in run.sampler.items() if v is not None and v is not False}
    config = names["config"]
    assert {"name": config.sampler.name, **config.sampler.options} == on
    repeated = sample(config)
    assert repeated.llc("ignore").mean == run.llc("ignore").mean


def test_a_resume_takes_the_step_that_the_run_has(tmp_path: Path) -> None:
    first = sample(short(draws=100), store=tmp_path / "run")
    pool = CountingPool()
    longer = sample(short(draws=130), pool, store=tmp_path / "run", resume="auto")
    assert pool.pilots == 0
    assert pool.run < 2 * 140, "it goes on"
    assert longer.sampler == first.sampler
    assert longer.posterior.sizes["draw"] == 130
    given = short(draws=40, sampler=ds.SamplerConfig(lr=2e-3, localization=1.0))
    sample(given, store=tmp_path / "given")
    open_again = short(draws=50, sampler=ds.SamplerConfig(localization=1.0))
    found = sample(open_again, store=tmp_path / "given", resume="must")
    assert found.sampler["lr"] == 2e-3
    named = short(draws=50, sampler=ds.SamplerConfig(name="sgld"))
    with pytest.raises(ds.StoreError, match=r"config\.sampler: stored"):
        sample(named, store=tmp_path / "run", resume="must")


def test_what_pilots_cannot_choose_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    store = tmp_path / "run"
    wrong: list[tuple[ds.RunConfig, str]] = [
        (short(sampler=ds.SamplerConfig(name="rmsprop_sgld")), "must be given for 'rmsprop_sgld'"),
        (short(draws=5, burn_in=0), "must be given for a run of 10 steps"),
    ]
    for config, sentence in wrong:
        with pytest.raises(ConfigError, match=rf"sampler\.lr {sentence}"):
            sample(config, store=store)
    with pytest.raises(ds.StoreError, match="needs a run"):
        sample(short(), resume="must")
    assert not store.exists()


def test_a_started_run_is_piloted_in_its_thread() -> None:
    parts = (*regression(), squared_error, short())
    run = ds.start(*parts, pool=ds.SerialPool()).wait(60)
    assert run.manifest.calibration is not None


def test_cells_without_lr_start_from_the_first_checkpoints_step(tmp_path: Path) -> None:
    model, (x, y) = regression()
    weights = model.state_dict()
    pool = CountingPool()
    sweep = ds.sweep(
        model, (x, y), squared_error, short(), store=tmp_path / "s", pool=pool, quiet=True,
        checkpoints={"a": weights, "b": {k: v + 0.1 for k, v in weights.items()}},
        settings={"open": {}, "given": {"sampler.lr": 1e-4}},
    )  # fmt: skip
    assert pool.pilots == 2 * 2, "two cells, a step of two chains each"
    table = sweep.collect().squeeze()
    assert (table["status"] == "finished").all()
    assert (table["lr"].sel(setting="given") == 1e-4).all()
    a, b = (table["lr"].sel(setting="open", checkpoint=name).item() for name in "ab")
    assert 0 < b <= a
    assert len(set(table["localization"].sel(setting="open").values)) == 1
