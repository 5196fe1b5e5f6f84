"""What is said of the biases of a sampler's step: which are predicted, and when it is too large.

What they are is predicted along the chains, where torch is; see ``curvature.watch``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distsampler.config import RunConfig
from distsampler.facts import Facts, Law

GENTLE = 0.1  # of the lr kappa at which the chain diverges: what is advised
BEARABLE = 0.5  # of the same: beyond it a step is called too large
PREDICTED = ("discretisation_bias", "heat_bias")


def unpredicted(config: RunConfig, law: Law | None) -> dict[str, str]:
    """Return which biases of a run are not predicted, by their names in sample_stats, and why."""
    name, options = config.sampler.name, config.sampler.options
    if not config.watch:
        why = "nothing was measured along the run: watch is off"
    elif law is None:
        why = f"the law of {name!r} on a quadratic is not known here"
    elif options.get("noise_level", 1.0) != 1.0:
        why = "with a noise_level other than 1 the law is not that of the posterior"
    elif options.get("bounding_box_size") is not None:
        why = "a box changes the law"
    else:
        heat = "batches of an epoch bring less heat than independent ones, how much less is unknown"
        return {"heat_bias": heat} if config.batches == "epoch" else {}
    return dict.fromkeys(PREDICTED, why)


@dataclass(frozen=True)
class Steepness:
    """How steep a step is where the curvature was largest."""

    lr: float  # step size
    limit: float  # lr kappa at which a chain diverges
    share: float  # largest lr kappa that was met, as a share of the limit
    curvature: float  # h, the largest curvature of the mean loss

    @property
    def too_large(self) -> bool:
        """Tell whether the step is too large there."""
        return self.share > BEARABLE

    @property
    def gentle_lr(self) -> float:
        """The step size that is advised."""
        return two_digits(self.lr * GENTLE / self.share)

    @property
    def reason(self) -> str:
        """Say why the step is too large."""
        return (
            f"the step is too large: lr (nbeta h + gamma) / {self.limit:.3g} reached "
            f"{self.share:.2g}, beyond {BEARABLE}, where the largest curvature h was "
            f"{self.curvature:.4g}"
        )

    def __str__(self) -> str:
        return f"{self.reason}; lower sampler.lr from {self.lr:.3g} to {self.gentle_lr:g}"


def steepness(curvature: NDArray[np.float64], facts: Facts) -> Steepness | None:
    """Return how steep a run's step has been; None where nothing is known of it.

    Args:
        curvature: largest curvatures of the mean loss, as measured along some chains, any shape.
        facts: what is known of the run.
    """
    law, lr, finite = facts.law, facts.lr, curvature[np.isfinite(curvature)]
    if law is None or law.limit is None or lr is None or not finite.size:
        return None
    largest = float(finite.max())
    share = lr * (facts.posterior.kappa(largest) / law.limit)
    return Steepness(lr, law.limit, share, largest) if share > 0 else None


@dataclass(frozen=True)
class Slower:
    """The smaller step that is advised where a chain has diverged."""

    lr: float | None  # step size that was used; None: the sampler has no such option
    gentle_lr: float | None  # step size to start with; None: likewise
    localization: float  # gamma that was used

    def __str__(self) -> str:
        pull = f"raise sampler.localization from {self.localization:g}"
        if self.lr is None:
            return f"give the sampler a smaller step, or {pull}"
        return f"lower sampler.lr from {self.lr:.3g} to {self.gentle_lr:g} as a start, or {pull}"


def after_divergence(facts: Facts, curvature: float) -> Slower:
    """Return what to lower: half the step, or less where the last known curvature asks for it.

    The curvature is NaN where none was measured.
    """
    if facts.lr is None:
        return Slower(None, None, facts.posterior.localization)
    lr, known = two_digits(facts.lr / 2), steepness(np.array([curvature]), facts)
    if known is not None and known.too_large:
        lr = min(lr, known.gentle_lr)
    return Slower(facts.lr, lr, facts.posterior.localization)


def two_digits(value: float) -> float:
    """Return a number that can be read and written."""
    return float(f"{value:.2g}")
