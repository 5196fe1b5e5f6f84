"""Reading, diagnosis and estimators: without torch and ray, with either of ArviZ's data models."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray
from typer.testing import CliRunner

import distsampler as ds
from distsampler.analysis import diagnosis as diagnostics
from distsampler.analysis import error_budget, estimators
from distsampler.analysis import verdict as verdicts
from distsampler.analysis.advice import Situation
from distsampler.cli import app
from distsampler.draws import AtAnchor
from distsampler.errors import ConfigError, NotConverged, NotConvergedWarning, StoreError
from distsampler.facts import Facts, Posterior
from distsampler.store.trace import Trace
from tests.stores import NBETA, N, autoregressive, make_run


@pytest.fixture(scope="module")
def good() -> ds.Run:
    return make_run(autoregressive(4, 2020, 0.5), noise=0.05)


def test_torch_and_ray_are_not_needed() -> None:
    code = (
        "import sys, distsampler.analysis.run, distsampler.cli, distsampler.report.html;"
        "print([m for m in ('torch', 'ray', 'arviz') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_inference_data_is_what_arviz_reads(good: ds.Run) -> None:
    import arviz

    data = good.inference_data
    kind = arviz.InferenceData if arviz.__version__.startswith("0.") else xr.DataTree
    assert isinstance(data, kind)
    assert data["posterior"].sizes["draw"] == 2000
    assert data["warmup_posterior"].sizes["draw"] == 20
    assert float(data["constant_data"]["nbeta"]) == pytest.approx(NBETA)
    assert json.loads(data.attrs["config"])["chains"] == 4
    found = arviz.ess(data, var_names=["probe_loss"], method="bulk")
    assert float(found["probe_loss"]) == pytest.approx(good.diagnosis.rows[0].ess_bulk)


def test_r_hat_and_ess_of_independent_chains(good: ds.Run) -> None:
    assert good.verdict.converged
    assert good.verdict.status == "CONVERGED"
    assert 1.0 <= good.diagnosis.r_hat < 1.01
    row = good.diagnosis.rows[0]
    assert (row.name, row.gated) == ("probe_loss", True)
    exact = 4 * 2000 * (1 - 0.5) / (1 + 0.5)  # of an AR(1) process
    assert row.ess_bulk == pytest.approx(exact, rel=0.15)
    assert row.mcse == pytest.approx(row.sd / math.sqrt(row.ess_bulk), rel=0.1)


def test_minibatch_noise_does_not_make_chains_converge() -> None:
    """White noise hides that the chains disagree: the gate must not read it."""
    apart = autoregressive(4, 1020, 0.3) + np.array([[0.0], [0.0], [3.0], [3.0]])
    run = make_run(apart, noise=2.0)
    rows = {row.name: row for row in run.diagnosis.rows}
    assert rows["excess_loss"].r_hat < 1.01
    assert rows["excess_loss"].ess > 400
    assert run.verdict.status == "NOT_CONVERGED"
    assert "R-hat of" in run.verdict.reason
    assert run.verdict.advice


def test_a_small_ess_says_how_many_more_draws() -> None:
    run = make_run(autoregressive(4, 620, 0.9, seed=6))
    config = ds.RunConfig(gate=ds.GateConfig(rhat=1.5))
    verdict = verdicts.gate(replace(run.diagnosis, gate=config.gate), Situation(config))
    assert verdict.status == "NOT_CONVERGED"
    assert verdict.reason.startswith("bulk ESS of ")
    assert "times the draws" in verdict.advice


@pytest.mark.parametrize(
    ("slow", "sentence"),
    [
        (autoregressive(1, 500, 0.5), "at least 2 chains, got 1"),
        (autoregressive(4, 90, 0.5), "at least 100 draws a chain, got 70"),
        (np.zeros((4, 500)), "constant or NaN: probe_loss"),
    ],
)
def test_what_cannot_be_judged_is_undetermined(slow: NDArray[np.float64], sentence: str) -> None:
    run = make_run(slow)
    assert run.verdict.status == "UNDETERMINED"
    assert sentence in run.verdict.reason
    with pytest.raises(NotConverged, match="UNDETERMINED"):
        run.llc(on_unconverged="raise")
    with pytest.warns(NotConvergedWarning, match=sentence):
        assert not run.llc().converged


def test_nan_is_undetermined_never_converged() -> None:
    posterior = xr.Dataset(
        {
            name: (
                ("chain", "draw"),
                np.where(np.arange(400) == 7, np.nan, autoregressive(4, 400, 0)),
            )
            for name in ("probe_loss", "excess_loss")
        }
    )
    verdict = verdicts.gate(diagnostics.diagnose(posterior), Situation(ds.RunConfig()))
    assert verdict.status == "UNDETERMINED"


def test_the_llc_is_nbeta_times_the_mean_excess_loss(good: ds.Run) -> None:
    estimate = good.llc()
    excess = good.posterior["excess_loss"].values
    assert estimate.mean == pytest.approx(NBETA * excess.mean())
    assert estimate.per_chain == pytest.approx(NBETA * excess.mean(axis=1))
    assert (estimate.n, estimate.nbeta, estimate.localization) == (N, pytest.approx(NBETA), 5.0)
    assert estimate.interval[0] < NBETA * 0.1 < estimate.interval[1]
    text = str(estimate)
    for part in (
        "LLC 14.",
        "+-",
        "4 of 4 chains",
        "R-hat 1.0",
        "ESS ",
        "CONVERGED",
        "n 1000",
        "gamma 5",
    ):
        assert part in text


def test_the_error_covers_the_truth_as_often_as_it_says() -> None:
    """40 runs of known mean: |z| stays within what a standard error promises, and is no smaller."""
    z = []
    for seed in range(40):
        slow = autoregressive(4, 800, 0.8, seed)
        posterior = xr.Dataset(
            {name: (("chain", "draw"), slow) for name in ("probe_loss", "excess_loss")}
        )
        diagnosis = diagnostics.diagnose(posterior)
        error = error_budget.budget(posterior, 1.0, diagnosis).se
        z.append(slow.mean() / error)
    assert np.mean(np.abs(z) < 1.96) >= 0.875  # 95 % less four standard errors of that share
    assert 0.5 < np.std(z) < 1.3


def test_minibatch_noise_cannot_hide_a_slow_part_from_the_error() -> None:
    slow = autoregressive(4, 2020, 0.99, seed=3)
    quiet, noisy = make_run(slow), make_run(slow, noise=0.5)
    assert noisy.llc("ignore").se >= 0.99 * quiet.llc("ignore").se


def test_the_wbic_is_n_times_the_mean_loss_at_n_over_log_n(good: ds.Run) -> None:
    found = good.wbic()
    assert found.mean == pytest.approx(N * good.posterior["loss"].values.mean(), rel=1e-9)
    assert "WBIC" in str(found)
    assert "gamma 5" in str(found)
    hotter = make_run(autoregressive(2, 50, 0.5))
    Trace(hotter.store).record_facts(
        Facts(N, Posterior(3.0, 5.0)), AtAnchor(None, 0.5, 0.4, np.zeros(4))
    )
    with pytest.raises(ConfigError, match="needs nbeta = n / log n"):
        hotter.wbic("ignore")


def test_lost_chains_are_in_the_result() -> None:
    run = make_run(autoregressive(4, 1020, 0.2))
    Trace(run.store).retire(2, "chain 2 diverged at step 7")
    again = ds.open(run.store)
    estimate = again.llc("ignore")
    assert (estimate.chains, estimate.lost) == ((0, 1, 3), (2,))
    assert "3 of 4 chains" in str(estimate)
    assert again.lost_chains == {2: "chain 2 diverged at step 7"}
    assert json.loads(again.inference_data.attrs["lost_chains"]) == {
        "2": "chain 2 diverged at step 7"
    }


def test_what_goes_into_json_comes_out_again(good: ds.Run) -> None:
    for found in (good.llc().as_dict(), good.diagnosis.as_dict()):
        assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (12.3456, 0.234, "12.35 +- 0.23"),
        (1234.5, 56.7, "1234 +- 57"),
        (0.01234, 0.00056, "0.01234 +- 0.00056"),
        (math.nan, math.nan, "nan +- nan"),
    ],
)
def test_a_number_is_printed_to_two_digits_of_its_error(
    mean: float, error: float, text: str
) -> None:
    assert estimators.plus_minus(mean, error) == text


def test_what_prints_in_python_is_what_the_command_line_prints(good: ds.Run) -> None:
    refused = make_run(autoregressive(4, 620, 0.9, seed=6))
    for run in (good, refused):
        diagnosed, with_budget = (
            CliRunner().invoke(app, [*words, run.store]).output
            for words in (["diagnose"], ["llc", "--budget"])
        )
        budget = run.llc("ignore").budget
        assert diagnosed.startswith(f"{run.diagnosis}\n")
        assert str(run.verdict) in diagnosed
        assert str(budget) in with_budget
        assert (str(run.verdict) in with_budget) == (run is refused)
        for value in (run.diagnosis, budget):
            assert "\n" in str(value)
            assert "\n" not in repr(value)
            assert len(repr(value)) < 80


def test_all_outputs_say_what_the_verdict_says() -> None:
    run = make_run(autoregressive(4, 620, 0.9, seed=6))
    verdict = run.verdict
    assert verdict.to_do.call == f"ds.resume({run.store!r}, model, data, loss, draws=2500)"
    diagnosis = json.loads(CliRunner().invoke(app, ["diagnose", run.store, "--json"]).output)
    llc = json.loads(CliRunner().invoke(app, ["llc", run.store, "--json"]).output)
    told = verdict.as_dict()
    assert llc["verdict"] == told
    assert diagnosis["verdict"] == told.pop("status")
    assert {k: diagnosis[k] for k in told} == told
    page = Path(CliRunner().invoke(app, ["report", run.store]).output.strip()).read_text()
    for said in (verdict.reason, verdict.advice):
        assert escape(said) in page
    with pytest.raises(NotConverged) as raised:
        run.llc("raise")
    assert str(raised.value) == str(verdict)
    for failure in verdict.failures:
        assert f"not {'above' if 'ESS' in failure.criterion else 'below'}" in failure.reason


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no run\.json"):
        ds.open(tmp_path)


def test_the_report_needs_neither_torch_nor_ray(good: ds.Run) -> None:
    from distsampler.report.run_report import write

    text = Path(write(good)).read_text()
    assert text.count("<svg") == 6
    assert str(good.llc()) in text
    assert "://" not in text, "the page asks the net for something"
