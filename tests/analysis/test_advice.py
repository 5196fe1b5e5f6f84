"""What a verdict advises: the lever that applies, never its opposite, and a call that does it."""

import itertools
import math
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import distsampler as ds
from distsampler import recipe
from distsampler.analysis import advice, bias
from distsampler.analysis.advice import (
    Advice,
    Criterion,
    Failure,
    Lever,
    Situation,
    advise,
    changed,
)
from distsampler.analysis.diagnosis import Diagnosis
from distsampler.analysis.drift import Outlier
from distsampler.analysis.error_budget import ErrorBudget
from distsampler.errors import StepTooLargeWarning
from distsampler.facts import Facts, Law, Posterior
from tests.problems import config, regression, squared_error

LR, BATCH, N, DRAWS = 1e-3, 16, 1000, 600
FACTS = Facts(N, Posterior(50.0, 10.0), LR, Law("sgld", 4.0))
CONFIG = config(draws=DRAWS, batch_size=BATCH)
AUTO = config(draws="auto", max_draws=DRAWS, batch_size=BATCH)
STEEP, MILD = (bias.Steepness(LR, 4.0, share, 1.0) for share in (0.85, 0.02))
STORE = "runs/my digits"


def fails(*criteria: Criterion, factor: float = 28.0) -> tuple[Failure, ...]:
    """Failures, of which the last needs most draws."""
    factors = [1.0 if c in NOT_BY_DRAWS else factor / 2 for c in criteria[:-1]]
    factors.append(1.0 if criteria[-1] in NOT_BY_DRAWS else factor)
    each = zip(criteria, factors, strict=True)
    return tuple(Failure(c, f"{c} fails", 1.0, 2.0, times) for c, times in each)


NOT_BY_DRAWS = (Criterion.CHAINS, Criterion.MOVING, Criterion.BOTH_SIDES, Criterion.SCALE)
DIAGNOSIS = Diagnosis(2, DRAWS, ())
ENDED = Situation(CONFIG, FACTS, 10, STORE, status="finished")


def hot(heat: float = 0.0, step: float = 0.0) -> ErrorBudget:
    """A budget whose biases are these shares of the LLC."""
    return ErrorBudget(0.1, 0.1, step * 5, heat * 5, 0.0, 0.0, 0.0, llc=5.0)


