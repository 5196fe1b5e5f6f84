"""``certify()``: samplers on targets whose LLC is known, by ordinary means, as a table.

A row holds if its estimate lies within four standard errors of the expected value, and the error is
small enough to tell. The expected value is that of the discretised chain where its law is known,
else the exact LLC, and then the case allows for the sampler's bias.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from distsampler.analysis.run import Run
from distsampler.chains.anchor_pass import BLOCK
from distsampler.errors import RunFailed
from distsampler.execution.pool import ChainPool, SerialPool
from distsampler.sampling.sample import sample
from distsampler.table import Column, Content, Table, failing
from distsampler.truth.cases import Case, cases

SIGMAS = 4.0
TELLING = 0.05  # the relative standard error above which a row can say nothing
SHOWN = 0.01  # bias of a law that is said, as a share of the exact LLC
COLUMNS = (
    Column("case", "label"),
    Column("sampler", "label"),
    Column("exact"),
    Column("law"),
    Column("estimate"),
    Column("z"),
    Column("off exact"),
    Column("converged", "label"),
    Column("conclusion", "label"),
)
LEGEND = f"""
case: a quadratic of d directions and gradient noise v; a normal crossing w1^2k1 w2^2k2; a deep
  linear network of these widths and rank r, its layers rescaled by c. t: nbeta.
exact: the LLC that a perfect sampler returns: a formula, an integral, or Gibbs sampling.
law: the LLC that this sampler has with this step and batch size, by the law of its discretised
  chain; "-" where that is not known. A + behind a sampler: the heat of minibatches is corrected.
estimate: what the run returns, +- one standard error. off exact: estimate / exact - 1.
z: the estimate less the law (less exact where there is none), in standard errors of both.
converged: what the run's own verdict says, without knowing the answer; a short run may be right
  before it can know that it is.
A row passes where z is below {SIGMAS:g} in size (without a law a few per cent are allowed beside,
  for the bias of the step), its error is below {TELLING:.0%}, and no chain diverged."""


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """Result of a case, its LLCs those of one copy; the defaults are those of a failed run."""

    case: str  # its name
    sampler: str  # its name; with a + where the heat is corrected
    seed: int  # seed of the run
    exact: float  # LLC that a perfect sampler returns
    exact_se: float  # standard error of ``exact``
    expected: float  # LLC that the discretised chain returns if its law is known, else ``exact``
    allowed: float  # relative error that is allowed beside chance
    law: bool  # whether ``expected`` is the law's
    seconds: float  # wall-clock time
    reason: str  # why the verdict is what it is, or why the run failed
    verdict: str = "FAILED"  # CONVERGED, NOT_CONVERGED, UNDETERMINED or FAILED
    estimate: float = math.nan  # LLC that the run estimates
    se: float = math.nan  # standard error of ``estimate``
    interval: tuple[float, float] = (math.nan, math.nan)  # nominal 95 % interval of ``estimate``
    gradients: int = 0  # minibatch gradients that all chains took
    evaluations: int = 0  # passes over the probe, and over the blocks of the anchor pass
    nan_runs: int = 1  # 1 if a chain diverged, which fails the row
    # predicted bias of the step size, relative to the estimate; None: unknown
    discretisation: float | None = None
    # predicted bias of minibatch noise, relative to the estimate; None: unknown
    heat: float | None = None

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
        """Whether the estimate is the expected one, and precise enough to tell."""
        margin = SIGMAS * self.error + self.allowed * self.expected
        near = abs(self.estimate - self.expected) <= margin
        return near and self.error <= TELLING * self.expected and not self.nan_runs

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers for JSON, NaN as None."""
        derived = {"relative": self.relative, "z": self.z, "holds": self.holds}
        fields = {**asdict(self), **derived, "conclusion": self.conclusion}
        fields["interval"] = [_finite(bound) for bound in self.interval]
        return {k: _finite(v) if isinstance(v, float) else v for k, v in fields.items()}

    def __str__(self) -> str:
        took = f"{self.seconds:4.0f} s  {self.case}, {self.sampler}"
        return f"{took}: {self.estimate:.4g}, {self.conclusion}"

    def cells(self) -> tuple[Content, ...]:
        """Return the row of a table, under ``COLUMNS``."""
        return (
            self.case,
            self.sampler,
            f"{self.exact:.4g}",
            f"{self.expected:.4g}" if self.law else "-",
            f"{self.estimate:.4g} +- {self.se:.2g}",
            f"{self.z:+.1f}",
            f"{self.relative:+.1%}",
            "yes" if self.verdict == "CONVERGED" else "no",
            failing(self.conclusion, not self.holds),
        )

    @property
    def conclusion(self) -> str:
        """What the row shows, in words."""
        return f"pass: {self._agreement}" if self.holds else f"FAIL: {self._fault}"

    @property
    def _agreement(self) -> str:
        if self.law:
            bias = self.expected / self.exact - 1
            if abs(bias) < SHOWN:
                return f"agrees with the law, and that with the exact LLC to {SHOWN:.0%}"
            side = "above" if bias > 0 else "below"
            return (
                f"agrees with the law, which is {abs(bias):.1%} {side} the exact LLC: bias of step "
                "and minibatches, expected"
            )
        if abs(self.z) <= SIGMAS:
            return "agrees with the exact LLC"
        return f"within the {self.allowed:.0%} of the exact LLC that the sampler's bias may make"

    @property
    def _fault(self) -> str:
        if self.nan_runs:
            return f"it ended without all its chains: {self.reason.splitlines()[0]}"
        if not self.error <= TELLING * self.expected:
            share = self.error / self.expected
            return f"it cannot tell: its error is {share:.1%} of the LLC, above {TELLING:.0%}"
        against = "the law" if self.law else "the exact LLC"
        return f"disagrees with {against}: {self.z:+.1f} standard errors"


