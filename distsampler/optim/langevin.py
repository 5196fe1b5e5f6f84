"""One Langevin step as a proposal: what SGLD takes and MALA tests."""

import torch
from torch import Tensor

from distsampler.optim import kernels, options
from distsampler.optim.acceptance import Side
from distsampler.optim.base import Sampler


class LangevinProposal(Sampler):
    """A sampler whose step is w' = w - (lr/2) grad U(w) + sqrt(lr) N, and can say where it is."""

    def _side(self, loss: Tensor | float) -> Side:
        """The present point for the Metropolis ratio: copies of w and grad U, and U."""
        weights: list[Tensor] = []
        drift: list[Tensor] = []
        step_sizes: list[float] = []
        energy = torch.zeros((), dtype=torch.float64, device=self.generator.device)
        nbetas = {self._potential(group).nbeta for group in self.param_groups}
        if len(nbetas) > 1:
            options.refuse("all groups must have one nbeta", f"{nbetas}", "set it for all")
        for group, plan in zip(self.param_groups, self._current_plans(), strict=True):
            u, grads = self._potential(group), plan.grads()
            slopes = [torch.empty_like(w, requires_grad=False) for w in plan.weights]
            for chunk in plan.chunks:
                at = plan.point(chunk, grads, plan.column(self.state, "anchor"))
                energy += kernels.prior_energy(chunk, at, u)
                kernels.put_drift(chunk, at, u)
                torch._foreach_copy_(chunk.part(slopes), chunk.views)
            weights += [w.detach().clone() for w in plan.weights]
            drift += slopes
            step_sizes += [group["lr"]] * len(slopes)
        return Side(weights, drift, nbetas.pop() * loss + energy, step_sizes)
