"""Can the number be trusted? The verdict on a diagnosis: why not, and what to do."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from distsampler.analysis import bias
from distsampler.analysis.advice import Advice, Criterion, Failure, Situation, advise, notes
from distsampler.analysis.diagnosis import Diagnosis, diagnose
from distsampler.analysis.error_budget import ErrorBudget, budget, relative_error
from distsampler.analysis.json_values import plain
from distsampler.draws import CURVATURE

MIN_CHAINS, MIN_DRAWS = 2, 100
LEAST = 2.0  # times the draws, at least, for chains that have not met or still drift
MARGIN = 1.1  # on what is needed: it is estimated


class Status(StrEnum):
    """What the diagnosis says."""

    CONVERGED = "CONVERGED"
    NOT_CONVERGED = "NOT_CONVERGED"
    UNDETERMINED = "UNDETERMINED"


@dataclass(frozen=True)
class Verdict:
    """Whether the number can be trusted, why, and what to do; all outputs say what it says."""

    status: Status
    reason: str  # the criteria that are not met, each with its number; or those that are
    r_hat: float  # the worst of what is gated
    ess: float  # the smallest of what is gated
    failures: tuple[Failure, ...] = ()  # the criteria that are not met, the gravest first
    to_do: Advice = field(default_factory=Advice)  # empty if converged
    notes: tuple[str, ...] = ()  # what does not enter the status and should be known

    @property
    def converged(self) -> bool:
        """Whether all is below the thresholds."""
        return self.status is Status.CONVERGED

    @property
    def advice(self) -> str:
        """What to do, in words; empty if converged."""
        return str(self.to_do)

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict for JSON; numbers that are not finite as None."""
        failures = [
            {"criterion": str(each.criterion), "value": each.value, "threshold": each.threshold}
            | {"factor": each.factor, "reason": each.reason}
            for each in self.failures
        ]
        words = {"status": str(self.status), "reason": self.reason, "advice": self.advice}
        numbers = {"r_hat": self.r_hat, "ess": self.ess, "notes": self.notes}
        return plain({**words, **numbers, "failures": failures, "to_do": self.to_do.as_dict()})

    def __str__(self) -> str:
        advice = f" To do: {self.advice}." if self.advice else ""
        lines = [f"{self.status}: {self.reason}.{advice}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


class Judgement(NamedTuple):
    """What is known of draws."""

    diagnosis: Diagnosis
    verdict: Verdict
    budget: ErrorBudget | None  # None: the facts of the run are not known


def judge(groups: Mapping[str, xr.Dataset], about: Situation) -> Judgement:
    """Return diagnosis, verdict and error budget of a run's draws: where all three are made.

    Of the groups, sample_stats and constant_data may be missing. Without facts, what is to be done
    is said as far as the diagnosis alone tells.
    """
    posterior, constants = groups["posterior"], groups.get("constant_data", xr.Dataset())
    stats, config, parts = groups.get("sample_stats"), about.config, None
    diagnosis = diagnose(
        posterior,
        stats,
        nbeta=float(constants.get("nbeta", math.nan)),
        dispersed=config.init == "dispersed",
    )
    diagnosis = replace(diagnosis, gate=config.gate, thin=config.thin)
    if about.facts is not None:
        why = bias.unpredicted(config, about.facts.law)
        hop = float(constants["hop_bias"]) if "hop_bias" in constants else None
        parts = budget(posterior, about.facts.posterior.nbeta, diagnosis, stats, why, hop)
        about = replace(about, budget=parts, step=_step(stats, about))
    return Judgement(diagnosis, gate(diagnosis, about, relative_error(posterior, diagnosis)), parts)


def gate(diagnosis: Diagnosis, about: Situation, relative_error: float = math.nan) -> Verdict:
    """Return the verdict: CONVERGED only if every gated quantity is below its threshold."""
    numbers, noted = (diagnosis.r_hat, diagnosis.ess), notes(about)
    undetermined = tuple(_undetermined(diagnosis))
    failures = undetermined or tuple(_refusals(diagnosis, relative_error))
    if not failures:
        return Verdict(Status.CONVERGED, _praise(diagnosis, relative_error), *numbers, notes=noted)
    status = Status.UNDETERMINED if undetermined else Status.NOT_CONVERGED
    reason = "; ".join(failure.reason for failure in failures)
    to_do = advise(failures, diagnosis, about)
    return Verdict(status, reason, *numbers, failures, to_do, noted)


def _step(stats: xr.Dataset | None, about: Situation) -> bias.Steepness | None:
    """How steep the step has been along the judged draws."""
    if stats is None or CURVATURE not in stats or about.facts is None:
        return None
    return bias.steepness(np.asarray(stats[CURVATURE].values, np.float64), about.facts)


def _undetermined(diagnosis: Diagnosis) -> Iterator[Failure]:
    """Yield why nothing can be said."""
    few, short = diagnosis.chains < MIN_CHAINS, diagnosis.draws < MIN_DRAWS
    if few:
        reason = f"R-hat needs at least {MIN_CHAINS} chains, got {diagnosis.chains}"
        yield Failure(Criterion.CHAINS, reason, diagnosis.chains, MIN_CHAINS)
    if short:
        reason = f"a verdict needs at least {MIN_DRAWS} draws a chain, got {diagnosis.draws}"
        factor = MARGIN * MIN_DRAWS / max(diagnosis.draws, 1)
        yield Failure(Criterion.LENGTH, reason, diagnosis.draws, MIN_DRAWS, factor)
    if few or short:
        return
    blind = [row for row in diagnosis.gated if not np.isfinite([row.r_hat, row.ess]).all()]
    if blind or not diagnosis.gated:
        names = ", ".join(row.name for row in blind) or "no gated variable"
        yield Failure(Criterion.MOVING, f"constant or NaN: {names}", len(blind), 0)
    elif not math.isfinite(diagnosis.nested_r_hat or 0.0):
        reason = (
            "the bracket needs chains that started at w* and chains that started dispersed, and "
            "one kind is lost"
        )
        yield Failure(Criterion.BOTH_SIDES, reason, 1, 2)


def _refusals(diagnosis: Diagnosis, relative_error: float) -> Iterator[Failure]:
    """Yield each threshold that is not met, the gravest first."""
    wanted, rows = diagnosis.gate.rhat, diagnosis.gated
    if not diagnosis.r_hat < wanted:
        worst = max(rows, key=lambda row: row.r_hat)
        others = sum(not row.r_hat < wanted for row in rows) - 1
        reason = f"R-hat of {worst.name} is {worst.r_hat:.4f}, not below {wanted}{_more(others)}"
        reason = "; ".join([reason, *diagnosis.apart()])
        yield Failure(Criterion.R_HAT, reason, worst.r_hat, wanted, _of_r_hat(worst.r_hat, wanted))
    nested = diagnosis.nested_r_hat
    if nested is not None and not nested < wanted:
        worst = max(rows, key=lambda row: row.nested_r_hat or 0.0)
        reason = f"nested R-hat of {worst.name} is {nested:.4f}, not below {wanted}"
        reason = "; ".join([f"the bracket has not closed: {reason}", *diagnosis.bracket_lines()])
        yield Failure(Criterion.NESTED_R_HAT, reason, nested, wanted, _of_r_hat(nested, wanted))
    clearest = diagnosis.clearest_drift()
    if clearest is not None and clearest.drift is not None:
        ratio, critical = clearest.drift.ratio, clearest.drift.critical
        reason = "; ".join(diagnosis.drifting())
        yield Failure(Criterion.DRIFT, reason, ratio, critical, LEAST)
    yield from _too_few(diagnosis, Criterion.ESS_BULK, {r.name: r.ess_bulk for r in rows})
    yield from _too_few(diagnosis, Criterion.ESS_TAIL, {r.name: r.ess_tail for r in rows})
    yield from _too_uncertain(diagnosis.gate.relative_error, relative_error)


def _too_few(
    diagnosis: Diagnosis, criterion: Criterion, sizes: Mapping[str, float]
) -> Iterator[Failure]:
    """Yield an effective sample size that is too small."""
    wanted, worst = diagnosis.gate.ess, min(sizes, key=lambda name: sizes[name])
    if sizes[worst] > wanted:
        return
    others = sum(not size > wanted for size in sizes.values()) - 1
    reason = f"{criterion} of {worst} is {sizes[worst]:.0f}, not above {wanted:.0f}{_more(others)}"
    factor = MARGIN * wanted / max(sizes[worst], 1.0)
    yield Failure(criterion, reason, sizes[worst], wanted, factor)


def _too_uncertain(wanted: float | None, got: float) -> Iterator[Failure]:
    """Yield a standard error that is larger than what was asked for."""
    if wanted is None or got <= wanted:
        return
    if math.isfinite(got):
        reason = f"the standard error is {got:.1%} of the LLC, not below {wanted:.1%}"
        yield Failure(Criterion.ERROR, reason, got, wanted, MARGIN * (got / wanted) ** 2)
        return
    state = "it is not known" if math.isnan(got) else "the LLC is zero"
    reason = f"an error of {wanted:.1%} of the LLC is wanted, and {state}"
    yield Failure(Criterion.SCALE, reason, got, wanted)


def _of_r_hat(r_hat: float, wanted: float) -> float:
    """Times the draws that an R-hat needs: R-hat^2 - 1 falls as 1 / draws."""
    return max(MARGIN * (r_hat**2 - 1) / (wanted**2 - 1), LEAST)


def _more(others: int) -> str:
    return f" ({others} other{'s' if others > 1 else ''} too)" if others else ""


def _praise(diagnosis: Diagnosis, relative_error: float) -> str:
    gate = diagnosis.gate
    reason = f"R-hat {diagnosis.r_hat:.4f} < {gate.rhat}, ESS {diagnosis.ess:.0f} > {gate.ess:.0f}"
    if diagnosis.nested_r_hat is not None:
        reason += f", nested R-hat {diagnosis.nested_r_hat:.4f} < {gate.rhat}"
    if gate.relative_error is not None:
        reason += f", error {relative_error:.1%} <= {gate.relative_error:.1%} of the LLC"
    return reason
