"""A job: a run that was checked, and is run once: store, pool, driver, gate, seal."""

import contextlib
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distsampler.analysis import arviz_bridge
from distsampler.analysis.advice import Lever
from distsampler.analysis.run import Run
from distsampler.chains.observables import variables, wide_variables
from distsampler.chains.worker import ALONE
from distsampler.config import RunConfig
from distsampler.errors import RunFailed
from distsampler.execution.driver import Driver
from distsampler.execution.pool import ChainPool, ExportsMetrics, KnowsPlaces
from distsampler.execution.progress import Observer, together
from distsampler.execution.run_state import Phase, State
from distsampler.models.numerics import AUTOCAST
from distsampler.models.replica import ChainSpec
from distsampler.models.sampler import effective_options
from distsampler.recipe import Recipe
from distsampler.sampling import packing
from distsampler.sampling.directory import Resume, beginning, continues
from distsampler.sampling.fingerprint import check_same, fingerprint, versions
from distsampler.sampling.gate import Gate
from distsampler.sampling.prepare import draft, inspected
from distsampler.sampling.stopping import Stopped, stop_after
from distsampler.store.events import Ended, Inspected, Packed
from distsampler.store.files import Files, as_files
from distsampler.store.lease import Lease
from distsampler.store.manifest import Manifest, RunStatus
from distsampler.store.trace import Trace

if TYPE_CHECKING:
    from distsampler.execution.ray_pool import RayPool


class Job:
    """A run that was checked; store, pool and resume as for ``sample``."""

    def __init__(
        self,
        draft: ChainSpec,
        store: str | Path | Files | None,
        pool: ChainPool | None,
        resume: Resume,
        recipe: Recipe | None = None,  # of which names of model, data, loss and the pilots are kept
    ) -> None:
        self._files = as_files(tempfile.mkdtemp(prefix="distsampler-") if store is None else store)
        self._files.fsync = draft.config.fsync
        self._continues = continues(self._files, resume)
        stored = Trace(self._files).manifest.config if self._continues else None
        self._pool = ray_pool(draft.config) if pool is None else pool
        marks = fingerprint(draft)  # of the user's parts, which are read whole for it
        self._finished = stored is not None and _is_finished(self._files, draft, stored, marks)
        if self._finished:
            return
        again = draft.pilot or (recipe is not None and recipe.calibration is not None)
        draft = replace(draft, run=self._files.name)
        spec = inspected(draft, self._pool, say=not again)
        together = stored.together if stored and draft.config.pack == "auto" else None
        places = pool.place_count() if isinstance(pool, KnowsPlaces) else None
        with ALONE:
            self._packing = packing.choose_pack(spec, places, together)
        self._asked = draft.config.pack
        config = spec.config.replaced(pack=self._packing.pack)
        self._spec = replace(spec, config=config)
        self._manifest = _manifest(self._spec, marks, recipe)

    def run(self, observer: Observer, stopped: Stopped) -> Run:
        """Run it to its end, or until ``stopped`` says why it must end early."""
        files, pool = self._files, self._pool
        with contextlib.ExitStack() as stack:
            stack.callback(pool.stop)  # it may have joined Ray
            if self._finished:
                return Run(files)
            config = self._spec.config
            if self._continues:
                check_same(files, self._manifest)
            lease = stack.enter_context(Lease(files))  # two drivers are one too many
            places = tuple(pool.start(self._spec, range(len(config.packs))))
            if self._continues:
                trace = Trace(files)  # as it is since we hold it
                trace.reopen(config, lease.epoch)
            else:
                stack.enter_context(beginning(files))
                trace = Trace.create(files, self._manifest)
            stack.callback(pool.stop)  # before the right to write is given up
            state = self._drive(trace, pool, places, observer, stopped)
            if state.phase is Phase.FAILED:
                raise self._failure(Run(files), state.reason)
        return Run(files)

    def _failure(self, run: Run, reason: str) -> RunFailed:
        """Why a run failed, what to do where its chains diverged, and what is left of it."""
        lines, left = [reason], f"what was committed stays readable in {run.store}"
        if run.lost_chains and Lever.LR in run.verdict.to_do.levers:
            lines.append(f"To do: {run.verdict.advice}.")
        if not (self._continues or any(run.manifest.n_committed)):
            left = f"it made no draw: nothing is left in {run.store}, where it can be started again"
        return RunFailed("\n".join([*lines, left]), run.lost_chains)

    def _drive(
        self,
        trace: Trace,
        pool: ChainPool,
        places: tuple[int, ...],
        observer: Observer,
        stopped: Stopped,
    ) -> State:
        """Let the driver sample until the run is over, and seal the store."""
        if self._spec.notes:
            trace.log(Inspected(self._spec.notes))
        if self._asked != 1:
            trace.log(Packed(self._asked, **asdict(self._packing)))
        if isinstance(pool, ExportsMetrics):
            observer = together(observer, pool.metrics(self._spec.run))
        arviz_bridge.load()  # takes a second or more: now, while places start, and not later
        began = time.monotonic() - trace.manifest.seconds
        stopped = stop_after(self._spec.config.max_seconds, stopped)
        state = Driver(self._spec, pool, trace, Gate(trace).judge, observer, stopped).run(places)
        failed = state.phase is Phase.FAILED
        status: RunStatus = (
            "failed" if failed else "interrupted" if state.interrupted else "finished"
        )
        kept = state.kept if status == "finished" else None
        trace.seal(status, state.reason, kept, time.monotonic() - began)
        trace.log(Ended(status, state.reason))
        return state


