"""Targets: models with data and loss whose LLC is known, ready for ``sample()``.

A target may be many independent copies of a small problem in one parameter vector: its loss is the
sum of theirs, and so is its LLC; ``exact`` is that of one copy. Here are the targets whose LLC is a
formula or an integral; ``networks`` has those for which Gibbs sampling gives it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from distsampler.config import RunConfig
from distsampler.errors import ConfigError
from distsampler.facts import Posterior, optimal_nbeta
from distsampler.truth import coefficients, discretised_laws
from distsampler.truth.coefficients import LearningCoefficient
from distsampler.truth.quadrature import Exact, linear_regression, quadrature

EXAMPLES = 64  # of a loss that does not depend on them


class Known(NamedTuple):
    """An LLC that is known."""

    mean: float  # its value
    se: float = 0.0  # standard error of the value; 0 where it is a formula or an integral
    how: str = "closed form"  # where the value comes from


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model at w*, with data and loss, whose LLC is known.

    Example:
        >>> target = normal_crossing((2,), t=579.0, copies=100)
        >>> round(target.exact.mean, 4)
        0.2465
    """

    name: str  # title in tables
    model: nn.Module  # model at w*
    data: object  # data set as ``sample`` takes it
    loss: Callable[..., Tensor]  # function that returns the loss of each example
    nbeta: float  # inverse temperature times n
    localization: float  # gamma
    solve: Callable[[], Known]  # returns the exact LLC of one copy; called once, when it is needed
    # learning coefficient of one copy, the limit of infinite nbeta
    coefficient: LearningCoefficient | None = None
    copies: int = 1  # number of independent problems in the one parameter vector

    @cached_property
    def exact(self) -> Known:
        """LLC of one copy that a perfect sampler returns, at this nbeta and localization."""
        return self.solve()

    def known(self, exact: Known) -> Self:
        """Return the same target with an exact LLC that was computed before."""
        return replace(self, solve=partial(Known, *exact))

    def law(self, config: RunConfig) -> Known | None:
        """Return the LLC of one copy that the discretised chain has; None: its law is not known.

        Args:
            config: config of the run.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Quadratic(Target):
    """A linear regression in its own axes: ``l_i(w) = 1/2 sum_j h_j w_j^2 + sum_j z_ij w_j``.

    The z of the examples have mean 0 and variance v, exactly, so a minibatch gradient has variance
    v / m whatever w is, and the chain's law is exact.
    """

    curvature: Tensor  # h, (d,), float64
    variance: float  # v, variance of the gradient between examples

    @property
    def kappa(self) -> Tensor:
        """Curvature of U in each direction, ``nbeta h + gamma``, (d,)."""
        return Posterior(self.nbeta, self.localization).kappa(self.curvature)

    def law(self, config: RunConfig) -> Known | None:
        """Return ``1/2 sum_j nbeta h_j Var(w_j)`` of SGLD and LMSGLD, with the chain's variance.

        Minibatches add ``(lr^2/4) nbeta^2 v / m`` to the variance of a step; corrected, as much is
        taken from the noise, but no more than there is. A ``noise_level`` other than 1 is an error
        of the sampler, not part of its law.
        """
        variance = {"sgld": discretised_laws.sgld, "lmsgld": discretised_laws.lmsgld}.get(
            config.sampler.name
        )
        if variance is None or config.batches != "replacement":
            return None
        lr = float(config.sampler.options.get("lr", 0.01))
        heat = lr * self.nbeta**2 * self.variance / (4 * config.batch_size)
        left = max(0.0, 1 - heat) if config.sampler.correct_heat else 1.0
        variances = [variance(lr, kappa, lr * heat, left) for kappa in self.kappa.tolist()]
        energies = self.nbeta * self.curvature / 2 * torch.tensor(variances, dtype=torch.float64)
        return Known(float(energies.sum()), how="law")


class Vectors(nn.Module):
    """Parameters ``w`` and no layers."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone(memory_format=torch.contiguous_format))


@dataclass(frozen=True)
class NoisyQuadraticLoss:
    """``1/2 sum_j h_j w_j^2 + sum_j z_ij w_j`` of each example."""

    curvature: Tensor

    def __call__(self, model: Vectors, batch: Tensor) -> Tensor:
        """Return the losses of the rows z, (batch,); the parameter ``w`` has shape (d,)."""
        w = model.w
        return torch.mv(batch, w) + (self.curvature * w).dot(w) / 2


