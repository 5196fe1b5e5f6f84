"""Plan: a sweep that was checked before anything starts, so that a mistake is told at once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from distsampler.config import RunConfig
from distsampler.data.rows import as_rows
from distsampler.data.shards import is_made
from distsampler.errors import ConfigError
from distsampler.models.loss import LossFn
from distsampler.sampling.calibration import BIAS
from distsampler.sampling.fingerprint import versions
from distsampler.sampling.sample import prepare
from distsampler.sweeps import cells as grid
from distsampler.sweeps import checkpoints
from distsampler.sweeps.cells import Cell
from distsampler.sweeps.checkpoints import Checkpoint
from distsampler.sweeps.manifest import SweepManifest

MAX_CELLS = 1000


@dataclass(frozen=True)
class Wanted:
    """What a sweep is asked for, from Python or a file.

    Args:
        model: of the checkpoints' architecture.
        data: label -> data set.
        loss: as for ``sample``.
        config: of all cells.
        checkpoints: in their order.
        restrictions: label -> ``restrict_to``; None: the config's.
        settings: label -> fields that differ from the config; None: none.
        named_data: whether cells are named by their data sets.
        calibrate: choose sampler, step and length by pilots.
        bias: wanted of them.
        max_cells: at most.
    """

    model: nn.Module
    data: Mapping[str, object]
    loss: LossFn
    config: RunConfig
    checkpoints: Sequence[Checkpoint]
    restrictions: Mapping[str, Any] | None = None
    settings: Mapping[str, Mapping[str, Any]] | None = None
    named_data: bool = False
    calibrate: bool = False
    bias: float = BIAS
    max_cells: int = MAX_CELLS


@dataclass(frozen=True)
class Plan:
    """A sweep that can be run.

    Args:
        wanted: what it was asked for.
        manifest: what is kept of that.
        cells: all of them.
        configs: (restriction, setting) -> config of their cells, but the seed.
        checkpoints: label -> where its weights come from.
    """

    wanted: Wanted
    manifest: SweepManifest
    cells: tuple[Cell, ...]
    configs: Mapping[tuple[str, str], RunConfig] = field(repr=False)
    checkpoints: Mapping[str, Checkpoint] = field(repr=False)

    def config(self, cell: Cell) -> RunConfig:
        """Of a cell, with its own seed."""
        config = self.configs[cell.restriction, cell.setting]
        return config.replaced(seed=grid.seed_of(config, cell))

    def leader(self, cell: Cell) -> Cell:
        """The first checkpoint of the cell's row."""
        return next(each for each in self.cells if each.row == cell.row)


def made(wanted: Wanted) -> Plan:
    """Checks a sweep.

    Raises:
        ConfigError: says what must hold, what was got and what to do.
    """
    _check_arguments(wanted)
    wanted = replace(wanted, data={label: _held(wanted, label) for label in wanted.data})
    restrictions = _restrictions(wanted)
    settings: Mapping[str, Mapping[str, Any]] = wanted.settings or {"config": {}}
    configs = {
        (restriction, setting): config
        for setting, overrides in settings.items()
        for restriction, config in _restricted(wanted, restrictions, setting, overrides).items()
    }
    manifest = _manifest(wanted, restrictions, settings)
    cells = grid.cells(manifest.labels, manifest.named)
    _check_checkpoints(wanted)
    _check_rows(wanted, configs)
    sources = {each.name: each for each in wanted.checkpoints}
    return Plan(wanted, manifest, cells, configs, sources)


def _manifest(
    wanted: Wanted, restrictions: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]
) -> SweepManifest:
    return SweepManifest(
        config=wanted.config,
        checkpoints={each.name: each.step for each in wanted.checkpoints},
        restrictions={
            name: wanted.config.replaced(restrict_to=value).model_dump(mode="json")["restrict_to"]
            for name, value in restrictions.items()
        },
        settings={name: _plain(overrides) for name, overrides in settings.items()},
        data=tuple(wanted.data),
        named=_named(wanted),
        calibrate=wanted.calibrate,
        bias=wanted.bias,
        versions=versions(),
    )


def _check_arguments(wanted: Wanted) -> None:
    if not isinstance(wanted.model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module, got {type(wanted.model).__name__}")
    if not 0 < wanted.bias < 1:
        raise ConfigError(f"bias must be between 0 and 1, a part of the LLC: got {wanted.bias}")
    labels = {
        "checkpoint": [each.name for each in wanted.checkpoints],
        "restriction": list(_restrictions(wanted)),
        "setting": ["config"] if wanted.settings is None else list(wanted.settings),
        "data": list(wanted.data),
    }
    grid.check_number(labels, wanted.max_cells)
    for dim, names in labels.items():
        grid.check_labels(dim, names)


def _held(wanted: Wanted, label: str) -> object:
    """A data set as rows: all cells have the same ones, which are sent and digested once."""
    data = wanted.data[label]
    try:
        if is_made(data):
            return data  # by the actors, and not here
        if isinstance(data, list):  # of shards
            return [as_rows(each) for each in data] if wanted.config.data_mode == "hop" else data
        return as_rows(data)
    except ConfigError as error:
        raise ConfigError(f"data {label!r}: {error}") from None


def _restrictions(wanted: Wanted) -> Mapping[str, Any]:
    if wanted.restrictions is not None:
        return wanted.restrictions
    given = wanted.config.restrict_to
    return {"all" if given is None else "config": given}


def _named(wanted: Wanted) -> tuple[str, ...]:
    """Dimensions that were asked for."""
    asked = {
        "restriction": wanted.restrictions is not None,
        "setting": wanted.settings is not None,
        "data": wanted.named_data,
    }
    return tuple(dim for dim, named in asked.items() if named)


def _restricted(
    wanted: Wanted, restrictions: Mapping[str, Any], setting: str, overrides: Mapping[str, Any]
) -> dict[str, RunConfig]:
    """The configs of one setting, by restriction."""
    try:
        config = grid.altered(wanted.config, overrides)
    except ConfigError as error:
        raise ConfigError(f"setting {setting!r}: {error}") from None
    found = {}
    for name, value in restrictions.items():
        try:
            found[name] = config.replaced(restrict_to=value)
        except ConfigError as error:
            raise ConfigError(f"restriction {name!r}: {error}") from None
    return found


def _check_checkpoints(wanted: Wanted) -> None:
    """Holds each against the model, as far as that can be known without calling ``load``."""
    for each in wanted.checkpoints:
        checkpoints.check(wanted.model, each)


def _check_rows(wanted: Wanted, configs: Mapping[tuple[str, str], RunConfig]) -> None:
    """Prepares a run of the model itself for each row; cautions are given with the cells."""
    for (restriction, setting), config in configs.items():
        for label, data in wanted.data.items():
            if is_made(data):
                continue  # by the actors, and not here
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    prepare(wanted.model, data, wanted.loss, config)
            except ConfigError as error:
                where = f"restriction {restriction!r}, setting {setting!r}, data {label!r}"
                raise ConfigError(f"{where}: {error}") from None


def _plain(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A setting as JSON can keep it."""
    nested = (Mapping, list, tuple, str, int, float, bool, type(None))
    return {
        key: value.model_dump(mode="json", exclude_unset=True)
        if hasattr(value, "model_dump")
        else value
        if isinstance(value, nested)
        else str(value)
        for key, value in overrides.items()
    }
