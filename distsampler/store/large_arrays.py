"""What is too large to travel: arrays that the owner of a chain writes, and the driver only counts.

``wide.zarr`` lies beside the trace: one array a variable, (chain, draw, ...), float32, all draws
from the chain's start. A chunk holds draws of one chain, so it has one writer. It is written before
the block that acknowledges it is sent, and its draws exist when the trace counts them. Whoever
makes a draw again writes the same bytes again; what another draw has in that chunk stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from distsampler.draws import DrawBlock, WideVariable
from distsampler.errors import StoreError
from distsampler.store.files import Files, StoreFault, refused
from distsampler.store.zarr_arrays import ZarrFiles, codecs

WIDE = "wide.zarr"
LOSSES, WEIGHTS = "losses", "weights"  # what is not a user's own; weights: a group of parameters
CHUNK_BYTES = 2**20  # of small draws, as many as fit
PIECE_BYTES = 2**26  # a draw that is larger is cut along its first dimension
AGAIN = "continue the run with resume='must': it computes them again, to the same bits"


class WideArrays:
    """The wide arrays of a run directory.

    Args:
        files: of the run directory.
        variables: that it holds; none: there is no ``wide.zarr``.
    """

    def __init__(self, files: Files, variables: Sequence[WideVariable]) -> None:
        self.files, self.variables = files, tuple(variables)

    def create(self, chains: int, draws: int) -> None:
        """Makes all arrays, empty."""
        if not self.variables:
            return
        root = zarr.create_group(ZarrFiles(self.files, WIDE), zarr_format=3, overwrite=True)
        for variable in self.variables:
            array = root.create_array(
                variable.name,
                shape=(chains, variable.saved(draws), *variable.shape),
                chunks=(1, *_chunks(variable)),
                dtype="float32",
                fill_value=np.nan,
                dimension_names=("chain", "draw", *variable.dims),
                **codecs(),
            )
            array.attrs["long_name"] = variable.meaning

    def array(self, variable: WideVariable) -> zarr.Array[Any]:
        """One array.

        Raises:
            StoreError: if it cannot be opened.
        """
        try:
            return zarr.open_array(
                ZarrFiles(self.files, WIDE), path=variable.name, mode="r+", zarr_format=3
            )
        except Exception as error:  # zarr raises what it likes
            where = self.files.path(f"{WIDE}/{variable.name}/zarr.json")
            raise StoreError(
                f"{where} cannot be read: {error}; every node that runs chains must see the store; "
                "if the file was lost, restore it from a copy, or delete the store and sample again"
            ) from error

    def resize(self, draws: int) -> None:
        """Cuts the draws, burn-in included, or makes room for more."""
        for variable in self.variables:
            array = self.array(variable)
            array.resize((array.shape[0], variable.saved(draws), *array.shape[2:]))

    def check(self, block: DrawBlock) -> None:
        """Sees that a block acknowledges all that must lie in the store when its draws count.

        Raises:
            StoreError: if it does not.
        """
        lacking = [v.name for v in self.variables if v.name not in block.wide]
        if lacking and block.draws:
            raise StoreError(
                f"chain {block.chain}, draws {block.first_draw}..{block.end}: {lacking} must be "
                "written before the block that counts them, and was not"
            )

    def intact(self, counts: Sequence[int]) -> list[int]:
        """How many draws of each chain are there without a gap, of those that were committed."""
        found = list(counts)
        for variable in self.variables:
            for chain, count in enumerate(found):
                whole = self.whole(variable, chain, variable.saved(count))
                if whole < variable.saved(count):
                    found[chain] = variable.draw(whole)
        return found

    def whole(self, variable: WideVariable, chain: int, rows: int) -> int:
        """How many of a chain's first rows are there without a gap."""
        array = self.array(variable)
        for start in range(0, rows, array.chunks[1]):
            stop = min(start + array.chunks[1], rows)
            for piece in _pieces(array, chain, start, stop):
                gone = _missing(array, piece)
                if gone.any():
                    return start + int(gone.argmax())
        return rows

    def sweep(self, counts: Sequence[int]) -> None:
        """Removes the chunks of which no draw was committed, damaged ones among them."""
        for variable in self.variables:
            under, step = f"{WIDE}/{variable.name}/c/", self.array(variable).chunks[1]
            for name in list(self.files.names(under)):
                chain, chunk, *_ = name.removeprefix(under).split("/")
                if int(chunk) * step >= variable.saved(counts[int(chain)]):
                    self.files.remove(name)

    def place(self, variable: WideVariable, chain: int, row: int) -> str:
        """The file that begins the chunk of a row, for people."""
        chunk = row // self.array(variable).chunks[1]
        return self.files.path(f"{WIDE}/{variable.name}/c/{chain}/{chunk}")


