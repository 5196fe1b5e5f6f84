"""From a YAML file to a run: RunConfig field for field, and model, data, loss by name."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distsampler.config import RunConfig
from distsampler.errors import ConfigError, unknown_name
from distsampler.references import Named

PARTS = ("model", "data", "loss")
CALIBRATION = "calibration"  # in a run's record: what pilots chose, beside the parts


@dataclass(frozen=True)
class Recipe:
    """A model, its data and loss, and how to sample them.

    Args:
        model: the trained module.
        data: the data set; see ``sample``.
        loss: ``loss(model, batch)``.
        config: what to sample, and for how long.
        record: the names of model, data and loss in a YAML file, which a run remembers; empty if
            they come from Python.
    """

    model: Any
    data: object
    loss: Callable[..., Any]
    config: RunConfig
    record: dict[str, Any] = field(default_factory=dict)


def load(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Reads a YAML file and calls what it names.

    ``model`` and ``data`` are called with ``model_kwargs`` and ``data_kwargs`` and give the module
    and the data; ``loss`` is the function itself, with ``loss_kwargs`` bound to it. A
    ``restrict_to`` that ends in ".npz" is a file of boolean masks by parameter name.

    Args:
        path: of the YAML file.
        changes: ``"sampler.lr=1e-5"``: fields to set, values in YAML.

    Raises:
        ConfigError: says where the file is wrong.
    """
    return of_fields(read(path, changes), path)


