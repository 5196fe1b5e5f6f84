"""The Metropolis ratio of a Langevin step, and the samplers that can give it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distsampler.optim import checks, kernels
from distsampler.optim.sampler import Sampler


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
    """Return the chance that Metropolis and Hastings would accept an SGLD step.

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
    """Return U(w) - U(w') + log q(w|w') - log q(w'|w), 0-d, float64."""
    gain = before.potential.double() - after.potential.double()
    return gain + _log_q(before, after, before.lr) - _log_q(after, before, before.lr)


def _log_q(to: Side, start: Side, step_sizes: Sequence[float]) -> Tensor:
    """Return log q(to | start), up to the constant that both directions share."""
    terms = [
        -(b.double() - a.double() + (lr / 2) * g.double()).square().sum() / (2 * lr)
        for b, a, g, lr in zip(to.weights, start.weights, start.drift, step_sizes, strict=True)
    ]
    return torch.stack(terms).sum()


class LangevinProposal(Sampler):
    """A sampler whose step is w' = w + sqrt(lr) N - (lr/2) grad U(w), and can say where it is."""

    def _side(self, loss: Tensor | float) -> Side:
        """Return the present point for the Metropolis ratio: copies of w and grad U, and U."""
        weights: list[Tensor] = []
        drift: list[Tensor] = []
        step_sizes: list[float] = []
        energy = torch.zeros((), dtype=torch.float64, device=self.generator.device)
        nbetas = {self._potential(group).nbeta for group in self.param_groups}
        if len(nbetas) > 1:
            checks.refuse("all groups must have one nbeta", f"{nbetas}", "set it for all")
        for layout in self._current_layouts():
            gradients = [torch.empty_like(w, requires_grad=False) for w in layout.weights]
            for at in layout.points(self._potential(layout.group)):
                energy += kernels.prior_energy(at)
                kernels.put_drift(at)
                torch._foreach_copy_(at.chunk.part(gradients), at.step)
            weights += [w.detach().clone() for w in layout.weights]
            drift += gradients
            step_sizes += [layout.group["lr"]] * len(gradients)
        return Side(weights, drift, nbetas.pop() * loss + energy, step_sizes)
