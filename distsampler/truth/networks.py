"""Targets whose truth Gibbs sampling finds: deep linear networks, ``y = W_L ... W_1 x``.

Reduced-rank regression is the case of two layers. The benchmark classes "1K" and "10K" are those
of Lau et al. 2308.12108 and Furman & Lau 2024: random widths, Xavier-normal layers, each with
probability 1/2 cut to a random rank, inputs uniform in (-10, 10), targets without noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from distsampler.errors import ConfigError
from distsampler.facts import optimal_nbeta
from distsampler.models.loss import LossFn
from distsampler.truth import coefficients
from distsampler.truth.codimension import codimension
from distsampler.truth.gibbs import BlockGibbs, DeepLinear, ReplicaMean, product
from distsampler.truth.targets import Known, Target

EXAMPLES = 100_000  # of a benchmark net
BOUND = 10.0  # of its inputs
UNIT = 2_048  # examples of a small net, whose inputs have second moment I exactly
BURN_IN, SWEEPS = 150, 150  # of Gibbs
LEAST, MOST, ENTRIES = 16, 256, 20_000  # chains of Gibbs, and their weights altogether
ENOUGH = 2e-3  # relative standard error at which Gibbs stops
ROUNDS = 16  # of SWEEPS, at most


class DeepLinearModel(nn.Module):
    """``y = W_L ... W_1 x``; the layers are multiplied first, which is cheaper than x at a time.

    Args:
        layers: W_1 .. W_L, each (H_s, H_(s-1)), or (copies, H_s, H_(s-1)).
    """

    def __init__(self, layers: Sequence[Tensor]) -> None:
        super().__init__()
        contiguous = [w.clone(memory_format=torch.contiguous_format) for w in layers]
        self.layers = nn.ParameterList(contiguous)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, (batch, H_L) or (copies, batch, H_L), of inputs (batch, H_0)."""
        return x @ product(list(self.layers)).mT


def squared_error(model: nn.Module, batch: object) -> Tensor:
    """``|y - model(x)|^2`` of each example, (batch,), summed over outputs and copies."""
    x, y = pair(batch)
    error: Tensor = (model(x) - y).square().sum(-1)
    return error if error.ndim == 1 else error.sum(0)


def pair(batch: object) -> tuple[Tensor, Tensor]:
    """Inputs and outputs.

    Raises:
        ConfigError: the batch is something else.
    """
    match batch:
        case (Tensor() as x, Tensor() as y):
            return x, y
    raise ConfigError(f"a batch must be inputs and outputs, two tensors: {type(batch).__name__}")


@dataclass(frozen=True, kw_only=True)
class Network(Target):
    """A deep linear network at w*.

    Args:
        layers: W*_1 .. W*_L of one copy, float64.
        moment: mean second moment of the inputs; the posterior's t is nbeta times that.
    """

    layers: tuple[Tensor, ...]
    moment: float

    @property
    def posterior(self) -> DeepLinear:
        """What Gibbs samples."""
        return DeepLinear(self.layers, self.nbeta * self.moment, self.gamma)

    @property
    def widths(self) -> tuple[int, ...]:
        """H_0 .. H_L."""
        return (self.layers[0].shape[1], *(w.shape[0] for w in self.layers))

    @property
    def rank(self) -> int:
        """Of the true product."""
        return int(torch.linalg.matrix_rank(product(self.layers)))

    @property
    def codimension(self) -> int:
        """Of the set of zero loss near w*: twice the LLC of a chain that stays there."""
        return codimension(self.layers)


def network(
    name: str,
    layers: Sequence[Tensor],
    inputs: Tensor,
    *,
    nbeta: float | None = None,
    gamma: float = 1.0,
    copies: int = 1,
) -> Network:
    """A deep linear network with noise-free targets, whose truth Gibbs finds.

    Gibbs takes the inputs' second moment for a multiple of the identity; where that is so only for
    infinitely many inputs, n of them leave the LLC wrong by less than a thousandth part.

    Args:
        name: for tables.
        layers: W*_1 .. W*_L.
        inputs: x, (n, H_0).
        nbeta: inverse temperature times n; None: n / log n.
        gamma: localisation.
        copies: independent networks in one vector.
    """
    stored = [w.float() for w in layers]
    exact = tuple(w.double() for w in stored)
    targets = inputs.double() @ product(exact).mT
    temperature = optimal_nbeta(len(inputs)) if nbeta is None else nbeta
    moment = float(inputs.double().square().mean())
    posterior = DeepLinear(exact, temperature * moment, gamma)
    shown = stored if copies == 1 else [w.expand(copies, *w.shape) for w in stored]
    widths = (inputs.shape[1], *(w.shape[0] for w in stored))
    return Network(
        name=name,
        model=DeepLinearModel(shown),
        data=(inputs.float(), targets.float()),
        loss=squared_error,
        nbeta=temperature,
        gamma=gamma,
        find=partial(by_gibbs, posterior),
        coefficient=coefficients.deep_linear(widths, _rank(exact)),
        copies=copies,
        layers=exact,
        moment=moment,
    )


def unit_network(
    widths: Sequence[int],
    rank: int,
    *,
    t: float = 1e3,
    gamma: float = 1.0,
    copies: int = 1,
    n: int = UNIT,
) -> Network:
    """A deep linear network whose layers pass on the first ``rank`` unit vectors, all else 0.

    Its inputs have the identity as second moment, exactly.

    Args:
        widths: H_0 .. H_L.
        rank: r of the true product.
        t: nbeta.
        gamma: localisation.
        copies: independent ones in one vector.
        n: examples, H_0 or more.
    """
    coefficients.deep_linear(widths, rank)  # refuses what does not fit
    layers = DeepLinear.of_rank(widths, rank, t, gamma).anchors
    inputs = isotropic(uniform_inputs(n, widths[0], seed=0))
    name = f"{list(widths)} r={rank}, t={t:g}"
    return network(name, layers, inputs, nbeta=t, gamma=gamma, copies=copies)


