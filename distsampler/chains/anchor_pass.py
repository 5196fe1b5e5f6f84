"""The anchor pass: loss (and, where asked, gradient noise) at w*, over the data, in fixed blocks.

A part is a run of whole blocks, measured anywhere; the blocks are reduced in the order of their
rows in float64, so that the result's bits do not depend on how many workers took part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.chains import hop
from distsampler.config import RunConfig
from distsampler.curvature import gradient_noise
from distsampler.data.rows import blocks, spread
from distsampler.data.shards import ShardedRows
from distsampler.draws import AtAnchor
from distsampler.models.replica import ChainSpec, Replica
from distsampler.seeding import probe_rows

What = Literal["losses", "probe", "gradient noise", "shard gradient", "shard curvature"]
PARTS = 8  # of the probe, where the loss gives batch means only


class Part(NamedTuple):
    """A piece of the pass: rows of the data, the probe, batches of the gradient noise, a shard."""

    start: int
    stop: int
    what: What = "losses"


@dataclass(frozen=True)
class AnchorPart:
    """What one part of the pass gave.

    Args:
        part: which.
        values: losses, per example or the mean of each block (of each part of the probe), float64;
            or the gradient's variance between examples, an entry each, float32; or a shard's
            gradient, or its curvatures.
    """

    part: Part
    values: NDArray[np.float64] | NDArray[np.float32]


def plan(spec: ChainSpec, places: int) -> tuple[Part, ...]:
    """The parts of the pass."""
    n, noise = len(spec.rows), list[tuple[int, int]]()
    shards = _spans(spec) if isinstance(spec.rows, ShardedRows) else ()
    curved = shards if spec.config.watch else ()
    if spec.config.sampler.correct_heat:
        noise = gradient_noise.blocks(len(gradient_noise.batches(spec.config, n)))
    return (
        Part(0, 0, "probe"),
        *(Part(*rows) for span in _spans(spec) for rows in spread(_blocks(span), places)),
        *(Part(*batches, "gradient noise") for batches in noise),
        *(Part(*span, "shard gradient") for span in shards),
        *(Part(*span, "shard curvature") for span in curved),
    )


def progress(parts: Iterable[Part], done: Iterable[AnchorPart]) -> dict[str, tuple[int, int]]:
    """How far the pass is: of its rows, and of the batches of the gradient noise where asked.

    Args:
        parts: of the pass.
        done: those that are in, however they were cut.
    """
    totals, made = Counter[str](), Counter[str]()
    for part in parts:
        totals[part.what] += part.stop - part.start
    for each in done:
        made[each.part.what] += each.part.stop - each.part.start
    names = {"losses": "rows", "gradient noise": "batches for the gradient noise"}
    return {name: (made[what], totals[what]) for what, name in names.items() if totals[what]}


def measure(replica: Replica, spec: ChainSpec, part: Part) -> AnchorPart:
    """Measures one part on a replica that is at w*."""
    start, stop, what = part
    match what:
        case "probe":
            losses = probe_losses(replica, spec, probe_batches(replica, spec))
            return AnchorPart(part, losses)
        case "losses":
            cut = _blocks((start, stop))
            found = np.concatenate([_block(replica, spec, a, b) for a, b in cut])
            return AnchorPart(part, found)
        case "gradient noise":
            return AnchorPart(part, gradient_noise.measure(replica, spec, start, stop))
        case "shard gradient":
            return AnchorPart(part, hop.gradient(replica, spec, start, stop))
        case "shard curvature":
            return AnchorPart(part, hop.curvatures(replica, spec, start, stop))
        case _:
            assert_never(what)


def reduce(parts: Iterable[AnchorPart], spec: ChainSpec) -> AtAnchor:
    """L_n(w*) and what the chains subtract, from all parts."""
    found: dict[str, list[AnchorPart]] = {}
    for each in sorted(parts, key=lambda each: each.part):
        found.setdefault(each.part.what, []).append(each)
    probe = np.asarray(found["probe"][0].values, np.float64)
    losses = np.concatenate([each.values for each in found["losses"]])
    noise = [
        (each.part.start, each.part.stop, np.asarray(each.values, np.float32))
        for each in found.get("gradient noise", [])
    ]
    cut = (block for span in _spans(spec) for block in _blocks(span))
    weights = None if spec.per_example else [stop - start for start, stop in cut]
    gradients = [each.values for each in found.get("shard gradient", [])]
    curved = [np.asarray(each.values, np.float64) for each in found.get("shard curvature", [])]
    return AtAnchor(
        losses=losses.astype(np.float32) if spec.per_example else None,
        init_loss=float(np.average(losses, weights=weights)),
        probe_init_loss=float(np.average(probe, weights=probe_weights(spec))),
        probe_losses=probe,
        gradient_variance=gradient_noise.reduce(noise) if noise else None,
        shard_gradients=np.asarray(gradients, np.float32) if gradients else None,
        hop_bias=hop.bias(curved, spec) if curved else None,
    )


def _spans(spec: ChainSpec) -> tuple[tuple[int, int], ...]:
    """Rows that are cut into blocks together: a shard's, or all."""
    return spec.rows.spans if isinstance(spec.rows, ShardedRows) else ((0, len(spec.rows)),)


def _blocks(span: tuple[int, int]) -> list[tuple[int, int]]:
    """Blocks of 1,024 rows, counted from the first of a span."""
    return [(a + span[0], b + span[0]) for a, b in blocks(span[1] - span[0])]


def probe_batches(replica: Replica, spec: ChainSpec) -> list[object]:
    """The probe on the replica's device."""
    return [replica.batch(part) for part in probe_parts(spec)]


def probe_parts(spec: ChainSpec) -> list[NDArray[np.int64]]:
    """The probe's rows as they go through the model: at once, by microbatches, or eight parts."""
    rows = probe_rows(spec.config.seed, len(spec.rows), spec.config.probe)
    size = spec.config.microbatch or len(rows)
    cuts = range(size, len(rows), size) if spec.per_example else PARTS
    return [part for part in np.array_split(rows, cuts) if len(part)]


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
    losses = [_cut(replica, spec, rows) for rows in cuts]
    numbers = torch.cat([loss.reshape(-1).double() for loss in losses]).cpu().numpy()
    if spec.per_example:
        return numbers
    return np.array([np.average(numbers, weights=[len(rows) for rows in cuts])])


def _cut(replica: Replica, spec: ChainSpec, rows: NDArray[np.int64]) -> Tensor:
    """Losses of some rows; a single one goes with its neighbour, as batch norm needs two."""
    first = int(rows[0])
    if len(rows) > 1 or not first or not spec.coupled:
        return replica.values(rows, step=first)
    pair = replica.values(np.array([first - 1, first]), step=first)
    return pair[1:] if spec.per_example else pair
