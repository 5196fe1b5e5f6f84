"""Sweep: what a sweep's directory says, as cells, runs and one table of all its estimates."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xarray as xr

from distsampler.analysis.json_values import plain
from distsampler.analysis.run import Run
from distsampler.errors import StoreError, unknown_name
from distsampler.redaction import redacted
from distsampler.store.files import Files, as_files
from distsampler.store.manifest import MANIFEST
from distsampler.sweeps.cells import CELL_DIMS, Cell
from distsampler.sweeps.manifest import SWEEP, cell_files, read_manifest, read_record

WAITING, FAILED, FINISHED = "waiting", "failed", "finished"


@dataclass(frozen=True)
class CellResult:
    """What is known of one cell: the columns of the table. NaN where a cell has no number."""

    llc: float = math.nan
    se: float = math.nan  # standard error of the LLC
    interval_low: float = math.nan  # nominal 95 % interval
    interval_high: float = math.nan
    spread: float = math.nan  # sd / mean between chains
    init_loss: float = math.nan  # L_n(w*)
    r_hat: float = math.nan  # the worst of what the gate reads
    ess: float = math.nan  # the smallest of what the gate reads
    lr: float = math.nan
    nbeta: float = math.nan
    localization: float = math.nan
    n: float = math.nan  # number of examples
    seconds: float = math.nan  # wall-clock time of the run
    verdict: str = ""
    status: str = WAITING  # waiting, running, interrupted, finished or failed
    reason: str = ""  # why the cell is in that status
    lost_chains: int = 0  # chains that are in no estimate


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
        self.files = as_files(store)
        self.store = str(self.files)  # a path, or an fsspec URL
        self.manifest = read_manifest(self.files)
        self.cells = self.manifest.grid.cells  # the checkpoints of one row after another

    def run(self, name: str) -> Run:
        """Return the run of a cell.

        Raises:
            StoreError: if there is no such cell, or it has not begun.
        """
        return Run(cell_files(self.files, self._cell(name)))

    def status(self, name: str) -> str:
        """Return the status of a cell: waiting, running, interrupted, finished or failed."""
        return self._standing(self._cell(name))[0].status

    def reason(self, name: str) -> str:
        """Return why a cell is in its status."""
        return self._standing(self._cell(name))[0].reason

    def collect(self, probe: str | None = None) -> xr.Dataset:
        """Return all estimates, dims (checkpoint, restriction, setting, data).

        All four dimensions are there, of length one where nothing was asked for; ``step`` is a
        coordinate of the checkpoints whose names all end in a number. The variables are the fields
        of ``CellResult``. All that a finished cell has but its ``seconds`` is a function of the
        sweep, whatever died on the way; a failed one has no estimate, for how far its other chains
        came is not.

        Args:
            probe: name of a named probe: ``llc``, ``se`` and ``init_loss`` are its data-refined
                reading, as ``Run.llc(probe=...)`` gives it, and intervals and spread NaN. None: the
                LLC.

        Raises:
            ConfigError: if the runs measured no such probe.
        """
        grid = self.manifest.grid
        results = [asdict(self._result(cell, probe)) for cell in self.cells]
        variables = {
            name: (CELL_DIMS, grid.arranged([result[name] for result in results]))
            for name in results[0]
        }
        coordinates: dict[str, Any] = {dim: list(names) for dim, names in grid.labels.items()}
        steps = list(self.manifest.checkpoints.values())
        if None not in steps:
            coordinates["step"] = ("checkpoint", steps)
        return xr.Dataset(variables, coordinates, {"sweep": self.store})

    def to_csv(self, path: str | Path) -> None:
        """Write the estimates as a table, one line per cell."""
        self.collect().to_dataframe().to_csv(path)

    def to_netcdf(self, path: str | Path) -> None:
        """Write the estimates as ``collect`` gives them, for ``xarray.open_dataset``."""
        self.collect().to_netcdf(path)

    def rows(self, dataset: xr.Dataset | None = None) -> list[dict[str, Any]]:
        """Return the estimates, one dict per cell, for JSON: NaN as None.

        Args:
            dataset: what ``collect`` gave; None: the estimates are collected.
        """
        dataset = self.collect() if dataset is None else dataset
        rows = []
        for cell in self.cells:
            variables = dataset.sel(cell.labels).data_vars
            values = plain({str(name): value.item() for name, value in variables.items()})
            rows.append({"cell": cell.name, **cell.labels, **values})
        return rows

    def counts(self) -> dict[str, int]:
        """Return the number of cells in each status."""
        return dict(Counter(self._standing(cell)[0].status for cell in self.cells))

    def __repr__(self) -> str:
        counts = ", ".join(f"{number} {status}" for status, number in self.counts().items())
        return f"Sweep({redacted(self.store)!r}, {len(self.cells)} cells: {counts})"

    def _cell(self, name: str) -> Cell:
        cells = {cell.name: cell for cell in self.cells}
        if name not in cells:
            raise StoreError(f"{self.store}: {unknown_name('cell', name, cells)}")
        return cells[name]

    def _standing(self, cell: Cell) -> tuple[CellResult, Run | None]:
        """How a cell stands, and its run; one that is whole counts, whatever came after."""
        files = cell_files(self.files, cell)
        failure, lost = _failure(files, cell)
        if not files.exists(MANIFEST):
            status = FAILED if failure else WAITING
            return CellResult(status=status, reason=failure, lost_chains=lost), None
        try:
            run = Run(files)
        except StoreError as error:
            return CellResult(status=FAILED, reason=str(error)), None
        status, reason = run.manifest.status, run.manifest.reason
        if failure and status not in (FINISHED, FAILED):
            return CellResult(status=FAILED, reason=failure), run
        return CellResult(status=status, reason=reason), run

    def _result(self, cell: Cell, probe: str | None) -> CellResult:
        """All that is known of a cell; a damaged one has failed."""
        standing, run = self._standing(cell)
        if run is None:
            return standing
        try:
            return _with_numbers(standing, run, probe)
        except StoreError as error:
            return CellResult(status=FAILED, reason=standing.reason or str(error))


def open_sweep(store: str | Path) -> Sweep:
    """Open the directory of a sweep for reading; needs neither Ray nor models nor data."""
    return Sweep(store)


def is_sweep(store: str | Path) -> bool:
    """Return whether a directory is that of a sweep."""
    return as_files(store).exists(SWEEP.manifest)


def _failure(files: Files, cell: Cell) -> tuple[str, int]:
    """Why a cell could not be run, if it could not, and the chains it lost before a first draw."""
    try:
        record = read_record(files, cell)
    except StoreError as error:  # a damaged record says so
        return str(error), 0
    return record.failure, record.lost_chains


def _with_numbers(standing: CellResult, run: Run, probe: str | None) -> CellResult:
    """What a run adds to a cell; no estimate where it has made no draw."""
    known = replace(standing, lost_chains=len(run.lost_chains), seconds=run.manifest.seconds)
    if run.manifest.status == FAILED or not any(run.manifest.n_committed):
        return known
    estimate = run.llc("ignore")
    value = estimate if probe is None else run.llc("ignore", probe=probe)
    low, high = estimate.interval if probe is None else (math.nan, math.nan)
    return replace(
        known,
        llc=value.mean,
        se=value.se,
        interval_low=low,
        interval_high=high,
        spread=estimate.spread if probe is None else math.nan,
        init_loss=value.init_loss,
        r_hat=estimate.verdict.r_hat,
        ess=estimate.verdict.ess,
        lr=run.facts.get("lr", math.nan),
        nbeta=estimate.nbeta,
        localization=estimate.localization,
        n=float(estimate.n),
        verdict=str(estimate.verdict.status),
    )
