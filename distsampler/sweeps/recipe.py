"""From a YAML file to a sweep: what ``run`` reads, and a block ``sweep`` that says what is varied.

    model: mnist.py:network
    data: mnist.py:data
    loss: mnist.py:loss
    sampler: {localization: 1000.0}
    batch_size: 256
    sweep:
      checkpoints: runs/mnist/step*.pt          # or a folder, a list, a mapping of names
      restrictions: {all: null, head: ["7.*"]}
      settings: {cold: {}, hot: {sampler.nbeta: 50.0}}
      datasets: {train: {part: train}, test: {part: test}}   # keyword arguments of data
      calibrate: true

Files are named as seen from the YAML file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distsampler import recipe
from distsampler.errors import ConfigError
from distsampler.frozen import Config, Count
from distsampler.recipe import Recipe
from distsampler.references import find_callable
from distsampler.sampling.calibration import BIAS
from distsampler.sweeps import checkpoints
from distsampler.sweeps.plan import MAX_CELLS, SweepRequest


class SweepConfig(Config):
    """The block ``sweep`` of a YAML file; see ``sweep``."""

    checkpoints: str | list[str] | dict[str, str] | None = None
    load: str | None = None  # module:callable, or a callable in a file
    restrictions: dict[str, Any] | None = None
    settings: dict[str, dict[str, Any]] | None = None
    datasets: dict[str, dict[str, Any]] | None = None  # name -> keyword arguments of ``data``
    calibrate: bool = False
    bias: float = BIAS
    max_cells: Count = MAX_CELLS


def load(path: Path, changes: Sequence[str] = (), max_cells: int | None = None) -> SweepRequest:
    """Read a YAML file and call what it names.

    Args:
        path: the YAML file.
        changes: fields to set, as for ``recipe.load``: "sweep.bias=0.02".
        max_cells: largest number of cells, in place of the file's.

    Raises:
        ConfigError: says where the file is wrong.
    """
    fields = recipe.read(path, changes)
    block = fields.pop("sweep", None) or {}
    if not isinstance(block, dict):
        raise ConfigError(f"{path}: sweep must hold options, got {type(block).__name__}")
    try:
        config = SweepConfig(**block)
    except ConfigError as error:
        raise ConfigError(f"{path}: sweep: {error}") from None
    if config.datasets:
        first = next(iter(config.datasets.values()))
        fields["data_kwargs"] = {**(fields.get("data_kwargs") or {}), **first}
    return _request(recipe.of_fields(fields, path), config, path.parent, max_cells)


def _request(
    parts: Recipe, config: SweepConfig, folder: Path, max_cells: int | None
) -> SweepRequest:
    load = config.load
    reader = None if load is None else find_callable("sweep.load", load, folder)
    return SweepRequest(
        parts.model,
        _data(parts, config, folder),
        parts.loss,
        parts.config,
        checkpoints.find(config.checkpoints, reader, folder),
        _restrictions(config, folder),
        config.settings,
        parts.probes,
        named_data=config.datasets is not None,
        calibrate=config.calibrate,
        bias=config.bias,
        max_cells=config.max_cells if max_cells is None else max_cells,
    )


def _data(parts: Recipe, config: SweepConfig, folder: Path) -> dict[str, object]:
    """The data sets; the first has been made with the recipe."""
    if config.datasets is None:
        return {"data": parts.data}
    function = find_callable("data", parts.record["data"], folder)
    common, (first, *others) = parts.record["data_kwargs"], config.datasets
    made = {name: recipe.call("data", function, common | config.datasets[name]) for name in others}
    return {first: parts.data, **made}


def _restrictions(config: SweepConfig, folder: Path) -> dict[str, Any] | None:
    if config.restrictions is None:
        return None
    return {name: recipe.restriction(v, folder) for name, v in config.restrictions.items()}
