"""sweep(): one LLC for every checkpoint, restriction, setting and data set, each a run of its own.

Cells are ordinary runs, driven by threads of one process: a cell's store is written, resumed and
read as any other, its bits are those of ``sample``, and its chains may be on any node. Ray is
joined once; actors go from cell to cell (``fleet``), because starting one costs seconds and most
cells of a large sweep take less. (Whole cells inside actors would save the driver's work, but then
every node must write stores, and twelve checkpoints could use twelve GPUs at most.) A cell that
fails leaves its reason in its own store. The sweep itself is two kinds of files (``manifest``) and
no state: to resume is to run the same cells again, of which those that are finished end at once.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from distsampler.analysis.run import Run
from distsampler.config import RunConfig
from distsampler.errors import ConfigError, DistsamplerError, RunFailed, StoreError
from distsampler.execution.display import say
from distsampler.execution.pool import ChainPool
from distsampler.execution.progress import Observer
from distsampler.models.loss import LossFn
from distsampler.probes import by_name
from distsampler.sampling.calibration import BIAS
from distsampler.sampling.directory import Resume, check_new, continues, replace
from distsampler.sampling.job import Job
from distsampler.sampling.prepare import draft
from distsampler.sampling.stopping import PilotsStopped, Stopped, interruptible, keyboard_interrupt
from distsampler.store.files import Files, as_files
from distsampler.store.lease import Lease
from distsampler.sweeps import warm_start
from distsampler.sweeps.cells import Cell
from distsampler.sweeps.checkpoints import Load, Sources, find
from distsampler.sweeps.fleet import fleet_of
from distsampler.sweeps.manifest import (
    SWEEP,
    CellRecord,
    Chosen,
    cell_files,
    check_same,
    clear_sweep,
    read_record,
    write_manifest,
    write_record,
)
from distsampler.sweeps.plan import MAX_CELLS, Plan, SweepRequest, make_plan
from distsampler.sweeps.results import Sweep
from distsampler.sweeps.scheduler import Outcome, Scheduler


def sweep(  # noqa: PLR0913 (the signature is the public contract)
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig | Mapping[str, Any] | None = None,
    *,
    store: str | Path,
    checkpoints: Sources = None,
    load: Load | None = None,
    restrictions: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    datasets: Mapping[str, object] | None = None,
    probes: Mapping[str, object] | None = None,
    calibrate: bool = False,
    bias: float = BIAS,
    pool: ChainPool | None = None,
    resume: Resume = "never",
    max_cells: int = MAX_CELLS,
    quiet: bool = False,
) -> Sweep:
    """Estimate the LLC of many checkpoints, parts of the model, settings and data sets.

    Every checkpoint with every restriction, setting and data set is a cell: a run in
    ``store/cells/<name>``, whose seed is made of the config's and the cell's name. A cell that
    fails is recorded with its reason, and the others continue.

    Args:
        model: a module of the checkpoints' architecture; its weights matter only without
            ``checkpoints``.
        data: as for ``sample``.
        loss: as for ``sample``.
        config: the config that all cells start from, as for ``sample``.
        store: the directory of the sweep: new, empty, or of a sweep that has made no draw yet,
            which is replaced.
        checkpoints: a file, glob, folder of files or of steps, a list of those, or a mapping from
            names to files, state dicts or models; see ``checkpoints.find``. None: the model as it
            is.
        load: from a name in ``checkpoints`` to a state dict or model, where they are no files.
        restrictions: name -> ``restrict_to``; None: the config's.
        settings: name -> fields that differ from the config: ``{"hot": {"sampler.nbeta": 10.0}}``.
        datasets: name -> data, in place of ``data``, which is then None.
        probes: named probes, as for ``sample``; every cell measures the same.
        calibrate: choose sampler, step and length by pilots, at the first checkpoint of each row;
            the others start from there (``warm_start``). Without it, what has no lr is chosen as
            ``sample`` does, and the length is not.
        bias: relative bias of the LLC that pilots aim for; see ``calibrate``.
        pool: where chains run, a cell at a time; None: many cells at once on Ray, by
            ``config.placement``.
        resume: "auto" continues a sweep that the store holds, "must" insists that there is one.
        max_cells: largest number of cells: a sweep of more is an error.
        quiet: print nothing as each cell ends.

    Returns:
        The sweep: all cells have ended, or SIGTERM ended it early and cleanly.

    Raises:
        ConfigError: if a checkpoint, restriction, setting or data set cannot be sampled; nothing
            has been written then.
        PlacementError: if the cluster cannot hold a chain.
        StoreError: if the store holds another sweep; at the end, if a cell's store could not be
            used.
        KeyboardInterrupt: after Ctrl-C and a clean end; its ``run`` is the sweep as committed.

    Example:
        >>> training = sweep(
        ...     model, train_set, loss, store="runs/training", checkpoints="checkpoints/*.pt"
        ... )  # doctest: +SKIP
        >>> training.collect().llc  # doctest: +SKIP
    """
    request = SweepRequest(
        model,
        {"data": data} if datasets is None else datasets,
        loss,
        RunConfig.of(config),
        find(checkpoints, load),
        restrictions,
        settings,
        by_name(probes),
        named_data=datasets is not None,
        calibrate=calibrate,
        bias=bias,
        max_cells=max_cells,
    )
    if datasets is not None and data is not None:
        raise ConfigError("data must be None where datasets are given: got both")
    with keyboard_interrupt(lambda _: "continue with the same call and resume='auto'"):
        return run_plan(make_plan(request), store, pool, resume, quiet)


def run_plan(
    plan: Plan, store: str | Path, pool: ChainPool | None, resume: Resume, quiet: bool
) -> Sweep:
    """Run the cells of a plan, as far as they have not been run; see ``sweep``."""
    files = as_files(store)
    continued = continues(files, resume, SWEEP)
    if continued:
        check_same(files, plan.manifest)
    return interruptible(lambda stopped: _run_cells(plan, files, pool, quiet, continued, stopped))


def _run_cells(
    plan: Plan, files: Files, pool: ChainPool | None, quiet: bool, continued: bool, stopped: Stopped
) -> Sweep:
    with Lease(files), fleet_of(pool, plan.request.config) as fleet:
        if not continued:
            check_new(files, SWEEP)
            replace(files, SWEEP, clear_sweep)
            write_manifest(files, plan.manifest)
        work = _PlanWork(plan, files, quiet)
        Scheduler(fleet, work, stopped).run(plan.cells)
    if work.broken:
        lines = [f"  {cell.name}: {error}" for cell, error in work.broken.items()]
        raise StoreError("the stores of some cells could not be used:\n" + "\n".join(lines))
    return Sweep(files)


class _PlanWork:
    """What is done for each cell of a plan, and what is kept of how it ended: a ``CellWork``."""

    def __init__(self, plan: Plan, files: Files, quiet: bool) -> None:
        self._plan, self._files, self._quiet = plan, files, quiet
        self._ended = 0
        self.broken: dict[Cell, StoreError] = {}
        self._leaders: dict[Cell, Chosen | str] = {}  # what each chose, or why it could not
        for cell in plan.leaders.values():
            if (chosen := self._record(cell).chosen) is not None:
                self._leaders[cell] = chosen

    def ready(self, cell: Cell) -> bool:
        """Return whether what the cell starts from is there."""
        leader = self._plan.leaders.get(cell.row, cell)
        return leader == cell or leader in self._leaders

    def run(self, cell: Cell, pool: ChainPool, observer: Observer, stopped: Stopped) -> Run:
        """Run a cell, as long as the sweep is this driver's."""
        self._files.guard()
        before = self._record(cell)
        if before.failure:
            self._write(cell, before.replaced(failure="", lost_chains=0))
        request, model, config = self._plan.request, self._plan.model(cell), self._plan.config(cell)
        if self._plan.tunes(cell):
            asked = warm_start.Asked(
                model,
                request.data[cell.data],
                request.loss,
                config,
                pool,
                request.bias,
                length=request.calibrate,
                stopped=stopped,
            )
            config = self._chosen(cell, asked).applied(config)
        spec = draft(model, request.data[cell.data], request.loss, config, pool, request.probes)
        return Job(spec, cell_files(self._files, cell), pool, "auto").run(observer, stopped)

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        """Keep why a cell failed, and print how it ended."""
        self._ended += 1
        if isinstance(outcome, Exception) and not isinstance(outcome, PilotsStopped):
            self._fail(cell, outcome)
        if not self._quiet:
            count = f"{self._ended} of {len(self._plan.cells)}"
            say(f"{count}  {cell.name}: {_ending(outcome)}")

    def _fail(self, cell: Cell, error: Exception) -> None:
        ours = isinstance(error, DistsamplerError)
        reason = str(error) if ours else f"{type(error).__name__}: {error}"
        if self._plan.leaders.get(cell.row) == cell:
            self._leaders.setdefault(cell, reason)  # or the others would wait for ever
        if isinstance(error, StoreError):
            self.broken[cell] = error
            return
        try:
            lost = len(error.lost_chains) if isinstance(error, RunFailed) else 0
            self._write(cell, self._record(cell).replaced(failure=reason, lost_chains=lost))
        except StoreError as fault:
            self.broken[cell] = StoreError(f"{reason}; {fault}")

    def _chosen(self, cell: Cell, asked: warm_start.Asked) -> Chosen:
        """What pilots choose for a cell, or have chosen before."""
        record, leader = self._record(cell), self._plan.leaders[cell.row]
        if record.chosen is not None:
            return record.chosen
        if leader == cell:
            chosen = warm_start.lead(asked)
        else:
            first = self._leaders[leader]
            if isinstance(first, str):
                raise ConfigError(
                    f"calibration starts from cell {leader.name!r}, which failed: {first}"
                )
            chosen = warm_start.start_from(first, asked)
        self._write(cell, record.replaced(chosen=chosen))
        if leader == cell:
            self._leaders[cell] = chosen
        return chosen

    def _record(self, cell: Cell) -> CellRecord:
        try:
            return read_record(cell_files(self._files, cell), cell)
        except StoreError:  # what it said is decided again
            return CellRecord(cell=asdict(cell))

    def _write(self, cell: Cell, record: CellRecord) -> None:
        write_record(self._files, cell, record)


def _ending(outcome: Outcome) -> str:
    """How a cell ended, in one line."""
    if isinstance(outcome, Exception):
        lines = str(outcome).splitlines() or [type(outcome).__name__]
        return f"failed: {lines[0]}"
    if outcome.manifest.status != "finished":
        return f"{outcome.manifest.status} ({outcome.manifest.reason})"
    return f"{outcome.llc('ignore')}, {outcome.manifest.seconds:.0f} s"
