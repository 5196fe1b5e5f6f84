"""What a sweep keeps beside its runs: sweep.json says what it is, cell.json how a cell went.

A cell's directory is a run directory. What its sweep adds is in ``cell.json``: what calibration
chose, and why the cell failed where its run could not say so itself.
"""

from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field

from distsampler.config import RunConfig, SamplerConfig
from distsampler.errors import ConfigError, StoreError
from distsampler.frozen import Frozen
from distsampler.redaction import redacted
from distsampler.sampling.directory import Stored
from distsampler.store.files import Files, damaged, writing
from distsampler.store.lease import Lease
from distsampler.store.manifest import SCHEMA_VERSION, SWEEP_MANIFEST, read_as, write_as
from distsampler.store.trace import clear, has_draws
from distsampler.sweeps.cells import Cell, Grid

MANIFEST, CELLS, CELL = SWEEP_MANIFEST, "cells", "cell.json"
LARGEST_GRID = 10**6  # of a sweep that is read
# Fields of RunConfig with which a sweep may be continued otherwise than it was started.
FREE = ("placement", "commit_seconds", "max_seconds", "fsync", "max_state_mb")


class SweepManifest(Frozen):
    """What a sweep is; it does not change while the sweep runs."""

    schema_version: int = SCHEMA_VERSION
    config: RunConfig  # that all cells start from, before restrictions and settings
    checkpoints: dict[str, int | None]  # label -> the number it ends in, in their order
    restrictions: dict[str, Any]  # label -> parameters that move; masks by their digests
    settings: dict[str, Any]  # label -> fields that differ from the config
    data: tuple[str, ...]  # labels of the data sets
    named: tuple[str, ...] = ()  # dimensions that cells are named by, beside the checkpoint
    calibrate: bool = False  # whether pilots choose sampler, step and length
    bias: float  # relative bias of the LLC that pilots aim for
    versions: dict[str, str] = Field(default_factory=dict)  # of the libraries that wrote it

    @property
    def grid(self) -> Grid:
        """The labels of each dimension."""
        checkpoints, restrictions = tuple(self.checkpoints), tuple(self.restrictions)
        return Grid(checkpoints, restrictions, tuple(self.settings), self.data, self.named)


class Chosen(Frozen):
    """What calibration chose for one cell."""

    sampler: dict[str, Any]  # name and options
    draws: int | Literal["auto"]
    burn_in: int | Literal["auto"]
    thin: int
    curvature: float  # largest of the mean loss that the pilots met
    bias: float  # relative bias of the LLC that step and minibatches may bring
    reasons: dict[str, str]  # field -> why it is what it is, in a sentence

    def applied(self, config: RunConfig) -> RunConfig:
        """Return a cell's config with what was chosen."""
        sampler = SamplerConfig(**self.sampler)
        fields = {"draws": self.draws, "burn_in": self.burn_in, "thin": self.thin}
        return config.replaced(sampler=sampler, **fields)


class CellRecord(Frozen):
    """What the sweep knows of one cell."""

    schema_version: int = SCHEMA_VERSION
    cell: dict[str, str]  # its name and labels
    chosen: Chosen | None = None
    failure: str = ""  # why it could not be run; empty if it could
    lost_chains: int = 0  # of a run that failed before its first draw, and left nothing else


def cell_files(sweep: Files, cell: Cell) -> Files:
    """Return the run directory of a cell."""
    return Files(sweep.path(f"{CELLS}/{cell.name}"))


def write_manifest(files: Files, manifest: SweepManifest) -> None:
    """Write sweep.json, whole or not at all."""
    write_as(files, MANIFEST, manifest, fsync=True)


def read_manifest(files: Files) -> SweepManifest:
    """Return the manifest of the sweep in a directory.

    Raises:
        StoreError: if there is none, or it is damaged, or of another version.
    """
    repair = "delete it and start the same sweep again in another store"
    made = read_as(SweepManifest, files, MANIFEST, "a sweep", repair)
    try:
        made.grid.check(LARGEST_GRID)
    except ConfigError as error:
        raise damaged(files.path(MANIFEST), error) from error
    return made


def check_same(files: Files, asked: SweepManifest) -> None:
    """Check that the sweep in a store is the one that is asked for.

    Raises:
        StoreError: lists every key that differs, with the stored and the present value.
    """
    old, new = _fixed(read_manifest(files)), _fixed(asked)
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


def write_record(sweep: Files, cell: Cell, record: CellRecord) -> None:
    """Write a cell's record into the cell's directory, as the sweep's driver.

    Raises:
        StoreError: if it cannot be written, or another driver has the sweep.
    """
    with writing(sweep):
        write_as(sweep, f"{CELLS}/{cell.name}/{CELL}", record)


def read_record(files: Files, cell: Cell) -> CellRecord:
    """Return the record in a cell's directory; a new one, where there is none.

    Raises:
        StoreError: if it is damaged.
    """
    if not files.exists(CELL):
        return CellRecord(cell=asdict(cell))
    return read_as(CellRecord, files, CELL, "a cell", "remove it: its pilots are made again")


def _fixed(manifest: SweepManifest) -> dict[str, Any]:
    """Key -> value of all that must not differ when a sweep is continued."""
    data = redacted(manifest.model_dump(mode="json"))
    fixed: dict[str, Any] = {key: data[key] for key in ("data", "named", "calibrate", "bias")}
    fixed["checkpoints"] = list(data["checkpoints"])
    for home in ("restrictions", "settings"):
        fixed |= {f"{home}.{name}": value for name, value in data[home].items()}
    config = {key: value for key, value in data["config"].items() if key not in FREE}
    return fixed | {f"config.{key}": value for key, value in config.items()}


def _has_draws(files: Files) -> bool:
    """Whether a directory holds a sweep with a cell that has made a draw; so it has, if damaged."""
    if not files.exists(MANIFEST):
        return False
    try:
        return any(has_draws(cell_files(files, cell)) for cell in read_manifest(files).grid.cells)
    except StoreError:
        return True


SWEEP = Stored("sweep", MANIFEST, "distsampler.open_sweep", _has_draws)


def clear_sweep(files: Files) -> None:
    """Remove a sweep whose cells have made no draw.

    Raises:
        StoreError: if another driver has one of its cells.
    """
    if not files.exists(MANIFEST):
        return
    for cell in read_manifest(files).grid.cells:
        own = cell_files(files, cell)
        if any(own.names()):
            with Lease(own):
                clear(own)
                own.remove(CELL)
        if not any(own.names()):
            files.remove(f"{CELLS}/{cell.name}")
    files.remove(MANIFEST)