def check(recipe: Recipe, store: str | Path | None, pool: ChainPool | None, resume: Resume) -> Job:
    """Check a recipe and where it shall run, and return the job; nothing is written."""
    pool = ray_pool(recipe.config) if pool is None else pool
    warn_of_autocast()
    with stopped_on_error(pool):
        spec = draft(recipe.model, recipe.data, recipe.loss, recipe.config, pool, recipe.probes)
        return Job(spec, store, pool, resume, recipe)


@contextlib.contextmanager
def stopped_on_error(pool: ChainPool) -> Iterator[None]:
    """Stop a pool, which may have joined Ray, if what is done here fails."""
    try:
        yield
    except BaseException:
        pool.stop()
        raise


def warn_of_autocast() -> None:
    """Say that autocast around the call is not used: it holds in this thread, not on the places."""
    if any(map(torch.is_autocast_enabled, AUTOCAST)):
        warnings.warn(
            "torch.autocast around this call is not used, so that all places compute the same: "
            "precision='bf16' runs the model's forward and backward pass under it",
            stacklevel=4,
        )


def _is_finished(files: Files, draft: ChainSpec, stored: RunConfig, marks: dict[str, str]) -> bool:
    """Return whether a stored run is the one that is asked for, and all of it is there.

    Whether its curvature is watched, and how its chains are packed, was settled when it began.
    """
    config = draft.config.replaced(pack=stored.pack, watch=stored.watch)
    asked = _manifest(replace(draft, config=config), marks)
    return check_same(files, asked).finished(config)


def _manifest(spec: ChainSpec, marks: dict[str, str], recipe: Recipe | None = None) -> Manifest:
    """The manifest of a run that has not begun; ``marks`` is its fingerprint."""
    config = spec.config
    return Manifest(
        config=config,
        fingerprint=marks,
        variables=variables(spec),
        wide=wide_variables(spec),
        law=spec.facts.law,
        sampler=effective_options(config, spec.nbeta),
        versions=versions(),
        n_committed=(0,) * config.chains,
        recipe=(recipe and recipe.record) or None,
        calibration=recipe and recipe.calibration,
    )


def ray_pool(config: RunConfig) -> "RayPool":
    """Return a pool on Ray, which is joined when its first place is started."""
    from distsampler.execution.ray_pool import RayPool

    return RayPool(config.placement)


@contextlib.contextmanager
def lasting_pool(pool: ChainPool | None, config: RunConfig) -> Iterator[ChainPool]:
    """Give a pool for several runs: this one, or one on Ray that stays up between them."""
    if pool is not None:
        yield pool
        return
    with ray_pool(config).joined() as own:
        yield own
