"""What is said of the biases of a sampler's step: which are predicted, and when it is too large.

What they are is predicted along the chains, where torch is; see ``curvature.watch``.
"""

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


def too_large(curvature: NDArray[np.float64], facts: Facts) -> str | None:
    """Return a sentence where a step is, or has become, too large; None where it is not.

    Args:
        curvature: largest curvatures of the mean loss, as measured along some chains, any shape.
        facts: what is known of the run.
    """
    law, lr = facts.law, facts.lr
    if law is None or law.limit is None or lr is None or not curvature.size:
        return None
    steepness = float((lr * (facts.posterior.kappa(curvature) / law.limit)).max())
    if not steepness > BEARABLE:
        return None
    return (
        f"the step is too large: lr (nbeta h + gamma) / 4 reached {steepness:.2g}, beyond "
        f"{BEARABLE}, where the largest curvature h was {curvature.max():.4g}; lower sampler.lr to "
        f"about {lr * GENTLE / steepness:.2g}"
    )
