"""The anchor pass: what is measured once at w*, over the data, before any chain moves.

A part of the pass is a run of whole blocks of rows, measured anywhere; the blocks are reduced in
the order of their rows in float64, so that the result's bits do not depend on how many workers took
part.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.chains import hop, probe
from distsampler.chains.probe import NamedLosses, Probe
from distsampler.curvature import gradient_noise
from distsampler.draws import AtAnchor
from distsampler.models.replica import ChainSpec, NamedProbe, Replica

What = Literal[
    "losses", "probe", "named probe", "gradient noise", "shard gradient", "shard curvature"
]
BLOCK = 1024  # rows of a block: fixed, so that the result's bits are too
PIECES = 4  # parts for each place, so that none waits for long


class Part(NamedTuple):
    """A part of the pass: rows of the data, a probe, batches of the gradient noise, a shard.

    The rows of named probes are numbered through all of them.
    """

    start: int
    stop: int
    what: What = "losses"


@dataclass(frozen=True)
class AnchorPart:
    """What was measured in one part of the pass."""

    part: Part
    # losses, per example or the mean of each block (of each part of the probe), float64; those of a
    # named probe; or the gradient's variance between examples, one for each entry, float32; or a
    # shard's gradient, or its curvatures
    values: NDArray[np.floating]


def parts_of(spec: ChainSpec, places: int) -> tuple[Part, ...]:
    """Return the parts of the pass, for a number of places that will measure them."""
    noise = list[tuple[int, int]]()
    if spec.config.sampler.correct_heat:
        noise = gradient_noise.batch_blocks(
            len(gradient_noise.batches(spec.config, len(spec.rows)))
        )
    shards = spec.rows.spans if spec.rows.shard_sizes else ()
    curved = shards if spec.config.watch else ()
    return (
        Part(0, 0, "probe"),
        *(part for part, _ in _named(spec)),
        *(Part(*rows) for span in spec.rows.spans for rows in _runs(blocks(*span), places)),
        *(Part(*batches, "gradient noise") for batches in noise),
        *(Part(*span, "shard gradient") for span in shards),
        *(Part(*span, "shard curvature") for span in curved),
    )


def cut(part: Part, rows: int) -> tuple[Part, ...]:
    """Return a part of so many rows, in whole blocks and at least one, and the rest of it."""
    stop = part.start + max(rows // BLOCK * BLOCK, BLOCK)
    if part.what != "losses" or stop >= part.stop:
        return (part,)
    return part._replace(stop=stop), part._replace(start=stop)


def blocks(start: int, stop: int) -> list[tuple[int, int]]:
    """Return rows cut into blocks of 1,024, each as its first row and the row behind its last."""
    return [(first, min(first + BLOCK, stop)) for first in range(start, stop, BLOCK)]


def _runs(cut: list[tuple[int, int]], places: int) -> list[tuple[int, int]]:
    """Neighbouring blocks joined into about four runs for each place."""
    size = max(1, -(-len(cut) // (PIECES * places)))
    return [
        (cut[first][0], cut[min(first + size, len(cut)) - 1][1])
        for first in range(0, len(cut), size)
    ]


def progress(parts: Iterable[Part], done: Iterable[AnchorPart]) -> dict[str, tuple[int, int]]:
    """Return how much of the pass is done: of its rows, and of the batches of gradient noise."""
    totals, made = Counter[str](), Counter[str]()
    for part in parts:
        totals[part.what] += part.stop - part.start
    for each in done:
        made[each.part.what] += each.part.stop - each.part.start
    names = {"losses": "rows", "gradient noise": "batches for the gradient noise"}
    return {name: (made[what], totals[what]) for what, name in names.items() if totals[what]}


def measure(replica: Replica, spec: ChainSpec, part: Part) -> AnchorPart:
    """Measure one part on a replica that is at w*."""
    start, stop, what = part
    match what:
        case "probe":
            return AnchorPart(part, Probe(replica, spec).losses())
        case "named probe":
            return AnchorPart(part, NamedLosses(replica, dict(_named(spec))[part]).measure())
        case "losses":
            losses = [_losses(replica, spec, *block) for block in blocks(start, stop)]
            return AnchorPart(part, np.concatenate(losses))
        case "gradient noise":
            return AnchorPart(part, gradient_noise.measure(replica, spec, start, stop))
        case "shard gradient":
            return AnchorPart(part, hop.gradient(replica, spec, start, stop))
        case "shard curvature":
            return AnchorPart(part, hop.curvatures(replica, spec, start, stop))
        case _:
            assert_never(what)


def reduce(parts: Iterable[AnchorPart], spec: ChainSpec) -> AtAnchor:
    """Return L_n(w*) and what the chains subtract, from all parts in any order."""
    ordered = sorted(parts, key=lambda each: each.part)

    def values(what: What) -> list[NDArray[np.floating]]:
        return [each.values for each in ordered if each.part.what == what]

    probe_losses = np.asarray(values("probe")[0], np.float64)
    losses = np.asarray(np.concatenate(values("losses")), np.float64)
    noise = [
        (each.part.start, each.part.stop, np.asarray(each.values, np.float32))
        for each in ordered
        if each.part.what == "gradient noise"
    ]
    cut = (block for span in spec.rows.spans for block in blocks(*span))
    weights = None if spec.per_example else [stop - start for start, stop in cut]
    gradients = values("shard gradient")
    curved = [np.asarray(each, np.float64) for each in values("shard curvature")]
    return AtAnchor(
        losses=losses.astype(np.float32) if spec.per_example else None,
        init_loss=float(np.average(losses, weights=weights)),
        probe_init_loss=float(np.average(probe_losses, weights=probe.part_weights(spec))),
        probe_losses=probe_losses,
        gradient_variance=gradient_noise.reduce(noise) if noise else None,
        shard_gradients=np.asarray(gradients, np.float32) if gradients else None,
        hop_bias=hop.predict(curved, spec) if curved else None,
        named={
            each.name: probe.at_anchor(each, losses)
            for each, losses in zip(spec.probes, values("named probe"), strict=True)
        },
    )


def _named(spec: ChainSpec) -> Iterator[tuple[Part, NamedProbe]]:
    """The parts that are named probes."""
    start = 0
    for each in spec.probes:
        yield Part(start, start + len(each.rows), "named probe"), each
        start += len(each.rows)


@torch.no_grad()
def _losses(replica: Replica, spec: ChainSpec, start: int, stop: int) -> NDArray[np.float64]:
    """Losses of one block: per example, or their mean (one number)."""
    size = spec.config.batch_size if spec.kind.coupled else max(spec.config.batch_size, 256)
    batches = [np.arange(a, min(a + size, stop)) for a in range(start, stop, size)]
    losses = [_losses_of(replica, spec, rows) for rows in batches]
    numbers = torch.cat([loss.reshape(-1).double() for loss in losses]).cpu().numpy()
    if spec.per_example:
        return numbers
    return np.array([np.average(numbers, weights=[len(rows) for rows in batches])])


def _losses_of(replica: Replica, spec: ChainSpec, rows: NDArray[np.int64]) -> Tensor:
    """Losses of some rows; a single one goes with its neighbour, as batch norm needs two."""
    first = int(rows[0])
    apart = not spec.coupled and spec.kind.least == 1
    if len(rows) > 1 or not first or apart:
        return replica.losses_of_rows(rows, step=first)
    pair = replica.losses_of_rows(np.array([first - 1, first]), step=first)
    return pair[1:] if spec.per_example else pair
