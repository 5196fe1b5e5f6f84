"""Have the chains converged? R-hat, ESS, MCSE, drift and bracket of what enters the LLC.

What decides is read on the probe, without minibatch noise: that noise is white, and would make
R-hat 1.00 and ESS large for chains that have hardly begun to move. Distances and projections of
the weights are shown beside it, advisory: flat directions relax slowly and barely move the loss.

Chains that start together agree until they have moved: R-hat alone cannot know. So the pooled
segment means must not drift, and where the odd chains started dispersed (``init="dispersed"``) the
two kinds must meet: the even ones come from below, the odd ones from above.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from distsampler.analysis import arviz_bridge, convergence, drift
from distsampler.analysis.convergence import (
    ADVISORY,
    ENTERS_ERROR,
    GATED,
    MIN_FOR_MOMENTS,
    MIN_FOR_R_HAT,
    Row,
    gated_values,
)
from distsampler.analysis.drift import Outlier
from distsampler.analysis.json_values import plain
from distsampler.config import GateConfig
from distsampler.draws import ACCEPTANCE, EXCESS_LOSS, PROBE_LOSS
from distsampler.table import Column, Content, Table, failing

CLEARLY = 3.0  # standard errors
POOLED = 1_000_000  # draws of a variable that are diagnosed, at most
POOLED_ADVISORY = 250_000  # likewise, of what enters neither verdict nor error


@dataclass(frozen=True)
class BracketSide:
    """The LLC of the even or of the odd chains, and its Monte-Carlo standard error."""

    mean: float
    se: float


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a posterior's convergence.

    Args:
        chains: number of chains.
        draws: number of draws of each chain.
        rows: the diagnosed quantities.
        stride: every stride-th draw was diagnosed, so that they are at most a million (a quarter
            of that where a quantity only advises).
        nbeta: inverse temperature times n, which makes losses LLCs; NaN: not known.
        settled: draws until the drift ends (``drift.settled``), where a quantity drifts; else 0.
        outliers: chains that lie apart in a gated quantity, each with its clearest case.
        bracket: the LLC of the even chains, from w*, and of the odd ones, which started dispersed;
            None: all start at w*.
        signal_to_noise: sd of the probe's loss over the posterior, by that of the minibatch noise
            in a draw's excess loss, ``sqrt(var(excess_loss) - var(probe_loss))``: below 1, most
            of what the excess loss shows from draw to draw is noise; infinite: there is none.
        acceptance: mean chance that Metropolis would accept a step; NaN: not recorded.
        gate: what is asked of the gated rows.
        thin: steps per draw.
    """

    chains: int
    draws: int
    rows: tuple[Row, ...]
    stride: int = 1
    nbeta: float = math.nan
    settled: int = 0
    outliers: tuple[Outlier, ...] = ()
    bracket: tuple[BracketSide, BracketSide] | None = None
    signal_to_noise: float = math.nan
    acceptance: float = math.nan
    gate: GateConfig = field(default_factory=GateConfig)
    thin: int = 1

    @property
    def gated(self) -> tuple[Row, ...]:
        """The rows that decide."""
        return tuple(row for row in self.rows if row.gated)

    @property
    def r_hat(self) -> float:
        """The worst R-hat of the gated rows; NaN if any is undetermined."""
        return float(np.max([row.r_hat for row in self.gated], initial=-np.inf))

    @property
    def nested_r_hat(self) -> float | None:
        """The worst nested R-hat of the gated rows; NaN: undetermined; None: not asked for."""
        nested = [row.nested_r_hat for row in self.gated if row.nested_r_hat is not None]
        return float(np.max(nested)) if nested else None

    @property
    def ess(self) -> float:
        """The smallest ESS of the gated rows; NaN if any is undetermined."""
        return float(np.min([row.ess for row in self.gated], initial=np.inf))

    def draws_for(self, row: Row, ess: float) -> float:
        """Return the draws that each chain would need for an ESS of a quantity, at its pace."""
        return self.draws * ess / row.ess if row.ess > 0 else math.nan

    def remarks(self) -> list[str]:
        """Return what is known beside the rows, a sentence each."""
        remarks = [*self.apart(), *self.drifting(), *self._below()]
        for line in self.bracket_lines():
            remarks.append(f"{line}; nested R-hat {self.nested_r_hat or 0:.4f}")
        if not math.isnan(self.signal_to_noise):
            remarks.append(
                f"signal-to-noise of a draw's minibatch loss {self.signal_to_noise:.3g} (sd of the "
                "probe's loss over sd of the minibatch noise)"
            )
        if not math.isnan(self.acceptance):
            remarks.append(
                f"mean acceptance {self.acceptance:.4f}: of the step size, not of the LLC"
            )
        if self.stride > 1:
            remarks.append(f"one draw in {self.stride} was diagnosed, a million in all at most")
        return remarks

    def apart(self) -> list[str]:
        """Return the outliers in words."""
        return [
            f"chain {each.chain} lies apart in {each.name} ({each.z:+.1f} standard errors)"
            for each in self.outliers
        ]

    def clearest_drift(self) -> Row | None:
        """Return the row that drifts most clearly, the probe's loss before equally clear ones."""
        drifts = [(row, row.drift) for row in self.gated if row.drift and row.drift.significant]
        # Rounded, so that equally clear drifts do not differ by a machine's bits.
        return max(
            drifts,
            key=lambda d: (round(d[1].ratio, 6), d[0].name == PROBE_LOSS),
            default=(None, None),
        )[0]

    def drifting(self) -> list[str]:
        """Return the clearest drift in words, if there is any.

        It is in units of the LLC for the probe's loss, else in standard deviations.
        """
        row = self.clearest_drift()
        if row is None or row.drift is None:
            return []
        moved = row.drift
        unit, name = row.sd, "standard deviations"
        if row.name == PROBE_LOSS and math.isfinite(self.nbeta):
            unit, name = 1 / self.nbeta, "in units of the LLC"
        size, error = moved.size / unit, moved.error / unit
        way = "rising" if size > 0 else "falling"
        return [
            f"{row.name} is still {way}: by {abs(size):.3g} +- {error:.2g} {name} from the first "
            "draw to the last"
        ]

    def bracket_lines(self) -> list[str]:
        """Return the two sides of the bracket in words, if there is one."""
        return [
            f"the even chains, from w*, give an LLC of {even.mean:.4g} +- {even.se:.2g}, the odd "
            f"ones, started dispersed, {odd.mean:.4g} +- {odd.se:.2g}"
            for even, odd in filter(None, [self.bracket])
        ]

    def table(self) -> Table:
        """Return the table of what was measured; a star marks what the gate reads."""
        steps = f"steps for ESS {self.gate.ess:g}"  # that each needs, the advisory ones too
        numbers = ("mean", "sd", "MCSE", "R-hat", "bulk ESS", "tail ESS", steps)
        columns = [Column("gate", "label"), Column("quantity", "label"), *map(Column, numbers)]
        return Table(columns, [tuple(self._cells(row)) for row in self.rows])

    def __str__(self) -> str:
        return "\n".join([self.table().text(), *self.remarks()])

    def __repr__(self) -> str:
        worst = f"R-hat {self.r_hat:.4f}, ESS {self.ess:.0f}"
        return f"Diagnosis({self.chains} chains of {self.draws} draws, {worst})"

    def as_dict(self) -> dict[str, Any]:
        """Return the diagnosis for JSON; numbers that are not finite as None."""
        return plain({**asdict(self), "gate": self.gate.model_dump()})

    def _cells(self, row: Row) -> Iterator[Content]:
        """Yield a quantity's cells of the table."""
        yield "*" if row.gated else ""
        yield row.name
        yield from (f"{value:.4g}" for value in (row.mean, row.sd, row.mcse))
        yield failing(f"{row.r_hat:.4f}", row.gated and not row.r_hat < self.gate.rhat)
        for ess in (row.ess_bulk, row.ess_tail):
            yield failing(f"{ess:.0f}", row.gated and not ess > self.gate.ess)
        yield f"{self.thin * self.draws_for(row, self.gate.ess):.0f}"

    def _below(self) -> list[str]:
        """Losses clearly below that at w*, in words: then the LLC is below zero."""
        return [
            f"the chains reached lower loss than at w*, by {-row.mean:.3g} +- {row.mcse:.2g} on "
            "average: w* is no minimum, and an LLC below zero does not measure how degenerate it is"
            for row in self.rows
            if row.name in ENTERS_ERROR and row.mean < -CLEARLY * row.mcse
        ]


