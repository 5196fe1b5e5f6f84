"""certify: samplers through the truth kit by the ordinary road (sample, gate, LLC), as a table.

A row holds if its estimate lies within four standard errors of what must come out, and the error
is small enough to tell. What must come out is the law of the discretised chain where there is one
(no allowance), else the exact LLC with the allowance that the case gives to the sampler's bias.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from distsampler.analysis.estimators import LLCEstimate
from distsampler.analysis.run import Run
from distsampler.chains.anchor_pass import BLOCK
from distsampler.errors import RunFailed
from distsampler.execution.pool import ChainPool, SerialPool
from distsampler.sampling.sample import sample
from distsampler.truth.cases import Case, cases
from distsampler.truth.targets import Known

SIGMAS = 4.0
TELLING = 0.05  # the relative standard error above which a row can say nothing
HEADINGS = (
    "case", "sampler", "exact", "estimate", "z", "error", "verdict", "gradients", "evaluations",
    "NaN runs", "",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What came of a case. LLCs are those of one copy.

    Args:
        case: its name.
        sampler: name; with a + where the heat is corrected.
        seed: of the run.
        exact: the LLC that a perfect sampler returns.
        exact_se: standard error of that.
        expected: what must come out: the law of the discretised chain, or the exact LLC.
        allowed: relative error that is allowed beside chance.
        estimate: of the run; NaN if it failed.
        se: its standard error.
        interval: its nominal 95 % interval.
        verdict: CONVERGED, NOT_CONVERGED, UNDETERMINED, or FAILED.
        reason: of the verdict.
        gradients: minibatch gradients that all chains took.
        evaluations: passes over the probe, and over the blocks of the anchor pass.
        nan_runs: 1 if a chain left for infinity, and with it this run's claim.
        seconds: of wall-clock time.
        discretisation: predicted bias of the step size, relative to the estimate; None: unknown.
        heat: predicted bias of minibatch noise, likewise.
    """

    case: str
    sampler: str
    seed: int
    exact: float
    exact_se: float
    expected: float
    allowed: float
    estimate: float
    se: float
    interval: tuple[float, float]
    verdict: str
    reason: str
    gradients: int
    evaluations: int
    nan_runs: int
    seconds: float
    discretisation: float | None = None
    heat: float | None = None

    @property
    def converged(self) -> bool:
        """Whether the verdict is CONVERGED."""
        return self.verdict == "CONVERGED"

    @property
    def relative(self) -> float:
        """``estimate / exact - 1``."""
        return self.estimate / self.exact - 1

    @property
    def error(self) -> float:
        """Standard error of the estimate and of the exact value together."""
        return math.hypot(self.se, self.exact_se)

    @property
    def z(self) -> float:
        """``(estimate - expected) / error``."""
        away = self.estimate - self.expected
        return away / self.error if self.error > 0 else math.nan

    @property
    def covered(self) -> bool:
        """Whether the interval contains the exact value."""
        return self.interval[0] <= self.exact <= self.interval[1]

    @property
    def holds(self) -> bool:
        """Whether the estimate is what must come out, and could have been told from another."""
        tells = self.error <= TELLING * self.expected
        near = abs(self.estimate - self.expected) <= self._margin
        return tells and near and not self.nan_runs

    @property
    def _margin(self) -> float:
        return SIGMAS * self.error + self.allowed * self.expected

    def as_dict(self) -> dict[str, Any]:
        """For JSON; NaN as None."""
        found = {**asdict(self), "relative": self.relative, "z": self.z, "holds": self.holds}
        found["interval"] = [_number(bound) for bound in self.interval]
        return {k: _number(v) if isinstance(v, float) else v for k, v in found.items()}

    def cells(self) -> tuple[str, ...]:
        """The row of a table, under ``HEADINGS``."""
        return (
            self.case,
            self.sampler,
            f"{self.exact:.4g}",
            f"{self.estimate:.4g} +- {self.se:.2g}",
            f"{self.z:+.1f}",
            f"{self.relative:+.1%}",
            self.verdict,
            f"{self.gradients:,}",
            f"{self.evaluations:,}",
            str(self.nan_runs),
            "holds" if self.holds else "FAILS",
        )


