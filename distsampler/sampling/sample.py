"""sample(): from a trained model to a run. Start reading here.

What happens, in order:

1. ``prepare`` checks model, data, loss and config against each other. What comes of it is a
   ``ChainSpec``: all that a process needs to make a chain.
2. A ``Job`` takes the store and brings up the places of the pool; a place is a process with a GPU.
3. The ``Driver`` has the loss measured at w*, then sends blocks of draws to the places and commits
   what comes back to the ``Trace``, again and again.
4. At the end of each gate round the ``Gate`` judges what was committed, and may end the run.
5. ``Run`` reads the store: LLC, verdict, diagnosis.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from distsampler.analysis.run import Run
from distsampler.config import RunConfig
from distsampler.execution.display import Reporter, say
from distsampler.execution.metrics import Log, Logger
from distsampler.execution.pool import ChainPool
from distsampler.execution.progress import Observer, together
from distsampler.models.loss import LossFn
from distsampler.probes import by_name
from distsampler.recipe import Recipe
from distsampler.sampling.directory import Resume, trusted_config
from distsampler.sampling.handle import Running
from distsampler.sampling.piloted import plan
from distsampler.sampling.stopping import continuation, interruptible, keyboard_interrupt


def sample(  # noqa: PLR0913 (the signature is the public contract)
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig | Mapping[str, Any] | None = None,
    *,
    store: str | Path | None = None,
    pool: ChainPool | None = None,
    resume: Resume = "never",
    probes: Mapping[str, object] | None = None,
    quiet: bool = False,
    log: Log | None = None,
) -> Run:
    """Sample the posterior around a trained model and return the run.

    Args:
        model: trained; its present weights are w*. It is not changed.
        data: a map-style Dataset, a tensor or array, a tuple or mapping of them, data frames of
            numbers, or a DataLoader (its dataset, collate_fn and batch_size are taken, its sampler
            is not). A list is a data set of its elements; with data_mode="hop" it is one of shards,
            each any of these, or ``make_shard(index, count)`` is given, which the actors call.
        loss: ``loss(model, batch)``: one value per example, shape (batch,), or the batch mean. n
            counts examples: where an example is a sequence, and the loss gives one value each, n is
            the number of sequences, not of tokens.
        config: what to sample, and for how long, as a RunConfig or a dict of its fields; None: the
            defaults.
        store: the run directory: new, empty, or of a run that has made no draw yet, which is
            replaced; None: a temporary one.
        pool: where chains run; None: ``RayPool(config.placement)``.
        resume: "auto" continues a run whose draws the store holds (a finished one is returned as
            it is), "must" insists that there is a run.
        probes: named probes: name -> data, each as ``data`` is, whose losses are measured at the
            draws, and decide nothing; see ``RunConfig.probes``, ``Run.losses_of`` and
            ``Run.llc(probe=...)``.
        quiet: show no progress, and do not say what pilots chose.
        log: ``log(step, values)``, called at each commit and gate round: step is the number of
            draws that every chain has, values are numbers by name, those of the running LLC
            provisional. What it raises is a warning, once.

    Returns:
        The run: finished, or ended early and cleanly by SIGTERM or ``max_seconds``.

    Raises:
        ConfigError: if something cannot be sampled as asked; nothing has been written then.
        PlacementError: if the cluster cannot hold a chain; nothing has been written then.
        StoreError: if the store cannot be used.
        RunFailed: if fewer than ``min_chains`` chains were left, or no step suited the pilots.
        KeyboardInterrupt: after Ctrl-C and a clean end; its ``run`` is what was committed, and
            ``start`` is the way to do other things meanwhile.

    Example:
        >>> run = sample(model, train_set, loss, RunConfig(), store="runs/one")  # doctest: +SKIP
        >>> print(run.llc())  # doctest: +SKIP
    """
    recipe = Recipe(model, data, loss, RunConfig.of(config), probes=by_name(probes))
    with keyboard_interrupt(continuation):
        return sample_recipe(recipe, store, pool, resume, quiet=quiet, log=log)


def resume(  # noqa: PLR0913 (as sample)
    store: str | Path,
    model: nn.Module,
    data: object,
    loss: LossFn,
    *,
    draws: int | None = None,
    max_draws: int | None = None,
    pool: ChainPool | None = None,
    probes: Mapping[str, object] | None = None,
    trust: bool = False,
    quiet: bool = False,
    log: Log | None = None,
) -> Run:
    """Continue a run that was interrupted, or extend a finished one.

    Args:
        store: the run directory.
        model: the model that the run started with; what differs is an error, here and below.
        data: the data that the run started with.
        loss: the loss that the run started with.
        draws: kept draws per chain, to make more than the run started with; of a run with
            draws="auto": all of them are made, and the gate no longer ends it.
        max_draws: a larger budget for draws="auto".
        pool: where chains run; None: as the run was started.
        probes: data of the named probes that the run started with.
        trust: import what the run's own config names (observables, a sampler of the user's), even
            where the directory is another user's.
        quiet: show no progress.
        log: see ``sample``.

    Raises:
        StoreError: if there is no such run, another driver has it, or something differs.
    """
    config = _longer(trusted_config(Run(store), trust), draws, max_draws)
    recipe = Recipe(model, data, loss, config, probes=by_name(probes))
    with keyboard_interrupt(continuation):
        return sample_recipe(recipe, store, pool, "must", quiet=quiet, log=log)


def start(  # noqa: PLR0913 (as sample)
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig | Mapping[str, Any] | None = None,
    *,
    store: str | Path | None = None,
    pool: ChainPool | None = None,
    resume: Resume = "never",
    probes: Mapping[str, object] | None = None,
    log: Log | None = None,
) -> Running:
    """Sample in a thread of this process: check everything, then return without waiting.

    Arguments and errors are those of ``sample``; what goes wrong after the checks is raised by
    ``wait``.

    Returns:
        A handle with ``progress``, ``wait(timeout)`` and ``stop()``.

    Example:
        >>> running = start(model, data, loss, store="runs/one")  # doctest: +SKIP
        >>> running.stop()  # doctest: +SKIP
        >>> running.wait().llc()  # doctest: +SKIP
    """
    recipe = Recipe(model, data, loss, RunConfig.of(config), probes=by_name(probes))
    job = plan(recipe, store, pool, resume, say)
    return Running(lambda observer, stopped: job.run(_with_log(observer, log), stopped))


def sample_recipe(
    recipe: Recipe,
    store: str | Path | None,
    pool: ChainPool | None = None,
    resume: Resume = "never",
    *,
    quiet: bool = False,
    log: Log | None = None,
) -> Run:
    """Sample what a recipe asks for; see ``sample``."""
    reporter = Reporter(quiet)
    job = plan(recipe, store, pool, resume, reporter.say)
    with reporter:
        return interruptible(lambda stopped: job.run(_with_log(reporter.show, log), stopped))


def _with_log(observer: Observer, log: Log | None) -> Observer:
    return observer if log is None else together(observer, Logger(log).show)


def _longer(config: RunConfig, draws: int | None, max_draws: int | None) -> RunConfig:
    """Return the config with other lengths; of draws="auto", a number takes the gate away."""
    changes: dict[str, Any] = {"draws": draws, "max_draws": max_draws}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes.keys() == {"draws"} and config.draws == "auto":
        changes["max_draws"] = None
        changes["gate"] = config.gate.replaced(every=None, relative_error=None)
    return config.replaced(**changes)
