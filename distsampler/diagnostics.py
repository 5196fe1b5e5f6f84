"""Have the chains converged? R-hat, ESS and MCSE of what enters the LLC, and the verdict.

What decides is read on the probe, without minibatch noise: that noise is white, and would make
R-hat 1.00 and ESS large for chains that have hardly begun to move. Distances and projections of
the weights are shown beside it, advisory: flat directions relax slowly and barely move the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from distsampler.config import GateConfig
from distsampler.inference_data import arviz_module

GATED = ("probe_loss", "projections")
ADVISORY = ("excess_loss", "distance", "weight_projections")
MIN_CHAINS, MIN_DRAWS = 2, 100
MIN_FOR_R_HAT, MIN_FOR_MOMENTS = 4, 2
TAIL = (0.05, 0.95)


class Status(StrEnum):
    """What the diagnosis says."""

    CONVERGED = "CONVERGED"
    NOT_CONVERGED = "NOT_CONVERGED"
    UNDETERMINED = "UNDETERMINED"


@dataclass(frozen=True)
class Row:
    """One diagnosed quantity.

    Args:
        name: of the variable, with an index where it has several entries.
        gated: whether it decides.
        mean: over chains and draws.
        sd: likewise.
        mcse: Monte-Carlo standard error of the mean.
        r_hat: rank-normalised split R-hat (Vehtari et al. 2021); NaN: undetermined.
        ess_bulk: effective sample size of the bulk.
        ess_tail: the smaller one of the 5 % and 95 % quantiles'.
    """

    name: str
    gated: bool
    mean: float
    sd: float
    mcse: float
    r_hat: float
    ess_bulk: float
    ess_tail: float

    @property
    def ess(self) -> float:
        """The smaller effective sample size; NaN if either is."""
        return float(np.minimum(self.ess_bulk, self.ess_tail))


@dataclass(frozen=True)
class Diagnosis:
    """R-hat, ESS and MCSE of a posterior.

    Args:
        chains: that were diagnosed.
        draws: of each.
        rows: one a quantity.
    """

    chains: int
    draws: int
    rows: tuple[Row, ...]

    @property
    def gated(self) -> tuple[Row, ...]:
        """The rows that decide."""
        return tuple(row for row in self.rows if row.gated)

    @property
    def r_hat(self) -> float:
        """The worst of the gated rows; NaN if any is undetermined."""
        return float(np.max([row.r_hat for row in self.gated], initial=-np.inf))

    @property
    def ess(self) -> float:
        """The worst of the gated rows; NaN if any is undetermined."""
        return float(np.min([row.ess for row in self.gated], initial=np.inf))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; NaN as None."""
        rows = [{k: None if v != v else v for k, v in asdict(row).items()} for row in self.rows]
        return {"chains": self.chains, "draws": self.draws, "rows": rows}


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


def diagnose(posterior: xr.Dataset) -> Diagnosis:
    """Diagnoses the posterior group, through ArviZ, in float64.

    Args:
        posterior: variables of dims (chain, draw, ...).

    Returns:
        R-hat, ESS and MCSE; NaN where there are under 2 chains or 4 draws, or a NaN.
    """
    names = [name for name in (*GATED, *ADVISORY) if name in posterior]
    data = posterior[names].astype(np.float64)
    chains, draws = data.sizes["chain"], data.sizes["draw"]
    statistics = _statistics(data) if chains and draws >= MIN_FOR_R_HAT else None
    rows = [
        Row(label, name in GATED, *_moments(values), *_looked_up(statistics, name, index))
        for name in names
        for label, index, values in _entries(data[name])
    ]
    return Diagnosis(chains, draws, tuple(rows))


def gate(diagnosis: Diagnosis, config: GateConfig) -> Verdict:
    """The verdict: CONVERGED only if every gated quantity is below its threshold."""
    status, reason, advice = _judge(diagnosis, config)
    return Verdict(status, reason, advice, diagnosis.r_hat, diagnosis.ess)


def _judge(diagnosis: Diagnosis, config: GateConfig) -> tuple[Status, str, str]:
    if diagnosis.chains < MIN_CHAINS:
        found = f"R-hat needs at least {MIN_CHAINS} chains, got {diagnosis.chains}"
        return Status.UNDETERMINED, found, "run more chains"
    if diagnosis.draws < MIN_DRAWS:
        found = f"a verdict needs at least {MIN_DRAWS} draws a chain, got {diagnosis.draws}"
        return Status.UNDETERMINED, found, "make more draws"
    blind = [row for row in diagnosis.gated if not np.isfinite([row.r_hat, row.ess]).all()]
    if blind or not diagnosis.gated:
        names = ", ".join(row.name for row in blind) or "no gated variable"
        found = f"constant or NaN: {names}"
        return Status.UNDETERMINED, found, "check that sampler.lr moves the chains at all"
    if diagnosis.r_hat >= config.rhat:
        row = max(diagnosis.gated, key=lambda row: row.r_hat)
        found = f"R-hat of {row.name} is {row.r_hat:.4f}, not below {config.rhat}"
        return Status.NOT_CONVERGED, found, "longer burn_in, more draws, or a larger sampler.lr"
    if diagnosis.ess <= config.ess:
        row = min(diagnosis.gated, key=lambda row: row.ess)
        factor = config.ess / max(row.ess, 1.0)
        found = f"ESS of {row.name} is {row.ess:.0f}, not above {config.ess:.0f}"
        return Status.NOT_CONVERGED, found, f"about {factor:.1f} times the draws, or more chains"
    found = (
        f"R-hat {diagnosis.r_hat:.4f} < {config.rhat}, ESS {diagnosis.ess:.0f} > {config.ess:.0f}"
    )
    return Status.CONVERGED, found, ""


@np.errstate(invalid="ignore", divide="ignore")  # a constant trace gives NaN: undetermined
def _statistics(data: xr.Dataset) -> list[xr.Dataset]:
    """MCSE, R-hat, bulk and tail ESS of every variable, in the order of Row's fields."""
    arviz = arviz_module()
    mcse = arviz.mcse(data, method="mean")
    several = data.sizes["chain"] > 1
    return [
        mcse,
        arviz.rhat(data, method="rank") if several else xr.full_like(mcse, np.nan),
        arviz.ess(data, method="bulk"),
        arviz.ess(data, method="tail", prob=TAIL),
    ]


def _looked_up(
    statistics: list[xr.Dataset] | None, name: str, index: tuple[int, ...]
) -> tuple[float, float, float, float]:
    """MCSE, R-hat, bulk and tail ESS of one entry of a variable."""
    if statistics is None:
        return (np.nan,) * 4
    mcse, r_hat, bulk, tail = (float(found[name].values[index]) for found in statistics)
    return mcse, r_hat, bulk, tail


def _moments(values: NDArray[np.float64]) -> tuple[float, float]:
    if values.size < MIN_FOR_MOMENTS:
        return np.nan, np.nan
    return float(values.mean()), float(values.std(ddof=1))


def _entries(array: xr.DataArray) -> Iterator[tuple[str, tuple[int, ...], NDArray[np.float64]]]:
    """The scalar quantities of a variable: label, index, values."""
    for index in np.ndindex(*array.shape[2:]):
        label = f"{array.name}{list(index)}" if index else str(array.name)
        yield label, index, array.values[(slice(None), slice(None), *index)]
