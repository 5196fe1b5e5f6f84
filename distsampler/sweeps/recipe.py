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

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from distsampler import recipe
from distsampler.config import Config
from distsampler.errors import ConfigError
from distsampler.recipe import Recipe
from distsampler.sampling.calibration import BIAS
from distsampler.sweeps import checkpoints
from distsampler.sweeps.plan import MAX_CELLS, Wanted


class SweepConfig(Config):
    """The block ``sweep`` of a YAML file; see ``sweeping.sweep``.

    Args:
        checkpoints: a file, glob or folder, a list of those, or a mapping from names to them.
        load: ``module:callable`` from a name to a state dict, where they are no files.
        restrictions: name -> ``restrict_to``.
        settings: name -> fields that differ.
        datasets: name -> keyword arguments of ``data``.
        calibrate: choose sampler, step and length by pilots.
        bias: wanted of them.
        max_cells: at most.
    """

    checkpoints: str | list[str] | dict[str, str] | None = None
    load: str | None = None
    restrictions: dict[str, Any] | None = None
    settings: dict[str, dict[str, Any]] | None = None
    datasets: dict[str, dict[str, Any]] | None = None
    calibrate: bool = False
    bias: float = BIAS
    max_cells: Annotated[int, Field(ge=1)] = MAX_CELLS


def load(path: Path, changes: Sequence[str] = (), max_cells: int | None = None) -> Wanted:
    """Reads a YAML file and calls what it names.

    Args:
        path: of the file.
        changes: fields to set, as for ``recipe.load``: "sweep.bias=0.02".
        max_cells: in place of the file's.

    Raises:
        ConfigError: says where the file is wrong.
    """
    fields = recipe.read(path, changes)
    block = fields.pop("sweep", None) or {}
    if not isinstance(block, dict):
        raise ConfigError(f"{path}: sweep must hold options, got {type(block).__name__}")
    try:
        asked = SweepConfig(**block)
    except ConfigError as error:
        raise ConfigError(f"{path}: sweep: {error}") from None
    if asked.datasets:
        first = next(iter(asked.datasets.values()))
        fields["data_kwargs"] = {**(fields.get("data_kwargs") or {}), **first}
    return _wanted(recipe.of_fields(fields, path), asked, path.parent, max_cells)


def _wanted(found: Recipe, asked: SweepConfig, folder: Path, max_cells: int | None) -> Wanted:
    return Wanted(
        found.model,
        _data(found, asked, folder),
        found.loss,
        found.config,
        checkpoints.find(asked.checkpoints, _load(asked, folder), folder),
        _restrictions(asked, folder),
        asked.settings,
        named_data=asked.datasets is not None,
        calibrate=asked.calibrate,
        bias=asked.bias,
        max_cells=asked.max_cells if max_cells is None else max_cells,
    )


def _data(found: Recipe, asked: SweepConfig, folder: Path) -> dict[str, object]:
    """The data sets; the first has been made with the recipe."""
    if asked.datasets is None:
        return {"data": found.data}
    function = recipe.find_callable("data", found.record["data"], folder)
    common, (first, *others) = found.record["data_kwargs"], asked.datasets
    made = {name: recipe.call("data", function, common | asked.datasets[name]) for name in others}
    return {first: found.data, **made}


def _load(asked: SweepConfig, folder: Path) -> checkpoints.Load | None:
    if asked.load is None:
        return None
    return recipe.find_callable("sweep.load", asked.load, folder)


def _restrictions(asked: SweepConfig, folder: Path) -> dict[str, Any] | None:
    if asked.restrictions is None:
        return None
    return {
        name: recipe.with_masks({"restrict_to": value}, folder)["restrict_to"]
        for name, value in asked.restrictions.items()
    }
