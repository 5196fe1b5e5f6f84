"""prepare(): checks model, data, loss and config against each other, and makes the ChainSpec.

Every mistake that can be seen before a run starts is an error here, which says what to do.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from distsampler.chains import hop, sampler_trial
from distsampler.chains.inspection import Inspection, with_seen
from distsampler.chains.worker import ALONE, Inspect, Worker
from distsampler.config import RunConfig
from distsampler.curvature import gradient_noise
from distsampler.data import shards, tokens
from distsampler.data.kinds import as_rows
from distsampler.data.rows import Rows
from distsampler.errors import ConfigError
from distsampler.execution.deadlines import first_answer
from distsampler.execution.pool import AnswersAtOnce, ChainPool, InspectsShards
from distsampler.facts import optimal_nbeta
from distsampler.models import sampler as by_name
from distsampler.models.copies import check_model
from distsampler.models.loss import ByToken, LossFn
from distsampler.models.numerics import ProcessSettings, on_device, plain_modes
from distsampler.models.replica import ChainSpec, NamedProbe
from distsampler.models.restriction import masks_entries, selected
from distsampler.optim.checks import check_parameter
from distsampler.probes import MOST_ROWS, ProbeConfig, check_names
from distsampler.recipe import with_functions
from distsampler.seeding import probe_rows

VARIES = (
    "the data are others at each reading (random augmentation, or a collate_fn that draws): two "
    "runs of one seed differ, what a fault has lost is made again with other numbers, a resumed "
    "run cannot tell whether its data are the same, and L_n(w*) is that of one reading; to mend "
    "it, let each index draw from a generator of its own (torch.Generator().manual_seed(index)), "
    "or read the data once and give tensors"
)


def prepare(
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig,
    pool: ChainPool | None = None,
    probes: Mapping[str, object] | None = None,
) -> ChainSpec:
    """Check model, data, loss and config against each other, and return what chains are made of.

    Model and loss are called on a place of the pool; None: in this process.
    """
    return inspected(draft(model, data, loss, config, pool, probes), pool)


def draft(
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig,
    pool: ChainPool | None = None,
    probes: Mapping[str, object] | None = None,
) -> ChainSpec:
    """Return a recipe that was checked as far as it can be without calling model and loss.

    ``probes`` has the data of the named probes; None: none is measured, whatever the config says.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise ConfigError(f"the loss must be callable as loss(model, batch), got {loss!r}")
    _check_alone()
    settings = ProcessSettings.here()
    with ALONE, plain_modes():
        inspect = pool.inspect_shards if isinstance(pool, InspectsShards) else shards.inspect_shards
        rows = shards.cut(data, config, inspect) if config.data_mode == "hop" else as_rows(data)
        hop.check(config, rows)
        config = _with_batch_size(config, rows)
        moving = selected(model, config)
        check_model(model, moving)
        for name in sorted(moving):
            check_parameter(model.get_parameter(name))
        if probes is not None:
            config = _with_probes(config, probes)
        config = with_functions(config, Path())
        sampler = by_name.resolve(config.sampler.name)
        loss = on_device(loss, settings.device)
        if config.n == "tokens" and not isinstance(loss, ByToken):  # a pilot's is one already
            loss = ByToken(loss, tokens.count(rows), len(rows))
        n = loss.tokens if isinstance(loss, ByToken) else len(rows)
        nbeta = config.sampler.options.get("nbeta")
        nbeta = optimal_nbeta(n) if nbeta is None else nbeta
        metrics = sampler_trial.check(sampler, config, nbeta, masks_entries(config, moving))
        if config.sampler.correct_heat:
            gradient_noise.batches(config, len(rows))
        notes = (VARIES,) if rows.varies else ()
        spec = ChainSpec(
            model,
            rows,
            loss,
            config,
            float(nbeta),
            sampler,
            metrics=metrics,
            notes=notes,
            settings=settings,
        )
        _check_batches(spec)
        named = (_named_probe(name, data, spec) for name, data in sorted((probes or {}).items()))
        return replace(spec, probes=tuple(named))


def inspected(spec: ChainSpec, pool: ChainPool | None, say: bool = True) -> ChainSpec:
    """Return a recipe with what model, loss and observables were seen to do on a place.

    ``say``: warn of what a user should know of them.
    """
    if pool is None:
        worker = Worker(spec, next(spec.model.parameters()).device)
        with ALONE:
            inspection = worker.perform(Inspect())
    elif isinstance(pool, AnswersAtOnce):
        inspection = pool.answer(spec, Inspect())
    else:
        inspection = first_answer(pool, spec, Inspect())
    if not isinstance(inspection, Inspection):
        raise TypeError(f"a place must answer with an Inspection, got {inspection!r}")
    kind, observed, notes = inspection.kind, inspection.observed, inspection.notes
    probes = with_seen(spec.probes, inspection.probes)
    spec = replace(spec, kind=kind, observed=observed, probes=probes, notes=(*spec.notes, *notes))
    _check_loss(spec)
    for note in spec.notes if say else ():
        warnings.warn(note, stacklevel=5)
    if not inspection.unwatched:
        return spec
    if say:
        warnings.warn(
            "watch is off in this run: the curvature needs a double backward, which the loss does "
            f"not have ({inspection.unwatched}); no bias is predicted, and a step that is too "
            "large is not noticed",
            stacklevel=5,
        )
    return replace(spec, config=spec.config.replaced(watch=False))


