"""The LLC and the WBIC: arithmetic on stored numbers, each with its error and its verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from distsampler.analysis import diagnosis as diagnostics
from distsampler.analysis.diagnosis import Diagnosis, Verdict
from distsampler.analysis.error_budget import ErrorBudget, budget
from distsampler.config import RunConfig, optimal_nbeta
from distsampler.errors import ConfigError


@dataclass(frozen=True)
class LLCEstimate:
    """A Local Learning Coefficient: ``nbeta * (E[L_n(w)] - L_n(w*))`` (Lau et al. 2308.12108).

    Args:
        mean: the estimate: nbeta times the mean excess loss over chains and draws.
        se: its standard error: Monte Carlo and anchor.
        interval: nominal 95 %: the error, and the sampler's predicted bias; see
            ``ErrorBudget.interval``.
        per_chain: the estimate of each chain.
        chains: indices of these chains.
        lost: indices of the chains that are not in it.
        nbeta: inverse temperature times n.
        n: examples.
        localization: gamma of the posterior, of which the LLC is part.
        init_loss: L_n(w*).
        verdict: of the diagnosis.
        budget: what the error is made of.
        bracket: the LLC of the even chains, which come from w*, and of the odd ones, which started
            dispersed; None: all started at w*. Their errors are in the diagnosis.
    """

    mean: float
    se: float
    interval: tuple[float, float]
    per_chain: tuple[float, ...]
    chains: tuple[int, ...]
    lost: tuple[int, ...]
    nbeta: float
    n: int
    localization: float
    init_loss: float
    verdict: Verdict
    budget: ErrorBudget
    bracket: tuple[float, float] | None = None

    @property
    def converged(self) -> bool:
        """Whether the verdict is CONVERGED."""
        return self.verdict.converged

    def as_dict(self) -> dict[str, Any]:
        """For JSON; NaN as None."""
        verdict = {
            "status": str(self.verdict.status),
            "reason": self.verdict.reason,
            "advice": self.verdict.advice,
            "r_hat": _number(self.verdict.r_hat),
            "ess": _number(self.verdict.ess),
        }
        return {
            "llc": _number(self.mean),
            "se": _number(self.se),
            "interval": [_number(bound) for bound in self.interval],
            "per_chain": [_number(value) for value in self.per_chain],
            "chains": list(self.chains),
            "lost_chains": list(self.lost),
            "nbeta": self.nbeta,
            "n": self.n,
            "localization": self.localization,
            "init_loss": self.init_loss,
            "verdict": verdict,
            "converged": self.converged,
            "budget": self.budget.as_dict(),
            "bracket": self.bracket and [_number(side) for side in self.bracket],
        }

    def __str__(self) -> str:
        total = len(self.chains) + len(self.lost)
        return (
            f"LLC {plus_minus(self.mean, self.se)} | {len(self.chains)} of {total} chains, "
            f"R-hat {self.verdict.r_hat:.4f}, ESS {self.verdict.ess:.0f}, {self.verdict.status} | "
            f"n {self.n}, nbeta {self.nbeta:.6g}, gamma {self.localization:g}"
            + (f" | bracket {self.bracket[0]:.4g} .. {self.bracket[1]:.4g}" if self.bracket else "")
        )


@dataclass(frozen=True)
class WBICEstimate:
    """Watanabe's WBIC: ``n E[L_n(w)]`` at nbeta = n / log n (Watanabe 2013, JMLR 14).

    It approximates the free energy under the prior that was sampled: here a Gaussian of precision
    gamma around w*, times that of the weight decay.

    Args:
        mean: the estimate, in nats.
        se: its Monte-Carlo standard error.
        n: examples.
        localization: gamma of the posterior.
        verdict: of the diagnosis.
    """

    mean: float
    se: float
    n: int
    localization: float
    verdict: Verdict

    def __str__(self) -> str:
        return (
            f"WBIC {plus_minus(self.mean, self.se)} | n {self.n}, gamma {self.localization:g}, "
            f"{self.verdict.status}"
        )


def _excess(posterior: xr.Dataset) -> NDArray[np.float64]:
    """Mean excess loss of each chain."""
    values = np.asarray(posterior["excess_loss"].values, np.float64)
    return values.mean(axis=1) if values.size else np.full(len(values), np.nan)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def judged(groups: Mapping[str, xr.Dataset], config: RunConfig) -> tuple[Diagnosis, Verdict]:
    """What a run's config says of its draws: the one place where both are made.

    Args:
        groups: posterior, and sample_stats and constant_data where there are any.
        config: of the run.
    """
    posterior, constants = groups["posterior"], groups.get("constant_data", xr.Dataset())
    diagnosis = diagnostics.diagnose(
        posterior,
        groups.get("sample_stats"),
        nbeta=float(constants.get("nbeta", math.nan)),
        dispersed=config.init == "dispersed",
    )
    return diagnosis, diagnostics.gate(diagnosis, config.gate, relative_error(posterior, diagnosis))


def relative_error(posterior: xr.Dataset, diagnosis: Diagnosis) -> float:
    """Standard error of the LLC over its size; infinite where the LLC is zero."""
    if "excess_loss" not in posterior:
        return math.nan
    mean, se = _mean(_excess(posterior)), budget(posterior, 1.0, diagnosis).se
    if math.isnan(mean + se):
        return math.nan
    return se / abs(mean) if mean else math.inf


def llc(
    posterior: xr.Dataset,
    facts: dict[str, float],
    diagnosis: Diagnosis,
    verdict: Verdict,
    lost: tuple[int, ...] = (),
    parts: ErrorBudget | None = None,
) -> LLCEstimate:
    """The LLC of a posterior.

    Args:
        posterior: with ``excess_loss`` of dims (chain, draw).
        facts: nbeta, n, localization, init_loss as stored.
        diagnosis: of the posterior.
        verdict: of the diagnosis.
        lost: chains that are not in the posterior.
        parts: of the error; None: those that the posterior tells, without a predicted bias.
    """
    nbeta = facts["nbeta"]
    per_chain = nbeta * _excess(posterior)
    mean = _mean(per_chain)
    parts = parts or budget(posterior, nbeta, diagnosis)
    return LLCEstimate(
        mean=mean,
        se=parts.se,
        interval=parts.interval(mean),
        per_chain=tuple(per_chain.tolist()),
        chains=tuple(posterior["chain"].values.tolist()),
        lost=lost,
        nbeta=nbeta,
        n=int(facts["n"]),
        localization=facts["localization"],
        init_loss=facts["init_loss"],
        verdict=verdict,
        budget=parts,
        bracket=diagnosis.bracket and (diagnosis.bracket[0].mean, diagnosis.bracket[1].mean),
    )


def wbic(
    posterior: xr.Dataset, facts: dict[str, float], diagnosis: Diagnosis, verdict: Verdict
) -> WBICEstimate:
    """The WBIC of a posterior.

    Raises:
        ConfigError: if the run's nbeta is not n / log n, where alone the WBIC holds.
    """
    n, nbeta = int(facts["n"]), facts["nbeta"]
    if not math.isclose(nbeta, optimal_nbeta(n), rel_tol=1e-6):
        raise ConfigError(
            f"the WBIC needs nbeta = n / log n = {optimal_nbeta(n):.6g}, this run has {nbeta:.6g}: "
            "sample again without sampler.nbeta"
        )
    mean = n * (facts["init_loss"] + _mean(_excess(posterior)))
    se = budget(posterior, n, diagnosis).se
    return WBICEstimate(mean, se, n, facts["localization"], verdict)


def plus_minus(mean: float, error: float) -> str:
    """A number and its error, to two digits of the error."""
    if not (math.isfinite(mean) and math.isfinite(error) and error > 0):
        return f"{mean:.6g} +- {error:.2g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{digits}f} +- {error:.{digits}f}"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