def read(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a YAML file, with changes; see ``load``.

    Raises:
        ConfigError: if it cannot be read, or a field cannot be set.
    """
    fields = _read(Path(path))
    for change in changes:
        _set(fields, change)
    return fields


def of_fields(fields: dict[str, Any], path: str | Path) -> Recipe:
    """The recipe that the fields of a YAML file make; see ``load``.

    Raises:
        ConfigError: says where they are wrong.
    """
    fields = dict(fields)
    record: dict[str, Any] = {"folder": str(Path(path).parent.absolute())}
    for part in PARTS:
        record[part] = fields.pop(part, None)
        record[f"{part}_kwargs"] = _options(f"{part}_kwargs", fields, path)
    known = (*RunConfig.model_fields, *PARTS, *(f"{part}_kwargs" for part in PARTS))
    for key, value in fields.items():
        if key not in RunConfig.model_fields:
            raise ConfigError(f"{path}: {unknown_name('option', str(key), known)}")
        if isinstance(value, dict):
            _see_names(path, key, value)
    record["restrict_to"] = fields.get("restrict_to")  # a file of masks, of which runs hold digests
    return resolve(record, RunConfig(**with_masks(fields, Path(record["folder"]))))


def reload(record: dict[str, Any], config: RunConfig, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a run that was started from a YAML file, with fields changed.

    Raises:
        ConfigError: if a field cannot be set, or what the file named is gone.
    """
    fields = {**config.model_dump(mode="json"), "restrict_to": record["restrict_to"]}
    for change in changes:
        _set(fields, change)
    return resolve(record, RunConfig(**with_masks(fields, Path(record["folder"]))))


def resolve(record: dict[str, Any], config: RunConfig) -> Recipe:
    """Imports and calls what a record names.

    Raises:
        ConfigError: if something cannot be imported or called.
    """
    folder = Path(record["folder"])
    found = {part: find_callable(part, record[part], folder) for part in PARTS}
    loss, bound = found["loss"], record["loss_kwargs"]
    config = with_functions(config, folder)
    return Recipe(
        call("model", found["model"], record["model_kwargs"]),
        call("data", found["data"], record["data_kwargs"]),
        functools.partial(loss, **bound) if bound else loss,
        config,
        record,
    )


def with_functions(config: RunConfig, folder: Path) -> RunConfig:
    """The config, with the observables that it only names imported.

    Args:
        config: of a run.
        folder: that files are named from.

    Raises:
        ConfigError: if one cannot be imported.
    """
    found = {}
    for name, each in config.observables.items():
        try:
            function = each.function or find_callable(f"observables.{name}", each.name, folder)
        except ConfigError as error:
            raise ConfigError(
                f"{error}; or give the function itself, from Python, in the config of "
                "sample(model, data, loss, config, store=..., resume='must') where a run goes on"
            ) from error
        found[name] = Named(each.name, function)
    return config.replaced(observables=found) if found else config


def write(recipe: Recipe, path: str | Path) -> None:
    """Writes a recipe as a YAML file that ``load`` reads; files are named as seen from there."""
    record, out = recipe.record, Path(path)
    folder = Path(record["folder"])
    fields: dict[str, Any] = {}
    for part in PARTS:
        fields[part] = _seen_from(out, record[part], folder)
        if record[f"{part}_kwargs"]:
            fields[f"{part}_kwargs"] = record[f"{part}_kwargs"]
    fields |= recipe.config.model_dump(mode="json", exclude_unset=True)
    for name, each in fields.get("observables", {}).items():
        fields["observables"][name] = _seen_from(out, each, folder)
    if record["restrict_to"] is not None:
        masked = isinstance(record["restrict_to"], str)
        fields["restrict_to"] = (
            str((folder / record["restrict_to"]).resolve()) if masked else record["restrict_to"]
        )
    out.write_text(yaml.safe_dump(fields, sort_keys=False))


def _options(name: str, fields: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Takes keyword arguments out of a file's fields."""
    found = fields.pop(name, None) or {}
    _see_names(path, name, found)
    return found


def _see_names(path: str | Path, name: str, options: object) -> None:
    """Sees that a field holds options by name."""
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ConfigError(f"{path}: {name} must hold options as 'name: value', got {options!r}")


def _seen_from(out: Path, name: str, folder: Path) -> str:
    """The name of a callable; one in a file, for a YAML file that may lie in another folder."""
    home, _, attribute = name.rpartition(":")
    if not home.endswith(".py") or folder == out.parent.absolute():
        return name
    return f"{(folder / home).resolve()}:{attribute}"


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} must be readable text: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{where}: must be YAML: {problem}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold options as 'key: value', got {type(fields).__name__}")
    return fields


def with_masks(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields, with the masks of a file in place of its name.

    Raises:
        ConfigError: if the file holds none.
    """
    name = fields.get("restrict_to")
    if not (isinstance(name, str) and name.endswith(".npz")):
        return fields
    try:
        with np.load(folder / name) as file:
            return {**fields, "restrict_to": dict(file)}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"restrict_to: {name} must be a file of numpy.savez: {error}") from None


def _set(fields: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals:
        raise ConfigError(f"--set needs key=value, as in sampler.lr=1e-5, got {change!r}")
    *path, last = key.strip().split(".")
    for part in path:
        fields = fields.setdefault(part, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"--set {key}: {part} holds no options")
    try:
        fields[last] = _number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"--set {key}: the value must be YAML, got {text!r}: {problem}") from None


def _number(value: object) -> object:
    """YAML 1.1 reads 1e-5 as text: it is meant as a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def find_callable(part: str, name: object, folder: Path) -> Callable[..., Any]:
    """The callable that ``module:callable`` or ``path/to/file.py:callable`` names.

    Raises:
        ConfigError: if there is none.
    """
    how = f"{part}: must be 'module:callable' or 'path/to/file.py:callable'"
    if not isinstance(name, str) or ":" not in name:
        raise ConfigError(f"{how}, got {name!r}")
    home, _, attribute = name.rpartition(":")
    try:
        module = _import_file(folder / home) if home.endswith(".py") else _import(home)
        found = getattr(module, attribute)
    except Exception as error:  # importing runs the user's code: anything can come
        raise ConfigError(
            f"{part}: {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ConfigError(f"{how}, but {name!r} is not callable: {type(found).__name__}")
    return found  # type: ignore[no-any-return]  # callable() does not narrow Any


def _import(name: str) -> object:
    """A module by name; the working directory comes first, as for a script."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(name)


def _import_file(path: Path) -> object:
    """A module from a file, beside which it finds its neighbours, as a script does.

    Its name is one that no import finds: what it defines is sent to the actors by value.
    """
    spec = importlib.util.spec_from_file_location(f"distsampler_file_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.absolute()))
    spec.loader.exec_module(module)
    return module


def call(part: str, function: Callable[..., Any], options: dict[str, Any]) -> object:
    """What a callable of the user gives.

    Raises:
        ConfigError: if it raises.
    """
    try:
        return function(**options)
    except ConfigError:
        raise
    except Exception as error:  # the user's code: anything can come
        raise ConfigError(
            f"{part}: {getattr(function, '__name__', function)}({options or ''}) raised "
            f"{type(error).__name__}: {error}"
        ) from error
