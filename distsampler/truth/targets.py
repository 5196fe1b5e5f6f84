"""Targets: models with data and loss whose LLC is known, ready for ``distsampler.sample``.

A target may be many independent copies of a small problem in one parameter vector: its loss is the
sum of theirs, and so is its LLC; ``exact`` is that of one copy. Here are the targets whose answer
is a formula or an integral; ``networks`` has those whose answer Gibbs sampling finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from distsampler.config import RunConfig
from distsampler.errors import ConfigError
from distsampler.facts import optimal_nbeta
from distsampler.models.loss import LossFn
from distsampler.truth import coefficients, discretised_laws
from distsampler.truth.coefficients import LearningCoefficient
from distsampler.truth.quadrature import linear_regression, quadrature

EXAMPLES = 64  # of a loss that does not depend on them


class Known(NamedTuple):
    """An LLC that is known.

    Args:
        mean: its value.
        se: standard error of that value; 0 where it is a formula or an integral.
        how: where it is from.
    """

    mean: float
    se: float = 0.0
    how: str = "closed form"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model at w*, with data and loss, whose LLC is known.

    Args:
        name: for tables.
        model: at w*.
        data: as ``sample`` takes them.
        loss: per example.
        nbeta: inverse temperature times n.
        gamma: localisation.
        find: the exact LLC of one copy; asked once, when it is needed.
        coefficient: the learning coefficient of one copy, the limit of infinite nbeta.
        copies: independent problems in the one parameter vector.

    Example:
        >>> target = normal_crossing((2,), t=579.0, copies=100)
        >>> round(target.exact.mean, 4)
        0.2465
    """

    name: str
    model: nn.Module
    data: object
    loss: LossFn
    nbeta: float
    gamma: float
    find: Callable[[], Known]
    coefficient: LearningCoefficient | None = None
    copies: int = 1

    @cached_property
    def exact(self) -> Known:
        """The LLC of one copy that a perfect sampler returns, at this nbeta and gamma."""
        return self.find()

    def known(self, exact: Known) -> Self:
        """The same target, whose exact LLC has been found before."""
        return replace(self, find=partial(_already, exact))

    def law(self, config: RunConfig) -> Known | None:
        """The LLC of one copy that the discretised chain returns; None: no law is known.

        Args:
            config: of the run.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Quadratic(Target):
    """A linear regression in its own axes: ``l_i(w) = 1/2 sum_j h_j w_j^2 + sum_j z_ij w_j``.

    The z of the examples have mean 0 and variance v, exactly, so a minibatch gradient has variance
    v / m whatever w is, and the chain's law is exact.

    Args:
        curvature: h, (d,), float64.
        variance: v, of the gradient between examples.
    """

    curvature: Tensor
    variance: float

    @property
    def kappa(self) -> Tensor:
        """``nbeta h + gamma``, (d,)."""
        return self.nbeta * self.curvature + self.gamma

    def law(self, config: RunConfig) -> Known | None:
        """Of SGLD and LMSGLD: ``1/2 sum_j nbeta h_j Var(w_j)`` with the chain's own variance.

        Minibatches add ``(lr^2/4) nbeta^2 v / m`` to the variance of a step; corrected, as much is
        taken from the noise, but no more than there is. A ``noise_level`` other than 1 is an error
        of the sampler, not part of its law.
        """
        options = config.sampler.options
        variance = {"sgld": discretised_laws.sgld, "lmsgld": discretised_laws.lmsgld}.get(
            config.sampler.name
        )
        if variance is None or config.batches != "replacement":
            return None
        lr = float(options.get("lr", 0.01))
        heat = lr * self.nbeta**2 * self.variance / (4 * config.batch_size)
        left = max(0.0, 1 - heat) if config.sampler.correct_heat else 1.0
        found = [variance(lr, kappa, lr * heat, left) for kappa in self.kappa.tolist()]
        weights = self.nbeta * self.curvature / 2
        return Known(float((weights * torch.tensor(found, dtype=torch.float64)).sum()), how="law")


class Vectors(nn.Module):
    """Parameters ``w`` and no layers."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone(memory_format=torch.contiguous_format))


def _weights(model: nn.Module) -> Tensor:
    """The ``w`` of Vectors, or what torch.func has put in its place."""
    return cast(Tensor, model.w)


@dataclass(frozen=True)
class NoisyQuadraticLoss:
    """``1/2 sum_j h_j w_j^2 + sum_j z_ij w_j`` of each example."""

    curvature: Tensor

    def __call__(self, model: nn.Module, batch: object) -> Tensor:
        """The losses of the rows z, (batch,); the parameter ``w`` has shape (d,)."""
        w = _weights(model)
        return torch.mv(_rows(batch), w) + (self.curvature * w).dot(w) / 2