def deep_linear_1k(seed: int, *, gamma: float = 1.0, n: int = EXAMPLES) -> Network:
    """A net of the class "1K": 2 to 5 layers, widths 5 to 50, at nbeta = n / log n.

    Args:
        seed: the net's; equal seeds give equal nets and data.
        gamma: localisation.
        n: examples.
    """
    return _benchmark("1K", seed, (2, 5), (5, 50), gamma, n)


def deep_linear_10k(seed: int, *, gamma: float = 1.0, n: int = EXAMPLES) -> Network:
    """A net of the class "10K": 2 to 10 layers, widths 5 to 100.

    Args:
        seed: the net's.
        gamma: localisation.
        n: examples.
    """
    return _benchmark("10K", seed, (2, 10), (5, 100), gamma, n)


def rescaled(net: Network, factor: float) -> Network:
    """The same function with other weights: W_1 times c, W_2 divided by it.

    The localised posterior is another one, and so are its LLC and its truth.

    Args:
        net: of two layers or more.
        factor: c, above 0.

    Raises:
        ConfigError: there is but one layer, or the factor is not above 0.
    """
    if len(net.layers) < 2 or not factor > 0:
        raise ConfigError(
            f"rescaling needs two layers and a factor above 0: got {len(net.layers)}, {factor}"
        )
    first, second, *others = net.layers
    layers = [first * factor, second / factor, *others]
    return network(
        f"{net.name}, c={factor:g}",
        layers,
        pair(net.data)[0],
        nbeta=net.nbeta,
        gamma=net.gamma,
        copies=net.copies,
    )


@dataclass(frozen=True)
class _OfLive:
    """The loss of the part of a model that does anything."""

    loss: LossFn

    def __call__(self, model: nn.Module, batch: object) -> Tensor:
        return self.loss(model.get_submodule("live"), batch)


class WithDeadWeights(nn.Module):
    """A model beside weights that nothing depends on."""

    def __init__(self, live: nn.Module, count: int) -> None:
        super().__init__()
        self.live, self.dead = live, nn.Parameter(torch.zeros(count))


def with_dead_weights(target: Target, count: int = 1_000) -> Target:
    """The same target with weights added that do nothing, and change no LLC.

    Args:
        target: any.
        count: how many.
    """
    return replace(
        target,
        name=f"{target.name}, {count} dead weights",
        model=WithDeadWeights(target.model, count),
        loss=_OfLive(target.loss),
    )


def uniform_inputs(n: int, width: int, *, seed: int, bound: float = BOUND) -> Tensor:
    """Inputs uniform in (-bound, bound), (n, width), float64."""
    unit = torch.rand(n, width, dtype=torch.float64, generator=_generator(seed))
    return (2 * unit - 1) * bound


def isotropic(inputs: Tensor) -> Tensor:
    """The inputs x turned into ``x S^(-1/2)``, S their second moment: it is the identity then."""
    values, vectors = torch.linalg.eigh(inputs.mT @ inputs / len(inputs))
    root: Tensor = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    return inputs @ root


def by_gibbs(net: DeepLinear, *, seed: int = 0) -> Known:
    """The exact LLC of a deep linear network, within a fifth of a per cent.

    Sweeps in rounds, at most 16, until the standard error, from the spread between chains, is that
    small.

    Args:
        net: one network.
        seed: of all draws.
    """
    size = sum(w.numel() for w in net.anchors)
    replicas = min(MOST, max(LEAST, ENTRIES // size))  # a small net's LLC is small: more of it
    chains = BlockGibbs(net, replicas, _generator(seed))
    chains.run(BURN_IN)
    rounds: list[Tensor] = []
    while len(rounds) < ROUNDS:
        rounds.append(chains.run(SWEEPS))
        found = ReplicaMean.over(torch.stack(rounds).mean(0))
        if float(found.se) < ENOUGH * float(found.mean):
            break
    return Known(float(found.mean), float(found.se), "Gibbs")


def _benchmark(
    name: str, seed: int, depths: tuple[int, int], sizes: tuple[int, int], gamma: float, n: int
) -> Network:
    rng = np.random.default_rng(np.random.SeedSequence((seed, *depths, *sizes)))
    depth = int(rng.integers(depths[0], depths[1] + 1))
    widths = rng.integers(sizes[0], sizes[1] + 1, depth + 1).tolist()
    layers = [_layer(rng, *pair) for pair in zip(widths[1:], widths[:-1], strict=True)]
    inputs = uniform_inputs(n, widths[0], seed=int(rng.integers(2**31)))
    return network(f"{name} net {seed}", layers, inputs, gamma=gamma)


def _layer(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    """Xavier-normal; with probability 1/2 rows or columns of it are 0, to a random rank."""
    w = rng.standard_normal((rows, columns)) * np.sqrt(2 / (rows + columns))
    if rng.random() < 0.5:
        rank = rng.integers(0, min(rows, columns) + 1)
        if rng.random() < 0.5:
            w[rng.permutation(rows)[rank:]] = 0
        else:
            w[:, rng.permutation(columns)[rank:]] = 0
    return torch.from_numpy(w)


def _rank(layers: Sequence[Tensor]) -> int:
    return int(torch.linalg.matrix_rank(product(layers)))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
