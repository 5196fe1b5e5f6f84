"""The bars: what the rows must show, the number reached, and whether it is met."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

Rows = list[dict[str, Any]]
BARS = (
    "quadratic", "crossing", "reduced rank", "nets 1K", "nets 10K", "rescaling", "dead weights",
    "honesty", "coverage", "pools",
)  # fmt: skip
CALIBRATED = {"calibrated": "calibrated", "cooler": "four times the batch and half the bias"}
CONVERGED = "CONVERGED"
RESAMPLES = 10_000  # of the bootstrap behind each interval


class Bar(NamedTuple):
    """One line of the table.

    Args:
        case: what was run.
        bar: what must hold.
        reached: the number, with its interval.
        met: whether it does; None: nothing to compare with, or nothing was run.
        runs: how many.
        gradients: of them all.
        nan: runs that left for infinity.
    """

    case: str
    bar: str
    reached: str
    met: bool | None
    runs: int = 0
    gradients: int = 0
    nan: int = 0


def summary(made: dict[str, Rows]) -> tuple[str, bool]:
    """The table in markdown, and whether every bar is met."""
    lines = [line for bar in BARS for line in JUDGES[bar](made.get(bar, []))]
    cells = [["case", "bar", "reached", "", "runs", "gradients", "NaN runs"]]
    cells.append(["---"] * len(cells[0]))
    words = {True: "met", False: "**missed**", None: ""}
    for line in lines:
        counts = [f"{line.runs:,}", f"{line.gradients:,}", str(line.nan)]
        cells.append([line.case, line.bar, line.reached, words[line.met], *counts])
    text = "\n".join("| " + " | ".join(row) + " |" for row in cells)
    notes = [*_steps_taken(made), *_strata(made)]
    met = all(line.met is not False for line in lines) and all(made.get(bar) for bar in BARS)
    return "\n\n".join([text, *notes]), met


def _line(case: str, bar: str, rows: Rows, judged: tuple[str, bool | None]) -> Bar:
    counts = (sum(row[key] for row in rows) for key in ("gradients", "nan_runs"))
    reached, met = judged if rows else ("not run", None)
    return Bar(case, bar, reached, met, len(rows), *counts)


def _quadratic(rows: Rows) -> Iterator[Bar]:
    case = "quadratic grid, 4 step sizes, SGLD and LMSGLD, heat corrected or not"
    z = np.abs([math.inf if row["z"] is None else row["z"] for row in rows])
    reached = f"largest {z.max(initial=0):.1f}; {share(z < 2)} below 2" if rows else ""
    good = bool((z < 4).all() and 0.88 <= (z < 2).mean() <= 0.99) if rows else None
    bar = "abs(z) against the closed form: all below 4, 88-99 % below 2"
    yield _line(case, bar, rows, (reached, good))
    cells = list(groups(rows, "sampler", "share"))
    off = {name: _prediction(cell) for name, cell in cells}
    known = {name: value for name, value in off.items() if value is not None}
    if known:
        worst = max(known, key=lambda name: abs(known[name]))
        near = sum(abs(value) <= 0.05 for value in known.values())
        text = f"{near} of {len(off)} cells; worst {known[worst]:+.1%} ({worst})"
        judged = text, near == len(off)
    else:
        judged = "no prediction", None
    yield _line("the same", "the predicted bias within 5 % of the true one", rows, judged)


def _prediction(rows: Rows) -> float | None:
    """Predicted bias over the true one, less 1, in the mean over seeds."""
    parts = [(row["discretisation"], row["heat"], row["estimate"]) for row in rows]
    if any(None in part for part in parts):
        return None
    predicted = float(np.mean([(a + b) * estimate for a, b, estimate in parts]))
    return predicted / (rows[0]["expected"] - rows[0]["exact"]) - 1


def _crossing(rows: Rows) -> Iterator[Bar]:
    for name, cell in groups(rows, "case") or [("normal crossings", [])]:
        yield _line(name, "within 3 % of the exact value", cell, _mean_within(cell, 0.03))


def _reduced_rank(rows: Rows) -> Iterator[Bar]:
    for name, cell in groups(rows, "case") or [("reduced rank", [])]:
        yield _line(name, "within 3 % of Gibbs", cell, _mean_within(cell, 0.03))
        bar = "within 10 % of lambda"
        yield _line(name, bar, cell, _mean_within(cell, 0.10, "coefficient"))


def _rescaling(rows: Rows) -> Iterator[Bar]:
    near = [row for row in rows if row["factor"] <= 10]
    for name, cell in groups(near, "case") or [("rescaled by c in 0.1 .. 10", [])]:
        yield _line(name, "within 1 % of its own Gibbs value", cell, _mean_within(cell, 0.01))
    far = [row for row in rows if row["factor"] > 10]
    wrong = [r for r in far if r["verdict"] == CONVERGED and not _near(r, 0.03)]
    said = ", ".join(f"c={r['factor']:g} {_percent(r)} {r['verdict']}" for r in far)
    bar = "right, or refused, or unconverged with the reason"
    yield _line("rescaled by c up to 1e4", bar, far, (said, not wrong))


def _dead_weights(rows: Rows) -> Iterator[Bar]:
    dead = [row for row in rows if "dead" in row["case"]]
    z = [math.inf if row["z"] is None else abs(row["z"]) for row in dead]
    converged = sum(row["verdict"] == CONVERGED for row in dead)
    judged = "not run", None
    if dead:
        judged = (
            f"largest {max(z):.1f}; {converged} of {len(dead)} CONVERGED",
            max(z) < 3 and converged == len(dead),
        )
    yield _line("1,000 dead weights added", "abs(z) < 3, and CONVERGED", dead, judged)


def _nets(kind: str, middle: float, tail: float) -> Callable[[Rows], Iterator[Bar]]:
    def judge(rows: Rows) -> Iterator[Bar]:
        ways = defaultdict(list, groups(rows, "how"))
        for how, settings in CALIBRATED.items():
            fixed, case = ways[how], f"deep linear nets {kind}, {settings}, 10,000 steps"
            bar = f"median error <= {middle:.1%}, 95th percentile <= {tail:.0%}"
            yield _line(case, bar, fixed, _median_and_tail(fixed, middle, tail))
            yield _line(case, "all CONVERGED within 3 %", fixed, _converged(fixed, 0))
            judged = _of_coefficient(fixed)
            yield _line(case, "median against lambda <= 4 %", fixed, judged)
            nan = sum(row["nan_runs"] for row in fixed)
            yield _line(case, "no NaN", fixed, (f"{nan} runs", nan == 0))
        old = ways["published"]
        case = f"the same {kind} nets, published settings and loss (mean over outputs)"
        yield _line(case, "beside it", old, (_median_and_tail(old, 1, 1)[0], None))
        auto = ways["auto"]
        least = math.ceil(2 * len(auto) / 3) if kind == "10K" else 20
        case = f'the same {kind} nets, draws="auto" up to 100,000 steps'
        bar = f"at least {least} CONVERGED, all within 3 %"
        yield _line(case, bar, auto, _converged(auto, least))

    return judge


def _median_and_tail(rows: Rows, middle: float, tail: float) -> tuple[str, bool | None]:
    if not rows:
        return "not run", None
    errors = _errors(rows)
    median, high = np.median(errors), np.percentile(errors, 95)
    low, up = _bootstrap(errors, np.median)
    text = (
        f"{median:.1%} ({low:.1%} to {up:.1%}), {high:.1%}, worst {errors.max():.1%}"
        if np.isfinite(errors).all()
        else f"{median:.1%}, {high:.1%}: some are NaN"
    )
    return text, bool(median <= middle and high <= tail)


def _converged(rows: Rows, least: int) -> tuple[str, bool | None]:
    good = [row for row in rows if row["verdict"] == CONVERGED]
    off = [row for row in good if not _near(row, 0.03)]
    worst = _errors(good).max(initial=0.0)
    text = f"{len(good)} of {len(rows)} CONVERGED, the worst of them {worst:.1%}"
    return text, len(good) >= least and not off


def _of_coefficient(rows: Rows) -> tuple[str, bool | None]:
    errors = np.array([_off(row, "coefficient") for row in rows])
    if not rows:
        return "not run", None
    low, high = _bootstrap(errors, np.median)
    return f"{np.median(errors):.1%} ({low:.1%} to {high:.1%})", bool(np.median(errors) <= 0.04)


def _honesty(rows: Rows) -> Iterator[Bar]:
    off = [row for row in rows if not _near(row, 0.10)]
    caught = np.array([row["verdict"] != CONVERGED for row in off])
    reached = f"{share(caught)} of {len(off)} runs that are off" if off else "none is off"
    judged = reached, bool(caught.mean() >= 0.95) if off else None
    bar = "at least 95 % of those off by more than 10 % are not CONVERGED"
    yield _line("honesty: runs cut short", bar, rows, judged)


def _coverage(rows: Rows) -> Iterator[Bar]:
    alarms = np.array([row["verdict"] != CONVERGED for row in rows])
    judged = share(alarms), bool(alarms.mean() <= 0.05) if rows else None
    yield _line("honesty: long runs", "at most 5 % false alarms", rows, judged)
    good = [row for row in rows if row["verdict"] == CONVERGED]
    covered = np.array([row["covered"] for row in good])
    judged = share(covered), bool(len(good) >= 400 and 0.92 <= covered.mean() <= 0.98)
    bar = "95 % intervals contain the exact value in 92-98 % of 400 CONVERGED runs"
    yield _line("coverage", bar, good, judged)


def _pools(rows: Rows) -> Iterator[Bar]:
    same = [row["same"] and row["killed"] and row["lost"] for row in rows]
    judged = f"{sum(map(bool, same))} of {len(rows)} to the last bit", all(same)
    yield _line("RayPool, an actor killed", "same numbers", rows, judged)


def _steps_taken(made: dict[str, Rows]) -> Iterator[str]:
    """The steps that each net took until it converged."""
    for bar in ("nets 1K", "nets 10K"):
        rows = [row for row in made.get(bar, []) if row["how"] == "auto"]
        if rows:
            yield f'Steps a chain of {bar}, draws="auto": ' + ", ".join(map(_taken, rows))


def _strata(made: dict[str, Rows]) -> Iterator[str]:
    """Which nets are off, and what a chain would find there that had not left w*."""
    for bar in ("nets 1K", "nets 10K"):
        rows = [row for row in made.get(bar, []) if row["how"] == "calibrated"]
        off = [row for row in rows if not _near(row, 0.05)]
        if off:
            yield (
                f"{bar} that are off by more than 5 %, with the LLC of a chain that has not left "
                "w*, half the codimension of the set of zero loss there, against the exact one: "
                + ", ".join(map(_stuck, off))
            )


def _stuck(row: dict[str, Any]) -> str:
    near = row["codimension"] / 2
    return f"{row['case']} {_percent(row)} ({near:g} against {row['exact']:.1f})"


def _taken(row: dict[str, Any]) -> str:
    mark = "" if row["verdict"] == CONVERGED else ", not CONVERGED"
    return f"{row['gradients'] // 4:,} ({_percent(row)}{mark})"


def _mean_within(rows: Rows, bound: float, of: str = "exact") -> tuple[str, bool | None]:
    """Whether the mean over seeds, with its 95 % interval, lies within a bound."""
    errors = np.array([_relative(row, of) for row in rows])
    if len(errors) < 2:
        return "too few runs", None
    if not np.isfinite(errors).all():
        return f"{np.isinf(errors).sum()} of {len(errors)} are NaN", False
    mean, half = errors.mean(), 1.96 * errors.std(ddof=1) / math.sqrt(len(errors))
    text = f"{mean:+.2%} +- {half:.2%}, worst seed {np.abs(errors).max():.1%}"
    return text, bool(abs(mean) + half <= bound)


def _relative(row: dict[str, Any], of: str = "exact") -> float:
    """Estimate over what it should be, less 1; NaN is infinitely far."""
    return math.inf if row["estimate"] is None else row["estimate"] / row[of] - 1


def _off(row: dict[str, Any], of: str = "exact") -> float:
    return abs(_relative(row, of))


def _near(row: dict[str, Any], bound: float) -> bool:
    return _off(row) <= bound


def _errors(rows: Rows) -> np.ndarray:
    return np.array([_off(row) for row in rows])


def _percent(row: dict[str, Any]) -> str:
    return f"{_relative(row):+.1%}"


def groups(rows: Rows, *keys: str) -> list[tuple[str, Rows]]:
    """The rows by what they share, in their order."""
    cells: dict[str, Rows] = {}
    for row in rows:
        cells.setdefault(" ".join(f"{row[key]}" for key in keys), []).append(row)
    return list(cells.items())


def share(hits: Iterable[bool]) -> str:
    """A share with its 95 % interval (Wilson 1927)."""
    values = np.array(list(hits), float)
    if not len(values):
        return "none"
    n, p, z = len(values), values.mean(), 1.96
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return f"{p:.1%} ({middle - half:.1%} to {middle + half:.1%})"


def _bootstrap(values: np.ndarray, statistic: Callable[..., Any]) -> tuple[float, float]:
    """A 95 % interval: percentiles of the statistic over resamples."""
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(statistic(values[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


JUDGES: dict[str, Callable[[Rows], Iterator[Bar]]] = {
    "quadratic": _quadratic,
    "crossing": _crossing,
    "reduced rank": _reduced_rank,
    "nets 1K": _nets("1K", 0.015, 0.10),
    "nets 10K": _nets("10K", 0.02, 0.12),
    "rescaling": _rescaling,
    "dead weights": _dead_weights,
    "honesty": _honesty,
    "coverage": _coverage,
    "pools": _pools,
}
