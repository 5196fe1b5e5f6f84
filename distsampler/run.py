"""sample(): checks everything, then puts recipe, pool, trace and driver together."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from distsampler import diagnostics, gradient_noise, inference_data, trace
from distsampler.config import RunConfig, optimal_nbeta
from distsampler.diagnostics import Verdict
from distsampler.driver import Driver
from distsampler.errors import ConfigError, RunFailed, StoreError
from distsampler.live import Reporter
from distsampler.manifest import Manifest
from distsampler.observables import variables
from distsampler.optim import by_name, trial
from distsampler.pool import ChainPool
from distsampler.replica import ChainSpec, Loss, inspect_loss
from distsampler.restriction import selected
from distsampler.results import Run
from distsampler.shards import as_rows
from distsampler.trace import Trace
from distsampler.transition import Phase, State

Resume = Literal["never", "auto", "must"]
FREE = ("placement", "commit_seconds", "max_seconds", "min_chains", "gate")  # change no bit


def sample(  # noqa: PLR0913 (the signature is the public contract)
    model: nn.Module,
    data: object,
    loss: Loss,
    config: RunConfig | None = None,
    *,
    store: str | Path | None = None,
    pool: ChainPool | None = None,
    resume: Resume = "never",
    quiet: bool = False,
) -> Run:
    """Samples the posterior around a trained model, and returns the run.

    Args:
        model: trained; its present weights are w*. It is not changed.
        data: a map-style Dataset, a tensor, a tuple or dict of tensors, or a DataLoader (its
            dataset, collate_fn and batch_size are taken, its sampler is not).
        loss: ``loss(model, batch)``: one value per example, shape (batch,), or the batch mean.
        config: of the run; None: the defaults.
        store: the run directory, which must be new; None: a temporary one.
        pool: where chains run; None: ``RayPool(config.placement)``.
        resume: "auto" continues a run that the store holds (a finished one is returned as it is),
            "must" insists that there is one.
        quiet: show no progress.

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
    path = Path(store) if store is not None else Path(tempfile.mkdtemp(prefix="distsampler-"))
    going_on = _continues(path, resume)
    spec = prepare(model, data, loss, config or RunConfig())
    manifest = _manifest(spec)
    if going_on:
        _check_same(path, manifest)
        if Run(path).manifest.status == "finished":
            return Run(path)
    pool = pool or _ray_pool(spec.config)
    with _end(pool), Reporter(quiet) as reporter, _stop_flag(spec.config) as stopped:
        places = tuple(pool.start(spec, range(spec.config.chains)))
        found = Trace(path) if going_on else Trace.create(path, manifest)
        found.reopen()
        began = time.monotonic()
        driver = Driver(spec, pool, found, _judge(found), reporter, stopped)
        state = driver.run(places)
        _seal(found, state, time.monotonic() - began)
    if state.phase is Phase.FAILED:
        raise RunFailed(f"{state.reason}\nwhat was committed stays readable in {path}")
    return Run(path)


def prepare(model: nn.Module, data: object, loss: Loss, config: RunConfig) -> ChainSpec:
    """Checks model, data, loss and config against each other, and makes the recipe of a chain.

    Raises:
        ConfigError: says what must hold, what was got and what to do.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise ConfigError(f"the loss must be callable as loss(model, batch), got {loss!r}")
    rows = as_rows(data)
    if isinstance(data, DataLoader) and "batch_size" not in config.model_fields_set:
        config = config.model_copy(update={"batch_size": data.batch_size or config.batch_size})
    if config.batch_size > len(rows):
        raise ConfigError(
            f"batch_size must be at most the number of examples, {len(rows)}: got "
            f"{config.batch_size}"
        )
    selected(model, config.restrict_to)
    sampler = by_name.resolve(config.sampler.name)
    by_name.signature_options(config.sampler)
    nbeta = config.sampler.options.get("nbeta")
    nbeta = optimal_nbeta(len(rows)) if nbeta is None else nbeta
    metrics = trial.check(sampler, config, nbeta)
    if config.sampler.correct_heat:
        gradient_noise.batches(config, len(rows))
    per_example, stochastic = inspect_loss(model, rows, loss, config.mode)
    if trial.needs_closure(sampler):
        _check_full(config, len(rows), stochastic)
    return ChainSpec(
        model, rows, loss, config, float(nbeta), per_example, stochastic, sampler, metrics
    )


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


def _ray_pool(config: RunConfig) -> ChainPool:
    from distsampler.ray_pool import RayPool

    return RayPool(config.placement)


def _continues(path: Path, resume: Resume) -> bool:
    """Whether the store holds a run to go on with; sees that it can be made, if not."""
    if resume not in ("never", "auto", "must"):
        raise ConfigError(f"resume must be 'never', 'auto' or 'must', got {resume!r}")
    exists = (path / "run.json").exists()
    if resume == "must" and not exists:
        raise StoreError(f"resume='must' needs a run in {path}, which holds none")
    if exists and resume != "never":
        return True
    trace.check_new(path)
    return False


def _manifest(spec: ChainSpec) -> Manifest:
    config = spec.config
    names = ("distsampler", "torch", "numpy", "zarr", "xarray", "arviz", "ray")
    return Manifest(
        config=config,
        fingerprint={
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "data": f"{len(spec.rows)} examples, {spec.rows.digest()}",
            "model": _model_digest(spec.model),
        },
        variables=variables(spec),
        versions={name: version(name) for name in names},
        n_committed=(0,) * config.chains,
    )


def _model_digest(model: nn.Module) -> str:
    """Names, shapes and bits of all parameters and buffers."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()


def _check_same(path: Path, manifest: Manifest) -> None:
    """Sees that the run in the store is the one that is asked for.

    Raises:
        StoreError: lists every key that differs, with the stored and the present value.
    """
    stored = Trace(path).manifest
    pairs = {key: (stored.fingerprint.get(key), now) for key, now in manifest.fingerprint.items()}
    old, new = stored.config.model_dump(), manifest.config.model_dump()
    pairs |= {f"config.{key}": (old[key], new[key]) for key in new if key not in FREE}
    lines = [f"  {key}: stored {a!r}, now {b!r}" for key, (a, b) in pairs.items() if a != b]
    if lines:
        raise StoreError(
            f"the run in {path} can only be continued as it was started; different are\n"
            + "\n".join(lines)
        )


def _judge(found: Trace) -> Callable[[int], Verdict]:
    def judge(draws: int) -> Verdict:
        posterior = inference_data.datasets(found, draws)["posterior"]
        return diagnostics.gate(diagnostics.diagnose(posterior), found.manifest.config.gate)

    return judge


def _seal(found: Trace, state: State, seconds: float) -> None:
    if state.phase is Phase.FAILED:
        found.seal("failed", state.reason, None, seconds)
    elif state.interrupted:
        found.seal("interrupted", state.reason, None, seconds)
    else:
        found.seal("finished", state.reason, state.kept, seconds)
    found.event(found.manifest.status, reason=state.reason)


@contextlib.contextmanager
def _end(pool: ChainPool) -> Iterator[None]:
    try:
        yield
    finally:
        pool.stop()


@contextlib.contextmanager
def _stop_flag(config: RunConfig) -> Iterator[Callable[[], str | None]]:
    """A function that says why to stop, once a signal has come or the time is up.

    A second signal ends the process at once.
    """
    began, caught = time.monotonic(), list[str]()

    def stopped() -> str | None:
        if caught:
            return caught[0]
        if config.max_seconds is not None and time.monotonic() - began > config.max_seconds:
            return f"max_seconds={config.max_seconds:g} is over"
        return None

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            os._exit(130)
        caught.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
