"""prepare(): checks model, data, loss and config against each other, and makes the ChainSpec.

Every mistake that can be seen before a run starts is an error here, which says what to do.
"""

import warnings
from dataclasses import replace
from pathlib import Path

from torch import nn

from distsampler.chains import hop, sampler_trial, user_observables
from distsampler.chains.observables import variables, wide_variables
from distsampler.chains.worker import ALONE
from distsampler.config import RunConfig
from distsampler.curvature import gradient_noise
from distsampler.curvature import watch as curvature_watch
from distsampler.data import shards
from distsampler.data.kinds import as_rows
from distsampler.data.rows import Rows
from distsampler.draws import Variable, WideVariable
from distsampler.errors import ConfigError
from distsampler.execution.pool import ChainPool, InspectsShards
from distsampler.facts import optimal_nbeta
from distsampler.models import sampler as by_name
from distsampler.models.loss import LossFn, inspect_loss
from distsampler.models.numerics import plain_modes
from distsampler.models.replica import ChainSpec
from distsampler.models.restriction import selected
from distsampler.optim.checks import check_parameter
from distsampler.recipe import with_functions


def prepare(
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig,
    inspect: shards.InspectShards = shards.inspect_shards,
) -> ChainSpec:
    """Check model, data, loss and config against each other, and return what chains are made of."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise ConfigError(f"the loss must be callable as loss(model, batch), got {loss!r}")
    with ALONE, plain_modes():
        rows = shards.cut(data, config, inspect) if config.data_mode == "hop" else as_rows(data)
        hop.check(config, rows)
        config = _with_batch_size(config, rows)
        moving = selected(model, config.restrict_to)
        for name in sorted(moving):
            check_parameter(model.get_parameter(name))
        config = with_functions(config, Path())
        sampler = by_name.resolve(config.sampler.name)
        nbeta = config.sampler.options.get("nbeta")
        nbeta = optimal_nbeta(len(rows)) if nbeta is None else nbeta
        metrics = sampler_trial.check(sampler, config, nbeta)
        if config.sampler.correct_heat:
            gradient_noise.batches(config, len(rows))
        per_example, stochastic = inspect_loss(model, rows, loss, config.mode, moving)
        spec = ChainSpec(
            model, rows, loss, config, float(nbeta), per_example, stochastic, sampler, metrics
        )
        _check_loss(spec)
        taken: list[Variable | WideVariable] = [*variables(spec), *wide_variables(spec)]
        return _watchable(replace(spec, observed=user_observables.try_observables(spec, taken)))


def inspector(pool: ChainPool | None) -> shards.InspectShards:
    """Return what inspects shards of data: the pool, where its chains will be, or this process."""
    return pool.inspect_shards if isinstance(pool, InspectsShards) else shards.inspect_shards


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


def _check_loss(spec: ChainSpec) -> None:
    """Check that the loss gives what config and sampler need of it."""
    config, n = spec.config, len(spec.rows)
    if config.save_losses and not spec.per_example:
        raise ConfigError(
            "save_losses needs a loss of one value per example, shape (batch,), and this one gives "
            "the batch mean: use reduction='none', or leave save_losses out"
        )
    if not sampler_trial.needs_closure(spec.sampler):
        return
    name = config.sampler.name
    if config.batch_size != n:
        raise ConfigError(
            f"sampler {name!r} accepts or refuses a step by the loss of all data: batch_size must "
            f"be {n}, the number of examples, got {config.batch_size}; raise it, or use a sampler "
            "of minibatches, such as 'lmsgld'"
        )
    if spec.stochastic:
        raise ConfigError(
            f"sampler {name!r} needs a loss that is a function of the weights, and this one draws "
            f"at random: use mode='eval', got {config.mode!r}"
        )


def _watchable(spec: ChainSpec) -> ChainSpec:
    """Return the spec; without its watch, and with a warning, where the loss cannot be watched."""
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
