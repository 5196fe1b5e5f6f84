"""The run directory: zarr trace, manifest, checkpoints, events. One driver writes, anybody reads.

A draw exists if and only if ``n_committed`` says so: it is written last, after the state behind
the draw and the draw itself. All that lies beyond it is what an interrupted commit left.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from distsampler import manifest as manifests
from distsampler.draws import Anchor, DrawBlock, Variable
from distsampler.errors import StoreError
from distsampler.manifest import Manifest, Status

CHUNK = (64, 1024)  # chains and draws of a chunk, at most
KEPT_CHECKPOINTS = 2
WARMUP = "warmup_"
CONSTANTS = {"probe_losses": "probe", "init_losses": "example", "gradient_variance": "parameter"}


class Trace:
    """One run directory.

    Args:
        path: of a directory that ``create`` made.

    Raises:
        StoreError: if it is no run directory, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = manifests.read(self.path / "run.json")
        try:
            self._root = zarr.open_group(self.path / "trace.zarr", mode="r+", zarr_format=3)
            counts = np.asarray(self._array("n_committed")[:])
        except Exception as error:
            raise StoreError(f"{self.path / 'trace.zarr'} cannot be read: {error}") from error
        self._committed = [int(count) for count in counts]

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> Trace:
        """Makes the run directory of a new run; run.json is written last."""
        path = Path(path)
        config = manifest.config
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            root = zarr.create_group(path / "trace.zarr", zarr_format=3, overwrite=True)
            root.attrs["config"] = config.model_dump_json()
            for prefix, draws in (("", config.draws), (WARMUP, config.burn_in)):
                for group in ("posterior", "sample_stats"):
                    named = [v for v in manifest.variables if v.group == group]
                    _create_group(root, prefix + group, named, config.chains, draws)
            root.create_group("constant_data")
            zeros = np.zeros(config.chains, np.int64)
            root.create_array("n_committed", data=zeros, dimension_names=("chain",), **_codecs())
            manifests.write(path / "run.json", manifest)
        except OSError as error:
            raise StoreError(f"the store {path} cannot be written: {error}") from error
        return cls(path)

    @property
    def committed(self) -> tuple[int, ...]:
        """Draws of each chain that exist, burn-in included."""
        return tuple(self._committed)

    @property
    def kept(self) -> int:
        """Draws after burn-in that all chains of the posterior have."""
        if self.manifest.kept is not None:
            return self.manifest.kept
        alive = [self._committed[chain] for chain in self.chains]
        return max(0, min(alive, default=0) - self.manifest.config.burn_in)

    @property
    def chains(self) -> tuple[int, ...]:
        """Chains of the posterior: all but the retired."""
        retired = self.manifest.retired
        return tuple(c for c in range(self.manifest.config.chains) if c not in retired)

    def record_facts(self, anchor: Anchor, facts: Mapping[str, float]) -> None:
        """Writes the anchor pass and the run's numbers, once."""
        group = self._root.require_group("constant_data")
        numbers = {
            **facts,
            "init_loss": anchor.init_loss,
            "probe_init_loss": anchor.probe_init_loss,
            "init_losses": anchor.losses,
            "gradient_variance": anchor.gradient_variance,
            "probe_losses": anchor.probe_losses,  # last: where it is, the pass is whole
        }
        arrays: dict[str, NDArray[Any]] = {
            name: np.asarray(value) for name, value in numbers.items() if value is not None
        }
        dims = {name: (dim,) for name, dim in CONSTANTS.items()}
        for name, value in arrays.items():
            group.create_array(
                name, data=value, dimension_names=dims.get(name, ()), overwrite=True, **_codecs()
            )

    def facts(self) -> dict[str, float]:
        """The run's numbers: nbeta, n, init_loss, localization ..."""
        return {
            name: _scalar(array) for name, array in self._arrays("constant_data") if array.ndim == 0
        }

    def anchor(self) -> Anchor | None:
        """The anchor pass as recorded; None before it has been."""
        probe = self.constant("probe_losses")
        if probe is None:
            return None
        facts = self.facts()
        return Anchor(
            losses=self.constant("init_losses"),
            init_loss=facts["init_loss"],
            probe_init_loss=facts["probe_init_loss"],
            probe_losses=probe,
            gradient_variance=self.constant("gradient_variance"),
        )

    def constant(self, name: str) -> NDArray[Any] | None:
        """One array of the anchor pass; None where there is none."""
        arrays = dict(self._arrays("constant_data"))
        return np.asarray(arrays[name][:]) if name in arrays else None

    def commit(self, blocks: Sequence[DrawBlock]) -> None:
        """Makes blocks durable together: states, then draws, then the counts that make them exist.

        Raises:
            StoreError: if a block does not begin where its chain ends, or writing fails.
        """
        counts = list(self._committed)
        for block in blocks:
            if block.first_draw != counts[block.chain]:
                raise StoreError(
                    f"chain {block.chain} must go on at draw {counts[block.chain]}, got a block "
                    f"from {block.first_draw}"
                )
            counts[block.chain] = block.end
        try:
            self._commit(blocks, counts)
        except OSError as error:
            raise StoreError(
                f"{self.path} can no longer be written: {error}; what was committed stays readable"
            ) from error

    def state(self, chain: int) -> bytes | None:
        """The committed state of a chain; None at its start.

        Raises:
            StoreError: if a state must be there and is not.
        """
        draw = self._committed[chain]
        if draw == 0:
            return None
        path = self._checkpoint(chain, draw)
        try:
            return path.read_bytes()
        except OSError as error:
            raise StoreError(f"the state of chain {chain} at draw {draw}: {error}") from error

    def read(self, group: str, name: str) -> NDArray[Any]:
        """All values of one variable, beyond what is committed too."""
        return np.asarray(self._array(f"{group}/{name}")[:])

    def retire(self, chain: int, reason: str) -> None:
        """Takes a chain out of the posterior; its draws stay."""
        self._update(retired={**self.manifest.retired, chain: reason})

    def reopen(self) -> None:
        """Marks an interrupted run as running again."""
        self._update(status="running", reason="")

    def seal(self, status: Status, reason: str, kept: int | None, seconds: float) -> None:
        """Ends the run; kept: the draws after burn-in that all chains are cut to."""
        if kept is not None:
            for group in ("posterior", "sample_stats"):
                self._array(f"{group}/draw").resize((kept,))
            for variable in self.manifest.variables:
                array = self._array(f"{variable.group}/{variable.name}")
                array.resize((array.shape[0], kept, *array.shape[2:]))
        self._update(status=status, reason=reason, kept=kept, seconds=seconds)

    def event(self, kind: str, **details: object) -> None:
        """Appends one line to events.jsonl."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **details})
        with (self.path / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All lines of events.jsonl but a torn last one."""
        path = self.path / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _commit(self, blocks: Sequence[DrawBlock], counts: list[int]) -> None:
        newest = {block.chain: block for block in blocks if block.state}
        for block in newest.values():
            path = self._checkpoint(block.chain, block.end)
            path.parent.mkdir(exist_ok=True)
            manifests.write_atomically(path, block.state)
        burn_in = self.manifest.config.burn_in
        pieces = [piece for block in blocks for piece in _split(block, burn_in)]
        for prefix in {prefix for prefix, *_ in pieces}:
            self._write(prefix, [piece[1:] for piece in pieces if piece[0] == prefix])
        self._array("n_committed")[:] = np.array(counts)
        self._committed = counts
        self._update(n_committed=tuple(counts))
        for chain in newest:
            self._forget(chain)

    def _write(
        self, prefix: str, pieces: list[tuple[int, int, Mapping[str, NDArray[np.generic]]]]
    ) -> None:
        """Draws of several chains into their arrays: each touched chunk is written once."""
        low = min(start for _, start, _ in pieces)
        high = max(start + len(values["step"]) for _, start, values in pieces)
        for variable in self.manifest.variables:
            array = self._array(f"{prefix}{variable.group}/{variable.name}")
            region = np.asarray(array[:, low:high])
            for chain, start, values in pieces:
                new = values[variable.name]
                region[chain, start - low : start - low + len(new)] = new
            array[:, low:high] = region

    def _forget(self, chain: int) -> None:
        """Removes all checkpoints of a chain but the newest two."""
        files = sorted(self._checkpoint(chain, 0).parent.glob("draw-*.pt"))
        for path in files[:-KEPT_CHECKPOINTS]:
            path.unlink()

    def _checkpoint(self, chain: int, draw: int) -> Path:
        return self.path / "checkpoints" / f"chain-{chain:04d}" / f"draw-{draw:08d}.pt"

    def _update(self, **changes: object) -> None:
        self.manifest = self.manifest.model_copy(update=changes)
        manifests.write(self.path / "run.json", self.manifest)

    def _array(self, name: str) -> zarr.Array[Any]:
        array = self._root[name]
        if not isinstance(array, zarr.Array):
            raise StoreError(f"{name} must be an array")
        return array

    def _arrays(self, group: str) -> Iterator[tuple[str, zarr.Array[Any]]]:
        return iter(self._root.require_group(group).arrays())


