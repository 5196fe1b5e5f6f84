"""The terms of the samplers' equations, in place on the chunk of a :class:`Point`.

A whole increment is summed in ``at.step`` before it touches the weights. That order matters: at a
step size of 5e-7 the pull to w* is smaller than the spacing of floating-point numbers around w and
would be lost if it were added alone; together with the noise it is not (the noise dithers it).

Symbols: w weights, w* anchors, g the minibatch mean gradient, gamma localization, lam weight decay,
u momentum. The potential is U(w) = nbeta L(w) + gamma/2 |w - w*|^2 + lam/2 |w|^2.
"""

import torch
from torch import Tensor

from distsampler.optim.layout import Point

# Sum a step.


def add_force(at: Point, scale: float) -> None:
    """Step -= scale grad U = scale (nbeta g + (gamma + lam) w - gamma w*).

    Terms whose coefficient is zero cost nothing.
    """
    nbeta, localization, weight_decay = at.u
    if at.grads:
        torch._foreach_add_(at.pulled(at.step), at.grads, alpha=-scale * nbeta)
    if localization + weight_decay:
        torch._foreach_add_(at.step, at.weights, alpha=-scale * (localization + weight_decay))
    if localization:
        torch._foreach_add_(at.step, at.anchors, alpha=scale * localization)


def add_preconditioned_force(at: Point, scale: float, root: list[Tensor]) -> None:
    """Step <- sqrt(P) step - scale P grad U, ``root`` being sqrt(P).

    In the order ``P (step / sqrt(P) - scale grad U)``, which needs no memory.
    """
    torch._foreach_div_(at.step, root)
    add_force(at, scale)
    torch._foreach_mul_(at.step, root)
    torch._foreach_mul_(at.step, root)


def add_noise_pair(at: Point, previous: list[Tensor]) -> None:
    """Step <- R_t + R_(t+1), previous <- R_(t+1) (to its last bit: it is read off the sum)."""
    torch._foreach_add_(at.step, previous)
    torch._foreach_sub_(previous, at.step)
    torch._foreach_neg_(previous)


# Move.


def move(at: Point) -> None:
    """W += step, frozen entries untouched; then :func:`settle`."""
    at.chunk.freeze()
    torch._foreach_add_(at.weights, at.step)
    settle(at)


def settle(at: Point) -> None:
    """W <- min(max(w, w* - b), w* + b) where there is a box; masters are written back rounded."""
    if (half_width := at.layout.group["bounding_box_size"]) is not None:
        _confine(at, half_width)
    if at.layout.rounded:
        torch._foreach_copy_(at.chunk.part(at.layout.params), at.weights)


def _confine(at: Point, half_width: float) -> None:
    for width, beyond, clamp in (
        (half_width, torch.inf, torch._foreach_minimum_),
        (-half_width, -torch.inf, torch._foreach_maximum_),
    ):
        torch._foreach_copy_(at.step, at.anchors)
        at.flat.add_(width)
        at.chunk.freeze(beyond)
        clamp(at.weights, at.step)


# Momentum.


def kick(at: Point, momentum: list[Tensor], keep: list[Tensor] | Tensor | float) -> None:
    """U <- keep u + step; a list has a number for each piece."""
    at.chunk.freeze()
    torch._foreach_mul_(momentum, keep)
    torch._foreach_add_(momentum, at.step)


def add_momentum(at: Point, momentum: list[Tensor], share: float = 1.0) -> None:
    """W += share u; frozen entries change no bit."""
    if at.chunk.frozen is None:
        torch._foreach_add_(at.weights, momentum, alpha=share)
    else:
        torch._foreach_copy_(at.step, momentum)
        at.chunk.freeze()
        torch._foreach_add_(at.weights, at.step, alpha=share)


def settle_and_reflect(at: Point, momentum: list[Tensor]) -> None:
    """U <- -u where |w - w*| > b, where there is a box; then :func:`settle`."""
    if (half_width := at.layout.group["bounding_box_size"]) is not None:
        put_displacement(at)
        outside = at.flat.abs() > half_width
        at.flat.fill_(1.0)
        at.flat.masked_fill_(outside, -1.0)
        torch._foreach_mul_(momentum, at.step)
    settle(at)


# Put something else into the buffer, zero at frozen entries: what is read, not stepped.


def put_gradient(at: Point) -> None:
    """Buffer <- g, zero where there is no gradient."""
    at.flat.zero_()
    if at.grads:
        torch._foreach_copy_(at.pulled(at.step), at.grads)
    at.chunk.freeze(0.0)


def put_weights(at: Point) -> None:
    """Buffer <- w."""
    torch._foreach_copy_(at.step, at.weights)
    at.chunk.freeze(0.0)


def put_displacement(at: Point) -> None:
    """Buffer <- w - w*."""
    torch._foreach_copy_(at.step, at.weights)
    torch._foreach_sub_(at.step, at.anchors)
    at.chunk.freeze(0.0)


def put_drift(at: Point) -> None:
    """Buffer <- grad U."""
    at.flat.zero_()
    add_force(at, scale=-1.0)
    at.chunk.freeze(0.0)


def prior_energy(at: Point) -> Tensor:
    """gamma/2 |w - w*|^2 + lam/2 |w|^2 over the trainable entries, 0-d, float64."""
    put_displacement(at)
    away: Tensor = torch.linalg.vector_norm(at.flat, dtype=torch.float64)
    put_weights(at)
    size: Tensor = torch.linalg.vector_norm(at.flat, dtype=torch.float64)
    _, localization, weight_decay = at.u
    return away.square() * (localization / 2) + size.square() * (weight_decay / 2)
