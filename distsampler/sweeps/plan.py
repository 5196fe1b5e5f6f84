"""Plan: a sweep that was checked before anything starts, so that a mistake is reported at once."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from distsampler.config import RunConfig
from distsampler.data.kinds import as_rows
from distsampler.data.shards import is_made
from distsampler.errors import ConfigError
from distsampler.frozen import Config
from distsampler.models.loss import LossFn
from distsampler.models.sampler import lacks_lr
from distsampler.sampling.calibration import BIAS
from distsampler.sampling.fingerprint import versions
from distsampler.sampling.prepare import prepare
from distsampler.sweeps import checkpoints
from distsampler.sweeps.cells import Cell, Grid
from distsampler.sweeps.checkpoints import Checkpoint
from distsampler.sweeps.manifest import SweepManifest

MAX_CELLS = 1000
SHARED = ("device", "placement", "deterministic", "threads")  # actors go from cell to cell


@dataclass(frozen=True)
class SweepRequest:
    """What a sweep is asked for, from Python or a file; see ``sweep``."""

    model: nn.Module
    data: Mapping[str, object]  # label -> data set
    loss: LossFn
    config: RunConfig
    checkpoints: Sequence[Checkpoint]
    restrictions: Mapping[str, Any] | None = None
    settings: Mapping[str, Mapping[str, Any]] | None = None
    probes: Mapping[str, object] = field(default_factory=dict)  # data of the named probes
    named_data: bool = False  # whether cells are named by their data sets
    calibrate: bool = False
    bias: float = BIAS
    max_cells: int = MAX_CELLS

    @property
    def restrict_to(self) -> Mapping[str, Any]:
        """Label -> ``restrict_to`` of every restriction, the config's own included."""
        if self.restrictions is not None:
            return self.restrictions
        own = self.config.restrict_to
        return {"all" if own is None else "config": own}

    @property
    def overrides(self) -> Mapping[str, Mapping[str, Any]]:
        """Label -> fields that differ from the config, of every setting."""
        return {"config": {}} if self.settings is None else self.settings

    @property
    def grid(self) -> Grid:
        """The labels of each dimension."""
        asked = {
            "restriction": self.restrictions is not None,
            "setting": self.settings is not None,
            "data": self.named_data,
        }
        return Grid(
            tuple(each.name for each in self.checkpoints),
            tuple(self.restrict_to),
            tuple(self.overrides),
            tuple(self.data),
            tuple(dim for dim, named in asked.items() if named),
        )


@dataclass(frozen=True)
class Plan:
    """A checked sweep, which can be run."""

    request: SweepRequest  # its data as rows
    manifest: SweepManifest
    # (restriction, setting) -> config of their cells, before each gets its seed
    configs: Mapping[tuple[str, str], RunConfig] = field(repr=False)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells of the sweep."""
        return self.manifest.grid.cells

    def config(self, cell: Cell) -> RunConfig:
        """Return the config of a cell, with its own seed."""
        config = self.configs[cell.restriction, cell.setting]
        return config.replaced(seed=cell.seed(config.seed))

    def model(self, cell: Cell) -> nn.Module:
        """Return the model of a cell, with the weights of its checkpoint.

        Raises:
            ConfigError: if the checkpoint cannot be read, or is not one of the model.
        """
        sources = {each.name: each for each in self.request.checkpoints}
        return checkpoints.loaded(self.request.model, sources[cell.checkpoint])

    def tunes(self, cell: Cell) -> bool:
        """Return whether pilots choose for a cell: where that is asked for, or it has no lr."""
        config = self.configs[cell.restriction, cell.setting]
        return self.request.calibrate or lacks_lr(config.sampler)

    @cached_property
    def leaders(self) -> dict[tuple[str, str, str], Cell]:
        """Row -> its first checkpoint's cell, from whose pilots the others start, if any."""
        first = self.request.checkpoints[0].name
        return {c.row: c for c in self.cells if c.checkpoint == first and self.tunes(c)}