def check_new(path: str | Path) -> None:
    """Sees that a run directory can be made here, making nothing.

    Raises:
        StoreError: if there is one already, or something else, or it may not be written.
    """
    path = Path(path)
    if re.match(r"\w{2,}:/", str(path)):
        raise StoreError(f"the store must be a local path, got {path}")
    if (path / "run.json").exists():
        raise StoreError(
            f"the store {path} must not exist, but it holds a run: give another store, read it "
            f"with distsampler.open({str(path)!r}), continue it with resume='auto', or delete it"
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StoreError(f"the store {path} must be new or an empty folder: give another one")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise StoreError(
            f"the store {path} must be writable, but {parent} is not: give another one"
        )


def _create_group(
    root: zarr.Group, name: str, variables: Sequence[Variable], chains: int, draws: int
) -> None:
    group = root.create_group(name)
    for dim, size in (("chain", chains), ("draw", draws)):
        group.create_array(dim, data=np.arange(size), dimension_names=(dim,))
    for variable in variables:
        kind = np.dtype(variable.dtype)
        array = group.create_array(
            variable.name,
            shape=(chains, draws, *variable.shape),
            chunks=(min(chains, CHUNK[0]), max(1, min(draws, CHUNK[1])), *variable.shape),
            dtype=kind,
            fill_value=np.nan if kind.kind == "f" else -1,
            dimension_names=("chain", "draw", *variable.dims),
            **_codecs(),
        )
        array.attrs["long_name"] = variable.meaning
    for dim, size in {
        d: s for v in variables for d, s in zip(v.dims, v.shape, strict=True)
    }.items():
        group.create_array(dim, data=np.arange(size), dimension_names=(dim,))


def _scalar(array: zarr.Array[Any]) -> float:
    return float(np.asarray(array[()]))


def _codecs() -> dict[str, Any]:
    return {"compressors": [ZstdCodec(level=3), Crc32cCodec()]}


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
