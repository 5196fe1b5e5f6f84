"""The draws in ``trace.zarr``: how their arrays are laid out, written, read and mended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from distsampler.draws import STEP, DrawBlock, Group, Variable
from distsampler.store.zarr_files import StoredRows, array_of, chunks, codecs, read_or_none

CHUNK = (64, 1024)  # chains and draws of a chunk, at most
WARMUP = "warmup_"
GROUPS: tuple[Group, ...] = ("posterior", "sample_stats")
Values = Mapping[str, NDArray[np.generic]]


class NarrowArrays:
    """The draws that travel to the driver: two groups, each with a twin for the warm-up.

    Args:
        root: the zarr group.
        variables: the variables of a draw.
        burn_in: draws that lie in the warm-up groups; all of them while a run has yet to choose
            its burn-in.
    """

    def __init__(self, root: zarr.Group, variables: Sequence[Variable], burn_in: int) -> None:
        self._root, self._variables, self._burn_in = root, variables, burn_in

    def create(self, chains: int, draws: int) -> None:
        """Make all groups and arrays, empty."""
        for prefix, size in (("", draws), (WARMUP, self._burn_in)):
            for group in GROUPS:
                named = [v for v in self._variables if v.group == group]
                chunk = size or max(draws, self._burn_in)  # empty at first, it may grow
                _create_group(self._root, prefix + group, named, (chains, size, chunk))

    def write(self, blocks: Sequence[DrawBlock]) -> None:
        """Put draws in their places; each chunk that they touch is written once.

        Only chunks of chains that bring draws are touched: these may be few of a thousand.
        """
        together: dict[tuple[str, int], list[tuple[int, int, Values]]] = {}
        for block in blocks:
            for prefix, chain, first, values in _split(block, self._burn_in):
                row = chain // CHUNK[0]
                together.setdefault((prefix, row), []).append((chain, first, values))
        for (prefix, row), pieces in together.items():
            self._write_row(prefix, row * CHUNK[0], pieces)

    def rows(self, variable: Variable) -> StoredRows:
        """Return the draws of a variable, counted from the chains' start."""
        name = f"{variable.group}/{variable.name}"
        first, rest = (array_of(self._root, prefix + name) for prefix in (WARMUP, ""))
        return StoredRows((first, 0), (rest, self._burn_in))

    def resize(self, draws: int, burn_in: int) -> None:
        """Cut the draws after burn-in and before, or make room for more."""
        for prefix, size in (("", draws), (WARMUP, burn_in)):
            self._resize(prefix, size)
        self._burn_in = burn_in

    def fits(self, draws: int, burn_in: int) -> bool:
        """Return whether ``resize`` to these would change nothing."""
        sizes = {"": draws, WARMUP: burn_in}
        return all(array.shape[1:2] == (sizes[prefix],) for prefix, array in self._arrays())

    def split(self, burn_in: int, draws: int) -> None:
        """Copy what lies behind a burn-in from the warm-up groups into the posterior's.

        Nothing of what was there is changed: until the manifest names the split, the warm-up
        groups alone count, and an interrupted split is made again.
        """
        self._resize("", draws)
        for name in self._names():
            late = array_of(self._root, WARMUP + name)[:, burn_in : burn_in + draws]
            array_of(self._root, name)[:] = late

    def join(self, burn_in: int, draws: int, room: int) -> None:
        """Copy the posterior's draws back behind the burn-in, where there is room for more.

        The posterior's groups stay as they are until the manifest no longer names the split.
        """
        self.mend()
        self._resize(WARMUP, room)
        for name in self._names():
            late = np.asarray(array_of(self._root, name)[:, :draws])
            array_of(self._root, WARMUP + name)[:, burn_in : burn_in + late.shape[1]] = late
        self._burn_in = room

    def intact(self, counts: Sequence[int]) -> list[int]:
        """Return how many draws of each chain hold all values, without a gap, up to a count."""
        for variable in self._variables:
            counts = self.rows(variable).whole(counts)
        return list(counts)

    def mend(self) -> None:
        """Empty the chunks that cannot be read, so that they can be written again."""
        for _, array in self._arrays():
            for region in chunks(array):
                if read_or_none(array, region) is None:
                    array[region] = array.fill_value

    def _names(self) -> list[str]:
        """Group and name of every variable."""
        return [f"{variable.group}/{variable.name}" for variable in self._variables]

    def _arrays(self) -> Iterator[tuple[str, zarr.Array[Any]]]:
        """Every array, with the prefix of its group."""
        for prefix, name in product(("", WARMUP), self._names()):
            yield prefix, array_of(self._root, prefix + name)

    def _resize(self, prefix: str, size: int) -> None:
        for group in GROUPS:
            _number(self._root, prefix + group, size)
        for name in self._names():
            array = array_of(self._root, prefix + name)
            if array.shape[1] != size:
                array.resize((array.shape[0], size, *array.shape[2:]))

    def _write_row(self, prefix: str, top: int, pieces: list[tuple[int, int, Values]]) -> None:
        """Write draws of the chains of one row of chunks, whose first chain is ``top``."""
        chains = slice(top, top + CHUNK[0])
        low = min(start for _, start, _ in pieces)
        high = max(start + len(values[STEP]) for _, start, values in pieces)
        for variable in self._variables:
            array = array_of(self._root, f"{prefix}{variable.group}/{variable.name}")
            region = np.asarray(array[chains, low:high])
            for chain, start, values in pieces:
                new = values[variable.name]
                region[chain - top, start - low : start - low + len(new)] = new
            array[chains, low:high] = region


