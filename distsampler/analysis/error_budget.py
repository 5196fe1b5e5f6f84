"""What an LLC's error is made of, part by part, in units of the LLC.

Only what was measured is in it. A bias that cannot be predicted is named, with the reason.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from distsampler.analysis.diagnosis import Diagnosis
from distsampler.analysis.json_values import plain
from distsampler.draws import DISCRETISATION_BIAS, EXCESS_LOSS, HEAT_BIAS, PROBE_LOSS
from distsampler.table import Column, Table

COVERAGE = 0.95
COLUMNS = (
    Column("error", "label"),
    Column("in the LLC"),
    Column("of it"),
    Column("meaning", "sentence"),
)


@dataclass(frozen=True)
class ErrorBudget:
    """The parts of an LLC's error."""

    # Monte-Carlo standard error from the draws of each chain: the larger of ArviZ's MCSE of
    # the excess loss and that of the probe's loss, whose slow part no noise can hide
    within: float
    # Monte-Carlo standard error from the spread of the chains' means; NaN for one chain
    between: float
    discretisation: float | None  # predicted bias of the step size; None: not predicted
    heat: float | None  # predicted bias of the minibatches' noise; None: not predicted
    bias_se: float  # standard error of the predicted bias, from its spread between chains
    # excess of the LLC of the second half of the draws over that of the first, on the
    # probe. Where modes relax within the run, their part in the error is minus half of it;
    # where they take longer, more than that.
    drift: float
    # standard error of the drift, from its spread between chains; NaN for one chain
    drift_se: float
    anchor: float = 0.0  # standard error of L_n(w*): 0, since it is taken over all data
    # predicted bias of hopping over shards; None: chains draw from all data
    hop: float | None = None
    # name of a bias -> why it is not predicted
    unpredicted: Mapping[str, str] = field(default_factory=dict)
    llc: float = math.nan  # the LLC whose error it is

    @property
    def se(self) -> float:
        """Standard error: the larger Monte-Carlo one, with the anchor's."""
        errors = [self.within] if math.isnan(self.between) else [self.within, self.between]
        return math.hypot(float(np.max(errors)), self.anchor)

    @property
    def bias(self) -> float:
        """The sum of the biases that are predicted."""
        return (self.discretisation or 0.0) + (self.heat or 0.0) + (self.hop or 0.0)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the nominal 95 % interval of the LLC without the sampler's bias.

        ``[llc - max(bias, 0) - z s, llc - min(bias, 0) + z s]``, ``s^2 = se^2 + bias_se^2``, with
        z such that ``Phi(z + |bias| / s) - Phi(-z) = 0.95``: 1.96 without a bias, 1.64 for a large
        one. It covers with 95 % if the bias is as predicted and if there is none, with more in
        between (Imbens & Manski 2004), and always holds the LLC itself. A shift by the prediction
        would be shorter, and wrong where the loss is far from quadratic.
        """
        spread = math.hypot(self.se, self.bias_se)
        reach = _quantile(abs(self.bias) / spread) * spread if spread > 0 else spread
        return self.llc - max(self.bias, 0.0) - reach, self.llc - min(self.bias, 0.0) + reach

    @property
    def covers(self) -> str:
        """Which errors the interval knows, and which biases it does not."""
        left = " and ".join(name for name, value, _ in self.rows() if value is None)
        known = "Monte Carlo, anchor and predicted bias"
        return f"{known}, without {left}, which was not predicted" if left else known

    def rows(self) -> list[tuple[str, float | None, str]]:
        """Return name, value and meaning of each part; None: not predicted, for that reason."""
        why = self.unpredicted
        hopping = ("hopping", self.hop, "predicted bias: the shards' curvatures differ")
        return [
            ("Monte Carlo, within chains", self.within, "standard error"),
            ("Monte Carlo, between chains", self.between, "standard error"),
            ("anchor", self.anchor, "standard error of the loss at w*"),
            (
                "discretisation",
                self.discretisation,
                why.get(DISCRETISATION_BIAS, "predicted bias of the step size"),
            ),
            ("minibatch heat", self.heat, why.get(HEAT_BIAS, "predicted bias")),
            *([] if self.hop is None else [hopping]),
            ("error of the prediction", self.bias_se, "standard error"),
            ("drift", self.drift, f"second half less first, +- {self.drift_se:.2g}: slow modes"),
        ]

    def table(self) -> Table:
        """Return the table of the parts, in units of the LLC and as shares of it."""
        rows = []
        for name, value, meaning in self.rows():
            size = "not predicted" if value is None else f"{value:.3g}"
            share = f"{value / self.llc:.1%}" if value is not None and self.llc else ""
            rows.append((name, size, share, meaning))
        return Table(COLUMNS, rows)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.table().text()}\n95 % interval {low:.5g} .. {high:.5g}: {self.covers}"

    def __repr__(self) -> str:
        return f"ErrorBudget(llc={self.llc:.4g}, se={self.se:.2g}, bias={self.bias:.2g})"

    def as_dict(self) -> dict[str, Any]:
        """Return the parts for JSON; NaN and what is not predicted as None."""
        return plain(asdict(self))


def budget(
    posterior: xr.Dataset,
    nbeta: float,
    diagnosis: Diagnosis,
    stats: xr.Dataset | None = None,
    unpredicted: Mapping[str, str] | None = None,
    hop: float | None = None,
) -> ErrorBudget:
    """Return the error budget of a posterior.

    Args:
        posterior: ``excess_loss`` and ``probe_loss`` of dims (chain, draw).
        nbeta: inverse temperature times n.
        diagnosis: diagnosis of the posterior.
        stats: sample_stats of the same draws, with the predicted biases.
        unpredicted: name of a bias -> why it is not predicted.
        hop: predicted bias of hopping over shards, relative to the LLC.
    """
    names, stats = (DISCRETISATION_BIAS, HEAT_BIAS), xr.Dataset() if stats is None else stats
    measured = [name for name in names if name in stats and stats[name].size]
    biases = {n: np.asarray(stats[n].values, np.float64).mean(axis=1) for n in measured}
    means = {name: mean_of(values) for name, values in biases.items()}
    missing = {n: "nothing was measured along the run" for n in names if n not in biases}
    total = sum(biases.values(), np.zeros(posterior.sizes["chain"]))
    excess = chain_excess(posterior)
    errors = [row.mcse for row in diagnosis.rows if row.name in (EXCESS_LOSS, PROBE_LOSS)]
    drift = _halves(np.asarray(posterior[PROBE_LOSS].values, np.float64))
    return ErrorBudget(
        within=nbeta * float(np.max(errors)) if errors else math.nan,
        between=nbeta * spread_error(excess),
        discretisation=means.get(DISCRETISATION_BIAS),
        heat=means.get(HEAT_BIAS),
        bias_se=spread_error(total) if len(total) > 1 else 0.0,
        drift=nbeta * mean_of(drift),
        drift_se=nbeta * spread_error(drift),
        hop=None if hop is None else hop * nbeta * mean_of(excess),
        unpredicted={**missing, **(unpredicted or {})},
        llc=nbeta * mean_of(excess),
    )


def relative_error(posterior: xr.Dataset, diagnosis: Diagnosis) -> float:
    """Return the standard error of the LLC over its size; infinite where the LLC is zero."""
    if EXCESS_LOSS not in posterior:
        return math.nan
    size, se = mean_of(chain_excess(posterior)), budget(posterior, 1.0, diagnosis).se
    if math.isnan(size + se):
        return math.nan
    return se / abs(size) if size else math.inf


def chain_excess(posterior: xr.Dataset) -> NDArray[np.float64]:
    """Return the mean excess loss of each chain; NaN without draws."""
    values = np.asarray(posterior[EXCESS_LOSS].values, np.float64)
    return values.mean(axis=1) if values.size else np.full(len(values), np.nan)


def mean_of(values: NDArray[np.float64]) -> float:
    """Return the mean; NaN of nothing."""
    return float(values.mean()) if len(values) else math.nan


def _halves(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the second half less that of the first, of each chain."""
    half = values.shape[1] // 2
    if not half:
        return np.full(len(values), np.nan)
    return np.asarray(values[:, -half:].mean(axis=1) - values[:, :half].mean(axis=1))


def spread_error(values: NDArray[np.float64]) -> float:
    """Return the standard error of the mean of independent values; NaN of a single one."""
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _quantile(ratio: float) -> float:
    """The z with ``Phi(z + ratio) - Phi(-z) = 0.95``."""
    normal = NormalDist()
    low, high = normal.inv_cdf(COVERAGE), normal.inv_cdf((1 + COVERAGE) / 2)
    for _ in range(50):
        z = (low + high) / 2
        covered = normal.cdf(z + ratio) - normal.cdf(-z)
        low, high = (z, high) if covered < COVERAGE else (low, z)
    return high
