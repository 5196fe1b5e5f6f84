"""sweep(): one LLC for every checkpoint, restriction, setting and data set, each a run of its own.

Cells are ordinary runs, driven by threads of one process: a cell's store is written, resumed and
read as any other, its bits are those of ``sample``, and its chains may be on any node. Ray is
joined once; actors go from cell to cell (``fleet``), because starting one costs seconds and most
cells of a large sweep take less. (Whole cells inside actors would save the driver's work, but then
every node must write stores, and twelve checkpoints could use twelve GPUs at most.) A cell that
fails leaves its reason in its own store. The sweep itself is two kinds of files (``sweep_files``)
and no state: to resume is to run the same cells again, of which those that are finished end at
once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from distsampler.analysis.run import Run
from distsampler.config import RunConfig
from distsampler.errors import ConfigError, DistsamplerError, StoreError
from distsampler.execution.pool import ChainPool
from distsampler.execution.progress import Observer
from distsampler.models.loss import LossFn
from distsampler.sampling.calibration import BIAS
from distsampler.sampling.sample import Job, Resume, hold, look_of, prepare, stop_on_signals
from distsampler.store.files import Files, refused
from distsampler.store.trace import as_files, check_new
from distsampler.sweeps import manifest as sweep_manifest
from distsampler.sweeps import warm_start
from distsampler.sweeps.cells import Cell
from distsampler.sweeps.checkpoints import Load, Sources, find, loaded
from distsampler.sweeps.fleet import fleet_of
from distsampler.sweeps.manifest import SWEEP, CellRecord
from distsampler.sweeps.plan import MAX_CELLS, Plan, Wanted, made
from distsampler.sweeps.results import Sweep
from distsampler.sweeps.scheduler import Outcome, Scheduler, Stopped
from distsampler.sweeps.warm_start import Chosen


def sweep(  # noqa: PLR0913 (the signature is the public contract)
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig | None = None,
    *,
    store: str | Path,
    checkpoints: Sources = None,
    load: Load | None = None,
    restrictions: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    datasets: Mapping[str, object] | None = None,
    calibrate: bool = False,
    bias: float = BIAS,
    pool: ChainPool | None = None,
    resume: Resume = "never",
    max_cells: int = MAX_CELLS,
    quiet: bool = False,
) -> Sweep:
    """Estimates the LLC of many checkpoints, parts of the model, settings and data sets.

    Every checkpoint with every restriction, setting and data set is a cell: a run in
    ``store/cells/<name>``, of a seed made of the config's and the cell's name. One that fails is
    recorded with its reason, and the rest go on.

    Args:
        model: of the checkpoints' architecture; its weights matter only without ``checkpoints``.
        data: as for ``sample``, and so is loss.
        loss: see ``sample``.
        config: of all cells.
        store: the directory of the sweep, which must be new.
        checkpoints: a file, glob, folder of files or of steps, a list of those, or a mapping from
            names to files, state dicts or models; see ``checkpoints.find``. None: the model as it
            is.
        load: from a name in ``checkpoints`` to a state dict or model: where they are no files.
        restrictions: name -> ``restrict_to``; None: the config's.
        settings: name -> fields that differ from the config: ``{"hot": {"sampler.nbeta": 10.0}}``.
        datasets: name -> data, in place of ``data``, which is then None.
        calibrate: choose sampler, step and length by pilots, at the first checkpoint of each row;
            the others start from there (``warm_start``).
        bias: wanted of calibration; see ``calibrate``.
        pool: where chains run, a cell at a time; None: many cells at once on Ray, by
            ``config.placement``.
        resume: "auto" goes on with a sweep that the store holds, "must" insists that there is one.
        max_cells: refuse a sweep of more.
        quiet: say nothing of each cell as it ends.

    Returns:
        The sweep, all of whose cells have ended, or which was cleanly interrupted.

    Raises:
        ConfigError: if a checkpoint, restriction, setting or data set cannot be sampled; nothing
            has been written then.
        PlacementError: if the cluster cannot hold a chain.
        StoreError: if the store holds another sweep; at the end, if a cell's store could not be
            used.

    Example:
        >>> found = sweep(
        ...     model, train_set, loss, store="runs/training", checkpoints="checkpoints/*.pt"
        ... )  # doctest: +SKIP
        >>> found.collect().llc  # doctest: +SKIP
    """
    wanted = Wanted(
        model,
        {"data": data} if datasets is None else datasets,
        loss,
        config or RunConfig(),
        find(checkpoints, load),
        restrictions,
        settings,
        named_data=datasets is not None,
        calibrate=calibrate,
        bias=bias,
        max_cells=max_cells,
    )
    if datasets is not None and data is not None:
        raise ConfigError("data must be None where datasets are given: got both")
    return carry_out(made(wanted), store, pool, resume, quiet)


def carry_out(
    plan: Plan, store: str | Path, pool: ChainPool | None, resume: Resume, quiet: bool
) -> Sweep:
    """Runs the cells of a plan, as far as they have not been; see ``sweep``."""
    files = as_files(store)
    _check_store(files, plan, resume)
    with hold(files), stop_on_signals() as stopped, fleet_of(pool, plan.wanted.config) as fleet:
        if not files.exists(SWEEP):
            sweep_manifest.write(files, plan.manifest)
        work = _Cells(plan, files, quiet)
        Scheduler(fleet, work.run, work.ready, work.ended, stopped).run(plan.cells)
    if work.broken:
        lines = [f"  {cell.name}: {error}" for cell, error in work.broken.items()]
        raise StoreError("the stores of some cells could not be used:\n" + "\n".join(lines))
    return Sweep(files)


class _Cells:
    """What is done for one cell, and what is kept of how it ended."""

    def __init__(self, plan: Plan, files: Files, quiet: bool) -> None:
        self._plan, self._files, self._quiet = plan, files, quiet
        self._count = 0
        self.broken: dict[Cell, StoreError] = {}
        self._leaders: dict[tuple[str, str, str], Chosen | str] = {}  # or why there is no choice
        for cell in plan.cells if plan.manifest.calibrate else ():
            chosen = self._record(cell).chosen
            if plan.leader(cell) == cell and chosen is not None:
                self._leaders[cell.row] = Chosen.model_validate(chosen)

    def ready(self, cell: Cell) -> bool:
        """Whether what a cell starts from is there."""
        free = not self._plan.manifest.calibrate or self._plan.leader(cell) == cell
        return free or cell.row in self._leaders

    def run(self, cell: Cell, pool: ChainPool, observer: Observer, stopped: Stopped) -> Run:
        """Runs a cell; called in a thread of its own."""
        plan, wanted = self._plan, self._plan.wanted
        before = self._record(cell)
        if before.failure:
            self._write(cell, before.replaced(failure=""))
        model = loaded(wanted.model, plan.checkpoints[cell.checkpoint])
        config = plan.config(cell)
        if plan.manifest.calibrate:
            config = self._chosen(cell, model, config, pool).applied(config)
        spec = prepare(model, wanted.data[cell.data], wanted.loss, config, look_of(pool))
        return Job(spec, self._store(cell), pool, "auto").run(observer, stopped)

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        """Keeps why a cell failed, and says how it ended."""
        self._count += 1
        if isinstance(outcome, Exception):
            self._fail(cell, outcome)
        if not self._quiet:
            done = f"{self._count} of {len(self._plan.cells)}"
            say = Console(file=sys.stderr)
            say.print(
                f"{done}  {cell.name}: {_told(outcome)}",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )

    def _fail(self, cell: Cell, error: Exception) -> None:
        ours = isinstance(error, DistsamplerError)
        reason = str(error) if ours else f"{type(error).__name__}: {error}"
        if self._plan.leader(cell) == cell:
            self._leaders.setdefault(cell.row, reason)  # or the others would wait for ever
        if isinstance(error, StoreError):
            self.broken[cell] = error
            return
        try:
            self._write(cell, self._record(cell).replaced(failure=reason))
        except StoreError as fault:
            self.broken[cell] = StoreError(f"{reason}; {fault}")

    def _chosen(self, cell: Cell, model: nn.Module, config: RunConfig, pool: ChainPool) -> Chosen:
        """What calibration chooses for a cell, or has chosen before."""
        record, wanted = self._record(cell), self._plan.wanted
        if record.chosen is not None:
            return Chosen.model_validate(record.chosen)
        data, leads = wanted.data[cell.data], self._plan.leader(cell) == cell
        if leads:
            found = warm_start.lead(model, data, wanted.loss, config, pool, wanted.bias)
        else:
            first = self._leaders[cell.row]
            if isinstance(first, str):
                name = self._plan.leader(cell).name
                raise ConfigError(f"calibration starts from cell {name!r}, which failed: {first}")
            found = warm_start.follow(first, model, data, wanted.loss, config, pool)
        self._write(cell, record.replaced(chosen=found.model_dump(mode="json")))
        if leads:
            self._leaders[cell.row] = found
        return found

    def _store(self, cell: Cell) -> str:
        return sweep_manifest.cell_store(self._files.root, cell)

    def _record(self, cell: Cell) -> CellRecord:
        return sweep_manifest.read_record(self._store(cell), cell)

    def _write(self, cell: Cell, record: CellRecord) -> None:
        files = Files(self._store(cell))
        try:
            sweep_manifest.write_record(files, record)
        except OSError as error:
            raise refused(files, error) from error


def _check_store(files: Files, plan: Plan, resume: Resume) -> None:
    """Sees that a sweep can begin here, or go on."""
    if resume not in ("never", "auto", "must"):
        raise ConfigError(f"resume must be 'never', 'auto' or 'must', got {resume!r}")
    if files.exists(SWEEP) and resume != "never":
        return sweep_manifest.check_same(files, plan.manifest)
    if resume == "must":
        raise StoreError(f"resume='must' needs a sweep in {files}, which holds none")
    if files.exists(SWEEP):
        raise StoreError(
            f"the store {files} must not exist, but it holds a sweep: give another store, read it "
            f"with distsampler.open_sweep({str(files)!r}), continue it with resume='auto', or "
            "delete it"
        )
    check_new(files)


def _told(outcome: Outcome) -> str:
    """How a cell ended, in one line."""
    if isinstance(outcome, Exception):
        lines = str(outcome).splitlines() or [type(outcome).__name__]
        return f"failed: {lines[0]}"
    if outcome.manifest.status != "finished":
        return f"{outcome.manifest.status} ({outcome.manifest.reason})"
    return f"{outcome.llc('ignore')}, {outcome.manifest.seconds:.0f} s"