def _number(root: zarr.Group, group: str, draws: int) -> None:
    """Set the coordinate of the draws; a damaged one is made again, as it holds nothing else."""
    values = np.arange(draws)
    try:
        coordinate = array_of(root, f"{group}/draw")
        if coordinate.shape != (draws,):
            coordinate.resize((draws,))
        if not np.array_equal(np.asarray(coordinate[:]), values):
            coordinate[:] = values
    except OSError:
        raise
    except Exception:  # zarr raises what it likes
        parent = root.require_group(group)
        parent.create_array("draw", data=values, dimension_names=("draw",), overwrite=True)


def _create_group(
    root: zarr.Group, name: str, variables: Sequence[Variable], sizes: tuple[int, int, int]
) -> None:
    """A group of empty arrays; sizes: chains, draws, and draws of a chunk."""
    chains, draws, chunk = sizes
    group = root.create_group(name)
    for dim, size in (("chain", chains), ("draw", draws)):
        group.create_array(dim, data=np.arange(size), dimension_names=(dim,))
    for variable in variables:
        kind = np.dtype(variable.dtype)
        array = group.create_array(
            variable.name,
            shape=(chains, draws, *variable.shape),
            chunks=(min(chains, CHUNK[0]), max(1, min(chunk, CHUNK[1])), *variable.shape),
            dtype=kind,
            fill_value=np.nan if kind.kind == "f" else -1,
            dimension_names=("chain", "draw", *variable.dims),
            **codecs(),
        )
        array.attrs["long_name"] = variable.meaning
    for dim, size in {
        d: s for v in variables for d, s in zip(v.dims, v.shape, strict=True)
    }.items():
        group.create_array(dim, data=np.arange(size), dimension_names=(dim,))


def _split(block: DrawBlock, burn_in: int) -> Iterator[tuple[str, int, int, Values]]:
    """A block as (group prefix, chain, first draw there, values): its burn-in, then the rest."""
    cut = min(max(burn_in - block.first_draw, 0), block.draws)
    if cut:
        early = {name: array[:cut] for name, array in block.values.items()}
        yield WARMUP, block.chain, block.first_draw, early
    if cut < block.draws:
        late = {name: array[cut:] for name, array in block.values.items()}
        yield "", block.chain, block.first_draw + cut - burn_in, late