@dataclass(frozen=True)
class CrossingLoss:
    """``sum over copies of prod_i w_i^(2 k_i)``, the same of every example."""

    halves: tuple[int, ...]

    def __call__(self, model: Vectors, batch: Tensor) -> Tensor:
        """Return the losses, (batch,); the parameter ``w`` has shape (dimensions, copies)."""
        pairs = zip(model.w, self.halves, strict=True)
        factors = [row if k == 1 else row**k for row, k in pairs if k > 0]
        product: Tensor = math.prod(factors[1:], start=factors[0])
        return product.square().sum().expand(len(batch))


def quadratic(
    curvature: ArrayLike,
    variance: float,
    *,
    n: int = 4096,
    localization: float = 100.0,
    seed: int = 0,
) -> Quadratic:
    """Return a quadratic loss with gradient noise, at nbeta = n / log n.

    Args:
        curvature: h, (d,), positive.
        variance: v, variance of the gradient between examples, the same in every direction.
        n: number of examples.
        localization: gamma.
        seed: seed of the examples.

    Raises:
        ConfigError: a curvature is not positive, or the variance is negative.

    Example:
        >>> target = quadratic([0.1, 1.0, 10.0], variance=4.0)
        >>> round(target.exact.mean, 3)
        1.088
    """
    h = torch.as_tensor(np.asarray(curvature, np.float64))
    if h.ndim != 1 or not bool((h > 0).all()) or variance < 0:
        raise ConfigError(
            f"a quadratic must have curvatures above 0, (d,), and a variance of 0 or more: got "
            f"{h.tolist()[:8]}, {variance}"
        )
    source = torch.Generator().manual_seed(seed)
    z = torch.randn(n, len(h), dtype=torch.float64, generator=source)
    z = (z - z.mean(0)) / z.std(0, correction=0) * math.sqrt(variance)
    nbeta = optimal_nbeta(n)
    return Quadratic(
        name=f"quadratic, d={len(h)}, v={variance:g}",
        model=Vectors(torch.zeros(len(h))),
        data=z.float(),
        loss=NoisyQuadraticLoss(h.float()),
        nbeta=nbeta,
        localization=localization,
        solve=partial(_solved, "closed form", linear_regression, h.numpy(), nbeta, localization),
        coefficient=coefficients.regular(len(h)),
        curvature=h,
        variance=variance,
    )


def normal_crossing(
    halves: Sequence[int],
    *,
    t: float = 579.0,
    localization: float = 1.0,
    anchor: Sequence[float] | None = None,
    copies: int = 1_000,
) -> Target:
    """Return copies of ``K = prod_i w_i^(2 k_i)``, in one or two dimensions.

    Args:
        halves: k_1, or k_1 and k_2; 0 for a direction that does nothing.
        t: nbeta.
        localization: gamma.
        anchor: w*, one number per dimension, at which K is 0; None: the origin.
        copies: number of independent problems in the one parameter vector.

    Raises:
        ConfigError: no k is above 0, there are more than two, or K is not 0 at w*.

    Example:
        >>> round(normal_crossing((1, 1)).exact.mean, 4)
        0.3833
    """
    at = tuple(anchor or [0.0] * len(halves))
    coefficients.normal_crossing(halves)  # raises where no k is above 0
    loss = partial(_crossing, tuple(halves))
    if len(at) != len(halves) or float(loss(*map(np.asarray, at))):
        raise ConfigError(
            f"w* must be a point at which K is 0, one number per dimension: got {at} for {halves}"
        )
    near = [0 if a else k for a, k in zip(at, halves, strict=True)]  # the factors that are 0 there
    return Target(
        name=f"normal crossing {tuple(halves)}" + f" at {at}, t={t:g}",
        model=Vectors(torch.tensor(at).unsqueeze(1).expand(-1, copies)),
        data=torch.zeros(EXAMPLES, 1),
        loss=CrossingLoss(tuple(halves)),
        nbeta=t,
        localization=localization,
        solve=partial(_solved, "quadrature", quadrature, loss, t, localization, at),
        coefficient=coefficients.normal_crossing(near),
        copies=copies,
    )


def _crossing(halves: tuple[int, ...], *w: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return K of one array per coordinate, which broadcast."""
    powers = [x ** (2 * k) for x, k in zip(w, halves, strict=True)]
    return math.prod(powers[1:], start=powers[0])


def _solved(how: str, solve: Callable[..., Exact], *problem: object) -> Known:
    return Known(solve(*problem).mean, how=how)
