"""The draws in ``trace.zarr``: how their arrays are laid out, written, read and mended."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import zarr

from distsampler.draws import DrawBlock, Group, Variable
from distsampler.store.files import damaged
from distsampler.store.zarr_files import (
    METADATA,
    ZarrRows,
    array_of,
    check_layout,
    chunks,
    codecs,
    create_array,
    read_or_none,
    resize_rows,
)

CHUNK = (64, 1024)  # chains and draws of a chunk, at most
WARMUP = "warmup_"
GROUPS: tuple[Group, ...] = ("posterior", "sample_stats")


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
        self._opened: dict[str, zarr.Array[Any]] = {}

    def create(self, chains: int, draws: int) -> None:
        """Make all groups and arrays, empty."""
        for prefix, size in (("", draws), (WARMUP, self._burn_in)):
            for name in GROUPS:
                group = self._root.create_group(prefix + name)
                sizes = {"chain": chains, "draw": size}
                for variable in self._variables:
                    if variable.group == name:
                        chunk = size or max(draws, self._burn_in)  # empty at first, it may grow
                        chunk = max(1, min(chunk, CHUNK[1]))
                        shape = (min(chains, CHUNK[0]), chunk, *variable.shape)
                        create_array(group, variable, (chains, size), shape, variable.dtype)
                        sizes |= zip(variable.dims, variable.shape, strict=True)
                for dim, size_of_dim in sizes.items():
                    _create_coordinate(group, dim, size_of_dim)

    def write(self, blocks: Sequence[DrawBlock]) -> None:
        """Put draws in their places; each chunk that they touch is written once.

        Only chunks of chains that bring draws are touched: these may be few of a thousand.
        """
        together: dict[int, list[DrawBlock]] = {}
        for block in blocks:
            together.setdefault(block.chain // CHUNK[0], []).append(block)
        for row, some in together.items():
            for variable in self._variables:
                values = [(b.chain, b.first_draw, b.values[variable.name]) for b in some]
                self.rows(variable).write(slice(row * CHUNK[0], (row + 1) * CHUNK[0]), values)

    def rows(self, variable: Variable) -> ZarrRows:
        """Return the draws of a variable, counted from the chains' start."""
        early, late = (self._array(prefix, variable) for prefix in (WARMUP, ""))
        return ZarrRows(variable.name, [(early, 0), (late, self._burn_in)])

    def resize(self, draws: int, burn_in: int) -> None:
        """Cut the draws after burn-in and before, or make room for more."""
        for prefix, size in (("", draws), (WARMUP, burn_in)):
            self._resize(prefix, size)
        self._burn_in = burn_in

    def fits(self, draws: int, burn_in: int) -> bool:
        """Return whether ``resize`` to these would change nothing."""
        sizes = {"": draws, WARMUP: burn_in}
        return all(array.shape[1] == sizes[prefix] for prefix, array in self._arrays())

    def split(self, burn_in: int, draws: int) -> None:
        """Copy what lies behind a burn-in from the warm-up groups into the posterior's.

        Nothing of what was there is changed: until the manifest names the split, the warm-up
        groups alone count, and an interrupted split is made again.
        """
        self._resize("", draws)
        for variable in self._variables:
            late = self._array(WARMUP, variable)[:, burn_in : burn_in + draws]
            self._array("", variable)[:] = late

    def join(self, burn_in: int, draws: int, room: int) -> None:
        """Copy the posterior's draws back behind the burn-in, where there is room for more.

        The posterior's groups stay as they are until the manifest no longer names the split.
        """
        self.mend()
        self._resize(WARMUP, room)
        for variable in self._variables:
            late = np.asarray(self._array("", variable)[:, :draws])
            self._array(WARMUP, variable)[:, burn_in : burn_in + late.shape[1]] = late
        self._burn_in = room

    def intact(self, counts: Sequence[int]) -> list[int]:
        """Return how many draws of each chain hold all values, without a gap, up to a count."""
        whole = np.array(counts)
        for variable in self._variables:
            whole = self.rows(variable).whole(whole)
        return [int(count) for count in whole]

    def mend(self) -> None:
        """Empty the chunks that cannot be read, so that they can be written again."""
        for _, array in self._arrays():
            for region in chunks(array):
                if read_or_none(array, region) is None:
                    array[region] = array.fill_value

    def _array(self, prefix: str, variable: Variable) -> zarr.Array[Any]:
        name = f"{prefix}{variable.group}/{variable.name}"
        if name not in self._opened:
            array = array_of(self._root, name)
            try:
                check_layout(array, variable, variable.dtype, CHUNK[0])
            except (ValueError, TypeError) as error:
                raise damaged(f"{self._root.store}/{name}/{METADATA}", error) from error
            self._opened[name] = array
        return self._opened[name]

    def _arrays(self) -> Iterator[tuple[str, zarr.Array[Any]]]:
        """Every array, with the prefix of its group."""
        for prefix in ("", WARMUP):
            for variable in self._variables:
                yield prefix, self._array(prefix, variable)

    def _resize(self, prefix: str, size: int) -> None:
        for group in GROUPS:
            _number(self._root, prefix + group, size)
        for variable in self._variables:
            resize_rows(self._array(prefix, variable), size)


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
        _create_coordinate(root.require_group(group), "draw", draws)


def _create_coordinate(group: zarr.Group, dim: str, size: int) -> None:
    group.create_array(
        dim, data=np.arange(size), dimension_names=(dim,), overwrite=True, **codecs()
    )