def _check_alone() -> None:
    """Check that this is the process that samples, where torchrun has started several."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if rank != "0" and size not in ("", "1"):
        raise ConfigError(
            f"sample() must be called by one process, which starts all others itself: this one is "
            f"rank {rank} of {size} that torchrun has started; start the script with python, or "
            "call it where RANK is 0 alone"
        )


def _with_batch_size(config: RunConfig, rows: Rows) -> RunConfig:
    """Return the config with the batch size of a DataLoader, if it sets none itself."""
    if rows.batch_size is not None and "batch_size" not in config.model_fields_set:
        config = config.replaced(batch_size=rows.batch_size)
    if config.batch_size > len(rows):
        raise ConfigError(
            f"batch_size must be at most the number of examples, {len(rows)}: got "
            f"{config.batch_size}"
        )
    return config


def _with_probes(config: RunConfig, probes: Mapping[str, object]) -> RunConfig:
    """Return the config with settings for each named probe, in the order of their names."""
    check_names(probes)
    if lacking := sorted(config.probes.keys() - probes.keys()):
        raise ConfigError(
            f"probes must give the data of {lacking[0]!r}, which the config says how to measure: "
            f"sample(..., probes={{{lacking[0]!r}: data}}), or in a YAML file a line 'data' there"
        )
    settings = {name: config.probes.get(name, ProbeConfig()) for name in sorted(probes)}
    return config.replaced(probes=settings) if settings else config


def _named_probe(name: str, data: object, spec: ChainSpec) -> NamedProbe:
    """A named probe, as far as it is known before its loss is called."""
    settings, config, where = spec.config.probes[name], spec.config, f"probes.{name}"
    try:
        rows = as_rows(data)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    n = len(rows)
    if rows.varies:
        raise ConfigError(
            f"{where}: its data must be the same at each reading, for the losses at w* are "
            "subtracted, and they are others (random augmentation, or a collate_fn that draws): "
            "read them once and give tensors"
        )
    if settings.rows is None and n > MOST_ROWS:
        raise ConfigError(
            f"{where}: its data hold {n} examples, and every draw would measure them all: ask for "
            f"some, RunConfig(probes={{{name!r}: {{'rows': 256}}}}), or for all with 'rows': {n}"
        )
    if settings.rows is not None and settings.rows > n:
        raise ConfigError(f"{where}: rows must be at most {n}, all there are: {settings.rows}")
    # Not the run's seed: runs of one sweep, and of several seeds, measure the same examples.
    numbers = probe_rows(0, n, settings.rows or n)
    own = None if settings.loss is None else settings.loss.function
    theirs = spec.loss.per_token if isinstance(spec.loss, ByToken) else spec.loss
    return NamedProbe(
        name,
        rows if len(numbers) == n else rows.picked(numbers),
        numbers,
        theirs if own is None else on_device(own, spec.settings.device),
        settings,
        settings.batch_size or rows.batch_size or config.microbatch or config.batch_size,
    )


def _check_batches(spec: ChainSpec) -> None:
    """Check that a sampler that accepts or refuses its steps has all data to do so."""
    name, n, size = spec.config.sampler.name, len(spec.rows), spec.config.batch_size
    if sampler_trial.needs_closure(spec.sampler) and size != n:
        raise ConfigError(
            f"sampler {name!r} accepts or refuses a step by the loss of all data: batch_size must "
            f"be {n}, the number of examples, got {size}; raise it, or use a sampler of "
            "minibatches, such as 'lmsgld'"
        )


def _check_loss(spec: ChainSpec) -> None:
    """Check that the loss gives what config and sampler need of it."""
    config, kind, name = spec.config, spec.kind, spec.config.sampler.name
    if config.save_losses and not kind.per_example:
        raise ConfigError(
            "save_losses needs a loss of one value per example, shape (batch,), and this one gives "
            "the batch mean: use reduction='none', or leave save_losses out"
        )
    if kind.coupled and (config.sampler.correct_heat or config.data_mode == "hop"):
        asked = "data_mode='hop'" if config.data_mode == "hop" else "sampler.correct_heat"
        raise ConfigError(
            f"{asked} needs examples whose losses do not depend on each other, and these do within "
            "a batch: leave it out, or give a loss of one value per example"
        )
    size, piece = config.batch_size, config.microbatch or config.batch_size
    if kind.least > min(size, piece, size % piece or piece):
        raise ConfigError(
            "a batch must hold two examples, because the loss does not work on a single one: raise "
            f"batch_size={size}{f' or microbatch={piece}' if config.microbatch else ''}, or keep "
            "the first dimension in the loss (a squeeze() takes it away)"
        )
    if kind.stochastic and sampler_trial.needs_closure(spec.sampler):
        raise ConfigError(
            f"sampler {name!r} needs a loss that is a function of the weights, and this one draws "
            f"at random: use mode='eval', got {config.mode!r}"
        )
