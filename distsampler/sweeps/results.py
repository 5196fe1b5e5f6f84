"""Sweep: what a sweep's directory says, as cells, runs and one table of all its estimates."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from distsampler.analysis.run import Run
from distsampler.errors import StoreError, unknown_name
from distsampler.store.files import Files
from distsampler.store.trace import MANIFEST, as_files
from distsampler.sweeps import cells
from distsampler.sweeps import manifest as sweep_manifest
from distsampler.sweeps.cells import DIMS, Cell
from distsampler.sweeps.manifest import SweepManifest

NUMBERS = ("llc", "se", "interval_low", "interval_high", "spread", "init_loss", "r_hat", "ess")
FACTS = ("lr", "nbeta", "localization", "n")
TEXTS = ("verdict", "status", "reason")
WAITING, FAILED = "waiting", "failed"


class Sweep:
    """A sweep, as its directory holds it; it may still be running elsewhere.

    Args:
        store: the directory of the sweep.

    Raises:
        StoreError: if there is none, or it is damaged.

    Example:
        >>> import distsampler as ds
        >>> table = ds.open_sweep("runs/training").collect()  # doctest: +SKIP
        >>> table.llc.sel(restriction="all")  # doctest: +SKIP
    """

    def __init__(self, store: str | Path | Files) -> None:
        self._files = as_files(store)
        self.manifest: SweepManifest = sweep_manifest.read(self._files)
        self.cells: tuple[Cell, ...] = cells.cells(self.manifest.labels, self.manifest.named)

    @property
    def files(self) -> Files:
        """The directory, for writing beside the cells."""
        return self._files

    @property
    def store(self) -> str:
        """The directory of the sweep: a path, or an fsspec URL."""
        return str(self._files)

    def run(self, name: str) -> Run:
        """The run of a cell.

        Raises:
            StoreError: if there is no such cell, or it has not begun.
        """
        return Run(self._store(self._cell(name)))

    def status(self, name: str) -> str:
        """Of a cell: waiting, running, interrupted, finished or failed."""
        return self._standing(self._cell(name))[0]

    def reason(self, name: str) -> str:
        """Why a cell is where it is."""
        return self._standing(self._cell(name))[1]

    def collect(self) -> xr.Dataset:
        """All estimates, dims (checkpoint, restriction, setting, data).

        All four dimensions are there, of length one where nothing was asked for; ``step`` is a
        coordinate of the checkpoints whose names all end in a number. ``llc``, ``se``,
        ``interval_low``, ``interval_high``, ``spread`` (sd / mean between chains), ``init_loss``,
        ``r_hat``, ``ess``, ``lr``, ``nbeta``, ``localization`` and ``n`` are NaN, and ``verdict``
        is empty, where a cell has none;
        ``status`` is waiting, running, interrupted, finished or failed, with its ``reason``;
        ``lost_chains`` counts chains that are in no estimate, ``seconds`` is the clock's time. All
        else that a finished cell has is a function of the sweep, whatever died on the way; a failed
        one has no estimate, for how far its other chains came is not.
        """
        labels = self.manifest.labels
        shape = tuple(len(labels[dim]) for dim in DIMS)
        columns: dict[str, np.ndarray[Any, Any]] = {
            **{name: np.full(shape, math.nan) for name in (*NUMBERS, *FACTS, "seconds")},
            **{name: np.full(shape, "", object) for name in TEXTS},
            "lost_chains": np.zeros(shape, np.int64),
        }
        for cell in self.cells:
            where = tuple(labels[dim].index(getattr(cell, dim)) for dim in DIMS)
            for name, value in self._row(cell).items():
                columns[name][where] = value
        texts = {name: columns[name].astype(str) for name in TEXTS}
        data = {name: (DIMS, values) for name, values in {**columns, **texts}.items()}
        coordinates: dict[str, Any] = {dim: list(labels[dim]) for dim in DIMS}
        steps = list(self.manifest.checkpoints.values())
        if None not in steps:
            coordinates["step"] = ("checkpoint", steps)
        return xr.Dataset(data, coordinates, {"sweep": self.store})

    def to_csv(self, path: str | Path) -> None:
        """Writes the estimates as a table, a cell a line."""
        self.collect().to_dataframe().to_csv(path)

    def to_netcdf(self, path: str | Path) -> None:
        """Writes the estimates as ``collect`` gives them, for ``xarray.open_dataset``."""
        self.collect().to_netcdf(path)

    def rows(self) -> list[dict[str, Any]]:
        """What ``collect`` says, a cell a dict, for JSON: NaN as None."""
        table, found = self.collect(), []
        for cell in self.cells:
            place = {dim: getattr(cell, dim) for dim in DIMS}
            at = table.sel(place)
            values = {str(name): _plain(at[name].item()) for name in at.data_vars}
            found.append({"cell": cell.name, **place, **values})
        return found

    def counts(self) -> dict[str, int]:
        """Status -> cells."""
        return dict(Counter(self._standing(cell)[0] for cell in self.cells))

    def __repr__(self) -> str:
        told = ", ".join(f"{number} {status}" for status, number in self.counts().items())
        return f"Sweep({self.store!r}, {len(self.cells)} cells: {told})"

    def _store(self, cell: Cell) -> str:
        return sweep_manifest.cell_store(self.store, cell)

    def _cell(self, name: str) -> Cell:
        found = {cell.name: cell for cell in self.cells}
        if name not in found:
            raise StoreError(f"{self.store}: {unknown_name('cell', name, found)}")
        return found[name]

    def _standing(self, cell: Cell) -> tuple[str, str]:
        """Status and reason of a cell: a run that is whole counts, whatever came after."""
        files = as_files(self._store(cell))
        failure = sweep_manifest.read_record(files.root, cell).failure
        if not files.exists(MANIFEST):
            return (FAILED, failure) if failure else (WAITING, "")
        try:
            found = Run(files).manifest
        except StoreError as error:
            return FAILED, str(error)
        if failure and found.status not in ("finished", FAILED):
            return FAILED, failure
        return found.status, found.reason

    def _row(self, cell: Cell) -> dict[str, object]:
        """What is known of a cell; a damaged one has failed."""
        status, reason = self._standing(cell)
        row: dict[str, object] = {"status": status, "reason": reason}
        if status == WAITING or not as_files(self._store(cell)).exists(MANIFEST):
            return row
        try:
            return {**_numbers(Run(self._store(cell))), **row}
        except StoreError as error:
            return {"status": FAILED, "reason": reason or str(error)}


def open_sweep(store: str | Path) -> Sweep:
    """Opens the directory of a sweep for reading; needs neither Ray nor models nor data."""
    return Sweep(store)


def is_sweep(store: str | Path) -> bool:
    """Whether a directory is that of a sweep."""
    return as_files(store).exists(sweep_manifest.SWEEP)


def _numbers(run: Run) -> dict[str, object]:
    """What a run adds to the table; no estimate where it has made no draw."""
    found: dict[str, object] = {
        "lost_chains": len(run.lost_chains),
        "seconds": run.manifest.seconds,
    }
    if run.manifest.status == FAILED or not any(run.manifest.n_committed):
        return found
    facts = run.facts
    found |= {name: facts[name] for name in FACTS if name in facts}
    estimate = run.llc("ignore")
    found |= {
        "llc": estimate.mean,
        "se": estimate.se,
        "interval_low": estimate.interval[0],
        "interval_high": estimate.interval[1],
        "spread": _spread(estimate.per_chain),
        "init_loss": estimate.init_loss,
        "r_hat": estimate.verdict.r_hat,
        "ess": estimate.verdict.ess,
        "verdict": str(estimate.verdict.status),
    }
    return found


def _spread(per_chain: tuple[float, ...]) -> float:
    """Standard deviation between chains over the mean."""
    if len(per_chain) < 2:
        return math.nan
    return float(np.std(per_chain, ddof=1) / abs(np.mean(per_chain)))


def _plain(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
