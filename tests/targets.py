"""Losses whose posterior is known: what a sampler must reproduce, as formulas.

A target acts on one parameter vector. Coordinates are independent unless a target says otherwise,
so one long vector is as many chains, and standard errors follow from counting coordinates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DATA = torch.zeros(64, 1)  # of a loss that does not depend on them


@dataclass(frozen=True)
class Quadratic:
    """L(w) = 1/2 sum h_i w_i^2."""

    curvature: Tensor

    def gradient(self, w: Tensor) -> Tensor:
        return self.curvature * w

    def loss(self, w: Tensor) -> Tensor:
        return (self.curvature * w.square()).sum() / 2

    def kappa(self, nbeta: float, localization: float = 0.0) -> Tensor:
        """Curvature of U in each direction."""
        return nbeta * self.curvature + localization

    def sgld_variance(self, lr: float, nbeta: float, localization: float = 0.0) -> Tensor:
        """Stationary variance of the discretised chain, exact: 1 / (kappa (1 - lr kappa / 4))."""
        kappa = self.kappa(nbeta, localization)
        return 1 / (kappa * (1 - lr * kappa / 4))


@dataclass(frozen=True)
class NoisyQuadratic:
    """A quadratic whose gradients carry the noise of minibatches: variance v / m, Gaussian."""

    curvature: Tensor
    variance: float
    batch_size: int
    generator: torch.Generator

    def gradient(self, w: Tensor) -> Tensor:
        noise = torch.randn(w.shape, dtype=w.dtype, generator=self.generator)
        return self.curvature * w + noise * (self.variance / self.batch_size) ** 0.5


@dataclass(frozen=True)
class CorrelatedGaussian:
    """L(w) = 1/2 w^T H w for each row of w; every row is a chain of its own."""

    hessian: Tensor

    @classmethod
    def make(cls, dimensions: int, condition: float, seed: int = 0) -> "CorrelatedGaussian":
        """Eigenvalues log-spaced from 1/condition to 1, eigenvectors random."""
        source = torch.Generator().manual_seed(seed)
        q, _ = torch.linalg.qr(torch.randn(dimensions, dimensions, generator=source).double())
        values = torch.logspace(0, 1, dimensions, base=1 / condition, dtype=torch.float64)
        return cls(q @ torch.diag(values) @ q.T)

    def gradient(self, w: Tensor) -> Tensor:
        return w @ self.hessian.to(w.dtype)

    def loss(self, w: Tensor) -> Tensor:
        return (w * self.gradient(w)).sum() / 2

    def principal(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues, and w in the eigenvectors' coordinates."""
        values, vectors = torch.linalg.eigh(self.hessian)
        return values, w.double() @ vectors


@dataclass(frozen=True)
class Power:
    """L(w) = sum w_i^(2k): each coordinate's nbeta L has mean and variance 1/(2k) for any nbeta."""

    k: int

    def gradient(self, w: Tensor) -> Tensor:
        return 2 * self.k * w ** (2 * self.k - 1)

    def loss(self, w: Tensor) -> Tensor:
        return (w ** (2 * self.k)).sum()

    def __call__(self, model: "Weights", batch: Any) -> Tensor:
        """The same as a run's loss: of each example that of all coordinates."""
        return self.loss(model.w).expand(len(batch))


class Weights(nn.Module):
    """Vectors at zero, which is w* of every loss here."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """A parameter at the minimum of the targets here."""
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


def run(
    sampler: torch.optim.Optimizer,
    w: Tensor,
    gradient: Callable[[Tensor], Tensor],
    steps: int,
) -> None:
    """Take steps with the given gradient."""
    for _ in range(steps):
        w.grad = gradient(w.detach())
        sampler.step()
