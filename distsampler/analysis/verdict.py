"""Can the number be trusted? The verdict on a diagnosis: why not, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    refusal = _undetermined(diagnosis)
    status = Status.UNDETERMINED if refusal else Status.NOT_CONVERGED
    checks = (_chains_disagree, _bracket_is_open, _drifts, _few_draws)
    refusal = refusal or next(filter(None, (check(diagnosis, config) for check in checks)), None)
    refusal = refusal or _imprecise(config, relative_error)
    if refusal is None:
        status, refusal = Status.CONVERGED, (_praise(diagnosis, config, relative_error), "")
    return Verdict(status, *refusal, diagnosis.r_hat, diagnosis.ess)


Refusal = tuple[str, str] | None  # reason and advice


def _undetermined(diagnosis: Diagnosis) -> Refusal:
    if diagnosis.chains < MIN_CHAINS:
        return (
            f"R-hat needs at least {MIN_CHAINS} chains, got {diagnosis.chains}",
            "run more chains",
        )
    if diagnosis.draws < MIN_DRAWS:
        reason = f"a verdict needs at least {MIN_DRAWS} draws a chain, got {diagnosis.draws}"
        return reason, "make more draws"
    blind = [row for row in diagnosis.gated if not np.isfinite([row.r_hat, row.ess]).all()]
    if blind or not diagnosis.gated:
        names = ", ".join(row.name for row in blind) or "no gated variable"
        return f"constant or NaN: {names}", "check that sampler.lr moves the chains at all"
    nested = diagnosis.nested_r_hat
    if nested is not None and not math.isfinite(nested):
        return (
            "the bracket needs chains that started at w* and chains that started dispersed, and "
            "one kind is lost",
            "see why its chains were retired",
        )
    return None


def _chains_disagree(diagnosis: Diagnosis, config: GateConfig) -> Refusal:
    """R-hat is too large, and whose fault it is."""
    if diagnosis.r_hat < config.rhat:
        return None
    row = max(diagnosis.gated, key=lambda row: row.r_hat)
    reason = f"R-hat of {row.name} is {row.r_hat:.4f}, not below {config.rhat}"
    reason = "; ".join([reason, *diagnosis.apart(), *diagnosis.drifting()])
    return reason, _more_draws(diagnosis, row.r_hat, config.rhat)


def _bracket_is_open(diagnosis: Diagnosis, config: GateConfig) -> Refusal:
    """The chains from below and from above have not met."""
    nested = diagnosis.nested_r_hat
    if nested is None or nested < config.rhat:
        return None
    row = max(diagnosis.gated, key=lambda row: row.nested_r_hat or 0.0)
    reason = (
        f"the bracket has not closed: nested R-hat of {row.name} is {nested:.4f}, not below "
        f"{config.rhat}"
    )
    if diagnosis.bracket is not None:
        reason += f"; {diagnosis.bracket_line()}"
    return reason, _more_draws(diagnosis, nested, config.rhat)


def _drifts(diagnosis: Diagnosis, config: GateConfig) -> Refusal:
    """The segment means drift."""
    drifting = diagnosis.drifting()
    return ("; ".join(drifting), _more_draws(diagnosis, 1.0, config.rhat)) if drifting else None


def _few_draws(diagnosis: Diagnosis, config: GateConfig) -> Refusal:
    """The effective sample size is too small."""
    if diagnosis.ess > config.ess:
        return None
    row = min(diagnosis.gated, key=lambda row: row.ess)
    factor = config.ess / max(row.ess, 1.0)
    reason = f"ESS of {row.name} is {row.ess:.0f}, not above {config.ess:.0f}"
    return reason, f"about {factor:.1f} times the draws, or more chains"


def _imprecise(config: GateConfig, relative_error: float) -> Refusal:
    """The error is larger than wanted."""
    wanted = config.relative_error
    if wanted is None or relative_error <= wanted:
        return None
    factor = (relative_error / wanted) ** 2
    if not math.isfinite(factor):
        state = "it is not known" if math.isnan(relative_error) else "the LLC is zero"
        reason = f"an error of {wanted:.1%} of the LLC is wanted, and {state}"
        return reason, "set gate.relative_error to null"
    reason = f"the standard error is {relative_error:.1%} of the LLC, not below {wanted:.1%}"
    return reason, f"about {factor:.1f} times the draws, or as many times the chains"


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
