"""Have the chains converged? R-hat, ESS, MCSE, drift and bracket of what enters the LLC.

What decides is read on the probe, without minibatch noise: that noise is white, and would make
R-hat 1.00 and ESS large for chains that have hardly begun to move. Distances and projections of
the weights are shown beside it, advisory: flat directions relax slowly and barely move the loss.

Chains that start together agree until they have moved: R-hat alone cannot know. So the pooled block
means must not drift, and where the odd chains started dispersed (``init="dispersed"``) the two
kinds must meet: the even ones come from below, the odd ones from above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import xarray as xr

from distsampler.analysis import convergence, drift
from distsampler.analysis.convergence import (
    ADVISORY,
    ENTERS_ERROR,
    GATED,
    MIN_FOR_MOMENTS,
    MIN_FOR_R_HAT,
    Row,
    gated_values,
)
from distsampler.analysis.drift import Drift, Outlier
from distsampler.analysis.inference_data import arviz_module
from distsampler.config import GateConfig

MIN_CHAINS, MIN_DRAWS = 2, 100
CLEARLY = 3.0  # standard errors
LIKELY = 10.0  # times the draws: beyond that nobody can tell
POOLED = 1_000_000  # draws of a variable that are diagnosed, at most
POOLED_ADVISORY = 250_000  # likewise, of what enters neither verdict nor error


@dataclass(frozen=True)
class Side:
    """The LLC of the even or of the odd chains.

    Args:
        mean: nbeta times their mean excess loss.
        se: its Monte-Carlo standard error.
    """

    mean: float
    se: float


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a posterior's convergence.

    Args:
        chains: that were diagnosed.
        draws: of each.
        rows: one a quantity.
        stride: every so-manieth draw was diagnosed, so that they are at most a million (a quarter
            of that where a quantity only advises).
        nbeta: inverse temperature times n, which makes losses LLCs; NaN: not known.
        settled: draws until the drift ends (``drift.settled``), where one was found; else 0.
        outliers: chains that lie apart in a gated quantity; of each the clearest case.
        bracket: the LLC of the even chains, from w*, and of the odd ones, which started dispersed;
            None: all start at w*.
        signal_to_noise: sd of the probe's loss over the posterior, by that of the minibatch noise
            in a draw's excess loss, ``sqrt(var(excess_loss) - var(probe_loss))``: below 1, most
            of what the excess loss shows from draw to draw is noise; infinite: there is none.
        acceptance: mean chance that Metropolis would accept a step; NaN: not recorded.
    """

    chains: int
    draws: int
    rows: tuple[Row, ...]
    stride: int = 1
    nbeta: float = math.nan
    settled: int = 0
    outliers: tuple[Outlier, ...] = ()
    bracket: tuple[Side, Side] | None = None
    signal_to_noise: float = math.nan
    acceptance: float = math.nan

    @property
    def gated(self) -> tuple[Row, ...]:
        """The rows that decide."""
        return tuple(row for row in self.rows if row.gated)

    @property
    def r_hat(self) -> float:
        """The worst of the gated rows; NaN if any is undetermined."""
        return float(np.max([row.r_hat for row in self.gated], initial=-np.inf))

    @property
    def nested_r_hat(self) -> float | None:
        """The worst of the gated rows; NaN if any is undetermined; None if not asked for."""
        found = [row.nested_r_hat for row in self.gated if row.nested_r_hat is not None]
        return float(np.max(found)) if found else None

    @property
    def ess(self) -> float:
        """The worst of the gated rows; NaN if any is undetermined."""
        return float(np.min([row.ess for row in self.gated], initial=np.inf))

    def draws_for(self, row: Row, ess: float) -> float:
        """Draws a chain that a quantity would need for an effective sample size, at its pace."""
        return self.draws * ess / row.ess if row.ess > 0 else math.nan

    def remarks(self) -> list[str]:
        """What is known beside the rows, a sentence each."""
        found = [*_apart(self), *_drifting(self), *_below(self)]
        if self.bracket is not None:
            found.append(f"{bracket_line(self.bracket)}; nested R-hat {self.nested_r_hat or 0:.4f}")
        if not math.isnan(self.signal_to_noise):
            found.append(
                f"signal-to-noise of a draw's minibatch loss {self.signal_to_noise:.3g} (sd of the "
                "probe's loss over sd of the minibatch noise)"
            )
        if not math.isnan(self.acceptance):
            found.append(f"mean acceptance {self.acceptance:.4f}: of the step size, not of the LLC")
        if self.stride > 1:
            found.append(f"one draw in {self.stride} was diagnosed, a million in all at most")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite as None."""
        found: dict[str, Any] = _plain(asdict(self))
        return found


class Status(StrEnum):
    """What the diagnosis says."""

    CONVERGED = "CONVERGED"
    NOT_CONVERGED = "NOT_CONVERGED"
    UNDETERMINED = "UNDETERMINED"


@dataclass(frozen=True)
class Verdict:
    """Whether the number can be trusted, why, and what to do.

    Args:
        status: CONVERGED, NOT_CONVERGED or UNDETERMINED.
        reason: which quantity, by how much.
        advice: what to do; empty if converged.
        r_hat: the worst gated one.
        ess: the worst gated one.
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