@dataclass(frozen=True)
class CrossingLoss:
    """``sum over copies of prod_i w_i^(2 k_i)``, the same of every example."""

    halves: tuple[int, ...]

    def __call__(self, model: nn.Module, batch: object) -> Tensor:
        """The losses, (batch,); the parameter ``w`` has shape (dimensions, copies)."""
        w = _weights(model)
        pairs = zip(w, self.halves, strict=True)
        factors = [row if k == 1 else row**k for row, k in pairs if k > 0]
        whole: Tensor = math.prod(factors[1:], start=factors[0])
        return whole.square().sum().expand(len(_rows(batch)))


def quadratic(
    curvature: ArrayLike, variance: float, *, n: int = 4096, gamma: float = 100.0, seed: int = 0
) -> Quadratic:
    """A quadratic loss with gradient noise, at nbeta = n / log n.

    Args:
        curvature: h, (d,), positive.
        variance: v, of the gradient between examples, the same in every direction.
        n: examples.
        gamma: localisation.
        seed: of the examples.

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
    z = torch.randn(n, len(h), dtype=torch.float64, generator=_generator(seed))
    z = (z - z.mean(0)) / z.std(0, correction=0) * math.sqrt(variance)
    nbeta = optimal_nbeta(n)
    return Quadratic(
        name=f"quadratic, d={len(h)}, v={variance:g}",
        model=Vectors(torch.zeros(len(h))),
        data=z.float(),
        loss=NoisyQuadraticLoss(h.float()),
        nbeta=nbeta,
        gamma=gamma,
        find=partial(_of_quadratic, h.numpy(), nbeta, gamma),
        coefficient=coefficients.regular(len(h)),
        curvature=h,
        variance=variance,
    )


def normal_crossing(
    halves: Sequence[int],
    *,
    t: float = 579.0,
    gamma: float = 1.0,
    anchor: Sequence[float] | None = None,
    copies: int = 1_000,
) -> Target:
    """Copies of ``K = prod_i w_i^(2 k_i)``, in one or two dimensions: ``y = prod_i w_i^k_i x``.

    Args:
        halves: k_1, or k_1 and k_2; 0 for a direction that does nothing.
        t: nbeta (times the second moment of x, which is 1 here).
        gamma: localisation.
        anchor: w*, one number a dimension, on which K is 0; None: the origin.
        copies: independent ones in one vector.

    Raises:
        ConfigError: no k is above 0, there are more than two, or K is not 0 at w*.

    Example:
        >>> round(normal_crossing((1, 1)).exact.mean, 4)
        0.3833
    """
    at = tuple(anchor or [0.0] * len(halves))
    origin = not any(at)
    found = coefficients.normal_crossing(halves)
    loss = partial(_crossing, tuple(halves))
    if len(at) != len(halves) or float(loss(*map(np.asarray, at))):
        raise ConfigError(
            f"w* must be a point on which K is 0, one number a dimension: got {at} for {halves}"
        )
    if not origin:  # only the factors that are 0 there are seen from there
        found = coefficients.normal_crossing(
            [0 if a else k for a, k in zip(at, halves, strict=True)]
        )
    return Target(
        name=f"normal crossing {tuple(halves)}" + f" at {at}, t={t:g}",
        model=Vectors(torch.tensor(at).unsqueeze(1).expand(-1, copies)),
        data=torch.zeros(EXAMPLES, 1),
        loss=CrossingLoss(tuple(halves)),
        nbeta=t,
        gamma=gamma,
        find=partial(_by_quadrature, loss, t, gamma, at),
        coefficient=found,
        copies=copies,
    )


def _crossing(halves: tuple[int, ...], *w: NDArray[np.float64]) -> NDArray[np.float64]:
    """K of one array a coordinate, which broadcast."""
    powers = [x ** (2 * k) for x, k in zip(w, halves, strict=True)]
    return math.prod(powers[1:], start=powers[0])


def _of_quadratic(h: NDArray[np.float64], nbeta: float, gamma: float) -> Known:
    return Known(linear_regression(h, nbeta, gamma).mean)


def _by_quadrature(
    loss: Callable[..., NDArray[np.float64]], t: float, gamma: float, anchor: tuple[float, ...]
) -> Known:
    return Known(quadrature(loss, t, gamma, anchor).mean, how="quadrature")


def _already(exact: Known) -> Known:
    return exact


def _rows(batch: object) -> Tensor:
    """The batch of a target whose data are one tensor."""
    if not isinstance(batch, Tensor):
        raise ConfigError(f"a batch must be a tensor here, got {type(batch).__name__}")
    return batch


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
