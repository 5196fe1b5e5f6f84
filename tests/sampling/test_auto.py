"""Runs that choose how many draws to make and how many to drop, whatever dies on the way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import distsampler as ds
from distsampler.analysis import inference_data
from distsampler.draws import AtAnchor
from distsampler.errors import ConfigError, StoreError
from distsampler.execution import driver
from distsampler.execution.pool import ChainPool
from distsampler.facts import Facts, Posterior
from distsampler.store.manifest import Manifest
from distsampler.store.trace import Trace
from tests.assertions import digest
from tests.fakes import FlakyPool
from tests.problems import config, regression, squared_error
from tests.stores import COUNTED, counted

EASY = ds.GateConfig(rhat=1.3, ess=40, every=100, relative_error=0.2)
AUTO: dict[str, Any] = {
    "draws": "auto", "max_draws": 800, "gate": EASY, "chains": 4, "thin": 1, "init": "dispersed",
    "placement": ds.PlacementConfig(block=40),
    "sampler": ds.SamplerConfig(lr=4e-3, localization=10.0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.random, "uniform", lambda low, high: 0.0)


def sample(store: Path, pool: ChainPool | None = None, resume: Any = "never", **fields: Any) -> Any:
    model, data = regression()
    settings = config(**{**AUTO, "burn_in": "auto", **fields})
    return ds.sample(model, data, squared_error, settings, store=store,
                     pool=pool or ds.SerialPool(), resume=resume, quiet=True)  # fmt: skip


def everything(run: ds.Run) -> np.ndarray[Any, Any]:
    """All draws of the probe's loss, burn-in included."""
    return np.array(list(run._trace.by_chain("probe_loss", run._trace.chains).values()))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> ds.Run:
    run: ds.Run = sample(tmp_path_factory.mktemp("runs") / "run")
    return run


def test_a_run_stops_at_the_first_look_that_is_good_enough(undisturbed: ds.Run) -> None:
    verdicts = [event for event in undisturbed.events if event["event"] == "verdict"]
    assert all(event["status"] != "CONVERGED" for event in verdicts[:-1])
    assert verdicts[-1]["status"] == "CONVERGED"
    assert 1 < len(verdicts) < 6
    assert undisturbed.manifest.reason == "converged"
    assert undisturbed.burn_in + undisturbed.posterior.sizes["draw"] == verdicts[-1]["draws"]
    assert undisturbed.burn_in == undisturbed.manifest.burn_in
    assert undisturbed.verdict.converged
    estimate = undisturbed.llc()
    assert estimate.se <= 0.2 * estimate.mean


@pytest.mark.parametrize("deaths", [[0], [7], [4, 9, 17], list(range(3, 40, 6))])
def test_deaths_change_neither_the_end_nor_the_burn_in_nor_a_bit(
    tmp_path: Path, undisturbed: ds.Run, deaths: list[int]
) -> None:
    pool = FlakyPool(2, deaths)
    block = ds.PlacementConfig(block=25 if len(deaths) > 1 else 40)
    run = sample(tmp_path / "run", pool, placement=block)
    assert pool.died == len(deaths)
    assert (run.burn_in, run._trace.kept) == (undisturbed.burn_in, undisturbed._trace.kept)
    assert digest(run) == digest(undisturbed)


def test_an_interrupted_run_is_read_and_goes_on_to_the_same_end(
    tmp_path: Path, undisturbed: ds.Run
) -> None:
    with pytest.raises(ds.RunFailed):
        sample(tmp_path / "run", FlakyPool(1, [14], kind="fatal"))
    half = ds.open(tmp_path / "run")
    made = min(half.manifest.n_committed)
    assert half.posterior.sizes["draw"] == made - half.burn_in > 0
    again = sample(tmp_path / "run", resume="auto")
    assert digest(again) == digest(undisturbed)


def test_a_finished_run_is_returned_as_it_is_and_goes_on_if_more_is_wanted(
    tmp_path: Path, undisturbed: ds.Run
) -> None:
    run = sample(tmp_path / "run")
    before = Path(run.store, "run.json").read_bytes()
    pool = FlakyPool()
    sample(tmp_path / "run", pool, resume="auto")
    assert pool.works == 0
    assert Path(run.store, "run.json").read_bytes() == before
    made = undisturbed.burn_in + undisturbed._trace.kept
    strict = EASY.replaced(relative_error=0.001)
    longer = sample(tmp_path / "run", resume="auto", gate=strict, max_draws=made + 60)
    assert longer.burn_in + longer._trace.kept == made + 60
    assert longer.manifest.reason == "the draw budget is used up"
    assert np.array_equal(everything(longer)[:, :made], everything(undisturbed))
    whole = sample(tmp_path / "whole", gate=strict, max_draws=made + 60)
    assert digest(longer) == digest(whole)


def test_a_run_that_ended_itself_can_be_made_longer_by_number(
    tmp_path: Path, undisturbed: ds.Run
) -> None:
    sample(tmp_path / "run")
    model, data = regression()
    made = undisturbed.burn_in + undisturbed._trace.kept
    with pytest.raises(StoreError, match=r"config\.draws: stored 'auto', now 50"):
        ds.resume(tmp_path / "run", model, data, squared_error, draws=50, pool=ds.SerialPool())
    longer = ds.resume(
        tmp_path / "run", model, data, squared_error, draws=made + 33, pool=ds.SerialPool(),
        quiet=True,
    )  # fmt: skip
    assert longer.burn_in + longer._trace.kept == made + 33
    assert np.array_equal(everything(longer)[:, :made], everything(undisturbed))