def diagnose(
    posterior: xr.Dataset,
    stats: xr.Dataset | None = None,
    *,
    nbeta: float = math.nan,
    dispersed: bool = False,
) -> Diagnosis:
    """Diagnoses the posterior group, through ArviZ, in float64.

    Args:
        posterior: variables of dims (chain, draw, ...).
        stats: the sample_stats of the same draws, if there are any.
        nbeta: inverse temperature times n, if known.
        dispersed: whether the odd chains started elsewhere than at w*.

    Returns:
        R-hat, ESS and MCSE; NaN where there are under 2 chains or 4 draws, or a NaN.
    """
    draws = posterior.sizes["draw"]
    stride, data = _thinned(posterior, (*GATED, *ENTERS_ERROR), POOLED)
    chains = [int(chain) for chain in posterior["chain"].values]
    sides = convergence.sides(chains, dispersed)
    averaged = _averaged(posterior, stride) if stride > 1 else None
    rows = convergence.rows(data, sides, averaged)
    rows += convergence.rows(_thinned(posterior, ADVISORY, POOLED_ADVISORY)[1], sides)
    drifting = any(row.drifts for row in rows)
    return Diagnosis(
        len(chains),
        draws,
        rows,
        stride,
        nbeta,
        settled=stride * burn_in(data, dispersed=dispersed) if drifting else 0,
        outliers=_outliers(data, chains, sides),
        bracket=_bracket(data, averaged or data, sides, nbeta) if dispersed else None,
        signal_to_noise=_signal_to_noise(data),
        acceptance=_acceptance(stats),
    )


def _thinned(posterior: xr.Dataset, names: Sequence[str], most: int) -> tuple[int, xr.Dataset]:
    """Every so-manieth draw of some variables in float64: at most so many, chains pooled."""
    found = [name for name in names if name in posterior]
    stride = max(1, math.ceil(posterior.sizes["chain"] * posterior.sizes["draw"] / most))
    kept = posterior[found].isel(draw=slice(None, None, stride), missing_dims="ignore")
    return stride, kept.astype(np.float64, copy=False)


def _averaged(posterior: xr.Dataset, stride: int) -> xr.Dataset:
    """What enters the error: of every ``stride`` draws the mean, so that no draw is left out."""
    found = {}
    for name in ENTERS_ERROR:
        if name in posterior:
            values = np.asarray(posterior[name].values)
            whole = values.shape[1] // stride
            parts = values[:, : whole * stride].reshape(len(values), whole, stride)
            found[name] = (("chain", "draw"), parts.mean(axis=2, dtype=np.float64))
    return xr.Dataset(found)


