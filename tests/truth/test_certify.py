"""Certify tells a sampler that is right from one that is not, and says so in words and JSON."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest

from distsampler.errors import ConfigError
from distsampler.truth import networks, targets
from distsampler.truth.cases import SMALL_NET, Case, Course, cases
from distsampler.truth.certify import CaseRow, Certificate, certify, row

COURSE = Course(lr=6e-5, burn_in=60, draws=150, thin=10, batch_size=64, chains=2, probe=1024)
NUMBER = {"type": ["number", "null"]}
TEXTS = {"case": {}, "sampler": {}, "verdict": {}, "reason": {}, "conclusion": {}}
NUMBERS = ("exact", "exact_se", "expected", "allowed", "estimate", "se", "relative", "z", "seconds")
COUNTS = ("seed", "gradients", "evaluations", "nan_runs")
SCHEMA = {
    "type": "object",
    "required": [*TEXTS, *NUMBERS, *COUNTS, "interval", "holds", "discretisation", "heat"],
    "properties": {
        **{name: {"type": "string"} for name in TEXTS},
        **{name: NUMBER for name in NUMBERS},
        **{name: {"type": "integer"} for name in COUNTS},
        "interval": {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2},
        "holds": {"type": "boolean"},
        "law": {"type": "boolean"},
    },
}


def quadratic_case(**options: Any) -> Case:
    target = targets.quadratic(np.logspace(-1, 1, 400), variance=0.25, n=1024)
    config = COURSE.config(target, "lmsgld")
    sampler = config.sampler.replaced(**options)
    return Case(target, config.replaced(sampler=sampler))


@pytest.fixture(scope="module")
def right() -> CaseRow:
    return row(quadratic_case())


def test_a_sampler_that_is_right_holds(right: CaseRow) -> None:
    assert right.holds, str(Certificate((right,)))
    assert right.nan_runs == 0
    assert right.gradients == 2 * 210 * 10
    assert right.evaluations == 2 * 210 + 1
    assert right.exact < right.expected  # of the minibatches' heat


@pytest.mark.filterwarnings("ignore:noise_level")
def test_a_sampler_with_too_much_noise_fails() -> None:
    found = row(quadratic_case(noise_level=1.1))
    assert not found.holds
    assert found.z > 4
    assert not Certificate((found,)).holds


@pytest.mark.filterwarnings("ignore::distsampler.errors.StepTooLargeWarning")
def test_a_chain_that_leaves_for_infinity_is_a_row_that_fails() -> None:
    case = quadratic_case(lr=1e-2)
    law_of_a_stable_one = targets.Known(1.0)
    still = replace(case.target.known(law_of_a_stable_one), solve=lambda: law_of_a_stable_one)
    config = case.config.replaced(sampler=case.config.sampler.replaced(name="sghmc"))
    found = row(Case(still, config))
    assert (found.verdict, found.nan_runs, found.holds) == ("FAILED", 1, False)
    assert math.isnan(found.estimate)
    assert found.as_dict()["estimate"] is None


def test_a_row_that_is_too_noisy_to_tell_does_not_hold(right: CaseRow) -> None:
    assert not replace(right, se=0.2 * right.estimate).holds


def test_the_json_has_its_shape(right: CaseRow) -> None:
    found = json.loads(json.dumps(Certificate((right,)).as_dict(), allow_nan=False))
    assert found["holds"] is True
    jsonschema.validate(found["rows"][0], SCHEMA)


def test_the_table_has_a_line_a_row(right: CaseRow) -> None:
    lines = str(Certificate((right, right))).splitlines()
    assert lines[0].split()[:6] == ["case", "sampler", "exact", "law", "estimate", "z"]
    assert lines[1] == lines[2] != lines[3]
    assert lines[1].endswith(right.conclusion)
    for column in ("exact", "law", "estimate", "z", "converged"):
        assert any(line.startswith(f"{column}: ") for line in lines), column
    assert lines[-1] == "2 of 2 rows pass"


def test_a_row_ends_in_what_it_shows(right: CaseRow) -> None:
    exact = replace(right, law=False, expected=right.exact, estimate=right.exact)
    away = 5 * right.error
    for case, words in (
        (right, "pass: agrees with the law, and that with the exact LLC to 1%"),
        (replace(right, exact=right.expected / 1.08), r"pass: .*, which is 8\.0% above the exact"),
        (exact, "pass: agrees with the exact LLC"),
        (replace(exact, estimate=exact.exact + away, allowed=0.9), "pass: within the 90% of the"),
        (replace(exact, estimate=exact.exact - away), "FAIL: disagrees with the exact LLC: -5.0"),
        (replace(right, estimate=right.expected + away), r"FAIL: disagrees with the law: \+5\.0"),
        (replace(right, se=0.2 * right.estimate), "FAIL: it cannot tell: its error is 2"),
        (replace(right, nan_runs=1, reason="chain 1 diverged\nand"), "FAIL: .*: chain 1 diverged$"),
    ):
        assert re.match(words, case.conclusion), case.conclusion
        assert case.conclusion.startswith("pass") == case.holds


def test_a_sampler_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="sgldd"):
        certify(sampler="sgldd")


def test_every_sampler_gets_a_row_of_every_kind() -> None:
    names = {case.name for case in cases("sgnht", quick=True)}
    assert len(names) == 7
    assert all(case.config.sampler.name == "sgnht" for case in cases("sgnht", quick=True))
    assert len(list(cases(None, quick=False))) > 3 * len(names)


def test_your_own_cases_go_the_same_road() -> None:
    told: list[CaseRow] = []
    course = replace(SMALL_NET, burn_in=10, draws=20, thin=2)
    net = networks.unit_network((2, 2), 1, localization=5.0).known(targets.Known(2.0))
    found = certify(only=[Case(net, course.config(net, "sgld"))], say=told.append)
    assert found.rows == tuple(told)
    assert found.rows[0].case == net.name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quick_table_holds() -> None:
    found = certify(quick=True)
    assert found.holds, str(found)
