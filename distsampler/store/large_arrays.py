"""Arrays too large to travel to the driver: a chain's actor writes them, the driver only counts.

``wide.zarr`` lies beside the trace, one array a variable, dims (chain, row, ...), where a variable
saved at every k-th draw has one row for k draws. A chunk holds rows of one chain, so it has one
writer. It is written before the block that acknowledges it is sent, and its draws exist once the
trace counts them. A draw that is computed again writes the same bytes again; the other draws in its
chunk stay.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from distsampler.draws import DrawBlock, WideVariable
from distsampler.errors import StoreError
from distsampler.store.files import AGAIN, Files, StoreFault, writing
from distsampler.store.zarr_files import (
    ZarrFiles,
    ZarrRows,
    check_layout,
    create_array,
    create_root,
    resize_rows,
)

WIDE = "wide.zarr"
# What is not a user's own; weights are a group of parameters, the others of named probes.
LOSSES, WEIGHTS, PROBES, MEAN_EXCESS = "losses", "weights", "probes", "probe_excess"
CHUNK_BYTES = 2**20  # of a chunk of small draws
PIECE_BYTES = 2**26  # a larger draw is cut along its first dimension


class WideArrays:
    """The wide arrays of a run directory; without wide variables there is no ``wide.zarr``.

    Args:
        files: the run directory.
        variables: what of a draw is wide.
        identity: of the run, to which they are bound; None: as the store has it.
    """

    def __init__(
        self, files: Files, variables: Sequence[WideVariable], identity: str | None = None
    ) -> None:
        self.files, self.variables, self._identity = files, tuple(variables), identity

    def create(self, chains: int, draws: int) -> None:
        """Make all arrays, empty."""
        if not self.variables:
            return
        root = create_root(self.files, WIDE, self._identity or "")
        for variable in self.variables:
            sizes, chunk = (chains, variable.saved(draws)), (1, *_chunks(variable))
            create_array(root, variable, sizes, chunk, variable.dtype)

    def array(self, variable: WideVariable) -> zarr.Array[Any]:
        """Return the array of a variable.

        Raises:
            StoreError: if it cannot be opened.
        """
        try:
            root = ZarrFiles(self.files, WIDE, self._identity)
            array = zarr.open_array(root, path=variable.name, mode="r+", zarr_format=3)
            check_layout(array, variable, variable.dtype, chains_in_chunk=1)
            return array
        except Exception as error:  # zarr raises what it likes
            where = self.files.path(f"{WIDE}/{variable.name}/zarr.json")
            raise StoreError(
                f"{where} cannot be read: {error}; every node that runs chains must see the store; "
                "if the file was lost, restore it from a copy, or delete the store and sample again"
            ) from error

    def rows(self, variable: WideVariable) -> ZarrRows:
        """Return the rows of a variable."""
        return ZarrRows(variable.name, [(self.array(variable), 0)], variable.draw)

    def resize(self, draws: int) -> None:
        """Cut the draws, burn-in included, or make room for more."""
        for variable in self.variables:
            resize_rows(self.array(variable), variable.saved(draws))

    def check(self, block: DrawBlock) -> None:
        """Check that a block acknowledges all that must be in the store when its draws count.

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
        """Return how many draws of each chain hold all values, without a gap, up to a count."""
        intact = list(counts)
        for variable in self.variables:
            rows = [variable.saved(count) for count in intact]
            for chain, whole in enumerate(self.rows(variable).whole(rows)):
                if whole < rows[chain]:
                    intact[chain] = variable.draw(int(whole))
        return intact

    def sweep(self, counts: Sequence[int]) -> None:
        """Remove the chunks of which no draw was committed, damaged ones among them."""
        for variable in self.variables:
            under, step = f"{WIDE}/{variable.name}/c/", self.array(variable).chunks[1]
            for name in list(self.files.names(under)):
                chain, chunk, *_ = name.removeprefix(under).split("/")
                if int(chunk) * step >= variable.saved(counts[int(chain)]):
                    self.files.remove(name)


class WideWriter:
    """Writes the wide values of one chain into the store, a chunk at a time.

    Raises:
        StoreFault: from ``put`` and ``flush``, if the store cannot be written.
    """

    def __init__(self, arrays: WideArrays, chain: int) -> None:
        self._arrays, self._chain = arrays, chain
        self._rows: dict[str, list[NDArray[np.floating]]] = {v.name: [] for v in arrays.variables}
        self._ends = dict.fromkeys(self._rows, 0)
        self._opened: dict[str, zarr.Array[Any]] = {}

    def put(self, draw: int, values: Mapping[str, float | NDArray[np.floating]]) -> None:
        """Take what is wide of a draw's values, and write the chunks that are full."""
        for variable in self._arrays.variables:
            if variable.name in values:
                value = np.asarray(values[variable.name], variable.dtype)
                self._rows[variable.name].append(value)
                end = self._ends[variable.name] = variable.saved(draw + 1)
                if end % _chunks(variable)[0] == 0:
                    self._write(variable)

    def flush(self) -> tuple[str, ...]:
        """Write all that was put, and return the names of the variables."""
        for variable in self._arrays.variables:
            self._write(variable)
        return tuple(self._rows)

    def _write(self, variable: WideVariable) -> None:
        rows, end = self._rows[variable.name], self._ends[variable.name]
        if not rows:
            return
        try:
            with writing(self._arrays.files):
                if variable.name not in self._opened:
                    self._opened[variable.name] = self._arrays.array(variable)
                self._opened[variable.name][self._chain, end - len(rows) : end] = np.stack(rows)
        except StoreError:
            raise
        except Exception as error:  # of zarr and its codecs, which had to read the chunk first
            where = self._arrays.rows(variable).place(self._chain, end - len(rows))
            raise StoreFault(f"{where} is damaged: {error}; {AGAIN}") from error
        rows.clear()


def _chunks(variable: WideVariable) -> tuple[int, ...]:
    """Draws of a chunk, and the shape of its part of a draw."""
    size = np.dtype(variable.dtype).itemsize * max(1, math.prod(variable.shape))
    if size <= PIECE_BYTES:
        return max(1, min(1024, CHUNK_BYTES // size)), *(max(1, side) for side in variable.shape)
    first, *rest = variable.shape
    return 1, max(1, PIECE_BYTES // (size // first)), *rest