CASES: dict[str, tuple[tuple[Failure, ...], Diagnosis, Situation, tuple[Lever, ...], str]] = {
    "R-hat": (fails(Criterion.R_HAT), DIAGNOSIS, ENDED, (Lever.DRAWS,),
              f"ds.resume('{STORE}', model, data, loss, draws=17000)"),
    "ESS in the bulk": (fails(Criterion.ESS_BULK, factor=2.3), DIAGNOSIS, ENDED, (Lever.DRAWS,),
                        "about 2.3 times the draws, 1400 in place of 600"),
    "ESS in the tail": (fails(Criterion.ESS_TAIL, factor=2.3), DIAGNOSIS, ENDED, (Lever.DRAWS,),
                        "or, in a new run, chains=5"),
    "a drift that ends": (fails(Criterion.DRIFT, factor=2), replace(DIAGNOSIS, settled=90), ENDED,
                          (Lever.BURN_IN, Lever.DRAWS), "burn_in=100, 90 draws more"),
    "a drift that goes on": (fails(Criterion.DRIFT, factor=2), replace(DIAGNOSIS, settled=300),
                             ENDED, (Lever.DRAWS,), "draws=1200"),
    "a chain apart": (fails(Criterion.R_HAT, factor=2),
                      replace(DIAGNOSIS, outliers=(Outlier(1, "probe_loss", 9.0),)), ENDED,
                      (Lever.LOOK, Lever.DRAWS), "whether chain 1 is stuck"),
    "constant": (fails(Criterion.MOVING), DIAGNOSIS, ENDED, (Lever.LOOK,), "restrict_to"),
    "constant since the step was too large": (
        fails(Criterion.MOVING), DIAGNOSIS, replace(ENDED, step=STEEP), (Lever.LR, Lever.THIN),
        "lower sampler.lr from 0.001 to 0.00012"),
    "one chain": (fails(Criterion.CHAINS), replace(DIAGNOSIS, chains=1),
                  replace(ENDED, config=config(chains=1)), (Lever.CHAINS,), "chains=4"),
    "a chain was lost": (fails(Criterion.CHAINS), replace(DIAGNOSIS, chains=1),
                         replace(ENDED, lost={1: "chain 1 failed: ZeroDivisionError\n.."}),
                         (Lever.LOOK,), "retired chain 1: chain 1 failed: ZeroDivisionError"),
    "a chain diverged": (fails(Criterion.CHAINS, Criterion.LENGTH, factor=2),
                         Diagnosis(1, 50, ()),
                         replace(ENDED, status="failed", lost={1: "left"}, diverged={1: math.nan}),
                         (Lever.LR, Lever.THIN), "lower sampler.lr from 0.001 to 0.0005"),
    "too few draws": (fails(Criterion.LENGTH, factor=2), Diagnosis(2, 50, ()),
                      replace(ENDED, status="interrupted"), (Lever.CONTINUE,),
                      f"continue it: 50 of its 600 draws are judged so far: ds.resume('{STORE}'"),
    "too few were asked for": (fails(Criterion.LENGTH, factor=2), Diagnosis(2, 50, ()),
                               replace(ENDED, config=config(draws=50)), (Lever.DRAWS,),
                               "draws=100"),
    "under way": (fails(Criterion.LENGTH, factor=2), Diagnosis(2, 50, ()),
                  replace(ENDED, status="running"), (Lever.CONTINUE,), "wait for its end"),
    "a step too large": (fails(Criterion.R_HAT), DIAGNOSIS, replace(ENDED, step=STEEP),
                         (Lever.LR, Lever.THIN, Lever.DRAWS),
                         "config.replaced(thin=25, draws=17000, sampler=config.sampler.replaced("
                         "lr=0.00012))"),
    "heat": (fails(Criterion.ESS_BULK), DIAGNOSIS, replace(ENDED, budget=hot(heat=0.3)),
             (Lever.BATCH_SIZE, Lever.DRAWS), "raise batch_size from 16 to 96"),
    "more heat than all data can cure": (
        fails(Criterion.ESS_BULK), DIAGNOSIS, replace(ENDED, budget=hot(heat=5.0)),
        (Lever.LR, Lever.DRAWS), "lower sampler.lr from 0.001 to 1e-05"),
    "a step too large that heats too": (
        fails(Criterion.R_HAT), DIAGNOSIS, replace(ENDED, step=STEEP, budget=hot(heat=2.0)),
        (Lever.LR, Lever.THIN, Lever.BATCH_SIZE, Lever.DRAWS), "raise batch_size from 16 to 77"),
    "discretisation": (fails(Criterion.ESS_BULK), DIAGNOSIS, replace(ENDED, budget=hot(step=0.2)),
                       (Lever.LR, Lever.THIN, Lever.DRAWS), "from 0.001 to 0.00025"),
    "a budget used up": (fails(Criterion.ESS_BULK), DIAGNOSIS,
                         replace(ENDED, config=AUTO, burn_in=0), (Lever.MAX_DRAWS,),
                         "max_draws=17000"),
    "an LLC of zero": (fails(Criterion.SCALE), DIAGNOSIS, ENDED, (Lever.GATE,),
                       "gate=config.gate.replaced(relative_error=None)"),
    "an LLC of zero, without end": (fails(Criterion.SCALE), DIAGNOSIS, replace(ENDED, config=AUTO),
                                    (Lever.GATE,), "loss, draws=600)"),
    "flat directions": (fails(Criterion.R_HAT), DIAGNOSIS, ENDED, (Lever.DRAWS,),
                        "sampler.localization=22 in place of 10, with which flat directions relax "
                        "20 times within these draws, not 9 times; its price: another posterior"),
    "room for a larger step": (fails(Criterion.R_HAT), DIAGNOSIS, replace(ENDED, step=MILD),
                               (Lever.DRAWS,), "sampler.lr=0.005, for which the curvature"),
    "from a file": (fails(Criterion.R_HAT), DIAGNOSIS, replace(ENDED, from_file=True),
                    (Lever.DRAWS,), f"distsampler resume '{STORE}' --set draws=17000"),
    "from a file, anew": (fails(Criterion.R_HAT), DIAGNOSIS,
                          replace(ENDED, from_file=True, step=STEEP),
                          (Lever.LR, Lever.THIN, Lever.DRAWS),
                          "distsampler run CONFIG.yaml --set sampler.lr=0.00012 --set thin=25 "
                          "--set draws=17000 --store NEW"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_levers_are_those_that_apply(name: str) -> None:
    failures, diagnosis, about, levers, words = CASES[name]
    to_do = advise(failures, diagnosis, about)
    assert to_do.levers == levers, str(to_do)
    assert words in str(to_do)


def situations() -> list[tuple[tuple[Failure, ...], Situation]]:
    """Combinations of what can fail and what else can be known, a part of them."""
    criteria = [*itertools.combinations(Criterion, 1), *itertools.combinations(Criterion, 3)]
    budgets = (None, hot(), hot(0.3), hot(9.0), hot(0.3, 0.3))
    lost: dict[str, Any] = {"lost": {1: "diverged"}, "diverged": {1: 2e-4}}
    known = [
        replace(ENDED, step=step, budget=parts, config=settings, status=status, **more)
        for step in (None, MILD, STEEP)
        for parts in budgets
        for settings in (CONFIG, AUTO)
        for status in ("finished", "interrupted", "failed")
        for more in ({}, lost)
    ]
    every = itertools.product(criteria, (1.2, 60.0), known)
    return [
        (fails(*kinds, factor=factor), about)
        for kinds, factor, about in itertools.islice(every, 0, None, 43)
    ]


def test_no_lever_contradicts_another_and_the_factor_is_the_largest() -> None:
    for failures, about in situations():
        to_do = advise(failures, DIAGNOSIS, about)
        assert str(to_do)
        every = [*to_do.measures, *to_do.alternatives]
        too_large = bool(about.diverged) or (about.step is not None and about.step.too_large)
        for measure in every:
            now = changed(about.config, measure.changes)  # valid
            lr = measure.changes.get("sampler.lr", LR)
            assert lr <= LR or (not too_large and measure in to_do.alternatives), str(to_do)
            assert not (too_large and measure.lever is Lever.LOCALIZATION)
            assert now.thin >= about.config.thin
        if too_large:
            assert Lever.LR in to_do.levers
        if {Lever.LR, Lever.BATCH_SIZE} & {*to_do.levers}:
            assert not to_do.alternatives, "nothing else mends a biased step"
        fields = [name for measure in to_do.measures for name in measure.changes]
        assert len(fields) == len(set(fields)), "a field is changed once"
        if Lever.LOOK not in to_do.levers:
            assert to_do.factor == max(failure.factor for failure in failures)
        for measure in to_do.measures:
            if measure.lever in (Lever.DRAWS, Lever.MAX_DRAWS):
                assert measure.changes[str(measure.lever)] >= to_do.factor * DRAWS
        lengths = {"draws", "max_draws", "gate.every", "gate.relative_error"}
        assert to_do.new_run == bool({*fields} - lengths) or fields == ["gate.relative_error"]


def test_a_sampler_that_adapts_does_not_go_on_where_its_adaptation_would_be_longer() -> None:
    auto = config(draws=DRAWS, burn_in="auto")
    unknown = replace(ENDED, config=auto, burn_in=0, facts=replace(FACTS, law=None))
    assert advise(fails(Criterion.R_HAT), DIAGNOSIS, unknown).new_run
    for about in (replace(unknown, facts=FACTS), replace(unknown, config=CONFIG)):
        assert not advise(fails(Criterion.R_HAT), DIAGNOSIS, about).new_run


def test_the_command_sets_what_the_measures_change() -> None:
    about = replace(ENDED, from_file=True, step=STEEP)
    to_do = advise(fails(Criterion.R_HAT), DIAGNOSIS, about)
    words = shlex.split(to_do.call)
    fields = CONFIG.model_dump(mode="json")
    for change in (words[i + 1] for i, word in enumerate(words) if word == "--set"):
        recipe.set_field(fields, change)
    asked = {k: v for measure in to_do.measures for k, v in measure.changes.items()}
    assert ds.RunConfig(**fields).model_dump() == changed(CONFIG, asked).model_dump()


def test_nothing_is_advised_where_nothing_fails() -> None:
    assert advise((), DIAGNOSIS, replace(ENDED, step=STEEP)) == Advice()
    assert not str(Advice())


# On real runs


def sampled(path: Path, settings: ds.RunConfig) -> ds.Run:
    """A run of the regression in this process."""
    return ds.sample(
        *regression(), squared_error, settings,
        store=path / "run", pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip


def follow(to_do: Advice, path: Path, settings: ds.RunConfig) -> ds.Run:
    """Make the call that is advised, to the letter, in this process."""
    model, data = regression()
    here: dict[str, Any] = {"pool": ds.SerialPool(), "quiet": True}
    ours = SimpleNamespace(resume=partial(ds.resume, **here), sample=partial(ds.sample, **here))
    names = {"ds": ours, "model": model, "data": data, "loss": squared_error, "config": settings}
    run = eval(to_do.call.replace("NEW", str(path / "new")), names)
    assert isinstance(run, ds.Run)
    return run


def test_a_run_that_is_too_short_converges_with_the_draws_that_are_advised(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"draws": 200, "burn_in": 10, "thin": 1, "watch": False}
    sampler = ds.SamplerConfig(lr=4e-3, localization=10.0)
    settings = config(sampler=sampler, gate=ds.GateConfig(rhat=1.2, ess=100), **fields)
    model, data = regression()
    run = ds.sample(
        model,
        data,
        squared_error,
        settings,
        store=tmp_path / "run",
        pool=ds.SerialPool(),
        quiet=True,
    )
    verdict = run.verdict
    kinds = {failure.criterion for failure in verdict.failures}
    assert {Criterion.ESS_BULK, Criterion.ESS_TAIL} <= kinds
    factor = verdict.to_do.factor
    assert factor >= settings.gate.ess / verdict.ess, "as the smallest ESS needs"
    assert f"{advice.times(factor)} times the draws" in verdict.advice
    with pytest.warns(ds.errors.NotConvergedWarning) as told:
        estimate = run.llc()
    assert str(told[0].message) == str(verdict)
    assert estimate.as_dict()["verdict"] == verdict.as_dict()
    longer = follow(verdict.to_do, tmp_path, settings)
    assert longer.store == run.store
    assert longer.verdict.converged, str(longer.verdict)


def test_a_run_whose_step_is_too_large_converges_with_what_is_advised(tmp_path: Path) -> None:
    _, data = regression()
    h = float(torch.linalg.eigvalsh(2 * data[0].T @ data[0] / len(data[0]))[-1])
    sampler = ds.SamplerConfig(lr=3.4 / (50 * h + 10), localization=10.0, nbeta=50.0)
    settings = config(
        sampler=sampler, draws=120, thin=1, batch_size=300, gate=ds.GateConfig(ess=200)
    )
    with pytest.warns(StepTooLargeWarning, match=r"lower sampler.lr from \S+ to \S+, in a new run"):
        run = sampled(tmp_path, settings)
    verdict = run.verdict
    assert not verdict.converged
    assert Lever.LR in verdict.to_do.levers
    lower = re.search(r"lower sampler.lr from (\S+) to (\S+);", verdict.advice)
    assert lower is not None
    assert float(lower[2]) < 0.2 * float(lower[1])
    assert "larger" not in verdict.advice
    again = follow(verdict.to_do, tmp_path, settings)
    assert again.verdict.converged, str(again.verdict)
    assert not any("the step is too large" in note for note in again.verdict.notes)


def test_a_run_that_failed_says_which_step_size_to_lower(tmp_path: Path) -> None:
    wild = config(sampler=ds.SamplerConfig(lr=1.0, localization=10.0), thin=1)
    with pytest.warns(StepTooLargeWarning), pytest.raises(ds.RunFailed) as failed:
        sampled(tmp_path, wild)
    run = ds.open(tmp_path / "run")
    assert "To do: lower sampler.lr from 1 to 0." in str(failed.value)
    assert run.verdict.advice in str(failed.value)
    assert run.verdict.status == "UNDETERMINED"
    lower = [m for m in run.verdict.to_do.measures if m.lever is Lever.LR]
    (event, *_) = [event for event in run.events if event["event"] == "retired"]
    assert lower[0].changes["sampler.lr"] <= event["gentle_lr"] <= 0.5