def diagnose(
    posterior: xr.Dataset,
    stats: xr.Dataset | None = None,
    *,
    nbeta: float = math.nan,
    dispersed: bool = False,
) -> Diagnosis:
    """Diagnose the posterior group, through ArviZ, in float64.

    Args:
        posterior: variables of dims (chain, draw, ...).
        stats: sample_stats of the same draws, if there are any.
        nbeta: inverse temperature times n, if known.
        dispersed: whether the odd chains started elsewhere than at w*.

    Returns:
        R-hat, ESS and MCSE; NaN where there are under 2 chains or 4 draws, or a NaN.
    """
    stride, data = _thinned(posterior, (*GATED, *ENTERS_ERROR), POOLED)
    chains = [int(chain) for chain in posterior["chain"].values]
    sides = convergence.sides(chains, dispersed)
    averaged = _averaged(posterior, stride) if stride > 1 else None
    rows = convergence.rows(data, sides, averaged)
    rows += convergence.rows(_thinned(posterior, ADVISORY, POOLED_ADVISORY)[1], sides)
    drifting = any(row.drifts for row in rows)
    return Diagnosis(
        len(chains),
        posterior.sizes["draw"],
        rows,
        stride,
        nbeta,
        settled=stride * burn_in(data, dispersed=dispersed) if drifting else 0,
        outliers=_outliers(data, chains, sides),
        bracket=_bracket(data, averaged or data, sides, nbeta) if dispersed else None,
        signal_to_noise=_signal_to_noise(data),
        acceptance=_acceptance(stats),
    )


