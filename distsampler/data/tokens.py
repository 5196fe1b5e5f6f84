"""Which tokens of a batch count: those whose loss a language model can be asked for."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from distsampler.data.rows import Rows
from distsampler.errors import ConfigError

IDS, MASK, LABELS, POSITIONS = "input_ids", "attention_mask", "labels", "position_ids"
AT_ONCE = 256  # examples that are read at once, where they are counted
_INTEGERS = {torch.uint8, torch.int8, torch.uint16, torch.int16}
_INTEGERS |= {torch.uint32, torch.int32, torch.uint64, torch.int64}
IGNORED = -100  # the label of a token that does not count, in transformers as in torch


def counted(batch: object) -> Tensor:
    """Return which tokens of a batch count, a boolean tensor (batch, length - 1).

    Column s is about token s + 1, which is predicted from those before it. It counts unless it or
    the token before it is padding (``attention_mask`` 0), or its label is -100.

    Args:
        batch: token ids, (batch, length); or a mapping with ``input_ids`` and, where needed,
            ``attention_mask`` and ``labels`` of the same shape.

    Raises:
        ConfigError: if the batch is none of these.
    """
    ids, mask, labels = token_ids(batch), column(batch, MASK), column(batch, LABELS)
    counts = ids.new_ones((len(ids), ids.shape[1] - 1), dtype=torch.bool)
    if mask is not None:
        real = mask != 0
        counts = real[:, 1:] & real[:, :-1]
    return counts if labels is None else counts & labels[:, 1:].ne(IGNORED)


def predicted(batch: object) -> Tensor:
    """Return the ids of the tokens that are to be predicted, int64 (batch, length - 1).

    They are the labels, where a batch has them and they are not -100, else the ids that are read.
    """
    ids, labels = token_ids(batch).long(), column(batch, LABELS)
    return (ids if labels is None else ids.where(labels == IGNORED, labels.long()))[:, 1:]


def count(rows: Rows) -> int:
    """Return how many tokens of all data count.

    Raises:
        ConfigError: if none does, or the batches are not of token ids.
    """
    total = 0
    for start, stop in rows.spans:
        for first in range(start, stop, AT_ONCE):
            batch = rows.take(np.arange(first, min(first + AT_ONCE, stop)))
            counts = counted(batch)
            plain = column(batch, MASK) is None and column(batch, LABELS) is None
            if plain and rows.pack_obstacle is None:  # all batches are alike: all tokens count
                return len(rows) * counts.shape[1]
            total += int(counts.sum())
    if not total:
        raise ConfigError("with n='tokens' a token of the data must count, and none does")
    return total


def token_ids(batch: object) -> Tensor:
    """Return the token ids of a batch, (batch, length)."""
    ids = batch.get(IDS) if isinstance(batch, Mapping) else batch
    if isinstance(ids, Tensor) and ids.ndim == 2 and ids.dtype in _INTEGERS:
        return ids
    raise ConfigError(
        "a batch of a language model must be a tensor of token ids, (batch, length), or a mapping "
        f"with such input_ids, got {_form(batch)}: give the data as ds.lm.blocks(...), or as a "
        "dict of tensors"
    )


def column(batch: object, name: str) -> Tensor | None:
    """Return a tensor of a batch that has the shape of its token ids; None if it has it not."""
    value = batch.get(name) if isinstance(batch, Mapping) else None
    if value is None:
        return None
    shape = token_ids(batch).shape
    if isinstance(value, Tensor) and value.shape == shape:
        return value
    raise ConfigError(
        f"{name} must be a tensor with the shape of input_ids, {tuple(shape)}, got {_form(value)}"
    )


def _form(value: object) -> str:
    """Type of a value, and its shape or names."""
    kind = type(value).__name__
    match value:
        case Tensor():
            return f"a {kind} of {value.dtype} and shape {tuple(value.shape)}"
        case Mapping():
            return f"a {kind} of {', '.join(map(repr, value))}"
        case _:
            return f"a {kind}"