class WideWriter:
    """Puts the wide values of one chain into the store, a chunk at a time.

    Args:
        arrays: of the run.
        chain: index.
    """

    def __init__(self, arrays: WideArrays, chain: int) -> None:
        self._arrays, self._chain = arrays, chain
        self._rows: dict[str, list[NDArray[np.floating]]] = {v.name: [] for v in arrays.variables}
        self._ends = dict.fromkeys(self._rows, 0)
        self._opened: dict[str, zarr.Array[Any]] = {}

    def put(self, draw: int, values: Mapping[str, float | NDArray[np.floating]]) -> None:
        """Takes what is wide of a draw's values.

        Raises:
            StoreFault: if the store cannot take it.
        """
        for variable in self._arrays.variables:
            if variable.name in values:
                self._rows[variable.name].append(np.asarray(values[variable.name], np.float32))
                end = self._ends[variable.name] = variable.saved(draw + 1)
                if end % _chunks(variable)[0] == 0:
                    self._write(variable)

    def flush(self) -> tuple[str, ...]:
        """Sees that all that was put lies in the store, and names the variables.

        Raises:
            StoreFault: if the store cannot take it.
        """
        for variable in self._arrays.variables:
            self._write(variable)
        return tuple(self._rows)

    def _write(self, variable: WideVariable) -> None:
        rows, end = self._rows[variable.name], self._ends[variable.name]
        if not rows:
            return
        try:
            if variable.name not in self._opened:
                self._opened[variable.name] = self._arrays.array(variable)
            self._opened[variable.name][self._chain, end - len(rows) : end] = np.stack(rows)
        except StoreError:
            raise
        except OSError as error:
            raise refused(self._arrays.files, error) from error
        except Exception as error:  # of zarr and its codecs, which had to read the chunk first
            where = self._arrays.place(variable, self._chain, end - len(rows))
            raise StoreFault(f"{where} is damaged: {error}; {AGAIN}") from error
        rows.clear()


def _chunks(variable: WideVariable) -> tuple[int, ...]:
    """Draws of a chunk, and the shape of its part of a draw."""
    size = 4 * max(1, math.prod(variable.shape))
    if size <= PIECE_BYTES:
        return max(1, min(1024, CHUNK_BYTES // size)), *(max(1, side) for side in variable.shape)
    first, *rest = variable.shape
    return 1, max(1, PIECE_BYTES // (size // first)), *rest


def _pieces(
    array: zarr.Array[Any], chain: int, start: int, stop: int
) -> Iterator[tuple[int | slice, ...]]:
    """The regions of some rows of a chain, of which each lies in one file."""
    if array.ndim == 2:
        yield chain, slice(start, stop)
        return
    for low in range(0, array.shape[2], array.chunks[2]):
        yield chain, slice(start, stop), slice(low, low + array.chunks[2])


def _missing(array: zarr.Array[Any], region: tuple[int | slice, ...]) -> NDArray[np.bool_]:
    """Which rows of a region lack a value; all, if it is damaged."""
    try:
        values = np.asarray(array[region])
    except Exception:  # zarr and its codecs raise what they like
        return np.ones(1, np.bool_)
    return np.asarray(np.isnan(values).any(axis=tuple(range(1, values.ndim))))
