"""Targets whose LLC Gibbs sampling gives: deep linear networks, ``y = W_L ... W_1 x``.

Reduced-rank regression is the case of two layers. The benchmark classes "1K" and "10K" are those
of Lau et al. 2308.12108 and Furman & Lau 2024: random widths, Xavier-normal layers, each with
probability 1/2 cut to a random rank, inputs uniform in (-10, 10), outputs without noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from distsampler.errors import ConfigError
from distsampler.facts import optimal_nbeta
from distsampler.truth import coefficients
from distsampler.truth.codimension import codimension
from distsampler.truth.gibbs import BlockGibbs, DeepLinear, ReplicaMean, product
from distsampler.truth.targets import Known, Target

NET_EXAMPLES = 100_000  # of a benchmark net
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
        """Return outputs, (batch, H_L) or (copies, batch, H_L), of inputs (batch, H_0)."""
        return x @ product(list(self.layers)).mT


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``|y - model(x)|^2`` of each example, (batch,), summed over outputs and copies."""
    x, y = batch
    error: Tensor = (model(x) - y).square().sum(-1)
    return error if error.ndim == 1 else error.sum(0)


@dataclass(frozen=True, kw_only=True)
class Network(Target):
    """A deep linear network at w*."""

    data: tuple[Tensor, Tensor]  # inputs (n, H_0) and outputs (n, H_L), float32
    layers: tuple[Tensor, ...]  # W*_1 .. W*_L of one copy, float64.
    moment: float  # mean second moment of the inputs; the posterior's t is nbeta times that

    @property
    def posterior(self) -> DeepLinear:
        """Posterior of one copy, which Gibbs samples."""
        return DeepLinear(self.layers, self.nbeta * self.moment, self.localization)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths H_0 .. H_L."""
        return self.posterior.widths

    @property
    def rank(self) -> int:
        """Rank of the product W*_L ... W*_1."""
        return _rank(self.layers)

    @property
    def codimension(self) -> int:
        """Codimension of the set of zero loss at w*: twice the LLC of a chain that stays there."""
        return codimension(self.layers)


def network(
    name: str,
    layers: Sequence[Tensor],
    inputs: Tensor,
    *,
    nbeta: float | None = None,
    localization: float = 1.0,
    copies: int = 1,
) -> Network:
    """Return a deep linear network with noise-free outputs, whose LLC Gibbs sampling gives.

    Gibbs takes the inputs' second moment for a multiple of the identity; where that is so only for
    infinitely many inputs, n of them leave the LLC wrong by less than a thousandth part.

    Args:
        name: title in tables.
        layers: W*_1 .. W*_L.
        inputs: x, (n, H_0).
        nbeta: inverse temperature times n; None: n / log n.
        localization: gamma.
        copies: number of independent networks in the one parameter vector.
    """
    stored = [w.float() for w in layers]
    exact = tuple(w.double() for w in stored)
    outputs = inputs.double() @ product(exact).mT
    nbeta = optimal_nbeta(len(inputs)) if nbeta is None else nbeta
    moment = float(inputs.double().square().mean())
    posterior = DeepLinear(exact, nbeta * moment, localization)
    return Network(
        name=name,
        model=DeepLinearModel([w.expand(copies, *w.shape) if copies > 1 else w for w in stored]),
        data=(inputs.float(), outputs.float()),
        loss=squared_error,
        nbeta=nbeta,
        localization=localization,
        solve=partial(by_gibbs, posterior),
        coefficient=coefficients.deep_linear(posterior.widths, _rank(exact)),
        copies=copies,
        layers=exact,
        moment=moment,
    )


def unit_network(
    widths: Sequence[int],
    rank: int,
    *,
    t: float = 1e3,
    localization: float = 1.0,
    copies: int = 1,
    n: int = UNIT,
) -> Network:
    """Return a network whose layers pass on the first ``rank`` unit vectors and are 0 elsewhere.

    Its inputs have the identity as second moment, exactly.

    Args:
        widths: H_0 .. H_L.
        rank: r, rank of the true product.
        t: nbeta.
        localization: gamma.
        copies: number of independent networks in the one parameter vector.
        n: number of examples, H_0 or more.
    """
    coefficients.deep_linear(widths, rank)  # raises where the rank does not fit
    layers = DeepLinear.of_rank(widths, rank, t, localization).anchors
    inputs = isotropic(uniform_inputs(n, widths[0], seed=0))
    name = f"{list(widths)} r={rank}, t={t:g}"
    return network(name, layers, inputs, nbeta=t, localization=localization, copies=copies)


def deep_linear_1k(seed: int, *, localization: float = 1.0, n: int = NET_EXAMPLES) -> Network:
    """Return a net of the class "1K": 2 to 5 layers, widths 5 to 50, at nbeta = n / log n.

    Args:
        seed: seed of net and data.
        localization: gamma.
        n: number of examples.
    """
    return _benchmark("1K", seed, (2, 5), (5, 50), localization, n)


def deep_linear_10k(seed: int, *, localization: float = 1.0, n: int = NET_EXAMPLES) -> Network:
    """Return a net of the class "10K": 2 to 10 layers, widths 5 to 100, at nbeta = n / log n.

    Args:
        seed: seed of net and data.
        localization: gamma.
        n: number of examples.
    """
    return _benchmark("10K", seed, (2, 10), (5, 100), localization, n)


def rescaled(net: Network, factor: float) -> Network:
    """Return the same function with other weights: W_1 times c, W_2 divided by it.

    The localised posterior is another one, and so is its LLC.

    Args:
        net: a network of two layers or more.
        factor: c, above 0.

    Raises:
        ConfigError: there is only one layer, or the factor is not above 0.
    """
    if len(net.layers) < 2 or not factor > 0:
        raise ConfigError(
            f"rescaling needs two layers and a factor above 0: got {len(net.layers)}, {factor}"
        )
    first, second, *others = net.layers
    layers = [first * factor, second / factor, *others]
    options = {"nbeta": net.nbeta, "localization": net.localization}
    return network(f"{net.name}, c={factor:g}", layers, net.data[0], copies=net.copies, **options)


class WithDeadWeights(nn.Module):
    """A model beside weights that nothing depends on."""

    def __init__(self, live: nn.Module, count: int) -> None:
        super().__init__()
        self.live, self.dead = live, nn.Parameter(torch.zeros(count))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the model does without them."""
        outputs: Tensor = self.live(x)
        return outputs


