"""Chains that hop over shards: what makes them right, and what they will still be off by.

A chain sits on shard s for ``hop_every`` steps and moves along (Ahn, Shahbaba & Welling 2014)

    g_B(w) - gbar_s(w*) + gbar(w*)

g_B being the mean gradient of a batch of the shard, gbar_s(w*) the mean over the shard and gbar(w*)
over all data at w*. Shards are visited with probability q_s = N_s / n, so that no weight is needed.
That takes away that the shards' gradients differ at w*, and leaves that their curvatures do: during
a visit a direction relaxes with ``kappa_s = nbeta h_s + gamma`` in place of kappa. In one direction
of a quadratic this can be summed up: with ``r_s = (1 - lr kappa_s / 2)^2``, a visit of k steps
takes the variance V to ``r_s^k V + lr (1 - r_s^k) / (1 - r_s)``, whose mean over s is V again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.config import RunConfig
from distsampler.curvature.hessian import Curvature, directions
from distsampler.data.batches import HopStream
from distsampler.data.shards import ShardedRows
from distsampler.errors import ConfigError
from distsampler.facts import Posterior
from distsampler.models.replica import ChainSpec, Replica
from distsampler.models.sampler import signature_options
from distsampler.seeding import Stream, generator, probe_rows

MOST = 1024  # rows of a shard whose curvature is measured
TOLERATED = 0.02  # of the LLC: more predicted bias is refused
PREDICTED = ("sgld", "lmsgld")  # samplers whose chain is a recursion of w alone
Array = NDArray[np.float64]


class ControlVariate:
    """Moves the gradient of a shard's batch by ``gbar(w*) - gbar_s(w*)``.

    Args:
        replica: whose gradient it is.
        gradients: of each shard's mean loss at w*, (shards, d).
        sizes: N_s.
        stream: tells where the chain sits.
    """

    def __init__(
        self,
        replica: Replica,
        gradients: NDArray[np.float32],
        sizes: Sequence[int],
        stream: HopStream,
    ) -> None:
        self._replica, self._gradients, self._stream = replica, gradients, stream
        self._mean = np.average(gradients, axis=0, weights=sizes).astype(np.float32)
        self._at, self._shift = -1, list[Tensor]()

    def apply(self, step: int) -> None:
        """Moves the gradients that a batch of this step has left."""
        shard = self._stream.shard(step)
        if shard != self._at:
            whole = torch.from_numpy(self._mean - self._gradients[shard]).to(self._replica.device)
            sizes = [flat.numel() for flat in self._replica.flats]
            self._at, self._shift = shard, list(torch.split(whole, sizes))
        for flat, shift in zip(self._replica.flats, self._shift, strict=True):
            flat.grad.add_(shift)  # type: ignore[union-attr]  # made by the replica, never dropped


def refuse(config: RunConfig, n: int, rows: object) -> None:
    """Refuses what would give a wrong number.

    Raises:
        ConfigError: of pinned chains, with their bias; of a sampler whose bias on shards that were
            not dealt at random is not known; of a shard too small to tell its curvature.
    """
    if config.data_mode == "pinned":
        shards = config.shards or 2
        share = (shards - 1) / np.log(n)
        raise ConfigError(
            f"data_mode='pinned' is refused: chains that stay on one of {shards} shards of {n} "
            f"examples each sample another posterior, and even if the rows are dealt at random the "
            f"LLC of a regular model comes out {share:.0%} too large on all data, {share:.0%} too "
            "small on the shard itself; use data_mode='hop'"
        )
    if isinstance(rows, ShardedRows) and not rows.dealt and config.sampler.name not in PREDICTED:
        raise ConfigError(
            "of shards that were not dealt at random the bias must be predicted, which is known "
            f"for the samplers {', '.join(PREDICTED)}, got {config.sampler.name!r}: use one of "
            "them, or give the data whole, to be dealt"
        )
    if isinstance(rows, ShardedRows) and config.watch and min(rows.sizes) < 2:
        raise ConfigError(
            "every shard must hold at least 2 examples, on whose halves its curvature is measured, "
            f"but shard {rows.sizes.index(1)} of {len(rows.sizes)} holds 1: make fewer shards"
        )


def gradient(replica: Replica, spec: ChainSpec, start: int, stop: int) -> NDArray[np.float32]:
    """The gradient of the mean loss over some rows, on a replica at w*, flat."""
    size = max(spec.config.batch_size, 256)
    total = [torch.zeros_like(flat, dtype=torch.float64) for flat in replica.flats]
    for first in range(start, stop, size):
        rows = np.arange(first, min(first + size, stop))
        replica.losses_and_gradient(rows, chain=0, step=first)
        for flat, whole in zip(replica.flats, total, strict=True):
            whole.add_(flat.grad, alpha=len(rows) / (stop - start))  # type: ignore[arg-type]
    return torch.cat(total).float().cpu().numpy()


def curvatures(replica: Replica, spec: ChainSpec, start: int, stop: int) -> Array:
    """A shard's curvatures in directions that all shards have in common, at w*.

    The directions are the Ritz vectors of the Hessian on the probe.

    Returns:
        Shape (3, directions): share of each in a trace, its curvature on one half of at most 1,024
        rows of the shard, and on the other.
    """
    config = spec.config
    probe = Curvature(replica, spec, probe_rows(config.seed, len(spec.rows), config.probe))
    signs = torch.Generator(replica.device)
    signs.manual_seed(int(generator(config.seed, Stream.SHARDS, 0).integers(2**62)))
    shares, vectors = directions(probe, signs)
    random = generator(config.seed, Stream.SHARDS, start + 1)
    rows = start + random.permutation(stop - start)[:MOST]
    found = [shares]
    for half in np.array_split(rows, 2):
        curvature = Curvature(replica, spec, np.sort(half))
        found.append(np.array([float(curvature.times(y) @ y) for y in vectors]))
    return np.array(found)


def bias(parts: Sequence[Array], spec: ChainSpec) -> tuple[float, float] | None:
    """The error that hopping will bring, from the curvatures of all shards.

    Returns:
        Relative, of the LLC: as chains read it, on the shard where they are; and as all data would
        give it. None where it cannot be predicted.
    """
    config, rows = spec.config, spec.rows
    if not isinstance(rows, ShardedRows) or config.sampler.name not in PREDICTED:
        return None
    shares, halves = parts[0][0], np.array([part[1:] for part in parts])  # (shard, half, direction)
    if not np.isfinite(halves).all():
        return None
    posterior, lr = spec.posterior, signature_options(config.sampler)["lr"]
    sizes = np.array(rows.sizes, np.float64)
    visits = config.hop_every or 1
    own = everywhere = whole = 0.0
    for share, found in zip(shares, np.moveaxis(halves, 2, 0), strict=True):
        h = _heterogeneous(found, sizes)
        mean = float(np.average(h, weights=sizes))
        if mean <= 0:
            continue
        llc = share * spec.nbeta * mean / posterior.kappa(mean) / 2
        each = in_direction(h, sizes / sizes.sum(), posterior, lr, visits, config.thin)
        own, everywhere, whole = own + llc * each[0], everywhere + llc * each[1], whole + llc
    return (own / whole, everywhere / whole) if whole > 0 else (0.0, 0.0)


def in_direction(
    h: Array, q: Array, posterior: Posterior, lr: float, visit: int, thin: int = 1
) -> tuple[float, float]:
    """Relative bias in one direction of a quadratic; exact for SGLD.

    Args:
        h: curvature of each shard's mean loss.
        q: how often each is visited.
        posterior: the density that is sampled.
        lr: step size.
        visit: k, steps on a shard.
        thin: steps a draw: where it shares a factor with k, draws fall on some steps of a visit
            only, and in one that is all of k on its last.

    Returns:
        Of the LLC read on the shard where the chain is, and read on all data; infinite where the
        chain has no law.
    """
    r = (1 - lr * posterior.kappa(h) / 2) ** 2
    kept, mean = r**visit, float(q @ h)
    if q @ kept >= 1:
        return np.inf, np.inf
    still = lr / (1 - r)  # where V would come to on that shard
    before = q @ (still * (1 - kept)) / (1 - q @ kept)
    apart = math.gcd(thin, visit)  # steps of a visit that are measured: apart - 1, and so on
    fading = r ** (apart - 1) * (1 - kept) / (1 - r**apart) * apart / visit
    variance = still + (before - still) * fading  # mean over the steps that are measured
    plain = lr / (1 - (1 - lr * posterior.kappa(mean) / 2) ** 2)
    return float(q @ (h * variance) / (mean * plain) - 1), float(q @ variance / plain - 1)


def too_much(anchor_bias: tuple[float, float] | None, spec: ChainSpec) -> str | None:
    """Why a run on its shards would give a wrong number; None if it would not."""
    rows = spec.rows
    if not isinstance(rows, ShardedRows):
        return None
    if anchor_bias is None:
        return None if rows.dealt else "the bias of hopping over these shards cannot be predicted"
    own, everywhere = anchor_bias
    if max(abs(own), abs(everywhere)) <= TOLERATED:
        return None
    return (
        f"hopping over these {len(rows.sizes)} shards would make the LLC {everywhere:+.1%} off "
        f"({own:+.1%} as it is read on the shards), more than {TOLERATED:.0%}, because their "
        f"curvatures differ: lower hop_every={spec.config.hop_every}, or give the data whole, to "
        "be dealt at random"
    )


def _heterogeneous(halves: Array, sizes: Array) -> Array:
    """Curvatures of the shards with the spread that whole shards have.

    The halves of a shard tell what of the spread is chance: the covariance between halves is that
    between populations, the difference between halves that of so many rows.

    Args:
        halves: (shard, half).
        sizes: N_s.
    """
    h: Array = halves.mean(axis=1)
    away = halves - np.average(halves, axis=0, weights=sizes)
    q = sizes / sizes.sum()
    populations = float(q @ (away[:, 0] * away[:, 1]))
    chance = q @ ((halves[:, 0] - halves[:, 1]) ** 2 * np.minimum(sizes, MOST) / sizes) / 4
    mean, wanted = float(q @ h), max(0.0, populations + float(chance))
    spread = float(q @ (h - mean) ** 2)
    return mean + (h - mean) * math.sqrt(wanted / spread) if spread > 0 else h
