"""sample(): checks everything, then puts recipe, pool, trace and driver together."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import xarray as xr
from torch import nn

from distsampler.analysis import diagnosis, inference_data, verdict
from distsampler.analysis.run import Run
from distsampler.analysis.verdict import Verdict
from distsampler.chains import hop, sampler_trial, user_observables
from distsampler.chains.observables import variables, wide_variables
from distsampler.chains.worker import ALONE
from distsampler.config import RunConfig, optimal_nbeta
from distsampler.curvature import gradient_noise
from distsampler.curvature import watch as curvature_watch
from distsampler.data import shards
from distsampler.data.rows import as_rows
from distsampler.draws import Variable, WideVariable
from distsampler.errors import ConfigError, RunFailed, StoreError
from distsampler.execution.display import Reporter
from distsampler.execution.driver import Driver
from distsampler.execution.metrics import Log, Logger
from distsampler.execution.pool import ChainPool, ExportsMetrics, InspectsShards, KnowsPlaces
from distsampler.execution.progress import Observer, Observers
from distsampler.execution.run_state import Phase, State
from distsampler.models import sampler as by_name
from distsampler.models.loss import LossFn, inspect_loss
from distsampler.models.replica import ChainSpec
from distsampler.models.restriction import selected
from distsampler.optim.checks import check_parameter
from distsampler.recipe import Recipe, with_functions
from distsampler.sampling import packing
from distsampler.sampling.fingerprint import check_same, fingerprint, versions
from distsampler.sampling.handle import Running
from distsampler.schedule import Schedule
from distsampler.store import trace
from distsampler.store.events import Ended, Packed
from distsampler.store.files import Files
from distsampler.store.lease import Lease
from distsampler.store.manifest import Manifest
from distsampler.store.trace import Trace, as_files, check_new, refuse_existing

Resume = Literal["never", "auto", "must"]


def sample(  # noqa: PLR0913 (the signature is the public contract)
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig | None = None,
    *,
    store: str | Path | None = None,
    pool: ChainPool | None = None,
    resume: Resume = "never",
    quiet: bool = False,
    log: Log | None = None,
) -> Run:
    """Samples the posterior around a trained model, and returns the run.

    Args:
        model: trained; its present weights are w*. It is not changed.
        data: a map-style Dataset, a tensor, a tuple or dict of tensors, or a DataLoader (its
            dataset, collate_fn and batch_size are taken, its sampler is not). With data_mode="hop"
            also a list of these, the shards, or ``make_shard(index, count)``, which the actors
            call for one.
        loss: ``loss(model, batch)``: one value per example, shape (batch,), or the batch mean. n
            counts examples: where an example is a sequence, and the loss gives one value each, n is
            the number of sequences, not of tokens.
        config: of the run; None: the defaults.
        store: the run directory, which must be new; None: a temporary one.
        pool: where chains run; None: ``RayPool(config.placement)``.
        resume: "auto" continues a run that the store holds (a finished one is returned as it is),
            "must" insists that there is one.
        quiet: show no progress.
        log: ``log(step, values)``, called at each commit and look of the gate: step is the number
            of draws that every chain has, values are numbers by name, those of the running LLC
            provisional. What it raises is a warning, once.

    Returns:
        The run, finished or cleanly interrupted.

    Raises:
        ConfigError: if something cannot be sampled as asked; nothing has been written then.
        PlacementError: if the cluster cannot hold a chain; nothing has been written then.
        StoreError: if the store cannot be used.
        RunFailed: if fewer than ``min_chains`` chains were left.

    Example:
        >>> run = sample(model, train_set, loss, RunConfig(), store="runs/one")  # doctest: +SKIP
        >>> print(run.llc())  # doctest: +SKIP
    """
    job = _job(model, data, loss, config or RunConfig(), (store, pool, resume))
    with Reporter(quiet) as reporter, stop_on_signals() as stopped:
        return job.run(_with_log(reporter, log), stopped)


def resume(  # noqa: PLR0913 (as sample)
    store: str | Path,
    model: nn.Module,
    data: object,
    loss: LossFn,
    *,
    draws: int | None = None,
    max_draws: int | None = None,
    pool: ChainPool | None = None,
    quiet: bool = False,
    log: Log | None = None,
) -> Run:
    """Goes on with a run that was interrupted, or extends a finished one.

    Args:
        store: the run directory.
        model: as at the run's start, and so are data and loss: what differs is refused.
        data: see ``sample``.
        loss: see ``sample``.
        draws: kept draws of a chain, if more are wanted than the run was started with; of a run
            with draws="auto": all of them are made, and the gate no longer ends it.
        max_draws: the budget of draws="auto", if it is to be larger.
        pool: where chains run; None: as the run was started.
        quiet: show no progress.
        log: see ``sample``.

    Raises:
        StoreError: if there is no such run, another driver has it, or something differs.
    """
    config = _longer(Run(store).manifest.config, draws, max_draws)
    settings: dict[str, Any] = {"store": store, "pool": pool, "quiet": quiet, "log": log}
    return sample(model, data, loss, config, resume="must", **settings)


def _longer(config: RunConfig, draws: int | None, max_draws: int | None) -> RunConfig:
    """Return the config with other lengths; of draws="auto", a number takes the gate away."""
    changes: dict[str, Any] = {"draws": draws, "max_draws": max_draws}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes.keys() == {"draws"} and config.draws == "auto":
        changes["max_draws"] = None
        changes["gate"] = config.gate.replaced(every=None, relative_error=None)
    return config.replaced(**changes)


def start(  # noqa: PLR0913 (as sample)
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig | None = None,
    *,
    store: str | Path | None = None,
    pool: ChainPool | None = None,
    resume: Resume = "never",
    log: Log | None = None,
) -> Running:
    """``sample`` without waiting: what it refuses, this refuses at once; the rest is told by wait.

    Returns:
        A handle with ``progress``, ``wait(timeout)`` and ``stop()``.

    Example:
        >>> running = start(model, data, loss, store="runs/one")  # doctest: +SKIP
        >>> running.stop()  # doctest: +SKIP
        >>> running.wait().llc()  # doctest: +SKIP
    """
    job = _job(model, data, loss, config or RunConfig(), (store, pool, resume))
    return Running(lambda observer, stopped: job.run(_with_log(observer, log), stopped))


def sample_recipe(recipe: Recipe, store: str | None, resume: Resume, quiet: bool) -> Run:
    """``sample`` of what a YAML file asks for; the run remembers the file's names."""
    parts, where = (recipe.model, recipe.data, recipe.loss), (store, None, resume)
    job = _job(*parts, recipe.config, where, recipe.record)
    with Reporter(quiet) as reporter, stop_on_signals() as stopped:
        return job.run(reporter, stopped)