def with_dead_weights(net: Network, count: int = 1_000) -> Network:
    """Return the same network beside this many weights that do nothing, and change no LLC."""
    model = WithDeadWeights(net.model, count)
    return replace(net, name=f"{net.name}, {count} dead weights", model=model)


def uniform_inputs(n: int, width: int, *, seed: int, bound: float = BOUND) -> Tensor:
    """Return inputs uniform in (-bound, bound), (n, width), float64."""
    unit = torch.rand(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (2 * unit - 1) * bound


def isotropic(inputs: Tensor) -> Tensor:
    """Return ``x S^(-1/2)`` of inputs x, S their second moment: it is the identity then."""
    values, vectors = torch.linalg.eigh(inputs.mT @ inputs / len(inputs))
    root: Tensor = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    return inputs @ root


def by_gibbs(net: DeepLinear, *, seed: int = 0) -> Known:
    """Return the exact LLC of a deep linear network, within a fifth of a per cent.

    Sweeps in rounds, at most 16, until the standard error, from the spread between chains, is that
    small.

    Args:
        net: posterior of one network.
        seed: seed of all draws.
    """
    size = sum(w.numel() for w in net.anchors)
    replicas = min(MOST, max(LEAST, ENTRIES // size))  # a small net's LLC is small: more chains
    chains = BlockGibbs(net, replicas, torch.Generator().manual_seed(seed))
    chains.run(BURN_IN)
    rounds: list[Tensor] = []
    while len(rounds) < ROUNDS:
        rounds.append(chains.run(SWEEPS))
        llc = ReplicaMean.over(torch.stack(rounds).mean(0))
        if float(llc.se) < ENOUGH * float(llc.mean):
            break
    return Known(float(llc.mean), float(llc.se), "Gibbs")


def _benchmark(
    name: str,
    seed: int,
    depths: tuple[int, int],
    sizes: tuple[int, int],
    localization: float,
    n: int,
) -> Network:
    rng = np.random.default_rng(np.random.SeedSequence((seed, *depths, *sizes)))
    depth = int(rng.integers(depths[0], depths[1] + 1))
    widths = rng.integers(sizes[0], sizes[1] + 1, depth + 1).tolist()
    layers = [_layer(rng, *pair) for pair in zip(widths[1:], widths[:-1], strict=True)]
    inputs = uniform_inputs(n, widths[0], seed=int(rng.integers(2**31)))
    return network(f"{name} net {seed}", layers, inputs, localization=localization)


def _layer(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    """Return a Xavier-normal layer, with probability 1/2 cut to a random rank."""
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
