"""The table of bars judges as it says: each bar can be met, and each can be missed."""

from typing import Any

import pytest

from scripts.certificate import bars


def made(count: int, **fields: Any) -> list[dict[str, Any]]:
    row = {
        "case": "a", "sampler": "sgld", "share": 0.1, "exact": 10.0, "expected": 11.0,
        "coefficient": 10.2, "estimate": 10.0, "z": 0.5, "verdict": "CONVERGED", "covered": True,
        "gradients": 100, "nan_runs": 0, "discretisation": 0.06, "heat": 0.05, "factor": 1.0,
        "how": "calibrated", "codimension": 20, "same": True, "killed": 1, "lost": 1,
    } | fields  # fmt: skip
    return [dict(row) for _ in range(count)]


def spread(count: int, **fields: Any) -> list[dict[str, Any]]:
    """With z as they are by chance: 95 of a hundred below 2."""
    rows = made(count, **fields)
    for i, row in enumerate(rows):
        row["z"] = 2.5 if i % 20 == 0 else 0.5
    return rows


BETTER = {
    "quadratic": lambda: spread(160, estimate=10.0, discretisation=0.06, heat=0.04),
    "crossing": lambda: made(10),
    "reduced rank": lambda: made(10),
    "nets 1K": lambda: [row for how in ("calibrated", "cooler", "published", "auto")
                        for row in made(30, how=how)],
    "nets 10K": lambda: [row for how in ("calibrated", "cooler", "published", "auto")
                         for row in made(10, how=how)],
    "rescaling": lambda: made(10) + made(1, factor=1e4, estimate=7.0, verdict="NOT_CONVERGED"),
    "dead weights": lambda: made(10, case="a, 1000 dead weights"),
    "honesty": lambda: made(100) + made(100, estimate=8.0, verdict="NOT_CONVERGED"),
    "coverage": lambda: made(380) + made(21, covered=False),
    "pools": lambda: made(3),
}  # fmt: skip
WORSE = {
    "quadratic": [made(160), spread(160, z=5.0, heat=0.0), spread(160, heat=0.0)],
    "crossing": [made(10, estimate=10.4), made(9) + made(1, estimate=None)],
    "reduced rank": [made(10, estimate=9.6), made(10, coefficient=12.0)],
    "nets 1K": [
        made(30, estimate=10.2),
        made(27) + made(3, estimate=12.0),
        made(30, nan_runs=1),
        made(30, coefficient=11.0),
        made(29) + made(1, estimate=10.4),
        made(30, how="auto", verdict="UNDETERMINED"),
    ],
    "nets 10K": [made(10, estimate=10.3)],
    "rescaling": [made(10, estimate=10.2), made(1, factor=1e4, estimate=7.0)],
    "dead weights": [made(10, case="dead", z=3.5), made(10, case="dead", verdict="NOT_CONVERGED")],
    "honesty": [made(100) + made(100, estimate=8.0)],
    "coverage": [made(400), made(300), made(420, verdict="UNDETERMINED"),
                 made(360) + made(40, covered=False)],
    "pools": [made(3, same=False), made(3, killed=0)],
}  # fmt: skip


@pytest.mark.parametrize("bar", BETTER)
def test_a_bar_that_is_reached_is_met(bar: str) -> None:
    results = {name: rows() for name, rows in BETTER.items()}
    lines = list(bars.JUDGES[bar](results[bar]))
    assert any(line.met for line in lines)
    assert not [line for line in lines if line.met is False], lines
    assert all(line.reached for line in lines)


MISSED = [(bar, i) for bar, cases in WORSE.items() for i in range(len(cases))]


@pytest.mark.parametrize(("bar", "number"), MISSED)
def test_a_bar_that_is_not_reached_is_missed(bar: str, number: int) -> None:
    assert any(line.met is False for line in bars.JUDGES[bar](WORSE[bar][number]))


def test_the_summary_is_markdown_and_met_only_if_all_is_there() -> None:
    results = {name: rows() for name, rows in BETTER.items()}
    text, met = bars.summary(results)
    assert met, text
    table = text.split("\n\n")[0].splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert "met" in table[2]
    text, met = bars.summary({**results, "pools": []})
    assert not met
    assert "not run" in text
    assert not bars.summary({**results, "pools": WORSE["pools"][0]})[1]


def test_a_net_that_is_off_is_named_with_what_a_chain_finds_near_its_start() -> None:
    rows = made(2) + made(1, case="1K net 28", estimate=11.5, codimension=23)
    text, _ = bars.summary({"nets 1K": rows})
    (note,) = [line for line in text.splitlines() if "has not left" in line]
    assert "1K net 28 +15.0% (11.5 against 10.0)" in note
    assert "has not left" not in bars.summary({"nets 1K": made(3)})[0]
