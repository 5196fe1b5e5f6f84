"""The LLC and the WBIC: arithmetic on stored numbers, each with its error and its verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import xarray as xr

from distsampler.analysis.diagnosis import Diagnosis
from distsampler.analysis.error_budget import ErrorBudget, budget, chain_excess
from distsampler.analysis.error_budget import mean as mean_of
from distsampler.analysis.json_values import plain
from distsampler.analysis.verdict import Verdict
from distsampler.errors import ConfigError
from distsampler.facts import optimal_nbeta


@dataclass(frozen=True)
class LLCEstimate:
    """A Local Learning Coefficient: ``nbeta * (E[L_n(w)] - L_n(w*))`` (Lau et al. 2308.12108).

    Args:
        mean: the estimate: nbeta times the mean excess loss over chains and draws.
        se: standard error of the mean: Monte Carlo and anchor.
        interval: nominal 95 % interval: the error, and the sampler's predicted bias; see
            ``ErrorBudget.interval``.
        per_chain: the estimate of each chain.
        chains: indices of these chains.
        lost: indices of the chains that are not in it.
        nbeta: inverse temperature times n.
        n: number of examples.
        localization: gamma of the posterior, of which the LLC is part.
        init_loss: L_n(w*).
        verdict: verdict on the draws.
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
        """Return the estimate for JSON; numbers that are not finite as None."""
        verdict = {**asdict(self.verdict), "status": str(self.verdict.status)}
        return plain(
            {
                "llc": self.mean,
                "se": self.se,
                "interval": self.interval,
                "per_chain": self.per_chain,
                "chains": self.chains,
                "lost_chains": self.lost,
                "nbeta": self.nbeta,
                "n": self.n,
                "localization": self.localization,
                "init_loss": self.init_loss,
                "verdict": verdict,
                "converged": self.converged,
                "budget": self.budget.as_dict(),
                "bracket": self.bracket,
            }
        )

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
        se: Monte-Carlo standard error of the mean.
        n: number of examples.
        localization: gamma of the posterior.
        verdict: verdict on the draws.
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


def llc(
    posterior: xr.Dataset,
    facts: dict[str, float],
    diagnosis: Diagnosis,
    verdict: Verdict,
    parts: ErrorBudget,
    lost: tuple[int, ...] = (),
) -> LLCEstimate:
    """Return the LLC of a posterior.

    Args:
        posterior: ``excess_loss`` of dims (chain, draw).
        facts: nbeta, n, localization and init_loss as stored.
        diagnosis: diagnosis of the posterior.
        verdict: verdict on the draws.
        parts: the parts of its error.
        lost: indices of the chains that are not in the posterior.
    """
    per_chain = facts["nbeta"] * chain_excess(posterior)
    mean = mean_of(per_chain)
    return LLCEstimate(
        mean=mean,
        se=parts.se,
        interval=parts.interval(mean),
        per_chain=tuple(per_chain.tolist()),
        chains=tuple(posterior["chain"].values.tolist()),
        lost=lost,
        nbeta=facts["nbeta"],
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
    """Return the WBIC of a posterior.

    Raises:
        ConfigError: if the run's nbeta is not n / log n, where alone the WBIC holds.
    """
    n, nbeta = int(facts["n"]), facts["nbeta"]
    if not math.isclose(nbeta, optimal_nbeta(n), rel_tol=1e-6):
        raise ConfigError(
            f"the WBIC needs nbeta = n / log n = {optimal_nbeta(n):.6g}, this run has {nbeta:.6g}: "
            "sample again without sampler.nbeta"
        )
    mean = n * (facts["init_loss"] + mean_of(chain_excess(posterior)))
    se = budget(posterior, n, diagnosis).se
    return WBICEstimate(mean, se, n, facts["localization"], verdict)


def plus_minus(mean: float, error: float) -> str:
    """Return a number and its error, to two digits of the error."""
    if not (math.isfinite(mean) and math.isfinite(error) and error > 0):
        return f"{mean:.6g} +- {error:.2g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{digits}f} +- {error:.{digits}f}"
