"""Block Gibbs sampling for deep linear networks: the posterior without a step size.

Given all other layers, a layer of ``y = W_L ... W_1 x`` is a linear regression, whose posterior is
Gaussian and can be sampled exactly. With A the product above layer s, B the product below and T the
true map, U = t |A W B - T|^2 + gamma/2 |W - W*|^2 has

    ``precision = 2 t (A^T A) (x) (B B^T) + gamma I``,
    ``mean = precision^-1 (2 t A^T T B^T + gamma W*)``,

which the eigenvectors of ``A^T A`` and ``B B^T`` make diagonal.

Neighbouring layers W, V may also trade a matrix, (W G, G^-1 V): the product stays as it is. Along
that orbit the Gaussian draws take steps of 1 / sqrt(t) only, so it gets a move of its own: G is
proposed at random and accepted after Metropolis and Hastings. The Jacobian is ``|det G|`` to the
rows of W less the columns of V.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from distsampler.errors import ConfigError

STRIDES = (1e-2, 1.0)  # log-uniform standard deviations of log G
ROUNDING = 1e-3  # of gamma, at most, in a precision
Eigen = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class DeepLinear:
    """The posterior of a deep linear network around w*.

    ``p(W) ~ exp(-t K - gamma/2 sum_s |W_s - W*_s|^2)``, ``K = |W_L ... W_1 - T|^2`` (the sum of the
    squares of all entries) and T the product at w*. For inputs of second moment c I and squared
    error summed over outputs, t is nbeta c.

    Raises:
        ConfigError: the layers do not fit onto each other, or t or gamma is not above 0.
    """

    # W*_1 .. W*_L, each (..., H_s, H_(s-1)), of one dtype; leading dimensions are several
    # networks.
    anchors: tuple[Tensor, ...]
    t: float  # inverse temperature times n, times the second moment of an input
    localization: float = 1.0  # gamma, above 0

    def __post_init__(self) -> None:
        fit = all(
            a.shape[:-2] == b.shape[:-2] and a.shape[-2] == b.shape[-1]
            for a, b in zip(self.anchors, self.anchors[1:], strict=False)
        )
        if not (self.anchors and fit):
            shapes = [tuple(w.shape) for w in self.anchors]
            raise ConfigError(
                f"layers must be (..., H_s, H_(s-1)), the input's first: got {shapes}"
            )
        if not (self.t > 0 and self.localization > 0):
            raise ConfigError(
                f"t and localization (gamma) must be above 0: got {self.t}, {self.localization}"
            )

    @classmethod
    def of_rank(
        cls, widths: Sequence[int], rank: int, t: float, localization: float = 1.0
    ) -> "DeepLinear":
        """Return the posterior around layers that pass on the first ``rank`` unit vectors.

        Args:
            widths: H_0 .. H_L.
            rank: rank of every layer, and so of the product.
            t: inverse temperature times n, times the second moment of an input.
            localization: gamma, above 0.
        """
        pairs = zip(widths[1:], widths, strict=False)
        layers = [torch.zeros(rows, columns, dtype=torch.float64) for rows, columns in pairs]
        for layer in layers:
            layer[range(rank), range(rank)] = 1.0
        return cls(tuple(layers), t, localization)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths H_0 .. H_L."""
        return (self.anchors[0].shape[-1], *(w.shape[-2] for w in self.anchors))

    @cached_property
    def target(self) -> Tensor:
        """True map T, (..., H_L, H_0)."""
        return product(self.anchors)

    def tk(self, weights: Sequence[Tensor]) -> Tensor:
        """Return ``t K`` at some weights, of their leading dimensions.

        Args:
            weights: W_1 .. W_L, each (..., H_s, H_(s-1)).
        """
        return self.t * (product(weights) - self.target).square().sum((-2, -1))

    def gradient(self, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return K at some weights, and its gradient ``2 A^T (W_L ... W_1 - T) B^T`` in each layer.

        Args:
            weights: W_1 .. W_L, each (..., H_s, H_(s-1)), of the anchors' dtype.

        Returns:
            K, of the weights' leading dimensions, and one tensor shaped like each layer.
        """
        below = list(accumulate(weights, lambda b, w: w @ b))
        error = below[-1] - self.target
        loss, error = error.square().sum((-2, -1)), 2 * error
        gradients: list[Tensor] = []
        for w, b in zip(reversed(weights[1:]), reversed(below[:-1]), strict=True):
            gradients.append(error @ b.mT)
            error = w.mT @ error
        return loss, [error, *reversed(gradients)]

    def curvature(self, weights: Sequence[Tensor], iterations: int = 100) -> Tensor:
        """Return the largest curvature of ``t K`` at some weights, by power iteration, from below.

        It is the Gauss-Newton one, 2 t times the largest eigenvalue of ``J J^T``, J the derivative
        of the product: exact where K = 0. It tells the step that a sampler would need there.

        Args:
            weights: W_1 .. W_L, each (..., H_s, H_(s-1)), of one dtype.
            iterations: number of power iterations.

        Returns:
            The curvature, of the weights' leading dimensions.
        """
        below = [None, *accumulate(weights[:-1], lambda b, w: w @ b)]
        above = [None, *accumulate(reversed(weights[1:]), lambda a, w: a @ w)]
        pairs = list(zip(reversed(above), below, strict=True))
        vector = torch.empty_like(product(weights))
        vector.normal_(generator=torch.Generator().manual_seed(0))
        least = torch.finfo(vector.dtype).tiny
        for _ in range(iterations):
            size = vector.norm(dim=(-2, -1), keepdim=True)
            unit, vector = vector / size.clamp(min=least), torch.zeros_like(vector)
            for a, b in pairs:
                part = unit if a is None else a @ (a.mT @ unit)
                vector += part if b is None else (part @ b.mT) @ b
        largest: Tensor = 2 * self.t * vector.norm(dim=(-2, -1))
        return largest


def product(weights: Sequence[Tensor]) -> Tensor:
    """Return the product W_L ... W_1, (..., H_L, H_0)."""
    return reduce(lambda below, w: w @ below, weights)


class ReplicaMean(NamedTuple):
    """t E[K] of each network as a mean over replicas, and its standard error from their spread."""

    mean: Tensor
    se: Tensor

    @classmethod
    def over(cls, replicas: Tensor) -> "ReplicaMean":
        """Return mean and standard error of one number per replica, (replicas, ...)."""
        return cls(replicas.mean(0), replicas.std(0) / math.sqrt(len(replicas)))


class BlockGibbs:
    """Independent Gibbs chains, all moved at once, starting at w*.

    Args:
        net: posterior of one network or several.
        replicas: number of chains per network.
        generator: source of all draws.

    Attributes:
        weights: W_1 .. W_L now, each (replicas, ..., H_s, H_(s-1)), float64.
    """

    def __init__(self, net: DeepLinear, replicas: int, generator: torch.Generator) -> None:
        self.net = DeepLinear(tuple(w.double() for w in net.anchors), net.t, net.localization)
        self._generator = generator
        self.weights = [
            w.expand(replicas, *w.shape).clone(memory_format=torch.contiguous_format)
            for w in self.net.anchors
        ]

    def sweep(self) -> None:
        """Draw every layer once given the others, then every hidden layer's place on its orbit."""
        above: list[Tensor | None] = [None]
        for w in reversed(self.weights[1:]):
            last = above[-1]
            above.append(w if last is None else last @ w)
        below: Tensor | None = None
        for s, a in enumerate(reversed(above)):
            self.weights[s] = w = self._layer(s, a, below)
            below = w if below is None else w @ below
        for s in range(len(self.weights) - 1):
            self._trade(s)

    def run(self, sweeps: int) -> Tensor:
        """Sweep this many times; return the mean of t K over these sweeps, (replicas, ...)."""
        total = torch.zeros(self.weights[0].shape[:-2], dtype=torch.float64)
        for _ in range(sweeps):
            self.sweep()
            total += self.net.tk(self.weights)
        return total / sweeps

    def _layer(self, s: int, a: Tensor | None, b: Tensor | None) -> Tensor:
        """Draw W_s given the product a above and the product b below (None: identity)."""
        t, gamma, target = self.net.t, self.net.localization, self.net.target
        w = self.weights[s]
        if a is not None:
            target = a.mT @ target
        if b is not None:
            target = target @ b.mT
        mean = (2 * t * target + gamma * self.net.anchors[s]).expand_as(w)
        (heights, u), (widths, v) = self._eigen(None if a is None else a.mT, b)
        precision = torch.full_like(w, 2 * t)
        if heights is not None and u is not None:
            precision *= heights.unsqueeze(-1)
            mean = u.mT @ mean
        if widths is not None and v is not None:
            precision *= widths.unsqueeze(-2)
            mean = mean @ v
        precision = precision.clamp_(min=0.0) + gamma
        drawn = mean / precision + self._normal(w) / precision.sqrt()
        drawn = drawn if u is None else u @ drawn
        return drawn if v is None else drawn @ v.mT

    def _eigen(self, *products: Tensor | None) -> list[Eigen]:
        """Return eigenvalues and eigenvectors of ``m m^T`` of each product m.

        Squares double the digits that are lost, and rounding may reach the precision of flat
        directions, gamma, in a deep net. Then the singular vectors of m itself are taken.
        """
        eigen: list[Eigen] = [
            (None, None) if m is None else torch.linalg.eigh(m @ m.mT) for m in products
        ]
        size = math.prod(float(values[..., -1].max()) for values, _ in eigen if values is not None)
        error = 2 * self.net.t * size * torch.finfo(torch.float64).eps
        if error < ROUNDING * self.net.localization:
            return eigen
        return [(None, None) if m is None else _singular(m) for m in products]

    def _trade(self, s: int) -> None:
        """(W_(s+1), W_s) <- (W_(s+1) G, G^-1 W_s), accepted for each replica by itself."""
        v, w = self.weights[s], self.weights[s + 1]
        width = v.shape[-2]
        low, high = (math.log(x) for x in STRIDES)
        place = torch.rand((), dtype=torch.float64, generator=self._generator)
        stride = torch.exp(low + (high - low) * place) / width
        log_g = stride * self._normal(v.new_empty(*v.shape[:-2], width, width))
        new_w = w @ torch.linalg.matrix_exp(log_g)
        new_v = torch.linalg.matrix_exp(-log_g) @ v
        volume = (w.shape[-2] - v.shape[-1]) * log_g.diagonal(dim1=-2, dim2=-1).sum(-1)
        gain = self._energy(s, v) - self._energy(s, new_v) + self._energy(s + 1, w)
        gain = gain - self._energy(s + 1, new_w) + volume
        coin = torch.rand(gain.shape, dtype=gain.dtype, generator=self._generator)
        accepted = (coin.log() < gain)[..., None, None]
        self.weights[s] = torch.where(accepted, new_v, v)
        self.weights[s + 1] = torch.where(accepted, new_w, w)

    def _energy(self, s: int, w: Tensor) -> Tensor:
        """Return ``gamma/2 |W_s - W*_s|^2`` of each replica."""
        return self.net.localization / 2 * (w - self.net.anchors[s]).square().sum((-2, -1))

    def _normal(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).normal_(generator=self._generator)


def _singular(m: Tensor) -> tuple[Tensor, Tensor]:
    """Return what eigh of ``m m^T`` does, by the singular values of m."""
    vectors, values, _ = torch.linalg.svd(m, full_matrices=True)
    missing = vectors.shape[-1] - values.shape[-1]
    return torch.nn.functional.pad(values.square(), (0, missing)), vectors


def block_gibbs(
    net: DeepLinear, *, replicas: int = 200, sweeps: int = 500, burn_in: int = 200, seed: int = 0
) -> ReplicaMean:
    """Return ``t E[K]`` of a deep linear network, which is the LLC that a perfect sampler returns.

    Args:
        net: posterior of one network or several.
        replicas: number of independent chains per network.
        sweeps: number of sweeps of each chain that are kept.
        burn_in: number of sweeps before those.
        seed: seed of all draws.

    Example:
        >>> net = DeepLinear.of_rank((2, 2, 2), rank=0, t=100.0)
        >>> llc = block_gibbs(net, replicas=50, sweeps=100)
        >>> bool(abs(llc.mean - 1.33) < 5 * llc.se)
        True
    """
    chains = BlockGibbs(net, replicas, torch.Generator().manual_seed(seed))
    chains.run(burn_in)
    return ReplicaMean.over(chains.run(sweeps))