@dataclass(frozen=True)
class Certificate:
    """The rows of a table.

    Args:
        rows: one a case.
    """

    rows: tuple[Row, ...]

    @property
    def holds(self) -> bool:
        """Whether every row does."""
        return all(row.holds for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"holds": self.holds, "rows": [row.as_dict() for row in self.rows]}

    def __str__(self) -> str:
        table = [HEADINGS, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        held = sum(row.holds for row in self.rows)
        return "\n".join([*lines, f"{held} of {len(self.rows)} rows hold"])


def certify(
    *,
    sampler: str | None = None,
    quick: bool = False,
    pool: Callable[[], ChainPool] = SerialPool,
    only: Sequence[Case] | None = None,
    say: Callable[[Row], None] | None = None,
) -> Certificate:
    """Runs samplers over targets whose LLC is known.

    Args:
        sampler: name of the one to try on every target; None: each target has its own.
        quick: a few targets of every kind, short runs: under three minutes on two cores.
        pool: makes where the chains of a case run.
        only: cases of your own in place of those.
        say: told each row when it is there.

    Returns:
        The table; ``print`` it.

    Raises:
        ConfigError: there is no such sampler.

    Example:
        >>> print(certify(quick=True))  # doctest: +SKIP
    """
    rows = []
    for case in cases(sampler, quick) if only is None else only:
        rows.append(row(case, pool()))
        if say is not None:
            say(rows[-1])
    return Certificate(tuple(rows))


def row(case: Case, pool: ChainPool | None = None, store: str | None = None) -> Row:
    """Runs one case.

    Args:
        case: what to run.
        pool: where; None: in this process.
        store: the run directory; None: a temporary one, removed afterwards.

    Raises:
        RunFailed: the run was interrupted.
    """
    if store is None:
        with tempfile.TemporaryDirectory(prefix="certify-") as folder:
            return row(case, pool, f"{folder}/run")
    began = time.monotonic()
    target, config = case.target, case.config
    try:
        run = sample(
            target.model, target.data, target.loss, config, pool=pool or SerialPool(), quiet=True,
            store=store,
        )  # fmt: skip
    except RunFailed as failure:
        return failed(case, str(failure), time.monotonic() - began)
    if run.manifest.status == "interrupted":
        raise RunFailed(f"{case.name} was interrupted ({run.manifest.reason}): its row is not made")
    return of_run(case, run, time.monotonic() - began)


def of_run(case: Case, run: Run, seconds: float) -> Row:
    """The row of a case that has been run."""
    copies, estimate = case.target.copies, run.llc("ignore")
    draws = sum(run.manifest.n_committed)
    low, high = estimate.interval
    discretisation, heat = predicted(estimate)
    return replace(
        failed(case, run.verdict.reason, seconds),
        estimate=estimate.mean / copies,
        se=estimate.se / copies,
        interval=(low / copies, high / copies),
        verdict=str(run.verdict.status),
        gradients=draws * case.config.thin,
        evaluations=draws + math.ceil(estimate.n / BLOCK),
        nan_runs=int(bool(run.lost_chains) or not math.isfinite(estimate.mean)),
        discretisation=discretisation,
        heat=heat,
    )


def failed(case: Case, reason: str, seconds: float) -> Row:
    """The row of a case whose run ended without a number."""
    expected, allowed = _expected(case)
    return Row(
        case=case.name,
        sampler=_sampler(case),
        seed=case.config.seed,
        exact=case.target.exact.mean,
        exact_se=case.target.exact.se,
        expected=expected.mean,
        allowed=allowed,
        estimate=math.nan,
        se=math.nan,
        interval=(math.nan, math.nan),
        verdict="FAILED",
        reason=reason,
        gradients=0,
        evaluations=0,
        nan_runs=1,
        seconds=seconds,
    )


def predicted(estimate: LLCEstimate) -> tuple[float | None, float | None]:
    """The biases that a run predicts of itself (step size, minibatch noise), relative."""
    parts = (estimate.budget.discretisation, estimate.budget.heat)
    return parts[0] and parts[0] / estimate.mean, parts[1] and parts[1] / estimate.mean


def _expected(case: Case) -> tuple[Known, float]:
    """What must come out, and what is allowed beside chance."""
    law = case.target.law(case.config)
    return (case.target.exact, case.allowed) if law is None else (law, 0.0)


def _sampler(case: Case) -> str:
    sampler = case.config.sampler
    return sampler.name + "+" * sampler.correct_heat


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
