"""The anchor pass: the loss at w*, over all data once, in fixed blocks.

A part is a run of whole blocks, measured anywhere; the blocks are reduced in the order of their
rows in float64, so that the result's bits do not depend on how many workers took part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from distsampler.config import RunConfig
from distsampler.draws import Anchor
from distsampler.replica import ChainSpec, Replica
from distsampler.seeding import probe_rows
from distsampler.shards import blocks, spread

PARTS = 8  # of the probe, where the loss gives batch means only


@dataclass(frozen=True)
class AnchorPart:
    """Losses at w* of the rows start..stop, or (stop == 0) of the probe.

    Args:
        start: first row.
        stop: behind the last row.
        losses: per example, or the mean of each block (of each part of the probe); float64.
    """

    start: int
    stop: int
    losses: NDArray[np.float64]


def plan(n: int, places: int) -> tuple[tuple[int, int], ...]:
    """The parts of the pass as (start, stop); (0, 0) is the probe."""
    return ((0, 0), *spread(blocks(n), places))


def measure(replica: Replica, spec: ChainSpec, part: tuple[int, int]) -> AnchorPart:
    """Measures one part on a replica that is at w*."""
    start, stop = part
    if stop == 0:
        losses = probe_losses(replica, spec, probe_batches(replica, spec))
        return AnchorPart(start, stop, losses)
    cut = [(a + start, b + start) for a, b in blocks(stop - start)]
    return AnchorPart(start, stop, np.concatenate([_block(replica, spec, a, b) for a, b in cut]))


def reduce(parts: Iterable[AnchorPart], spec: ChainSpec) -> Anchor:
    """L_n(w*) and what the chains subtract, from all parts."""
    ordered = sorted(parts, key=lambda part: (part.stop, part.start))
    probe, losses = ordered[0].losses, np.concatenate([part.losses for part in ordered[1:]])
    n = len(spec.rows)
    weights = None if spec.per_example else [stop - start for start, stop in blocks(n)]
    return Anchor(
        losses=losses.astype(np.float32) if spec.per_example else None,
        init_loss=float(np.average(losses, weights=weights)),
        probe_init_loss=float(np.average(probe, weights=probe_weights(spec))),
        probe_losses=probe,
    )


def probe_batches(replica: Replica, spec: ChainSpec) -> list[object]:
    """The probe on the replica's device: one batch, or eight where the loss gives means."""
    rows = probe_rows(spec.config.seed, len(spec.rows), spec.config.probe)
    parts = [rows] if spec.per_example else np.array_split(rows, PARTS)
    return [replica.move(spec.rows.take(part)) for part in parts if len(part)]


def probe_weights(spec: ChainSpec) -> NDArray[np.int64] | None:
    """How many examples each number of the probe stands for; None: one each."""
    if spec.per_example:
        return None
    size = probe_size(spec.config, len(spec.rows))
    parts = [len(part) for part in np.array_split(np.arange(size), PARTS)]
    return np.array([size for size in parts if size])


def probe_size(config: RunConfig, n: int) -> int:
    """Examples of the probe: as asked, or all there are."""
    return min(config.probe, n)


@torch.no_grad()
def probe_losses(
    replica: Replica, spec: ChainSpec, batches: list[object], chain: int = 0, step: int = 0
) -> NDArray[np.float64]:
    """The probe's per-example losses, shape (probe,), or the means of its parts, shape (8,)."""
    losses = [replica.losses(batch, chain, step).reshape(-1) for batch in batches]
    return torch.cat(losses).double().cpu().numpy()


@torch.no_grad()
def _block(replica: Replica, spec: ChainSpec, start: int, stop: int) -> NDArray[np.float64]:
    """Losses of one block: per example, or their mean (one number)."""
    size = max(spec.config.batch_size, 256)
    cuts = [np.arange(a, min(a + size, stop)) for a in range(start, stop, size)]
    losses = [replica.losses(replica.move(spec.rows.take(rows)), step=start) for rows in cuts]
    numbers = torch.cat([loss.reshape(-1).double() for loss in losses]).cpu().numpy()
    if spec.per_example:
        return numbers
    return np.array([np.average(numbers, weights=[len(rows) for rows in cuts])])