@dataclass(frozen=True)
class Certificate:
    """A table of rows; ``print`` it.

    Args:
        rows: one row per case.
    """

    rows: tuple[CaseRow, ...]

    @property
    def holds(self) -> bool:
        """Whether every row holds."""
        return all(row.holds for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the table for JSON."""
        return {"holds": self.holds, "rows": [row.as_dict() for row in self.rows]}

    def __str__(self) -> str:
        table = Table(COLUMNS, [row.cells() for row in self.rows]).text()
        good = sum(row.holds for row in self.rows)
        return f"{table}\n{LEGEND}\n{good} of {len(self.rows)} rows pass"


def certify(
    *,
    sampler: str | None = None,
    quick: bool = False,
    pool: Callable[[], ChainPool] = SerialPool,
    only: Sequence[Case] | None = None,
    say: Callable[[CaseRow], None] | None = None,
) -> Certificate:
    """Run samplers on targets whose LLC is known.

    Args:
        sampler: name of a sampler to try on every target; None: each target has its own.
        quick: whether to run a few short cases of every kind, under three minutes on two cores.
        pool: makes the pool in which the chains of a case run.
        only: cases of your own in place of the table's.
        say: called with each row as soon as it is made.

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


def row(case: Case, pool: ChainPool | None = None, store: str | None = None) -> CaseRow:
    """Run one case.

    Args:
        case: what to run.
        pool: pool in which the chains run; None: in this process.
        store: run directory; None: a temporary one, removed afterwards.

    Raises:
        RunFailed: the run was interrupted.
    """
    if store is None:
        with tempfile.TemporaryDirectory(prefix="certify-") as folder:
            return row(case, pool, f"{folder}/run")
    began, target = time.monotonic(), case.target
    try:
        run = sample(
            target.model, target.data, target.loss, case.config, pool=pool or SerialPool(),
            quiet=True, store=store,
        )  # fmt: skip
    except RunFailed as failure:
        return _failed(case, time.monotonic() - began, str(failure))
    seconds = time.monotonic() - began
    if run.manifest.status == "interrupted":
        raise RunFailed(f"{case.name} was interrupted ({run.manifest.reason}): its row is not made")
    return replace(_failed(case, seconds, run.verdict.reason), **_results(case, run))


def _failed(case: Case, seconds: float, reason: str) -> CaseRow:
    """Return the row of a case whose run ended without a number."""
    exact, law = case.target.exact, case.target.law(case.config)
    sampler = case.config.sampler
    return CaseRow(
        case=case.name,
        sampler=sampler.name + "+" * sampler.correct_heat,
        seed=case.config.seed,
        exact=exact.mean,
        exact_se=exact.se,
        expected=(law or exact).mean,
        allowed=0.0 if law else case.allowed,
        law=law is not None,
        seconds=seconds,
        reason=reason,
    )


def _results(case: Case, run: Run) -> dict[str, Any]:
    """Return what a row says of a run that has ended with a number."""
    copies, estimate = case.target.copies, run.llc("ignore")
    draws, (low, high), budget = sum(run.manifest.n_committed), estimate.interval, estimate.budget
    return {
        "verdict": str(run.verdict.status),
        "estimate": estimate.mean / copies,
        "se": estimate.se / copies,
        "interval": (low / copies, high / copies),
        "gradients": draws * case.config.thin,
        "evaluations": draws + math.ceil(estimate.n / BLOCK),
        "nan_runs": int(bool(run.lost_chains) or not math.isfinite(estimate.mean)),
        "discretisation": budget.discretisation and budget.discretisation / estimate.mean,
        "heat": budget.heat and budget.heat / estimate.mean,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
