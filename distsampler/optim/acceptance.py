"""The Metropolis ratio of a Langevin step: how far it is from an exact proposal."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Side(NamedTuple):
    """One end of a step, as a sampler's ``side()`` gives it."""

    weights: Sequence[Tensor]
    """w, one tensor a parameter."""
    drift: Sequence[Tensor]
    """Grad U(w), in the same shapes, from the same batch on both sides."""
    potential: Tensor
    """U(w), 0-d."""
    lr: Sequence[float]
    """Step size of each tensor."""


def mala_acceptance(before: Side, after: Side) -> Tensor:
    """Chance that Metropolis and Hastings would accept an SGLD step.

    ``min(1, exp(U(w) - U(w') + log q(w|w') - log q(w'|w)))`` with
    ``log q(b|a) = -|b - a + (lr/2) grad U(a)|^2 / (2 lr)``

    Source: Roberts & Tweedie 1996 (MALA). A diagnostic of the step size only: an acceptance
    near 1 does not say that the chain has converged, nor that its minibatches are large enough.

    Args:
        before: w, the side that the step left; holds the step size.
        after: w', where it arrived, with loss and gradient of the same batch.

    Returns:
        0-d tensor in [0, 1], float64; nan where a potential is.

    Example:
        >>> before = sampler.side(loss)
        >>> sampler.step()
        >>> again = loss_of_the_same_batch()
        >>> again.backward()
        >>> acceptance = mala_acceptance(before, sampler.side(again))
    """
    return log_ratio(before, after).clamp(max=0.0).exp()


def log_ratio(before: Side, after: Side) -> Tensor:
    """U(w) - U(w') + log q(w|w') - log q(w'|w), 0-d, float64."""
    gain = before.potential.double() - after.potential.double()
    return gain + _log_q(before, after, before.lr) - _log_q(after, before, before.lr)


def _log_q(to: Side, start: Side, step_sizes: Sequence[float]) -> Tensor:
    """Log q(to | start), up to the constant that both directions share."""
    terms = [
        -(b.double() - a.double() + (lr / 2) * g.double()).square().sum() / (2 * lr)
        for b, a, g, lr in zip(to.weights, start.weights, start.drift, step_sizes, strict=True)
    ]
    return torch.stack(terms).sum()
