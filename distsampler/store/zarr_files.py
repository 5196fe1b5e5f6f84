"""Zarr over ``Files``: how arrays reach the store, and the one search for what is damaged in them.

A value that is missing reads as NaN (or -1 in whole numbers, of which none is negative), so that it
differs from every value that was written. What is read is what was written in its place: every
file carries a seal, which is checked here.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
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

from distsampler.draws import Variable, WideVariable
from distsampler.errors import StoreError
from distsampler.store import integrity
from distsampler.store.files import Files, damaged

METADATA = "zarr.json"
CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, "zstd", "crc32c"]
Index = int | NDArray[np.int64]  # one position, or several


class ZarrFiles(Store):
    """A zarr store in a folder of ``Files``: arrays are written as everything else is, and sealed.

    Args:
        files: the run directory.
        under: the folder.
        identity: of the run, to which its files are bound; empty: they are not; None: as the first
            zarr.json says.
    """

    supports_writes = supports_deletes = supports_listing = True

    def __init__(self, files: Files, under: str, identity: str | None = None) -> None:
        super().__init__(read_only=False)
        self._files, self._under, self._identity = files, under, identity

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrFiles) and other._files.root == self._files.root

    def __hash__(self) -> int:
        return hash((self._files.root, self._under))

    def __str__(self) -> str:
        return self._files.path(self._under)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of a key; None if there is none."""
        name = f"{self._under}/{key}"
        try:
            data = self._files.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if _is_metadata(key):
            self._identity = integrity.check_metadata(data, self._identity, name)
        elif self._identity:
            integrity.check_chunk(data, self._identity, name)
        return prototype.buffer.from_bytes(data[_slice(byte_range, len(data))])

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return parts of several keys."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        """Return whether there is such a key."""
        return self._files.exists(f"{self._under}/{key}")

    async def set(self, key: str, value: Buffer) -> None:
        """Write a key, whole or not at all."""
        name, data = f"{self._under}/{key}", value.to_bytes()
        if self._identity:
            seal = integrity.seal_metadata if _is_metadata(key) else integrity.seal_chunk
            data = seal(data, self._identity, name)
        self._files.write(name, data)

    async def delete(self, key: str) -> None:
        """Remove a key, if it is there."""
        self._files.remove(f"{self._under}/{key}")

    async def list(self) -> AsyncIterator[str]:
        """Yield all keys."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield all keys that begin with a prefix."""
        for name in self._files.names(self._under):
            key = name.removeprefix(f"{self._under}/")
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names right below a folder."""
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        keys = [key.removeprefix(folder) async for key in self.list_prefix(folder)]
        for name in dict.fromkeys(key.partition("/")[0] for key in keys):
            yield name


class ZarrRows:
    """The rows of one variable, values of dims (chain, row, ...), in one array or in several.

    Args:
        name: name of the variable.
        pieces: the arrays, each with the row that it begins with: 0 for the first.
        draw: function from a row to its draw, counted from the chain's start.
    """

    def __init__(
        self,
        name: str,
        pieces: Sequence[tuple[zarr.Array[Any], int]],
        draw: Callable[[int], int] = int,
    ) -> None:
        self._name, self._draw = name, draw
        self._arrays, self._starts = zip(*pieces, strict=True)
        self.chains = min(array.shape[0] for array in self._arrays)

    def read(
        self,
        chains: Index,
        rows: Index,
        inside: tuple[Any, ...] = (),
        ends: NDArray[np.int64] | None = None,
    ) -> NDArray[Any]:
        """Return committed values; memory holds what is asked for, and a few chunks.

        Args:
            chains: index or indices of chains.
            rows: position or positions along the rows.
            inside: an index of each further dimension.
            ends: row, for each of these chains, up to which values must be there, of a scalar
                variable; None: all of the rows.

        Raises:
            StoreError: if a value is missing or damaged; it names the file.
        """
        needed = int(np.max(rows, initial=-1)) + 1 if ends is None else ends
        try:
            values = self._select(chains, rows, inside)
        except Exception as error:  # zarr and its codecs raise what they like
            raise self._damage(chains, needed) from error
        missing = missing_in(values)
        if ends is not None:
            missing &= rows < ends[:, None]
        if missing.any():
            raise self._damage(chains, needed)
        return values

    def write(self, chains: slice, values: Sequence[tuple[int, int, NDArray[np.generic]]]) -> None:
        """Put values in their places: each chunk that they touch is written once.

        Args:
            chains: the chains of a row of chunks.
            values: a chain of these, its first row, and values from there on; several times.
        """
        for array, start, stop in self._pieces(max(first + len(new) for _, first, new in values)):
            parts = [
                (chain, max(first, start) - start, new[max(start - first, 0) : stop - first])
                for chain, first, new in values
                if first < stop and first + len(new) > start
            ]
            low = min((first for _, first, _ in parts), default=0)
            high = max((first + len(new) for _, first, new in parts), default=0)
            if parts:
                region = np.asarray(array[chains, low:high])
                for chain, first, new in parts:
                    region[chain - chains.start, first - low : first - low + len(new)] = new
                array[chains, low:high] = region

    def whole(self, counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many of each chain's first rows hold all values, without a gap, up to a count.

        Nothing of a chunk that cannot be read counts as there.
        """
        whole = np.zeros(len(counts), np.int64)
        for array, start, stop in self._pieces(max(counts, default=0)):
            rows, reached = np.clip(counts, start, max(start, stop)) - start, whole == start
            whole[reached] += _whole(array, rows)[reached]
        return whole

    def place(self, chain: int, row: int) -> str:
        """Return where the chunk of a row is: its file, or the folder of its pieces."""
        piece = int(np.searchsorted(self._starts, row, side="right")) - 1
        array, row = self._arrays[piece], row - self._starts[piece]
        chunk = f"{chain // array.chunks[0]}/{row // array.chunks[1]}"
        return f"{array.store}/{array.path}/c/{chunk}"

    def _pieces(self, end: int) -> Iterator[tuple[zarr.Array[Any], int, int]]:
        """The arrays, each with the row that it begins with, and that behind its last."""
        return zip(self._arrays, self._starts, (*self._starts[1:], end), strict=True)

    def _select(self, chains: Index, rows: Index, inside: tuple[Any, ...]) -> NDArray[Any]:
        """Values as they are stored, read chunk by chunk."""
        piece = np.searchsorted(self._starts, rows, side="right") - 1
        pieces = np.unique(piece).tolist() or [0]
        if len(pieces) == 1:
            array, start = self._arrays[pieces[0]], self._starts[pieces[0]]
            return np.asarray(array.oindex[(chains, rows - start, *inside)])
        rows = np.asarray(rows)
        parts = [self._select(chains, rows[piece == each], inside) for each in pieces]
        order, axis = np.argsort(np.argsort(piece, kind="stable")), np.ndim(chains)
        return np.take(np.concatenate(parts, axis), order, axis)

    def _damage(self, chains: Index, needed: Index) -> StoreError:
        """The error that names the first chunk that is not whole."""
        wanted = np.zeros(self._arrays[0].shape[0], np.int64)
        wanted[chains] = needed
        whole = self.whole(wanted)
        for chain in np.flatnonzero(whole < wanted):
            what = f"{self._name} of chain {chain} at draw {self._draw(int(whole[chain]))}"
            place = self.place(int(chain), int(whole[chain]))
            return damaged(place, f"it holds {what}, which was committed")
        return damaged(self.place(0, 0), "it could not be read")


