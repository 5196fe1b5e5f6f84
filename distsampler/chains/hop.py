"""Chains that hop over shards: the correction of their gradient, and the bias that remains.

A chain sits on shard s for ``hop_every`` steps and moves along (Ahn, Shahbaba & Welling 2014)

    g_B(w) - gbar_s(w*) + gbar(w*)

g_B being the mean gradient of a batch of the shard, gbar_s(w*) the mean over the shard and gbar(w*)
over all data at w*. Shards are visited with probability q_s = N_s / n, so that no weight is needed.
The correction removes the differences between the shards' gradients at w*, not those between their
curvatures: during a visit a direction relaxes with ``kappa_s = nbeta h_s + gamma`` in place of
kappa. In one direction of a quadratic, with ``r_s = (1 - lr kappa_s / 2)^2``, a visit of k steps
takes the variance V to ``r_s^k V + lr (1 - r_s^k) / (1 - r_s)``, whose mean over s is V again.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.config import RunConfig
from distsampler.curvature.hessian import Curvature, directions
from distsampler.data.batches import Batches
from distsampler.data.rows import Rows
from distsampler.errors import ConfigError
from distsampler.facts import Posterior
from distsampler.models.replica import ChainSpec, Replica
from distsampler.models.sampler import names, ours, signature_options
from distsampler.seeding import Stream, generator, probe_rows

MOST_ROWS = 1024  # rows of a shard whose curvature is measured
TOLERATED = 0.02  # of the LLC: a larger predicted bias is refused
Array = NDArray[np.float64]


class ControlVariate:
    """Shifts the gradient of a shard's batch by ``gbar(w*) - gbar_s(w*)``.

    ``gradients`` has gbar_s(w*) for each shard, (shards, d).
    """

    def __init__(
        self, replica: Replica, gradients: NDArray[np.float32], rows: Rows, batches: Batches
    ) -> None:
        self._replica, self._gradients, self._batches = replica, gradients, batches
        self._mean = np.average(gradients, axis=0, weights=rows.shard_sizes).astype(np.float32)
        self._shard, self._shift = -1, list[Tensor]()

    def apply(self, step: int) -> None:
        """Shift the gradient that the batch of this step has left."""
        shard = self._batches.shard(step)
        if shard != self._shard:
            shift = torch.from_numpy(self._mean - self._gradients[shard])
            self._shard, self._shift = shard, self._replica.split(shift)
        for flat, shift in zip(self._replica.flats, self._shift, strict=True):
            flat.grad.add_(shift)  # type: ignore[union-attr]  # made by the replica, never dropped


def check(config: RunConfig, rows: Rows) -> None:
    """Check that chains on shards can give a right number, as far as is known before a run.

    Raises:
        ConfigError: for pinned chains, with their bias; for a sampler whose bias is not known, on
            shards that were not dealt at random; for a shard too small to measure its curvature.
    """
    if config.data_mode == "pinned":
        count, n = config.shards or 2, len(rows)
        share = (count - 1) / np.log(n)
        raise ConfigError(
            f"data_mode='pinned' is refused: chains that stay on one of {count} shards of {n} "
            f"examples each sample another posterior, and even if the rows are dealt at random the "
            f"LLC of a regular model comes out {share:.0%} too large on all data, {share:.0%} too "
            "small on the shard itself; use data_mode='hop'"
        )
    sizes = rows.shard_sizes
    if not rows.dealt and not ours(config.sampler.name).hop_bias_known:
        raise ConfigError(
            "of shards that were not dealt at random the bias must be predicted, which is known "
            f"for the samplers {names(lambda kind: kind.hop_bias_known)}, got "
            f"{config.sampler.name!r}: use one of "
            "them, or give the data whole, to be dealt"
        )
    if config.watch and 1 in sizes:
        raise ConfigError(
            "every shard must hold at least 2 examples, on whose halves its curvature is measured, "
            f"but shard {sizes.index(1)} of {len(sizes)} holds 1: make fewer shards"
        )


def refusal(predicted: tuple[float, float] | None, spec: ChainSpec) -> str | None:
    """Return why a run with this predicted bias would give a wrong number; None if it would not."""
    if predicted is None and not spec.rows.dealt:
        return "the bias of hopping over these shards cannot be predicted"
    as_read, on_all = predicted or (0.0, 0.0)
    if max(abs(as_read), abs(on_all)) <= TOLERATED:
        return None
    return (
        f"hopping over these {len(spec.rows.shard_sizes)} shards would make the LLC {on_all:+.1%} "
        f"off ({as_read:+.1%} as it is read on the shards), more than {TOLERATED:.0%}, because "
        f"their curvatures differ: lower hop_every={spec.config.hop_every}, or give the data "
        "whole, to be dealt at random"
    )


def gradient(replica: Replica, spec: ChainSpec, start: int, stop: int) -> NDArray[np.float32]:
    """Return the gradient of the mean loss over some rows, of a replica at w*, flat."""
    size = max(spec.config.batch_size, 256)
    total = [torch.zeros_like(flat, dtype=torch.float64) for flat in replica.flats]
    for first in range(start, stop, size):
        rows = np.arange(first, min(first + size, stop))
        replica.losses_and_gradient(rows, chain=0, step=first)
        for flat, whole in zip(replica.flats, total, strict=True):
            whole.add_(flat.grad, alpha=len(rows) / (stop - start))  # type: ignore[arg-type]
    return torch.cat(total).float().cpu().numpy()


def curvatures(replica: Replica, spec: ChainSpec, start: int, stop: int) -> Array:
    """Return a shard's curvatures at w*, in directions that all shards have in common.

    The directions are the Ritz vectors of the Hessian on the probe.

    Returns:
        Shape (3, directions): share of each direction in a trace, its curvature on one half of at
        most 1,024 rows of the shard, and on the other half.
    """
    config = spec.config
    probe = Curvature(replica, spec, probe_rows(config.seed, len(spec.rows), config.probe))
    signs = torch.Generator(replica.device)
    signs.manual_seed(int(generator(config.seed, Stream.SHARDS, 0).integers(2**62)))
    shares, vectors = directions(probe, signs)
    random = generator(config.seed, Stream.SHARDS, start + 1)
    rows = start + random.permutation(stop - start)[:MOST_ROWS]
    measured = [shares]
    for half in np.array_split(rows, 2):
        curvature = Curvature(replica, spec, np.sort(half))
        measured.append(np.array([float(curvature.times(y) @ y) for y in vectors]))
    return np.array(measured)


def predict(parts: Sequence[Array], spec: ChainSpec) -> tuple[float, float] | None:
    """Return the relative error of the LLC that hopping will bring, from all shards' curvatures.

    Returns:
        Error of the LLC as chains read it, on the shard where they sit; and of the LLC read on all
        data. None if it cannot be predicted.
    """
    config = spec.config
    if not ours(config.sampler.name).hop_bias_known:
        return None
    shares, halves = parts[0][0], np.array([part[1:] for part in parts])  # (shard, half, direction)
    if not np.isfinite(halves).all():
        return None
    posterior, lr = spec.posterior, signature_options(config.sampler)["lr"]
    sizes = np.array(spec.rows.shard_sizes, np.float64)
    visit = config.hop_every or 1
    as_read = on_all = total = 0.0
    for share, of_shards in zip(shares, np.moveaxis(halves, 2, 0), strict=True):
        h = _heterogeneous(of_shards, sizes)
        mean = float(np.average(h, weights=sizes))
        if mean <= 0:
            continue
        llc = share * spec.nbeta * mean / posterior.kappa(mean) / 2
        bias = in_direction(h, sizes / sizes.sum(), posterior, lr, visit, config.thin)
        as_read, on_all, total = as_read + llc * bias[0], on_all + llc * bias[1], total + llc
    return (as_read / total, on_all / total) if total > 0 else (0.0, 0.0)


def in_direction(
    h: Array, q: Array, posterior: Posterior, lr: float, visit: int, thin: int = 1
) -> tuple[float, float]:
    """Return the relative bias in one direction of a quadratic; exact for SGLD.

    Args:
        h: curvature of each shard's mean loss.
        q: probability of a visit to each shard.
        posterior: density that is sampled.
        lr: step size.
        visit: k, steps on a shard.
        thin: steps per draw: where it shares a factor with k, draws fall on some steps of a visit
            only, and if that factor is k, on its last alone.

    Returns:
        Bias of the LLC read on the shard where the chain sits, and read on all data; infinite where
        the chain has no law.
    """
    r = (1 - lr * posterior.kappa(h) / 2) ** 2
    kept, mean = r**visit, float(q @ h)
    if q @ kept >= 1:
        return np.inf, np.inf
    still = lr / (1 - r)  # the variance that a chain would reach if it stayed on that shard
    before = q @ (still * (1 - kept)) / (1 - q @ kept)
    apart = math.gcd(thin, visit)  # the measured steps of a visit are apart - 1, 2 apart - 1, ...
    fading = r ** (apart - 1) * (1 - kept) / (1 - r**apart) * apart / visit
    variance = still + (before - still) * fading  # mean over the steps that are measured
    plain = lr / (1 - (1 - lr * posterior.kappa(mean) / 2) ** 2)
    return float(q @ (h * variance) / (mean * plain) - 1), float(q @ variance / plain - 1)


def _heterogeneous(halves: Array, sizes: Array) -> Array:
    """Return curvatures of the shards with the spread that whole shards have.

    ``halves`` are curvatures, (shard, half): the covariance between halves is that between
    populations; the difference between halves shows how much of the spread is chance, in that
    number of rows.
    """
    h: Array = halves.mean(axis=1)
    away = halves - np.average(halves, axis=0, weights=sizes)
    q = sizes / sizes.sum()
    populations = float(q @ (away[:, 0] * away[:, 1]))
    chance = q @ ((halves[:, 0] - halves[:, 1]) ** 2 * np.minimum(sizes, MOST_ROWS) / sizes) / 4
    mean, wanted = float(q @ h), max(0.0, populations + float(chance))
    spread = float(q @ (h - mean) ** 2)
    return mean + (h - mean) * math.sqrt(wanted / spread) if spread > 0 else h
