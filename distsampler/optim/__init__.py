"""Samplers as torch optimizers.

A sampler is a torch.optim.Optimizer whose step does not descend: it leaves a posterior invariant.
Everything a training loop does with an optimizer works, so a sampling loop is a training loop::

    sampler = SGLD(model.parameters(), lr=1e-5, nbeta=n / math.log(n), localization=100.0)
    for inputs, targets in batches:
        sampler.zero_grad()
        loss = cross_entropy(model(inputs), targets)     # mean over the batch
        loss.backward()
        sampler.step()

The loss that belongs to the weights of a draw is the one computed before the step that leaves them.
"""

from distsampler.optim.base import Sampler
from distsampler.optim.sgld import SGLD
from distsampler.optim.sgnht import SGNHT

SAMPLERS: dict[str, type[Sampler]] = {"sgld": SGLD, "sgnht": SGNHT}
"""The samplers by the names that a configuration uses."""

__all__ = ["SAMPLERS", "SGLD", "SGNHT", "Sampler"]
