"""A sampler on many independent copies of a deep linear network: its error against Gibbs.

The copies are one parameter vector whose loss is the sum of theirs, so their joint posterior is the
product of theirs, and a step costs hardly more than that of one copy. Gradients are those of
infinitely many examples: what is left is the error of the sampler. Copies that share a thermostat
(SGNHT has one per parameter group) are independent up to its small fluctuations.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from distsampler.truth.gibbs import DeepLinear, ReplicaMean

Weights = list[torch.nn.Parameter]


def sample_copies(
    net: DeepLinear,
    sampler: Callable[[Weights], Optimizer],
    start: list[Tensor],
    *,
    steps: int,
    burn_in: int,
) -> ReplicaMean:
    """Return ``t E[K]`` as a sampler estimates it, with its standard error over the copies.

    Args:
        net: posterior of one network.
        sampler: makes the optimizer of W_1 .. W_L, (copies, H_s, H_(s-1)), which are at w* then;
            its nbeta must be ``net.t``, its localization ``net.localization``.
        start: weights that the copies start from, in the same shapes: draws of
            :class:`BlockGibbs`, or w*.
        steps: number of steps after burn-in; K is measured before each.
        burn_in: number of steps before those.

    Example:
        >>> from distsampler.optim import SGLD
        >>> net = DeepLinear.of_rank((2, 2, 2), rank=0, t=100.0)
        >>> w0 = [w.expand(64, 2, 2) for w in net.anchors]
        >>> llc = sample_copies(
        ...     net, lambda p: SGLD(p, 5e-4, nbeta=100.0, localization=1.0), w0,
        ...     steps=200, burn_in=100)
        >>> llc.mean.shape
        torch.Size([])
    """
    anchors = tuple(w.to(s.dtype) for w, s in zip(net.anchors, start, strict=True))
    net = DeepLinear(anchors, net.t, net.localization)
    weights = [
        torch.nn.Parameter(w.expand(s.shape).clone(memory_format=torch.contiguous_format))
        for w, s in zip(anchors, start, strict=True)
    ]
    chain = sampler(weights)
    with torch.no_grad():
        for w, s in zip(weights, start, strict=True):
            w.copy_(s)
    total = torch.zeros(len(start[0]), dtype=torch.float64)
    for step in range(burn_in + steps):
        with torch.no_grad():
            loss, gradients = net.gradient(weights)
        for w, gradient in zip(weights, gradients, strict=True):
            w.grad = gradient
        chain.step()
        if step >= burn_in:
            total += loss
    return ReplicaMean.over(net.t * total / steps)
