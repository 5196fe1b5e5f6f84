"""Draws in zarr: laid out, written, read, and searched for damage.

A value that is missing reads as NaN (or -1 in whole numbers, of which none is negative): it can
be told from every value that was written.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype

from distsampler.draws import DrawBlock, Group, Variable
from distsampler.errors import StoreError
from distsampler.store.files import Files

CHUNK = (64, 1024)  # chains and draws of a chunk, at most
ALL = slice(None)
WARMUP = "warmup_"
GROUPS: tuple[Group, ...] = ("posterior", "sample_stats")


class ZarrFiles(Store):
    """A zarr store over ``Files``, so that arrays are written as everything else is.

    Args:
        files: of the run directory.
        under: folder of the arrays.
    """

    supports_writes = supports_deletes = supports_listing = True

    def __init__(self, files: Files, under: str) -> None:
        super().__init__(read_only=False)
        self._files, self._under = files, under

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrFiles) and other._files.root == self._files.root

    def __hash__(self) -> int:
        return hash((self._files.root, self._under))

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The bytes of a key; None if there is none."""
        try:
            data = self._files.read(f"{self._under}/{key}")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        return prototype.buffer.from_bytes(data[_slice(byte_range, len(data))])

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Parts of several keys."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether there is such a key."""
        return self._files.exists(f"{self._under}/{key}")

    async def set(self, key: str, value: Buffer) -> None:
        """Writes a key, whole or not at all."""
        self._files.write(f"{self._under}/{key}", value.to_bytes())

    async def delete(self, key: str) -> None:
        """Removes a key, if it is there."""
        self._files.remove(f"{self._under}/{key}")

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """All keys that begin so."""
        for name in self._files.names(self._under):
            key = name.removeprefix(f"{self._under}/")
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names right below a folder."""
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        seen = set()
        async for key in self.list_prefix(folder):
            name = key.removeprefix(folder).partition("/")[0]
            if name not in seen:
                seen.add(name)
                yield name


class Draws:
    """The draws of a run: two groups, each with a twin for the warm-up.

    Args:
        root: the zarr group.
        variables: what a draw holds.
        burn_in: draws that go to the warm-up groups; of a run that has not chosen its burn-in yet,
            all of them.
    """

    def __init__(self, root: zarr.Group, variables: Sequence[Variable], burn_in: int) -> None:
        self._root, self._variables, self._burn_in = root, variables, burn_in

    def create(self, chains: int, draws: int) -> None:
        """Makes all groups and arrays, empty."""
        for prefix, size in (("", draws), (WARMUP, self._burn_in)):
            for group in GROUPS:
                named = [v for v in self._variables if v.group == group]
                chunk = size or max(draws, self._burn_in)  # empty at first, it may grow
                _create_group(self._root, prefix + group, named, (chains, size, chunk))

    def write(self, blocks: Sequence[DrawBlock]) -> None:
        """Puts draws in their places; each chunk that they touch is written once."""
        pieces = [piece for block in blocks for piece in _split(block, self._burn_in)]
        for prefix in {prefix for prefix, *_ in pieces}:
            self._write(prefix, [piece[1:] for piece in pieces if piece[0] == prefix])

    def read(self, group: str, name: str) -> NDArray[Any]:
        """All values of one variable, beyond what is committed too; raises what zarr raises."""
        return self._read(f"{group}/{name}")

    def between(
        self, group: str, name: str, start: int, stop: int, chains: slice = ALL
    ) -> NDArray[Any]:
        """Draws of one variable, counted from the chains' start; raises what zarr raises."""
        cut, parts = self._burn_in, []
        if start < cut:
            early = slice(start, min(stop, cut))
            parts.append(self._cut(f"{WARMUP}{group}/{name}", chains, early))
        if stop > cut or not parts:
            late = slice(max(start - cut, 0), max(stop - cut, 0))
            parts.append(self._cut(f"{group}/{name}", chains, late))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def resize(self, draws: int, burn_in: int) -> None:
        """Cuts the draws after burn-in and before, or makes room for more."""
        for prefix, size in (("", draws), (WARMUP, burn_in)):
            self._resize(prefix, size)
        self._burn_in = burn_in

    def fits(self, draws: int, burn_in: int) -> bool:
        """Whether ``resize`` to these would change nothing."""
        arrays = product((("", draws), (WARMUP, burn_in)), self._named())
        return all(
            array_of(self._root, prefix + n).shape[1:2] == (size,) for (prefix, size), n in arrays
        )

    def split(self, burn_in: int, draws: int) -> None:
        """Copies what lies behind a burn-in from the warm-up groups into the posterior's.

        Nothing of what was there is changed: until the manifest names the split, the warm-up
        groups alone count, and an interrupted split is made again.
        """
        self._resize("", draws)
        for name in self._named():
            late = self._read(WARMUP + name)[:, burn_in : burn_in + draws]
            array_of(self._root, name)[:] = late

    def join(self, burn_in: int, draws: int, room: int) -> None:
        """Copies the posterior's draws back behind the burn-in, where there is room for more.

        The posterior's groups stay as they are until the manifest no longer names the split.
        """
        self.mend()
        self._resize(WARMUP, room)
        for name in self._named():
            late = self._read(name)[:, :draws]
            array_of(self._root, WARMUP + name)[:, burn_in : burn_in + late.shape[1]] = late
        self._burn_in = room

    def intact(self, counts: Sequence[int]) -> tuple[int, ...]:
        """How many draws of each chain are there without a gap, of those that were committed."""
        found = list(counts)
        for prefix, offset in (("", self._burn_in), (WARMUP, 0)):
            for variable in self._variables:
                array = array_of(self._root, f"{prefix}{variable.group}/{variable.name}")
                missing = _missing(_readable(array))
                for chain, gone in enumerate(missing):
                    upto = min(counts[chain] - offset, len(gone))
                    if upto > 0 and gone[:upto].any():
                        found[chain] = min(found[chain], offset + int(gone.argmax()))
        return tuple(found)

    def mend(self) -> None:
        """Empties the chunks that cannot be read, so that they can be written again."""
        for prefix, variable in product(("", WARMUP), self._variables):
            array = array_of(self._root, f"{prefix}{variable.group}/{variable.name}")
            for region in _chunks(array):
                try:
                    array[region]
                except Exception:  # zarr and its codecs raise what they like
                    array[region] = array.fill_value

    def _named(self) -> list[str]:
        """Group and name of every variable."""
        return [f"{variable.group}/{variable.name}" for variable in self._variables]

    def _read(self, name: str) -> NDArray[Any]:
        return np.asarray(array_of(self._root, name)[:])

    def _cut(self, name: str, chains: slice, draws: slice) -> NDArray[Any]:
        """Some draws of some chains: only their chunks are read."""
        return np.asarray(array_of(self._root, name)[chains, draws])

    def _resize(self, prefix: str, size: int) -> None:
        for group in GROUPS:
            _number(self._root, prefix + group, size)
        for name in self._named():
            array = array_of(self._root, prefix + name)
            if array.shape[1] != size:
                array.resize((array.shape[0], size, *array.shape[2:]))

    def _write(
        self, prefix: str, pieces: list[tuple[int, int, Mapping[str, NDArray[np.generic]]]]
    ) -> None:
        """Only chunks of chains that bring draws are touched: of a thousand chains few may."""
        rows: dict[int, list[tuple[int, int, Mapping[str, NDArray[np.generic]]]]] = {}
        for piece in pieces:
            rows.setdefault(piece[0] // CHUNK[0], []).append(piece)
        for row, together in rows.items():
            self._write_row(prefix, row * CHUNK[0], together)

    def _write_row(
        self,
        prefix: str,
        top: int,
        pieces: list[tuple[int, int, Mapping[str, NDArray[np.generic]]]],
    ) -> None:
        chains = slice(top, top + CHUNK[0])
        low = min(start for _, start, _ in pieces)
        high = max(start + len(values["step"]) for _, start, values in pieces)
        for variable in self._variables:
            array = array_of(self._root, f"{prefix}{variable.group}/{variable.name}")
            region = np.asarray(array[chains, low:high])
            for chain, start, values in pieces:
                new = values[variable.name]
                region[chain - top, start - low : start - low + len(new)] = new
            array[chains, low:high] = region


def array_of(root: zarr.Group, name: str) -> zarr.Array[Any]:
    """An array by name.

    Raises:
        StoreError: if it is none.
    """
    array = root[name]
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{name} must be an array")
    return array


def _number(root: zarr.Group, group: str, draws: int) -> None:
    """Makes the coordinate of the draws count so many; if it is damaged, anew: it holds no more."""
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


def codecs() -> dict[str, Any]:
    """Every chunk carries a checksum."""
    return {"compressors": [ZstdCodec(level=3), Crc32cCodec()]}


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


def _split(
    block: DrawBlock, burn_in: int
) -> Iterator[tuple[str, int, int, Mapping[str, NDArray[np.generic]]]]:
    """A block as (group prefix, chain, first draw there, values): its burn-in, then the rest."""
    cut = min(max(burn_in - block.first_draw, 0), block.draws)
    if cut:
        early = {name: array[:cut] for name, array in block.values.items()}
        yield WARMUP, block.chain, block.first_draw, early
    if cut < block.draws:
        late = {name: array[cut:] for name, array in block.values.items()}
        yield "", block.chain, block.first_draw + cut - burn_in, late


def missing_in(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where no value was written."""
    return np.isnan(values) if values.dtype.kind == "f" else values < 0


def _missing(values: NDArray[Any]) -> NDArray[np.bool_]:
    """The draws of each chain that lack a value: shape (chain, draw)."""
    return np.asarray(missing_in(values).any(axis=tuple(range(2, values.ndim))))


def _readable(array: zarr.Array[Any]) -> NDArray[Any]:
    """All values; those of a damaged chunk as missing."""
    try:
        return np.asarray(array[:])
    except Exception:  # zarr and its codecs raise what they like
        values = np.full(array.shape, array.fill_value, array.dtype)
    for region in _chunks(array):
        with contextlib.suppress(Exception):  # a damaged chunk stays missing
            values[region] = array[region]
    return values


def _chunks(array: zarr.Array[Any]) -> Iterator[tuple[slice, ...]]:
    """The regions of an array that are files of their own."""
    edges = [range(0, size, step) for size, step in zip(array.shape, array.chunks, strict=True)]
    for corner in product(*edges):
        yield tuple(slice(a, a + step) for a, step in zip(corner, array.chunks, strict=True))


def _slice(part: ByteRequest | None, size: int) -> slice:
    match part:
        case RangeByteRequest(start, end):
            return slice(start, end)
        case OffsetByteRequest(offset):
            return slice(offset, None)
        case SuffixByteRequest(suffix):
            return slice(max(0, size - suffix), None)
        case _:
            return slice(None)
