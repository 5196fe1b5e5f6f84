"""Can the number be trusted? The verdict on a diagnosis: why not, and what to do."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import xarray as xr

from distsampler.analysis.diagnosis import Diagnosis, diagnose
from distsampler.analysis.error_budget import relative_error
from distsampler.config import GateConfig, RunConfig

MIN_CHAINS, MIN_DRAWS = 2, 100
LIKELY = 10.0  # times the draws: beyond that nobody can tell


class Status(StrEnum):
    """What the diagnosis says."""

    CONVERGED = "CONVERGED"
    NOT_CONVERGED = "NOT_CONVERGED"
    UNDETERMINED = "UNDETERMINED"


@dataclass(frozen=True)
class Verdict:
    """Whether the number can be trusted, why (which quantity, by how much), and what to do.

    The advice is empty if converged; R-hat is the worst, ESS the smallest of what is gated.
    """

    status: Status
    reason: str
    advice: str
    r_hat: float
    ess: float

    @property
    def converged(self) -> bool:
        """Whether all is below the thresholds."""
        return self.status is Status.CONVERGED

    def __str__(self) -> str:
        advice = f" To do: {self.advice}." if self.advice else ""
        return f"{self.status}: {self.reason}.{advice}"


def judge(groups: Mapping[str, xr.Dataset], config: RunConfig) -> tuple[Diagnosis, Verdict]:
    """Return diagnosis and verdict of a run's draws: the one place where both are made.

    Of the groups, sample_stats and constant_data may be missing.
    """
    posterior, constants = groups["posterior"], groups.get("constant_data", xr.Dataset())
    diagnosis = diagnose(
        posterior,
        groups.get("sample_stats"),
        nbeta=float(constants.get("nbeta", math.nan)),
        dispersed=config.init == "dispersed",
    )
    return diagnosis, gate(diagnosis, config.gate, relative_error(posterior, diagnosis))


def gate(diagnosis: Diagnosis, config: GateConfig, relative_error: float = math.nan) -> Verdict:
    """Return the verdict: CONVERGED only if every gated quantity is below its threshold."""
    undetermined = _undetermined(diagnosis)
    refusal = undetermined or next(_refusals(diagnosis, config, relative_error), None)
    status = Status.UNDETERMINED if undetermined else Status.NOT_CONVERGED
    if refusal is None:
        status, refusal = Status.CONVERGED, (_praise(diagnosis, config, relative_error), "")
    return Verdict(status, *refusal, diagnosis.r_hat, diagnosis.ess)


def _undetermined(diagnosis: Diagnosis) -> tuple[str, str] | None:
    """Why nothing can be said, and what to do."""
    if diagnosis.chains < MIN_CHAINS:
        reason = f"R-hat needs at least {MIN_CHAINS} chains, got {diagnosis.chains}"
        return reason, "run more chains"
    if diagnosis.draws < MIN_DRAWS:
        reason = f"a verdict needs at least {MIN_DRAWS} draws a chain, got {diagnosis.draws}"
        return reason, "make more draws"
    blind = [row for row in diagnosis.gated if not np.isfinite([row.r_hat, row.ess]).all()]
    if blind or not diagnosis.gated:
        names = ", ".join(row.name for row in blind) or "no gated variable"
        return f"constant or NaN: {names}", "check that sampler.lr moves the chains at all"
    if not math.isfinite(diagnosis.nested_r_hat or 0.0):
        return (
            "the bracket needs chains that started at w* and chains that started dispersed, and "
            "one kind is lost",
            "see why its chains were retired",
        )
    return None


def _refusals(
    diagnosis: Diagnosis, config: GateConfig, relative_error: float
) -> Iterator[tuple[str, str]]:
    """Yield each threshold that is not met as a reason, and what to do; the gravest first."""
    if not diagnosis.r_hat < config.rhat:
        row = max(diagnosis.gated, key=lambda row: row.r_hat)
        reason = f"R-hat of {row.name} is {row.r_hat:.4f}, not below {config.rhat}"
        reason = "; ".join([reason, *diagnosis.apart(), *diagnosis.drifting()])
        yield reason, _more_draws(diagnosis, row.r_hat, config.rhat)
    nested = diagnosis.nested_r_hat
    if nested is not None and not nested < config.rhat:
        row = max(diagnosis.gated, key=lambda row: row.nested_r_hat or 0.0)
        reason = f"nested R-hat of {row.name} is {nested:.4f}, not below {config.rhat}"
        reason = "; ".join([f"the bracket has not closed: {reason}", *diagnosis.bracket_lines()])
        yield reason, _more_draws(diagnosis, nested, config.rhat)
    if diagnosis.drifting():
        yield "; ".join(diagnosis.drifting()), _more_draws(diagnosis, 1.0, config.rhat)
    if not diagnosis.ess > config.ess:
        row = min(diagnosis.gated, key=lambda row: row.ess)
        reason = f"ESS of {row.name} is {row.ess:.0f}, not above {config.ess:.0f}"
        yield reason, f"about {config.ess / max(row.ess, 1.0):.1f} times the draws, or more chains"
    wanted = config.relative_error
    if wanted is not None and not relative_error <= wanted:
        factor = (relative_error / wanted) ** 2
        reason = f"the standard error is {relative_error:.1%} of the LLC, not below {wanted:.1%}"
        advice = f"about {factor:.1f} times the draws, or as many times the chains"
        if not math.isfinite(factor):
            state = "it is not known" if math.isnan(relative_error) else "the LLC is zero"
            reason = f"an error of {wanted:.1%} of the LLC is wanted, and {state}"
            advice = "set gate.relative_error to null"
        yield reason, advice


def _praise(diagnosis: Diagnosis, config: GateConfig, relative_error: float) -> str:
    reason = (
        f"R-hat {diagnosis.r_hat:.4f} < {config.rhat}, ESS {diagnosis.ess:.0f} > {config.ess:.0f}"
    )
    if diagnosis.nested_r_hat is not None:
        reason += f", nested R-hat {diagnosis.nested_r_hat:.4f} < {config.rhat}"
    if config.relative_error is not None:
        reason += f", error {relative_error:.1%} <= {config.relative_error:.1%} of the LLC"
    return reason


def _more_draws(diagnosis: Diagnosis, r_hat: float, wanted: float) -> str:
    """What to do for chains that have not come far enough; R-hat^2 - 1 falls as 1 / draws."""
    advice, half = [], diagnosis.draws // 2
    if 0 < diagnosis.settled < half:
        advice.append(f"a burn_in {diagnosis.settled} draws longer, where the drift seems to end")
    factor = max((r_hat**2 - 1) / (wanted**2 - 1), 2.0)
    times = f"about {factor:.1f}" if factor < LIKELY else f"at least {LIKELY:.0f}"
    advice.append(f"{times} times the draws, or a larger sampler.lr if it allows one")
    if diagnosis.outliers and diagnosis.settled == 0:
        names = ", ".join(str(each.chain) for each in diagnosis.outliers)
        advice.append(f"see in the report whether chain {names} is stuck or in a basin of its own")
    return "; ".join(advice)
