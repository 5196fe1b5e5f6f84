"""Texts or token ids as rows of one length."""

from typing import Any

import numpy as np
import torch

from distsampler.data.rows import Rows, TensorRows
from distsampler.data.tokens import IDS
from distsampler.errors import ConfigError


def blocks(data: object, tokenizer: object = None, length: int | None = None) -> Rows:
    """Return token ids as data for ``sample``: rows of one length, batches ``{"input_ids": ...}``.

    Args:
        data: a text or a list of texts, or an array of ids.
        tokenizer: of transformers; needed for texts, not for ids.
        length: tokens of a row.
    """
    texts = [data] if isinstance(data, str) else data
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        encode: Any = tokenizer
        ids, join = list[int](), list[int]()
        for text in texts:
            ids += [*join, *encode(text, add_special_tokens=False)[IDS]]
            join = [encode.eos_token_id]
        data = ids
    array = np.asarray(data)
    if length is not None:
        rows = array.size // length
        array = array.reshape(-1)[: rows * length].reshape(rows, length)
    if array.ndim != 2 or not len(array):
        raise ConfigError(f"{array.size} token ids fill no row of length {length}")
    return TensorRows({IDS: torch.from_numpy(array.astype(np.int64))})
