"""Rows of token ids, kept as narrow as they come, and widened when a batch is made.

An array in memory travels through shared memory. A memory-mapped one travels as the name of its
file, which is opened where the rows are read, and is never read whole.
"""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distsampler.data.rows import Rows
from distsampler.data.tokens import IDS
from distsampler.errors import ConfigError

Ids = NDArray[np.integer]
SAMPLED = 64  # rows of a file that its digest is made of


class TokenRows(Rows):
    """Rows of one length, (rows, length); a batch is ``{"input_ids": int64 (batch, length)}``."""

    def __init__(self, source: Ids | MappedIds) -> None:
        self._source = source

    def __len__(self) -> int:
        return self._source.shape[0]

    def take(self, rows: NDArray[np.int64]) -> object:
        """Return the batch of these rows."""
        return {IDS: torch.from_numpy(self._ids[rows].astype(np.int64))}

    def digest(self) -> str:
        """Return a digest of all ids, or of the shape and 64 rows of a file."""
        return self._digest

    def picked(self, rows: NDArray[np.int64]) -> Rows:
        """Return some of the rows; of an array in memory, no more than these."""
        if isinstance(self._source, MappedIds):
            return super().picked(rows)
        return TokenRows(self._source[rows])

    @cached_property
    def _ids(self) -> Ids:
        source = self._source
        return source.opened() if isinstance(source, MappedIds) else source

    @cached_property
    def _digest(self) -> str:
        source = self._source
        return source.digest if isinstance(source, MappedIds) else _digest(source)

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source}


@dataclass(frozen=True)
class MappedIds:
    """Token ids in a file."""

    path: str
    offset: int  # bytes before the first id
    dtype: str
    shape: tuple[int, ...]
    digest: str  # of the shape and some rows, by which another file is noticed

    @classmethod
    def of(cls, array: np.memmap[Any, Any], shape: tuple[int, int]) -> MappedIds:
        """Return where the ids of a memory-mapped array lie, cut to a shape."""
        if not array.flags.c_contiguous:
            raise ConfigError(
                "a memory-mapped array of token ids must be a stretch of its file, and this one is "
                "strided: give a slice of neighbouring ids, or write a file of its own"
            )
        # A slice has the offset of the whole: where it begins, its address says.
        start = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
        mapped: Any = array._mmap  # type: ignore[attr-defined]
        first = np.frombuffer(mapped, np.uint8).ctypes.data
        offset = start + array.ctypes.data - first
        digest = _digest(array.reshape(-1)[: shape[0] * shape[1]].reshape(shape), SAMPLED)
        path = str(Path(str(array.filename)).resolve())
        return cls(path, offset, array.dtype.str, shape, digest)

    def opened(self) -> Ids:
        """Return the ids, mapped.

        Raises:
            ConfigError: if the file here is not the one that it was.
        """
        try:
            ids = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
            wrong = "" if _digest(ids, SAMPLED) == self.digest else "it holds other ids"
        except (OSError, ValueError) as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            raise ConfigError(
                f"the token ids in {self.path} must be on every node as they were where the run "
                f"was written, but {wrong}: put the file where all nodes see it, or copy it to each"
            )
        return ids


def _digest(ids: Ids, sampled: int | None = None) -> str:
    """A digest of a shape, and of all ids or those of some rows, whatever type they have."""
    state = hashlib.blake2b(repr(ids.shape).encode(), digest_size=16)
    rows = np.arange(len(ids))
    if sampled is not None:
        rows = np.unique(np.linspace(0, len(ids) - 1, sampled).astype(np.int64))
    for part in np.array_split(rows, -(-len(rows) // 1024)):
        state.update(np.ascontiguousarray(ids[part], np.int64).tobytes())
    return state.hexdigest()
