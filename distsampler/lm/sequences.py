"""Texts or token ids as rows of one length, as language models are trained on them."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distsampler.data.rows import Rows
from distsampler.data.token_rows import Ids, MappedIds, TokenRows
from distsampler.data.tokens import IDS, MASK
from distsampler.errors import ConfigError

log = logging.getLogger(__name__)
AT_ONCE = 1000  # texts that a tokenizer gets at once
TEXT = "text"  # the column of texts, where there are several


def blocks(data: object, tokenizer: object = None, length: int | None = None) -> Rows:
    """Return rows of token ids as data for ``sample``; batches are ``{"input_ids": int64}``.

    Documents are put one behind the other, with the tokenizer's end-of-text token between two, and
    cut into rows of one length, in which every token counts; the rest at the end is left out.

    Args:
        data: a text or a list of texts; a ``datasets.Dataset`` with texts (the column "text", or
            the only one of texts) or ``input_ids``, which are taken as they are, without padding;
            or an array of ids: a stream, or rows, (rows, length). A memory-mapped array stays in
            its file, which every node must have; ids in memory keep their type.
        tokenizer: of transformers; needed for texts, not for ids.
        length: tokens of a row; may be left out where data are rows already.

    Raises:
        ConfigError: if data are none of these, or do not fill a row.

    Example:
        >>> rows = blocks(np.arange(10, dtype=np.uint16), length=4)
        >>> len(rows), rows.take(np.array([1]))
        (2, {'input_ids': tensor([[4, 5, 6, 7]])})
    """
    if length is not None:
        if not isinstance(length, int | np.integer) or length < 2:
            raise ConfigError(f"length must be an integer of at least 2 tokens, got {length!r}")
        length = int(length)
    ids = _ids(data, tokenizer)
    if ids.ndim == 2 and length in (None, ids.shape[1]):
        rows, length = ids.shape
    elif ids.ndim == 1 and length is not None:
        rows = len(ids) // length
    else:
        what = "a stream needs length=..., the tokens of a row"
        if ids.ndim == 2:
            what = f"with length={length}, give ids.reshape(-1) to have them cut again"
        raise ConfigError(
            f"token ids must be a stream, or rows, (rows, length), got shape {ids.shape}: {what}"
        )
    if not rows or length < 2:
        raise ConfigError(
            f"{ids.size} token ids fill no row of {length}: give more, or a smaller length"
        )
    if rest := ids.size - rows * length:
        log.info("the last %d of %d tokens fill no row, and are left out", rest, ids.size)
    if isinstance(ids, np.memmap):
        return TokenRows(MappedIds.of(ids, (rows, length)))
    return TokenRows(ids.reshape(-1)[: rows * length].reshape(rows, length))


def _ids(data: object, tokenizer: object) -> Ids:
    """The token ids of what was given: a stream or rows."""
    match data:
        case str():
            return _together(_encoded([[data]], tokenizer))
        case list() if data and all(isinstance(text, str) for text in data):
            parts = (data[first : first + AT_ONCE] for first in range(0, len(data), AT_ONCE))
            return _together(_encoded(parts, tokenizer))
        case torch.Tensor():
            ids = data.detach().cpu()
            return _checked((ids.float() if ids.is_floating_point() else ids).numpy())
        case np.ndarray() | list():
            return _checked(data)
        case _ if (
            not isinstance(data, dict)
            and hasattr(data, "column_names")
            and hasattr(data, "select_columns")
        ):
            return _of_dataset(data, tokenizer)
    what = f"a {type(data).__name__}"
    if isinstance(data, dict):
        what += f" of {', '.join(map(repr, data))}: give one of them"
    raise ConfigError(
        f"blocks() takes texts, a datasets.Dataset, or an array of token ids, got {what}"
    )


def _checked(data: Any) -> Ids:  # noqa: ANN401 (an array or nested lists)
    """An array of ids, if they are ids; of a file, some of them."""
    try:
        # What was written to a copy-on-write map is not in its file.
        mapped = isinstance(data, np.memmap) and data.filename and data.mode != "c"
        ids: NDArray[Any] = data if mapped else np.asarray(data)
    except ValueError as error:
        raise ConfigError(
            f"token ids must be an array, and lists of unequal lengths make none ({error}): join "
            "them, np.concatenate(documents)"
        ) from None
    if not ids.size:
        raise ConfigError("blocks() takes texts or token ids, and there are none: data are empty")
    if ids.dtype.kind not in "iu":
        raise ConfigError(
            f"token ids must be an array of integers, got {ids.size} values of {ids.dtype}"
        )
    seen = ids.reshape(-1)[:: max(1, ids.size // 65536)] if mapped else ids
    if ids.dtype.kind == "i" and (least := int(seen.min())) < 0:
        raise ConfigError(
            f"token ids must not be negative, got {least}: -100 is for labels, and padding must be "
            "taken out"
        )
    return ids


def _of_dataset(data: Any, tokenizer: object) -> Ids:  # noqa: ANN401 (a datasets.Dataset)
    """The ids of a datasets.Dataset, whatever its format is."""
    if not hasattr(data, "__len__"):
        raise ConfigError(
            f"a Dataset for blocks() must have a length, and {type(data).__name__} is read as it "
            "comes: give a list of texts, such as [each['text'] for each in data.take(1000)]"
        )
    columns = list(data.column_names)
    texts = [name for name in columns if getattr(data.features[name], "dtype", "") == "string"]
    if IDS in columns:
        kept = [name for name in (IDS, MASK) if name in columns]
    elif TEXT in texts or len(texts) == 1:
        kept = [TEXT if TEXT in texts else texts[0]]
    else:
        raise ConfigError(
            f"a Dataset for blocks() must have a column {TEXT!r}, a single one of texts, or "
            f"{IDS!r}, it has {', '.join(map(repr, columns))}: rename one, or give a list of texts"
        )
    plain = data.select_columns(kept).with_format(None)
    parts = (plain[first : first + AT_ONCE] for first in range(0, len(plain), AT_ONCE))
    if kept[0] != IDS:
        return _together(_encoded((part[kept[0]] for part in parts), tokenizer))
    return _together(
        np.asarray(ids)[np.asarray(mask, bool)]
        for part in parts
        for ids, mask in zip(part[IDS], part.get(MASK, map(np.ones_like, part[IDS])), strict=True)
    )


def _encoded(parts: Iterable[Sequence[str]], tokenizer: Any) -> Iterator[Ids]:  # noqa: ANN401
    """The ids of texts, and between two the token that ends one."""
    if not callable(tokenizer):
        raise ConfigError(
            "blocks() needs the tokenizer of the model for texts, blocks(data, tokenizer, length),"
            f" got {type(tokenizer).__name__}: AutoTokenizer.from_pretrained(...)"
        )
    end, first = getattr(tokenizer, "eos_token_id", None), True
    for part in parts:
        for ids in tokenizer(list(part), add_special_tokens=False)[IDS]:
            if not first and end is None:
                raise ConfigError(
                    "several texts are joined with the tokenizer's end-of-text token, and this "
                    "one has none: set tokenizer.eos_token, or join the texts to one yourself"
                )
            if not first:
                yield np.array([end])
            first = False
            yield np.asarray(ids, np.int64)


def _together(documents: Iterable[Ids]) -> Ids:
    """Documents as one stream, each id in as few bytes as all need."""
    narrow = [_checked(each).astype(np.uint32) for each in documents if len(each)]
    if not narrow:
        raise ConfigError("the texts for blocks() must hold a token, and they are empty")
    stream = np.concatenate(narrow)
    return stream.astype(np.uint16) if stream.max() < 2**16 else stream