def create_root(
    files: Files, under: str, identity: str, attributes: Mapping[str, str] | None = None
) -> zarr.Group:
    """Make a root group, empty, whose files are bound to an identity."""
    return zarr.create_group(
        ZarrFiles(files, under, identity),
        zarr_format=3,
        overwrite=True,
        attributes=dict(attributes or {}),
    )


def array_of(root: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return an array of a group by name; a StoreError if there is none, or it is damaged."""
    try:
        array = root[name]
    except Exception as error:  # zarr raises what it likes
        raise damaged(f"{root.store}/{name}", error) from error
    if not isinstance(array, zarr.Array):
        raise damaged(f"{root.store}/{name}", "it must be an array")
    return array


def create_array(
    parent: zarr.Group,
    variable: Variable | WideVariable,
    sizes: tuple[int, int],
    chunk: tuple[int, ...],
    dtype: str,
) -> None:
    """Make the array of a variable for a number of chains and rows, empty."""
    kind = np.dtype(dtype)
    array = parent.create_array(
        variable.name,
        shape=(*sizes, *variable.shape),
        chunks=chunk,
        dtype=kind,
        fill_value=np.nan if kind.kind == "f" else -1,
        dimension_names=("chain", "draw", *variable.dims),
        **codecs(),
    )
    array.attrs["long_name"] = variable.meaning


def check_layout(
    array: zarr.Array[Any], variable: Variable | WideVariable, dtype: str, chains_in_chunk: int
) -> None:
    """Check that the array of a variable is laid out as ``create_array`` does it.

    Raises:
        ValueError: if not.
    """
    metadata: Any = array.metadata
    first, *others = metadata.codecs
    layout = {
        "type": (array.dtype, np.dtype(dtype)),
        "dimensions": (metadata.dimension_names, ("chain", "draw", *variable.dims)),
        "shape of a draw": (array.shape[2:], variable.shape),
        "chains of a chunk": (array.chunks[0], min(chains_in_chunk, array.shape[0])),
        "codecs": ([first.to_dict(), *(codec.to_dict()["name"] for codec in others)], CODECS),
        "value of what is missing": (bool(missing_in(np.asarray(array.fill_value))), True),
    }
    for what, (got, demanded) in layout.items():
        if got != demanded:
            raise ValueError(f"its {what} must be {demanded}, got {got}")


def resize_rows(array: zarr.Array[Any], rows: int) -> None:
    """Cut the rows of an array, or make room for more."""
    if array.shape[1] != rows:
        array.resize((array.shape[0], rows, *array.shape[2:]))


def codecs() -> dict[str, Any]:
    """Return the codecs of every array: each chunk carries a checksum."""
    return {"compressors": [ZstdCodec(level=3), Crc32cCodec()]}


def missing_in(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where no value was written."""
    return np.isnan(values) if values.dtype.kind == "f" else values < 0


def chunks(array: zarr.Array[Any]) -> Iterator[tuple[slice, ...]]:
    """Yield the regions of an array that are files of their own, in ascending order."""
    edges = [range(0, size, step) for size, step in zip(array.shape, array.chunks, strict=True)]
    for corner in product(*edges):
        yield tuple(slice(a, a + step) for a, step in zip(corner, array.chunks, strict=True))


def read_or_none(array: zarr.Array[Any], region: tuple[slice, ...]) -> NDArray[Any] | None:
    """Return the values of a region; None if they cannot be read."""
    try:
        return np.asarray(array[region])
    except Exception:  # zarr and its codecs raise what they like
        return None


def _whole(array: zarr.Array[Any], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first rows of each chain without a gap, in one array: the one search for damage.

    Nothing of a chunk that cannot be read counts as there.
    """
    whole = np.minimum(rows, array.shape[1])
    for region in chunks(array):
        low, counts = region[1].start, whole[region[0]] - region[1].start
        if (counts <= 0).all():
            continue
        values = read_or_none(array, region)
        size = min(region[1].stop, array.shape[1]) - low
        lacking = np.arange(size) < counts[:, None]
        if values is not None:
            lacking &= missing_in(values).any(axis=tuple(range(2, values.ndim)))
        for chain in np.flatnonzero(lacking.any(axis=1)):
            whole[region[0].start + chain] = low + lacking[chain].argmax()
    return whole


def _is_metadata(key: str) -> bool:
    return key.rpartition("/")[2] == METADATA


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
