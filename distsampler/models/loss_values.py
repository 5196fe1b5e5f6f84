"""What the losses of a few rows say of a loss function: per example, a mean, or neither.

Rows are named by their numbers: ``losses[0, 1]`` is what the loss gave for rows 0 and 1 together.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distsampler.errors import ConfigError

RowSet = tuple[int, ...]
Losses = Mapping[RowSet, Tensor]
MUST = "loss(model, batch) must return one value per example, shape ({},), or their mean, shape ()"

TOUCHING = (
    "the loss of an example depends on the others of its batch ({seen}), so the loss at w* is "
    "taken in the same batches, and the LLC is that of {{batches}}; if this is not meant, look for "
    "a mean or softmax over the examples, or for shapes (n, 1) and (n,) that make (n, n)"
)
WEIGHED = (
    "the loss of a batch is a mean in which examples weigh differently ({seen}), so the loss at w* "
    "is taken in the same batches, and the LLC is that of this mean over {{batches}}; for that of "
    "the plain mean return one value per example (reduction='none'), and look for shapes (n, 1) "
    "and (n,) that make (n, n)"
)


class Interplay(NamedTuple):
    """How the examples of a batch touch each other in the loss; all is empty where they do not."""

    refusal: str = ""  # why it cannot be sampled
    note: str = ""  # what a user should know of it
    coupled: bool = False  # what it gives for an example depends on the others of its batch


def is_per_example(losses: Losses) -> bool:
    """Return whether the loss gives one value per example; if not, it gives one in all.

    Raises:
        ConfigError: if the shapes are those of neither.
    """
    shapes = {rows: tuple(values.shape) for rows, values in losses.items()}
    if all(shape == () for shape in shapes.values()):
        return False
    wrong = {rows: shape for rows, shape in shapes.items() if shape != (len(rows),)}
    if all(len(rows) == 1 and shape == () for rows, shape in wrong.items()):
        return True  # a dimension of one example is dropped by squeeze()
    rows, shape = next(iter(wrong.items()))
    right = next((len(rows) for rows in shapes if rows not in wrong), None)
    also = f", which is right for {right} by chance: take the mean over the other dimension"
    if right is None:
        also = ": take the mean over all dimensions but the first, as in losses.flatten(1).mean(1)"
    if len(shape) == 2:
        also += "; of losses of tokens, ds.lm.sequence_losses does, or set n='tokens'"
    raise ConfigError(f"{MUST.format(len(rows))}: got shape {shape} for {len(rows)} examples{also}")


def interplay(losses: Losses, tolerance: float) -> Interplay:
    """Return whether the examples of a batch touch each other's losses, and how.

    Args:
        losses: of some rows apart and together, with shapes that ``is_per_example`` has seen.
        tolerance: difference that rounding may make, relative to the largest loss.
    """
    if not {(0,), (1,), (0, 1)} <= losses.keys():
        return Interplay()
    if not all(bool(values.isfinite().all()) for values in losses.values()):
        return Interplay()
    return (_of_values if is_per_example(losses) else _of_means)(losses, tolerance)


def interplay_in_batch(losses: Losses, tolerance: float) -> Interplay:
    """Return the same of a batch, the first of the row sets, and its two halves."""
    rows, *halves = losses
    if not all(bool(values.isfinite().all()) for values in losses.values()):
        return Interplay()
    limit, whole = tolerance * largest(losses), losses[rows]
    if is_per_example(losses):
        apart = torch.cat([losses[half].reshape(-1) for half in halves])
        if _close(whole, apart, limit):
            return Interplay()
        worst = int((whole - apart).abs().argmax())
        seen = (
            f"one has {float(whole[worst]):.6g} among {len(rows)}, and {float(apart[worst]):.6g} "
            "among half of them"
        )
        return Interplay(note=TOUCHING.format(seen=seen), coupled=True)
    a, b = (float(losses[half]) for half in halves)
    c, sizes = float(whole), [len(half) for half in halves]
    mean = (sizes[0] * a + sizes[1] * b) / len(rows)
    if abs(c - mean) <= limit:
        return Interplay()
    seen = f"halves of a batch have {a:.6g} and {b:.6g} alone, and {c:.6g} together"
    return _mean_of(seen, mean, min(a, b) - limit <= c <= max(a, b) + limit)


def agree(one: Losses, other: Losses, tolerance: float) -> bool:
    """Return whether the losses of the same rows are the same, up to rounding."""
    scale, both = largest(one), one.keys() & other.keys()
    return all(_close(one[rows], other[rows], tolerance * scale) for rows in both)


def largest(losses: Losses) -> float:
    """Return the largest absolute loss that is finite; 0 if there is none."""
    values = torch.cat([each.reshape(-1) for each in losses.values()])
    finite = values[values.isfinite()].abs()
    return float(finite.max()) if len(finite) else 0.0


def _of_values(losses: Losses, tolerance: float) -> Interplay:
    limit = tolerance * largest(losses)
    alone = torch.cat([losses[0,].reshape(1), losses[1,].reshape(1)])
    pair, three = losses[0, 1], losses.get((0, 1, 2))
    if _close(pair, alone, limit) and (three is None or _close(three[:2], pair, limit)):
        return Interplay()
    a, b = float(alone[0]), float(pair[0])
    if _close(2 * pair, alone, limit) and (three is None or _close(3 * three[:2], alone, limit)):
        return Interplay(
            "loss(model, batch) must return the loss of each example as it is, but it is divided "
            f"by the number of examples: row 0 has {a:.6g} alone and {b:.6g} beside row 1; leave "
            "that division out, the mean is taken here"
        )
    if _close(pair, 2 * alone, limit) and (three is None or _close(three[:2], 3 * alone, limit)):
        return Interplay(
            "loss(model, batch) must return the loss of each example as it is, but it is "
            f"multiplied by the number of examples: row 0 has {a:.6g} alone and {b:.6g} beside row "
            "1; return one value per example as it is, or their mean"
        )
    seen = f"row 0: {a:.6g} alone, {b:.6g} beside row 1"
    return Interplay(note=TOUCHING.format(seen=seen), coupled=True)


def _of_means(losses: Losses, tolerance: float) -> Interplay:
    limit = tolerance * largest(losses)
    one, two, pair = losses[0,], losses[1,], losses[0, 1]
    if _close(pair, (one + two) / 2, limit):
        return Interplay()
    a, b, c = float(one), float(two), float(pair)
    seen = f"rows 0 and 1 have {a:.6g} and {b:.6g} alone, and {c:.6g} together"
    if _close(pair, one + two, limit):
        return Interplay(
            "loss(model, batch) must return one value per example or their mean, but it returns "
            f"their sum: {seen}, not {(a + b) / 2:.6g}; use reduction='none' or 'mean'"
        )
    return _mean_of(seen, (a + b) / 2, min(a, b) - limit <= c <= max(a, b) + limit)


def _mean_of(seen: str, mean: float, between: bool) -> Interplay:
    """What one value is that is not the mean of its parts, but may lie between them."""
    if between:
        return Interplay(note=WEIGHED.format(seen=seen), coupled=True)
    return Interplay(
        "loss(model, batch) must return one value per example or their mean, and it returns "
        f"neither: {seen}, where a mean gives {mean:.6g}; compare the shapes in it ((n, 1) "
        "and (n,) make (n, n)), and use reduction='none'"
    )


def _close(a: Tensor, b: Tensor, limit: float) -> bool:
    return bool((((a - b).abs() <= limit) | (a.isnan() & b.isnan())).all())