def make_plan(request: SweepRequest) -> Plan:
    """Check a sweep.

    Raises:
        ConfigError: says what must hold, what was got and what to do.
    """
    if not isinstance(request.model, nn.Module):
        got = type(request.model).__name__
        raise ConfigError(f"the model must be a torch.nn.Module, got {got}")
    if not 0 < request.bias < 1:
        raise ConfigError(f"bias must be between 0 and 1, a part of the LLC: got {request.bias}")
    _check_names(request)
    request.grid.check(request.max_cells)
    request = replace(request, data={label: _as_rows(request, label) for label in request.data})
    request = replace(request, probes=_probes_as_rows(request))
    configs = {
        (restriction, setting): config
        for setting in request.overrides
        for restriction, config in _configs(request, setting).items()
    }
    for each in request.checkpoints:
        checkpoints.check(request.model, each)
    _check_rows(request, configs)
    return Plan(request, _manifest(request, configs), configs)


def _check_names(request: SweepRequest) -> None:
    """Check that what gives cells their names has names."""
    every = {
        "restrictions": (request.restrictions, "{'head': 'l0h3'}"),
        "settings": (request.settings, "{'hot': {'sampler.nbeta': 10.0}}"),
        "datasets": (request.data, "{'code': data}"),
    }
    for what, (value, example) in every.items():
        if value is not None and not isinstance(value, Mapping):
            got = f"{type(value).__name__}: give them as {example}"
            raise ConfigError(f"{what} must have names, by which cells are called, got a {got}")


def altered(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """Return a config with the fields of a setting, validated again; see ``Config.merged``.

    Raises:
        ConfigError: if there is no such field, or it belongs to the sweep as a whole.
    """
    for path in overrides:
        if (home := path.partition(".")[0]) in SHARED:
            raise ConfigError(f"{home} must be the same for all cells: set it in the config")
    return config.merged(overrides)


def _manifest(request: SweepRequest, configs: Mapping[tuple[str, str], RunConfig]) -> SweepManifest:
    grid = request.grid
    restricted = {
        restriction: config.model_dump(mode="json", include={"restrict_to"})["restrict_to"]
        for (restriction, _), config in configs.items()
    }
    return SweepManifest(
        config=request.config,
        checkpoints={each.name: each.step for each in request.checkpoints},
        restrictions=restricted,
        settings={name: _plain(overrides) for name, overrides in request.overrides.items()},
        data=grid.data,
        named=grid.named,
        calibrate=request.calibrate,
        bias=request.bias,
        versions=versions(),
    )


def _as_rows(request: SweepRequest, label: str) -> object:
    """A data set as rows: all cells have the same ones, which are sent and digested once."""
    data = request.data[label]
    with _naming(f"data {label!r}"):
        if is_made(data):
            return data  # by the actors, and not here
        if isinstance(data, list):  # of shards
            return [as_rows(each) for each in data] if request.config.data_mode == "hop" else data
        return as_rows(data)


def _probes_as_rows(request: SweepRequest) -> dict[str, object]:
    """The data of the named probes as rows, the same ones for all cells."""
    made = dict[str, object]()
    for name, data in request.probes.items():
        with _naming(f"probes.{name}"):
            made[name] = as_rows(data)
    return made


def _configs(request: SweepRequest, setting: str) -> dict[str, RunConfig]:
    """The configs of one setting, by restriction."""
    with _naming(f"setting {setting!r}"):
        config = altered(request.config, request.overrides[setting])
    configs = {}
    for name, value in request.restrict_to.items():
        with _naming(f"restriction {name!r}"):
            configs[name] = config.replaced(restrict_to=value)
    return configs


def _check_rows(request: SweepRequest, configs: Mapping[tuple[str, str], RunConfig]) -> None:
    """Prepare a run of the model itself for each row; warnings come with the cells."""
    for (restriction, setting), config in configs.items():
        for label, data in request.data.items():
            if is_made(data):
                continue  # by the actors, and not here
            where = f"restriction {restriction!r}, setting {setting!r}, data {label!r}"
            with _naming(where), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                prepare(request.model, data, request.loss, config, probes=request.probes)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """What is wrong in here is said of a part of the sweep."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


def _plain(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A setting as JSON can keep it."""
    nested = (Mapping, list, tuple, str, int, float, bool, type(None))
    return {
        key: value.model_dump(mode="json", exclude_unset=True)
        if isinstance(value, Config)
        else value
        if isinstance(value, nested)
        else str(value)
        for key, value in overrides.items()
    }