def burn_in(posterior: xr.Dataset, earliest: int = 0, *, dispersed: bool = False) -> int:
    """Return the draws until the drift of the gated variables ends: see ``drift.settled``.

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


def _thinned(posterior: xr.Dataset, names: Sequence[str], most: int) -> tuple[int, xr.Dataset]:
    """Stride and draws of some variables in float64: evenly spaced, at most ``most`` in all."""
    stride = max(1, math.ceil(posterior.sizes["chain"] * posterior.sizes["draw"] / most))
    kept = posterior[[name for name in names if name in posterior]]
    kept = kept.isel(draw=slice(None, None, stride), missing_dims="ignore")
    return stride, kept.astype(np.float64, copy=False)


def _averaged(posterior: xr.Dataset, stride: int) -> xr.Dataset:
    """What enters the error: the mean of every ``stride`` draws, so that no draw is left out."""
    means = {}
    for name in ENTERS_ERROR:
        if name in posterior:
            values = np.asarray(posterior[name].values)
            whole = values.shape[1] // stride
            parts = values[:, : whole * stride].reshape(len(values), whole, stride)
            means[name] = (("chain", "draw"), parts.mean(axis=2, dtype=np.float64))
    return xr.Dataset(means)


def _outliers(data: xr.Dataset, chains: list[int], sides: list[list[int]]) -> tuple[Outlier, ...]:
    """The chains that lie apart, each with the quantity in which it does so most clearly."""
    worst: dict[int, Outlier] = {}
    gated = list(gated_values(data))
    if data.sizes["draw"] < drift.SEGMENTS:
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
) -> tuple[BracketSide, BracketSide] | None:
    """The LLC of the even and of the odd chains; None where either kind is lost."""
    if EXCESS_LOSS not in averaged or len(sides) != 2 or not all(sides):
        return None
    probe = data[[PROBE_LOSS]] if PROBE_LOSS in data else xr.Dataset()
    below, above = (
        _side(averaged[EXCESS_LOSS].isel(chain=side), probe.isel(chain=side), nbeta)
        for side in sides
    )
    return below, above


def _side(excess: xr.DataArray, probe: xr.Dataset, nbeta: float) -> BracketSide:
    """One side, its error as the LLC's own: the largest of excess loss's, probe's, spread's."""
    per_chain = excess.mean("draw").values
    if not per_chain.size or excess.sizes["draw"] < MIN_FOR_R_HAT:
        return BracketSide(math.nan, math.nan)
    mcse = (arviz_bridge.mcse(each) for each in (excess.to_dataset(), probe))
    errors = [float(error) for each in mcse for error in each.data_vars.values()]
    if len(per_chain) > 1:
        errors.append(float(per_chain.std(ddof=1)) / math.sqrt(len(per_chain)))
    return BracketSide(nbeta * float(per_chain.mean()), nbeta * float(np.max(errors)))


def _signal_to_noise(data: xr.Dataset) -> float:
    if not {PROBE_LOSS, EXCESS_LOSS} <= set(data) or data.sizes["draw"] < MIN_FOR_MOMENTS:
        return math.nan
    signal, total = (float(data[name].var()) for name in (PROBE_LOSS, EXCESS_LOSS))
    if not math.isfinite(signal + total):
        return math.nan
    return math.sqrt(signal / (total - signal)) if total > signal else math.inf


def _acceptance(stats: xr.Dataset | None) -> float:
    if stats is None or ACCEPTANCE not in stats or not stats[ACCEPTANCE].size:
        return math.nan
    return float(stats[ACCEPTANCE].mean())