def burn_in(posterior: xr.Dataset, earliest: int = 0, *, dispersed: bool = False) -> int:
    """Where the drift of the gated variables ends: see ``drift.settled``.

    Args:
        posterior: all draws from the chains' start, dims (chain, draw, ...).
        earliest: draws that belong to burn-in in any case.
        dispersed: whether the odd chains started elsewhere: the later end of the two kinds counts.
    """
    series = [values for _, values in gated_values(posterior)]
    draws = posterior.sizes["draw"]
    if not series or not all(np.isfinite(values).all() for values in series):
        return max(earliest, draws // 2)
    sides = convergence.sides([int(chain) for chain in posterior["chain"].values], dispersed)
    return max(
        [drift.settled([each[side] for each in series], earliest) for side in sides if side]
        or [max(earliest, draws // 2)]
    )


def gate(diagnosis: Diagnosis, config: GateConfig, relative_error: float = math.nan) -> Verdict:
    """The verdict: CONVERGED only if every gated quantity is below its threshold.

    Args:
        diagnosis: of the posterior.
        config: the thresholds.
        relative_error: standard error of the LLC over its value, where the config bounds it.
    """
    refusal = _undetermined(diagnosis)
    status = Status.UNDETERMINED if refusal else Status.NOT_CONVERGED
    checks = (_mixed, _closed, _still, _many)
    refusal = refusal or next(filter(None, (check(diagnosis, config) for check in checks)), None)
    refusal = refusal or _precise(config, relative_error)
    if refusal is None:
        status, refusal = Status.CONVERGED, (_praise(diagnosis, config, relative_error), "")
    return Verdict(status, *refusal, diagnosis.r_hat, diagnosis.ess)


Refusal = tuple[str, str] | None  # reason and advice


def _undetermined(diagnosis: Diagnosis) -> Refusal:
    if diagnosis.chains < MIN_CHAINS:
        found = f"R-hat needs at least {MIN_CHAINS} chains, got {diagnosis.chains}"
        return found, "run more chains"
    if diagnosis.draws < MIN_DRAWS:
        found = f"a verdict needs at least {MIN_DRAWS} draws a chain, got {diagnosis.draws}"
        return found, "make more draws"
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


def _mixed(diagnosis: Diagnosis, config: GateConfig) -> Refusal:
    """R-hat, and whose fault it is."""
    if diagnosis.r_hat < config.rhat:
        return None
    row = max(diagnosis.gated, key=lambda row: row.r_hat)
    found = f"R-hat of {row.name} is {row.r_hat:.4f}, not below {config.rhat}"
    found += "".join(f"; {text}" for text in (*_apart(diagnosis), *_drifting(diagnosis)))
    return found, _slow(diagnosis, row.r_hat, config.rhat)


def _closed(diagnosis: Diagnosis, config: GateConfig) -> Refusal:
    """The bracket: chains from below and from above have met."""
    nested = diagnosis.nested_r_hat
    if nested is None or nested < config.rhat:
        return None
    row = max(diagnosis.gated, key=lambda row: row.nested_r_hat or 0.0)
    found = (
        f"the bracket has not closed: nested R-hat of {row.name} is {nested:.4f}, not below "
        f"{config.rhat}"
    )
    if diagnosis.bracket is not None:
        found += f"; {bracket_line(diagnosis.bracket)}"
    return found, _slow(diagnosis, nested, config.rhat)


def _still(diagnosis: Diagnosis, config: GateConfig) -> Refusal:
    """No drift of the block means."""
    found = _drifting(diagnosis)
    return ("; ".join(found), _slow(diagnosis, 1.0, config.rhat)) if found else None


def _many(diagnosis: Diagnosis, config: GateConfig) -> Refusal:
    """Effective draws."""
    if diagnosis.ess > config.ess:
        return None
    row = min(diagnosis.gated, key=lambda row: row.ess)
    factor = config.ess / max(row.ess, 1.0)
    found = f"ESS of {row.name} is {row.ess:.0f}, not above {config.ess:.0f}"
    return found, f"about {factor:.1f} times the draws, or more chains"


def _precise(config: GateConfig, relative_error: float) -> Refusal:
    """The error that is wanted."""
    wanted = config.relative_error
    if wanted is None or relative_error <= wanted:
        return None
    found = f"the standard error is {relative_error:.1%} of the LLC, not below {wanted:.1%}"
    factor = (relative_error / wanted) ** 2
    if not math.isfinite(factor):
        found = f"an error of {wanted:.1%} of the LLC is wanted, and "
        found += "it is not known" if math.isnan(relative_error) else "the LLC is zero"
        return found, "set gate.relative_error to null"
    return found, f"about {factor:.1f} times the draws, or so many times the chains"


def _praise(diagnosis: Diagnosis, config: GateConfig, relative_error: float) -> str:
    found = (
        f"R-hat {diagnosis.r_hat:.4f} < {config.rhat}, ESS {diagnosis.ess:.0f} > {config.ess:.0f}"
    )
    if diagnosis.nested_r_hat is not None:
        found += f", nested R-hat {diagnosis.nested_r_hat:.4f} < {config.rhat}"
    if config.relative_error is not None:
        found += f", error {relative_error:.1%} <= {config.relative_error:.1%} of the LLC"
    return found


def bracket_line(bracket: tuple[Side, Side]) -> str:
    """The two sides in words."""
    even, odd = bracket
    return (
        f"the even chains, from w*, give an LLC of {even.mean:.4g} +- {even.se:.2g}, the odd ones, "
        f"started dispersed, {odd.mean:.4g} +- {odd.se:.2g}"
    )


def _apart(diagnosis: Diagnosis) -> list[str]:
    """The outliers in words."""
    return [
        f"chain {each.chain} lies apart in {each.name} ({each.z:+.1f} standard errors)"
        for each in diagnosis.outliers
    ]


def _drifting(diagnosis: Diagnosis) -> list[str]:
    """The clearest drift in words, the probe's loss before others that are as clear.

    In units of the LLC for the probe's loss, else in sds.
    """
    found = [(row, row.drift) for row in diagnosis.gated if row.drift and row.drift.found]
    if not found:
        return []
    row, moved = max(found, key=_clarity)
    unit, name = row.sd, "standard deviations"
    if row.name == "probe_loss" and math.isfinite(diagnosis.nbeta):
        unit, name = 1 / diagnosis.nbeta, "in units of the LLC"
    size, error = moved.size / unit, moved.error / unit
    way = "rising" if size > 0 else "falling"
    return [
        f"{row.name} is still {way}: by {abs(size):.3g} +- {error:.2g} {name} from the first draw "
        "to the last"
    ]


def _below(diagnosis: Diagnosis) -> list[str]:
    """Chains that found lower loss than w* has, in words: then the LLC is below zero."""
    return [
        f"the chains found lower loss than at w*, by {-row.mean:.3g} +- {row.mcse:.2g} on average: "
        "w* is no minimum, and an LLC below zero does not measure how degenerate it is"
        for row in diagnosis.rows
        if row.name in ENTERS_ERROR and row.mean < -CLEARLY * row.mcse
    ]


def _clarity(each: tuple[Row, Drift]) -> tuple[float, bool]:
    """Standard errors of a drift; rounded, so that equal ones do not differ by a machine's bits."""
    row, moved = each
    return round(abs(moved.size) / (moved.error or 1.0), 6), row.name == "probe_loss"


def _slow(diagnosis: Diagnosis, r_hat: float, wanted: float) -> str:
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


def _outliers(data: xr.Dataset, chains: list[int], sides: list[list[int]]) -> tuple[Outlier, ...]:
    """Of each chain that lies apart the quantity in which it does so most clearly."""
    worst: dict[int, Outlier] = {}
    gated = list(gated_values(data))
    if data.sizes["draw"] < drift.BLOCKS:
        return ()
    for name, values in gated:
        for side in sides:
            named = [chains[row] for row in side]
            for each in drift.outliers(name, values[side], named, len(gated) * len(chains)):
                if each.chain not in worst or abs(each.z) > abs(worst[each.chain].z):
                    worst[each.chain] = each
    return tuple(worst[chain] for chain in sorted(worst))


def _bracket(
    data: xr.Dataset, averaged: xr.Dataset, sides: list[list[int]], nbeta: float
) -> tuple[Side, Side] | None:
    if "excess_loss" not in averaged or len(sides) != 2 or not all(sides):
        return None
    probe = data[["probe_loss"]] if "probe_loss" in data else xr.Dataset()
    below, above = (
        _side(averaged["excess_loss"].isel(chain=side), probe.isel(chain=side), nbeta)
        for side in sides
    )
    return below, above


def _side(excess: xr.DataArray, probe: xr.Dataset, nbeta: float) -> Side:
    """As the LLC's own error: the largest of the excess loss's, the probe's, the spread's."""
    per_chain = excess.mean("draw").values
    if not per_chain.size or excess.sizes["draw"] < MIN_FOR_R_HAT:
        return Side(math.nan, math.nan)
    mcse = (arviz_module().mcse(each, method="mean") for each in (excess.to_dataset(), probe))
    errors = [float(found) for each in mcse for found in each.data_vars.values()]
    if len(per_chain) > 1:
        errors.append(float(per_chain.std(ddof=1)) / math.sqrt(len(per_chain)))
    return Side(nbeta * float(per_chain.mean()), nbeta * float(np.max(errors)))


def _signal_to_noise(data: xr.Dataset) -> float:
    if not {"probe_loss", "excess_loss"} <= set(data) or data.sizes["draw"] < MIN_FOR_MOMENTS:
        return math.nan
    signal, total = (float(data[name].var()) for name in ("probe_loss", "excess_loss"))
    if not math.isfinite(signal + total):
        return math.nan
    return math.sqrt(signal / (total - signal)) if total > signal else math.inf


def _acceptance(stats: xr.Dataset | None) -> float:
    if stats is None or "acceptance" not in stats or not stats["acceptance"].size:
        return math.nan
    return float(stats["acceptance"].mean())


def _plain(value: Any) -> Any:  # noqa: ANN401 (what JSON holds)
    """Tuples as lists, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
