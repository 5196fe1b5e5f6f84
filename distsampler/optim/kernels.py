"""The equations of the samplers, as functions of lists of tensors.

Each function works in place on a chunk: ``step`` is the chunk's noise buffer, in which a whole
increment is summed before it touches the weights. That order matters: at a step size of 5e-7 the
pull to w* is smaller than the spacing of floating-point numbers around w and would be lost if it
were added alone; together with the noise it is not (the noise dithers it).

Symbols: w weights, w* anchors, g the minibatch mean gradient, lr step size, N standard normal,
gamma localisation, lam weight decay. The potential is
U(w) = nbeta L(w) + gamma/2 |w - w*|^2 + lam/2 |w|^2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distsampler.optim.layout import Chunk, Point


class Potential(NamedTuple):
    """The coefficients of U: inverse temperature, localisation, weight decay."""

    nbeta: float
    gamma: float
    lam: float


def add_force(step: list[Tensor], at: Point, u: Potential, scale: float) -> None:
    """Step += -scale (nbeta g + (gamma + lam) w - gamma w*), the force -grad U times scale.

    Terms whose coefficient is zero cost nothing.
    """
    pulled = step if at.with_grad is None else [step[i] for i in at.with_grad]
    if pulled:
        torch._foreach_add_(pulled, at.grads, alpha=-scale * u.nbeta)
    if u.gamma + u.lam:
        torch._foreach_add_(step, at.weights, alpha=-scale * (u.gamma + u.lam))
    if u.gamma:
        torch._foreach_add_(step, at.anchors, alpha=scale * u.gamma)


def move(weights: list[Tensor], step: list[Tensor]) -> None:
    """W += step."""
    torch._foreach_add_(weights, step)


def confine(chunk: Chunk, at: Point, half_width: float) -> None:
    """W <- min(max(w, w* - b), w* + b), frozen entries untouched."""
    for width, beyond, clamp in (
        (half_width, torch.inf, torch._foreach_minimum_),
        (-half_width, -torch.inf, torch._foreach_maximum_),
    ):
        torch._foreach_copy_(chunk.views, at.anchors)
        chunk.flat.add_(width)
        chunk.freeze(beyond)
        clamp(at.weights, chunk.views)


def put_gradient(chunk: Chunk, at: Point) -> None:
    """Buffer <- g, zero where frozen or where there is no gradient."""
    chunk.flat.zero_()
    pulled = chunk.views if at.with_grad is None else [chunk.views[i] for i in at.with_grad]
    if pulled:
        torch._foreach_copy_(pulled, at.grads)
    chunk.freeze(0.0)


def put_weights(chunk: Chunk, at: Point) -> None:
    """Buffer <- w, zero where frozen."""
    torch._foreach_copy_(chunk.views, at.weights)
    chunk.freeze(0.0)


def put_displacement(chunk: Chunk, at: Point) -> None:
    """Buffer <- w - w*, zero where frozen."""
    torch._foreach_copy_(chunk.views, at.weights)
    torch._foreach_sub_(chunk.views, at.anchors)
    chunk.freeze(0.0)


def put_drift(chunk: Chunk, at: Point, u: Potential) -> None:
    """Buffer <- grad U = nbeta g + (gamma + lam) w - gamma w*, zero where frozen."""
    chunk.flat.zero_()
    add_force(chunk.views, at, u, scale=-1.0)
    chunk.freeze(0.0)


def sgld(chunk: Chunk, at: Point, u: Potential, lr: float) -> None:
    """Buffer, drawn as sqrt(lr) sigma N, += -(lr/2) grad U (Welling & Teh 2011, eq. 4)."""
    add_force(chunk.views, at, u, lr / 2)


def carry(chunk: Chunk, weights: list[Tensor], momentum: list[Tensor], share: float = 1.0) -> None:
    """W += share u; frozen entries change no bit."""
    if chunk.frozen is None:
        torch._foreach_add_(weights, momentum, alpha=share)
    else:
        torch._foreach_copy_(chunk.views, momentum)
        chunk.freeze()
        torch._foreach_add_(weights, chunk.views, alpha=share)


def kick(chunk: Chunk, momentum: list[Tensor], keep: list[Tensor] | Tensor | float) -> None:
    """U <- keep u + buffer; a list has a number for each piece."""
    chunk.freeze()
    torch._foreach_mul_(momentum, keep)
    torch._foreach_add_(momentum, chunk.views)


def kinetic(momentum: list[Tensor]) -> Tensor:
    """|u|^2 of each piece."""
    return torch.stack(torch._foreach_norm(momentum)).square()


def friction_noise(xi: Tensor, lr: float, a: float) -> Tensor:
    """sqrt(2 lr A (1 - exp(-2 xi)) / (2 xi)): the noise of friction xi over a step, 0-d."""
    ratio = torch.where(xi.abs() < 1e-6, 2 - 2 * xi, -torch.expm1(-2 * xi) / xi)
    return (lr * a * ratio).sqrt()


def turn_at_wall(chunk: Chunk, at: Point, momentum: list[Tensor], half_width: float) -> None:
    """U <- -u where |w - w*| > b."""
    put_displacement(chunk, at)
    outside = chunk.flat.abs() > half_width
    chunk.flat.fill_(1.0)
    chunk.flat.masked_fill_(outside, -1.0)
    torch._foreach_mul_(momentum, chunk.views)


def average_squares(chunk: Chunk, at: Point, averages: list[Tensor], beta2: float) -> None:
    """V <- beta2 v + (1 - beta2) g^2; a parameter without gradient has g = 0."""
    put_gradient(chunk, at)
    torch._foreach_mul_(averages, beta2)
    torch._foreach_addcmul_(averages, chunk.views, chunk.views, value=1 - beta2)


def average(at: Point, mean: list[Tensor], beta1: float) -> None:
    """M <- beta1 m + (1 - beta1) g; a parameter without gradient has g = 0."""
    torch._foreach_mul_(mean, beta1)
    pulled = mean if at.with_grad is None else [mean[i] for i in at.with_grad]
    if pulled:
        torch._foreach_add_(pulled, at.grads, alpha=1 - beta1)


def preconditioner_root(
    root: list[Tensor], averages: list[Tensor], unbiased: float, stability: float
) -> None:
    """Root <- 1 / sqrt(sqrt(v / unbiased) + a), the root of P (Li et al. 2016)."""
    torch._foreach_copy_(root, averages)
    torch._foreach_div_(root, unbiased)
    torch._foreach_sqrt_(root)
    torch._foreach_add_(root, stability)
    torch._foreach_sqrt_(root)
    torch._foreach_reciprocal_(root)


def preconditioned(chunk: Chunk, at: Point, u: Potential, lr: float, root: list[Tensor]) -> None:
    """Buffer, drawn as sqrt(lr) sigma N, <- sqrt(P) N - (lr/2) P grad U.

    In the order ``P (N / sqrt(P) - (lr/2) grad U)``, which needs no memory.
    """
    torch._foreach_div_(chunk.views, root)
    add_force(chunk.views, at, u, lr / 2)
    torch._foreach_mul_(chunk.views, root)
    torch._foreach_mul_(chunk.views, root)


def prior_energy(chunk: Chunk, at: Point, u: Potential) -> Tensor:
    """gamma/2 |w - w*|^2 + lam/2 |w|^2 over the trainable entries, 0-d, float64."""
    put_displacement(chunk, at)
    away: Tensor = torch.linalg.vector_norm(chunk.flat, dtype=torch.float64)
    put_weights(chunk, at)
    size: Tensor = torch.linalg.vector_norm(chunk.flat, dtype=torch.float64)
    return away.square() * (u.gamma / 2) + size.square() * (u.lam / 2)


def add_noise_pair(noise: list[Tensor], previous: list[Tensor]) -> None:
    """Noise <- R_t + R_(t+1), previous <- R_(t+1) (to its last bit: it is read off the sum)."""
    torch._foreach_add_(noise, previous)
    torch._foreach_sub_(previous, noise)
    torch._foreach_neg_(previous)