Where = tuple[str | Path | None, ChainPool | None, Resume]


def _job(
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig,
    where: Where,
    recipe: dict[str, Any] | None = None,
) -> Job:
    """Checks a run; shards that are made are looked at where the chains will be."""
    store, pool, resume = where
    if pool is None and config.data_mode == "hop":
        pool = _ray_pool(config)
    try:
        spec = prepare(model, data, loss, config, look_of(pool))
        return Job(spec, store, pool, resume, recipe)
    except BaseException:
        if pool is not None:
            pool.stop()  # it may have joined Ray to look
        raise


class Job:
    """A run that was checked and can be run: what ``sample`` and ``start`` have in common."""

    def __init__(
        self,
        spec: ChainSpec,
        store: str | Path | Files | None,
        pool: ChainPool | None,
        resume: Resume,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self._pool = pool
        self._files = as_files(tempfile.mkdtemp(prefix="distsampler-") if store is None else store)
        self._files.fsync = spec.config.fsync
        self._continues = continues(self._files, resume)
        self._asked, stored = spec.config.pack, None
        if self._continues and self._asked == "auto":
            stored = Trace(self._files).manifest.config.together
        places = pool.place_count() if isinstance(pool, KnowsPlaces) else None
        with ALONE:
            self._packing = packing.settle(spec, places, stored)
        settled = spec.config.replaced(pack=self._packing.pack)
        self._spec = replace(spec, config=settled, run=self._files.name)
        self._manifest = _manifest(self._spec, recipe)

    def run(self, observer: Observer, stopped: Callable[[], str | None]) -> Run:
        """Runs it to its end."""
        spec, files, config = self._spec, self._files, self._spec.config
        before, pool = None, self._pool
        with contextlib.ExitStack() as stack:
            if pool is not None:
                stack.callback(pool.stop)  # it may have joined Ray to look
            if self._continues:
                before = check_same(files, self._manifest)
                if before.finished(config):
                    return Run(files)
                lease = stack.enter_context(hold(files))
            if pool is None:
                pool = _ray_pool(config)
                stack.callback(pool.stop)
            if isinstance(pool, ExportsMetrics):
                observer = Observers(observer, pool.metrics(spec.run))
            places = tuple(pool.start(spec, range(len(config.packs))))
            if before is not None:
                found = Trace(files)
                found.reopen(config, lease.epoch)
            else:
                stack.enter_context(hold(files))
                refuse_existing(files)
                found = Trace.create(files, self._manifest)
            stack.callback(pool.stop)  # before the right to write is given up
            if self._asked != 1:
                found.log(Packed(self._asked, **asdict(self._packing)))
            began = time.monotonic() - found.manifest.seconds
            limit = _until(config, stopped)
            state = Driver(spec, pool, found, _judge(found), observer, limit).run(places)
            _seal(found, state, time.monotonic() - began)
        if state.phase is Phase.FAILED:
            raise RunFailed(f"{state.reason}\nwhat was committed stays readable in {files}")
        return Run(files)


def prepare(
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig,
    look: shards.InspectShards = shards.inspect_shards,
) -> ChainSpec:
    """Checks model, data, loss and config against each other, and makes the recipe of a chain.

    Args:
        model: at w*.
        data: see ``sample``.
        loss: see ``sample``.
        config: of the run.
        look: at shards that are made where chains run.

    Raises:
        ConfigError: says what must hold, what was got and what to do.
    """
    with ALONE:
        return _prepared(model, data, loss, config, look)


def look_of(pool: ChainPool | None) -> shards.InspectShards:
    """How shards that are made are looked at: where a pool's chains will be, else here."""
    return pool.inspect_shards if isinstance(pool, InspectsShards) else shards.inspect_shards


def _prepared(
    model: nn.Module, data: object, loss: LossFn, config: RunConfig, look: shards.InspectShards
) -> ChainSpec:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise ConfigError(f"the loss must be callable as loss(model, batch), got {loss!r}")
    rows = shards.cut(data, config, look) if config.data_mode == "hop" else as_rows(data)
    hop.check(config, rows)
    proposed = rows.batch_size
    if proposed is not None and "batch_size" not in config.model_fields_set:
        config = config.replaced(batch_size=proposed)
    if config.batch_size > len(rows):
        raise ConfigError(
            f"batch_size must be at most the number of examples, {len(rows)}: got "
            f"{config.batch_size}"
        )
    names = selected(model, config.restrict_to)
    for name in sorted(names):
        check_parameter(model.get_parameter(name))
    config = with_functions(config, Path())
    sampler = by_name.resolve(config.sampler.name)
    by_name.signature_options(config.sampler)
    nbeta = config.sampler.options.get("nbeta")
    nbeta = optimal_nbeta(len(rows)) if nbeta is None else nbeta
    metrics = sampler_trial.check(sampler, config, nbeta)
    if config.sampler.correct_heat:
        gradient_noise.batches(config, len(rows))
    per_example, stochastic = inspect_loss(model, rows, loss, config.mode, names)
    if config.save_losses and not per_example:
        raise ConfigError(
            "save_losses needs a loss of one value per example, shape (batch,), and this one gives "
            "the batch mean: use reduction='none', or leave save_losses out"
        )
    if sampler_trial.needs_closure(sampler):
        _check_full(config, len(rows), stochastic)
    spec = ChainSpec(
        model, rows, loss, config, float(nbeta), per_example, stochastic, sampler, metrics
    )
    taken: list[Variable | WideVariable] = [*variables(spec), *wide_variables(spec)]
    return _watchable(replace(spec, observed=user_observables.try_observables(spec, taken)))


def _watchable(spec: ChainSpec) -> ChainSpec:
    """The recipe; without its watch, and a warning, where the loss cannot be watched."""
    if not spec.config.watch:
        return spec
    try:
        curvature_watch.attempt(spec)
    except RuntimeError as error:
        warnings.warn(
            "watch is off in this run: the curvature needs a double backward, which the loss does "
            f"not have ({type(error).__name__}: {str(error).splitlines()[0]}); no bias is "
            "predicted, and a step that is too large is not noticed",
            stacklevel=4,
        )
        return replace(spec, config=spec.config.replaced(watch=False))
    return spec


def _check_full(config: RunConfig, n: int, stochastic: bool) -> None:
    """Sees that a sampler which accepts or refuses its steps does so by the loss of all data."""
    name = config.sampler.name
    if config.batch_size != n:
        raise ConfigError(
            f"sampler {name!r} accepts or refuses a step by the loss of all data: batch_size must "
            f"be {n}, the number of examples, got {config.batch_size}; raise it, or use a sampler "
            "of minibatches, such as 'lmsgld'"
        )
    if stochastic:
        raise ConfigError(
            f"sampler {name!r} needs a loss that is a function of the weights, and this one draws "
            f"at random: use mode='eval', got {config.mode!r}"
        )


def _with_log(observer: Observer, log: Log | None) -> Observer:
    return observer if log is None else Observers(observer, Logger(log))


def _ray_pool(config: RunConfig) -> ChainPool:
    from distsampler.execution.ray_pool import RayPool

    return RayPool(config.placement)


def continues(files: Files, resume: Resume) -> bool:
    """Whether the store holds a run to go on with; sees that one can be made, if not.

    Raises:
        ConfigError: if resume is no word for it.
        StoreError: if there is a run and none may be, or none and there must be one.
    """
    if resume not in ("never", "auto", "must"):
        raise ConfigError(f"resume must be 'never', 'auto' or 'must', got {resume!r}")
    exists = files.exists(trace.MANIFEST)
    if resume == "must" and not exists:
        raise StoreError(f"resume='must' needs a run in {files}, which holds none")
    if exists and resume != "never":
        return True
    check_new(files)
    return False


@contextlib.contextmanager
def hold(files: Files) -> Iterator[Lease]:
    """The right to write; every write sees first that it still holds."""
    try:
        lease = Lease(files)
    except OSError as error:
        raise StoreError(f"the store {files} cannot be written: {error}") from error
    with lease:
        files.guard = lease.check
        try:
            yield lease
        finally:
            files.guard = lambda: None


def _manifest(spec: ChainSpec, recipe: dict[str, Any] | None) -> Manifest:
    config = spec.config
    return Manifest(
        config=config,
        fingerprint=fingerprint(spec),
        variables=variables(spec),
        wide=wide_variables(spec),
        law=spec.facts.law,
        versions=versions(),
        n_committed=(0,) * config.chains,
        recipe=recipe,
    )


def _judge(found: Trace) -> Callable[[int], Verdict]:
    config = found.manifest.config
    schedule = Schedule.of(config)

    def judge(draws: int) -> Verdict:
        end = schedule.counted_from + draws
        if schedule.burn_in is None:
            whole = inference_data.between(found, "posterior", 0, end)
            found.choose_burn_in(_burn_in(whole, config))
        groups = inference_data.unread(found, end - found.burn_in)
        return verdict.judge(groups, config)[1]

    return judge


def _burn_in(whole: xr.Dataset, config: RunConfig) -> int:
    """Where the drift ends, and never before adaptation does."""
    adapting = -(-by_name.freeze_after(config) // config.thin)
    return diagnosis.burn_in(whole, adapting, dispersed=config.init == "dispersed")


def _seal(found: Trace, state: State, seconds: float) -> None:
    if state.phase is Phase.FAILED:
        found.seal("failed", state.reason, None, seconds)
    elif state.interrupted:
        found.seal("interrupted", state.reason, None, seconds)
    else:
        found.seal("finished", state.reason, state.kept, seconds)
    found.log(Ended(found.manifest.status, state.reason))


def _until(config: RunConfig, stopped: Callable[[], str | None]) -> Callable[[], str | None]:
    """A reason to stop: that of another, or that the time is up."""
    began = time.monotonic()

    def reason() -> str | None:
        if config.max_seconds is not None and time.monotonic() - began > config.max_seconds:
            return f"max_seconds={config.max_seconds:g} is over"
        return stopped()

    return reason


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], str | None]]:
    """A function that names the signal to stop, once one has come; the second ends the process."""
    caught = list[str]()

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            os._exit(130)
        caught.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
