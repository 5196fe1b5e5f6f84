"""The LLC and the WBIC: arithmetic on stored numbers, each with its error and its verdict."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xarray as xr

from distsampler.analysis import arviz_bridge
from distsampler.analysis.convergence import MIN_FOR_R_HAT
from distsampler.analysis.error_budget import ErrorBudget, mean_of, spread_error
from distsampler.analysis.json_values import plain
from distsampler.analysis.verdict import Verdict


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
        n: number of examples, or of tokens.
        localization: gamma of the posterior, of which the LLC is part.
        init_loss: L_n(w*).
        sampler: name and options of the sampler, with the values that they had.
        verdict: verdict on the draws.
        budget: what the error is made of.
        bracket: the LLC of the even chains, which come from w*, and of the odd ones, which started
            dispersed; None: all started at w*. Their errors are in the diagnosis.
        unit: what n counts, "examples" or "tokens".
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
    sampler: Mapping[str, Any]
    verdict: Verdict
    budget: ErrorBudget
    bracket: tuple[float, float] | None = None
    unit: str = "examples"

    @property
    def converged(self) -> bool:
        """Whether the verdict is CONVERGED."""
        return self.verdict.converged

    @property
    def lr(self) -> float | None:
        """Step size of the sampler; None: it has no such option."""
        lr = self.sampler.get("lr")
        return None if lr is None else float(lr)

    @property
    def spread(self) -> float:
        """Standard deviation between chains over their mean; NaN for one chain."""
        if len(self.per_chain) < 2:
            return math.nan
        return float(np.std(self.per_chain, ddof=1) / abs(self.mean))

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON; numbers that are not finite as None."""
        values = asdict(self)
        renamed = {"llc": values.pop("mean"), "lost_chains": values.pop("lost"), "lr": self.lr}
        verdict = {"verdict": self.verdict.as_dict(), "converged": self.converged}
        return plain({**renamed, **values, **verdict})

    def __str__(self) -> str:
        total, lr = len(self.chains) + len(self.lost), self.lr
        return (
            f"LLC {plus_minus(self.mean, self.se)} | {len(self.chains)} of {total} chains, "
            f"R-hat {self.verdict.r_hat:.4f}, ESS {self.verdict.ess:.0f}, {self.verdict.status} | "
            f"n {amount(self.n, self.unit)}, nbeta {self.nbeta:.6g}, gamma {self.localization:g}"
            + ("" if lr is None else f", {self.sampler['name']} lr {lr:g}")
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
        n: number of examples, or of tokens.
        localization: gamma.
        verdict: verdict on the draws.
        unit: what n counts, "examples" or "tokens".
    """

    mean: float
    se: float
    n: int
    localization: float
    verdict: Verdict
    unit: str = "examples"

    def __str__(self) -> str:
        return (
            f"WBIC {plus_minus(self.mean, self.se)} | n {amount(self.n, self.unit)}, "
            f"gamma {self.localization:g}, {self.verdict.status}"
        )


@dataclass(frozen=True)
class ProbeEstimate:
    """The data-refined reading of a named probe: ``nbeta (E[L_q(w)] - L_q(w*))``, q its data.

    The expectation is over the run's posterior, that of the training data, and nbeta is the
    training data's. So it says how much of the posterior's excess loss shows on this data, and is
    the LLC where they are the training data. The data-refined LLC of Wang et al. (2410.02984)
    samples the posterior of q itself: for that, give q as the data of a run.

    Args:
        probe: name of the probe.
        mean: the estimate: nbeta times the mean excess loss over chains, draws and what counts.
        se: Monte-Carlo standard error of the mean: the larger of ArviZ's and the chains' spread's.
        per_chain: the estimate of each chain.
        chains: indices of these chains.
        lost: indices of the chains that are not in it.
        draws: draws of each chain at which the probe was measured.
        examples: examples of the probe.
        tokens: tokens of the probe that count; None: its loss is one value an example.
        init_loss: mean loss of the probe at w*.
        nbeta: inverse temperature times n, of the run.
        n: number of examples, or of tokens, of the training data.
        localization: gamma of the posterior.
        verdict: verdict on the run, of which no named probe decides.
        unit: what n counts, "examples" or "tokens".
    """

    probe: str
    mean: float
    se: float
    per_chain: tuple[float, ...]
    chains: tuple[int, ...]
    lost: tuple[int, ...]
    draws: int
    examples: int
    tokens: int | None
    init_loss: float
    nbeta: float
    n: int
    localization: float
    verdict: Verdict
    unit: str = "examples"

    @property
    def converged(self) -> bool:
        """Whether the run's verdict is CONVERGED."""
        return self.verdict.converged

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON; numbers that are not finite as None."""
        values = asdict(self)
        renamed = {"data_refined_llc": values.pop("mean"), "lost_chains": values.pop("lost")}
        verdict = {"verdict": self.verdict.as_dict(), "converged": self.converged}
        return plain({**renamed, **values, **verdict})

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else f", {self.tokens} tokens"
        total = len(self.chains) + len(self.lost)
        return (
            f"data-refined LLC {plus_minus(self.mean, self.se)} on {self.probe}, {self.examples} "
            f"examples{tokens} | {len(self.chains)} of {total} chains, {self.draws} draws, "
            f"{self.verdict.status} | nbeta {self.nbeta:.6g} and n {amount(self.n, self.unit)} of "
            f"the training data, gamma {self.localization:g}"
        )


def mean_and_error(values: xr.DataArray) -> tuple[float, float, tuple[float, ...]]:
    """Return mean, Monte-Carlo error and chain means of a scalar of dims (chain, draw).

    The error is the larger of ArviZ's MCSE and that of the chains' spread; NaN: too few draws.
    """
    values = values.astype(np.float64).load()
    if not values.size:
        return math.nan, math.nan, (math.nan,) * values.sizes["chain"]
    per_chain = np.asarray(values.mean("draw").values)
    errors = [math.nan]
    if values.sizes["draw"] >= MIN_FOR_R_HAT:
        within = arviz_bridge.mcse(xr.Dataset({"values": values.variable}))
        errors = [float(within["values"])]
        errors += [spread_error(per_chain)] if len(per_chain) > 1 else []
    return mean_of(per_chain), float(np.max(errors)), tuple(per_chain.tolist())


def sampler_line(sampler: Mapping[str, Any]) -> str:
    """Return the options of a sampler in one line, without those that are off."""
    parts = [f"{key} {_shown(value)}" for key, value in options_of(sampler).items()]
    return f"sampler: {', '.join([str(sampler['name']), *parts])}"


def options_of(sampler: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a sampler that say something: neither None nor False."""
    return {k: v for k, v in sampler.items() if k != "name" and v is not None and v is not False}


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def amount(n: int, unit: str) -> str:
    """Return n, and what it counts where that is not examples."""
    return f"{n}" if unit == "examples" else f"{n} {unit}"


def plus_minus(mean: float, error: float) -> str:
    """Return a number and its error, to two digits of the error."""
    if not (math.isfinite(mean) and math.isfinite(error) and error > 0):
        return f"{mean:.6g} +- {error:.2g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{digits}f} +- {error:.{digits}f}"
