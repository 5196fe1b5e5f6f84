"""The files of a sweep beside the runs: sweep.json says what it is, cell.json how a cell went.

A cell's directory is a run directory. What its sweep adds is in ``cell.json``: what calibration
chose, and why the cell failed where its run could not say so itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from distsampler.config import Frozen, RunConfig
from distsampler.errors import StoreError
from distsampler.store.files import Files
from distsampler.sweeps.cells import DIMS, Cell

SWEEP, CELL = "sweep.json", "cell.json"
SCHEMA_VERSION = 1
# Fields of RunConfig that a sweep may be continued with other values of.
FREE = ("placement", "commit_seconds", "max_seconds", "fsync", "max_state_mb")


class SweepManifest(Frozen):
    """What a sweep is; it does not change while it runs.

    Args:
        schema_version: of this layout.
        config: of the sweep, without what its restrictions and settings change.
        checkpoints: label -> the number it ends in, in their order.
        restrictions: label -> parameters that move; masks by their digests.
        settings: label -> fields that differ from the config.
        data: labels of the data sets.
        named: dimensions that were asked for, by which cells are named.
        calibrate: whether sampler and step are chosen by pilots.
        bias: wanted of them.
        versions: of the libraries that wrote it.
    """

    schema_version: int = SCHEMA_VERSION
    config: RunConfig
    checkpoints: dict[str, int | None]
    restrictions: dict[str, Any]
    settings: dict[str, Any]
    data: tuple[str, ...]
    named: tuple[str, ...] = ()
    calibrate: bool = False
    bias: float
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Of each dimension."""
        found = (self.checkpoints, self.restrictions, self.settings, self.data)
        return {dim: tuple(names) for dim, names in zip(DIMS, found, strict=True)}


class CellRecord(Frozen):
    """What the sweep knows of one cell.

    Args:
        cell: its place in the sweep.
        chosen: what calibration chose for it.
        failure: why it could not be run; empty if it could.
    """

    cell: dict[str, str]
    chosen: dict[str, Any] | None = None
    failure: str = ""


def cell_store(root: str, cell: Cell) -> str:
    """The run directory of a cell."""
    return f"{root.rstrip('/')}/cells/{cell.name}"


def write(files: Files, manifest: SweepManifest) -> None:
    """Writes sweep.json, whole or not at all."""
    files.write(SWEEP, manifest.model_dump_json(indent=1).encode(), fsync=True)


def read(files: Files) -> SweepManifest:
    """The manifest of a sweep.

    Raises:
        StoreError: if there is none, or it is damaged, or of another version.
    """
    path = files.path(SWEEP)
    try:
        data: dict[str, Any] = json.loads(files.read(SWEEP))
        found = data.get("schema_version")
        if found != SCHEMA_VERSION:
            raise StoreError(
                f"{path} must have schema version {SCHEMA_VERSION}, got {found}: read it with the "
                "version of distsampler that wrote it"
            )
        return SweepManifest.model_validate(data)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{files} must be the directory of a sweep, but it holds no {SWEEP}: give the store of "
            "a sweep"
        ) from None
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        raise StoreError(
            f"{path} must be the manifest of a sweep, but it cannot be read: {error}; restore it "
            "from a copy, or delete it and start the same sweep again in another store"
        ) from error


def check_same(files: Files, now: SweepManifest) -> None:
    """Sees that the sweep in a store is the one that is asked for.

    Raises:
        StoreError: lists every key that differs, with the stored and the present value.
    """
    old, new = _flat(read(files)), _flat(now)
    lines = [
        f"  {key}: stored {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key, ...) != new.get(key, ...)
    ]
    if lines:
        raise StoreError(
            f"the sweep in {files} can only be continued as it was started; different are\n"
            + "\n".join(lines)
        )


def write_record(files: Files, record: CellRecord) -> None:
    """Writes a cell's record, in the cell's directory."""
    files.write(CELL, record.model_dump_json(indent=1).encode())


def read_record(store: str | Path, cell: Cell) -> CellRecord:
    """A cell's record; a new one, where there is none or it is damaged."""
    try:
        return CellRecord.model_validate_json(Files(store).read(CELL))
    except (OSError, ValueError):
        return CellRecord(cell=cell.as_dict())


def _flat(manifest: SweepManifest) -> dict[str, Any]:
    """Key -> value of all that must not differ."""
    data = manifest.model_dump(mode="json")
    found: dict[str, Any] = {key: data[key] for key in ("data", "named", "calibrate", "bias")}
    found["checkpoints"] = list(data["checkpoints"])
    for home in ("restrictions", "settings"):
        found |= {f"{home}.{name}": value for name, value in data[home].items()}
    config = {key: value for key, value in data["config"].items() if key not in FREE}
    return found | {f"config.{key}": value for key, value in config.items()}