def test_a_burn_in_by_number_goes_with_draws_until_converged(tmp_path: Path) -> None:
    run = sample(tmp_path / "run", burn_in=30)
    assert run.burn_in == 30
    assert run.manifest.burn_in is None
    assert run.verdict.converged
    assert run.posterior.sizes["draw"] in (100, 150, 225, 338, 507, 761, 800)


def test_what_adapts_stops_inside_the_first_gate_round_and_is_burn_in(tmp_path: Path) -> None:
    adaptive = ds.SamplerConfig(name="rmsprop_sgld", lr=1e-3, localization=10.0)
    run = sample(tmp_path / "run", sampler=adaptive, thin=2)
    assert run.burn_in >= 25  # a quarter of the first gate round
    assert run.manifest.burn_in <= (run.burn_in + run._trace.kept) // 2
    other = EASY.replaced(every=200)
    with pytest.raises(StoreError, match=r"sampler\.freeze_after: stored '50', now '100'"):
        sample(tmp_path / "run", sampler=adaptive, thin=2, gate=other, resume="auto")
    late = ds.SamplerConfig(name="rmsprop_sgld", lr=1e-3, localization=10.0, freeze_after=101)
    with pytest.raises(ConfigError, match=r"half of the first gate round \* thin = 100 steps"):
        sample(tmp_path / "other", sampler=late, thin=2)


def auto_trace(path: Path) -> Trace:
    """60 draws of three chains, whose burn-in is to be chosen."""
    settings = ds.RunConfig(chains=3, draws=80, burn_in="auto")
    facts: dict[str, Any] = {"fingerprint": {}, "versions": {}, "n_committed": (0,) * 3}
    trace = Trace.create(path, Manifest(config=settings, variables=COUNTED, **facts))
    trace.record_facts(Facts(100, Posterior(3.0)), AtAnchor(None, 0.5, 0.25, np.zeros(8)))
    for first in range(0, 60, 7):
        trace.commit([counted(c, first, min(7, 60 - first)) for c in range(3)])
    return trace


def probe(trace: Trace, group: str = "posterior") -> list[float]:
    found: list[float] = inference_data.datasets(trace)[group]["probe_loss"][1].values.tolist()
    return found


def test_until_it_is_chosen_the_burn_in_is_half_and_then_what_the_manifest_says(
    tmp_path: Path,
) -> None:
    trace = auto_trace(tmp_path / "run")
    assert (trace.burn_in, trace.kept) == (30, 30)
    trace.choose_burn_in(12)
    again = Trace(tmp_path / "run")
    assert (again.burn_in, again.kept) == (12, 48)
    assert probe(again) == [1000.0 + t for t in range(12, 60)]
    assert probe(again, "warmup_posterior") == [1000.0 + t for t in range(12)]


def test_a_chosen_burn_in_is_written_out_when_the_run_is_sealed(tmp_path: Path) -> None:
    trace = auto_trace(tmp_path / "run")
    trace.choose_burn_in(12)
    trace.seal("finished", "converged", 50, 1.0)
    tree = xr.open_datatree(tmp_path / "run/trace.zarr", engine="zarr", consolidated=False)
    assert tree["posterior"]["probe_loss"][1].values.tolist() == [1000.0 + t for t in range(12, 50)]
    assert tree["warmup_posterior"]["probe_loss"][1].values.tolist() == [
        1000.0 + t for t in range(12)
    ]
    assert tree["posterior"]["draw"].values.tolist() == list(range(38))
    for found in (trace, Trace(tmp_path / "run")):
        assert (found.burn_in, found.kept) == (12, 38)
        assert probe(found) == [1000.0 + t for t in range(12, 50)]


def test_a_sealed_run_goes_on_where_it_was_and_may_choose_again(tmp_path: Path) -> None:
    trace = auto_trace(tmp_path / "run")
    trace.choose_burn_in(12)
    trace.seal("finished", "converged", 50, 1.0)
    longer = trace.manifest.config.replaced(draws=200)
    again = Trace(tmp_path / "run")
    assert not again.finished(longer)
    again.reopen(longer, 2)
    assert again.committed == (50, 50, 50)
    again.commit([counted(c, 50, 100) for c in range(3)])
    again.choose_burn_in(70)
    again.seal("finished", "converged", 150, 2.0)
    found = Trace(tmp_path / "run")
    assert probe(found) == [1000.0 + t for t in range(70, 150)]
    assert probe(found, "warmup_posterior") == [1000.0 + t for t in range(70)]


@pytest.mark.parametrize("step", ["split", "_update", "resize"])
def test_a_seal_that_is_cut_short_leaves_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    trace = auto_trace(tmp_path / "run")
    trace.choose_burn_in(12)

    def dies(*args: object, **fields: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trace if step == "_update" else trace.narrow, step, dies)
    with pytest.raises(KeyboardInterrupt):
        trace.seal("finished", "converged", 50, 1.0)
    found = Trace(tmp_path / "run")
    assert probe(found)[:38] == [1000.0 + t for t in range(12, 50)]
    assert probe(found, "warmup_posterior") == [1000.0 + t for t in range(12)]
    found.reopen(found.manifest.config, 2)
    assert set(found.committed) == {50 if step == "resize" else 60}
    found.choose_burn_in(12)
    found.seal("finished", "converged", 50, 1.0)
    assert Trace(tmp_path / "run").finished(found.manifest.config)
    assert probe(Trace(tmp_path / "run")) == [1000.0 + t for t in range(12, 50)]
