"""A recipe: model, data, loss and config; from a YAML file that names them, and back to one.

What is wrong in the file, or in what it names, is a ConfigError that says where.
"""

import functools
import zipfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distsampler.config import RunConfig, unknown_option
from distsampler.errors import ConfigError
from distsampler.redaction import missing, redacted, scrubbed
from distsampler.references import Named, find_callable

PARTS = ("model", "data", "loss")
PROBE_PARTS = ("data", "data_kwargs")  # of a named probe, beside its settings
CALIBRATION = "calibration"  # key of a record in older stores: what pilots chose


@dataclass(frozen=True)
class Recipe:
    """A model, its data and loss, and how to sample them."""

    model: Any  # the trained module
    data: object  # the data set; see ``sample``
    loss: Callable[..., Any]  # ``loss(model, batch)``
    config: RunConfig  # what to sample, and for how long
    probes: Mapping[str, object] = field(default_factory=dict)  # data of the named probes
    # the names of model, data and loss in a YAML file, and its folder, which a run
    # remembers; empty if they come from Python
    record: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None  # what pilots chose of the config, and why


def load(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a YAML file and call what it names.

    ``model`` and ``data`` are called with ``model_kwargs`` and ``data_kwargs`` and return the
    module and the data; ``loss`` is the function itself, with ``loss_kwargs`` bound to it. A
    ``restrict_to`` that ends in ".npz" is a file of boolean masks by parameter name.

    Args:
        path: the YAML file.
        changes: fields to set, values in YAML: ``"sampler.lr=1e-5"``.
    """
    return of_fields(read(path, changes), path)


def read(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields of a YAML file, with changes; see ``load``."""
    fields = _parse(Path(path))
    for change in changes:
        set_field(fields, change)
    return fields


def of_fields(fields: dict[str, Any], path: str | Path) -> Recipe:
    """Return the recipe that the fields of a YAML file make; see ``load``."""
    fields, folder = dict(fields), Path(path).parent.absolute()
    record: dict[str, Any] = {"folder": str(folder)}
    for part in PARTS:
        record[part] = fields.pop(part, None)
        record[f"{part}_kwargs"] = fields.pop(f"{part}_kwargs", None) or {}
        _check_options(path, f"{part}_kwargs", record[f"{part}_kwargs"])
    known = (*RunConfig.model_fields, *PARTS, *(f"{part}_kwargs" for part in PARTS))
    for key, value in fields.items():
        if key not in RunConfig.model_fields:
            raise ConfigError(f"{path}: {unknown_option('', str(key), known)}")
        if isinstance(value, dict):
            _check_options(path, key, value)
    _take_probes(path, fields, record)
    record["restrict_to"] = fields.get("restrict_to")  # a file of masks: configs hold digests
    return _resolve(record, fields)


def load_model(
    path: str | Path, changes: Sequence[str] = ()
) -> tuple[Any, dict[str, str | int] | None]:
    """Return the model that a YAML file names, and its field ``components``; see ``load``.

    Nothing else in the file is read: it needs no data and no loss yet.
    """
    fields, folder = read(path, changes), Path(path).parent.absolute()
    options = fields.get("model_kwargs") or {}
    _check_options(path, "model_kwargs", options)
    model = call("model", find_callable("model", fields.get("model"), folder), options)
    return model, RunConfig(components=fields.get("components")).components


def reload(record: dict[str, Any], config: RunConfig, changes: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a run that was started from a YAML file, with fields changed."""
    lacking = {"folder", "restrict_to", *PARTS}.difference(record)
    if lacking:
        raise ConfigError(f"the record of a run must name model, data and loss: {lacking} lack")
    for part in PARTS:
        _check_options("run.json", f"{part}_kwargs", record.get(f"{part}_kwargs"))
    fields = {**config.model_dump(mode="json"), "restrict_to": record["restrict_to"]}
    record = deepcopy(record)
    lost = set(missing(record))
    for change in changes:
        set_field(record if change.partition("=")[0].strip() in lost else fields, change)
    _take_probes("run.json", fields, record)
    return _resolve(record, fields)


def write(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe as a YAML file that ``load`` reads; files are named as seen from there.

    Secrets are left out, and are to be written in again.
    """
    record, out = recipe.record, Path(path)
    folder = Path(record["folder"])
    fields: dict[str, Any] = {}
    for part in PARTS:
        fields[part] = _seen_from(out, record[part], folder)
        if record[f"{part}_kwargs"]:
            fields[f"{part}_kwargs"] = record[f"{part}_kwargs"]
    fields |= recipe.config.model_dump(mode="json", exclude_unset=True)
    for name, function in fields.get("observables", {}).items():
        fields["observables"][name] = _seen_from(out, function, folder)
    for name, options in fields.get("probes", {}).items():
        if options.get("loss") is not None:
            options["loss"] = _seen_from(out, options["loss"], folder)
        made = dict(record.get("probes", {}).get(name, {}))
        fields["probes"][name] = made | options | {"data": _seen_from(out, made["data"], folder)}
    if record["restrict_to"] is not None:
        moves = record["restrict_to"]
        fields["restrict_to"] = str((folder / moves).resolve()) if isinstance(moves, str) else moves
    out.write_text(yaml.safe_dump(redacted(fields), sort_keys=False))


def with_functions(config: RunConfig, folder: Path) -> RunConfig:
    """Return the config with observables and losses of probes imported that it only names.

    Args:
        config: what to sample, and for how long.
        folder: where paths of files start.
    """
    functions = {}
    for name, named in config.observables.items():
        try:
            function = named.function or find_callable(f"observables.{name}", named.name, folder)
        except ConfigError as error:
            raise ConfigError(
                f"{error}; or give the function itself, from Python, in the config of "
                "sample(model, data, loss, config, store=..., resume='must') where a run goes on"
            ) from error
        functions[name] = Named(named.name, function)
    if functions:
        config = config.replaced(observables=functions)
    probes = {}
    for name, probe in config.probes.items():
        probes[name] = probe
        if probe.loss is not None and probe.loss.function is None:
            loss = find_callable(f"probes.{name}.loss", probe.loss.name, folder)
            probes[name] = probe.replaced(loss=Named(probe.loss.name, loss))
    return config.replaced(probes=probes) if probes else config


def restriction(restrict_to: object, folder: Path) -> object:
    """Return ``restrict_to``; the masks themselves where it names a file of them."""
    if not (isinstance(restrict_to, str) and restrict_to.endswith(".npz")):
        return restrict_to
    try:
        with np.load(folder / restrict_to) as file:
            return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"restrict_to: {restrict_to} must be a file of numpy.savez: {error}"
        ) from None


def set_field(fields: dict[str, Any], change: str) -> None:
    """Set a field of a YAML file, as in ``"sampler.lr=1e-5"``."""
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


def call(part: str, function: Callable[..., Any], options: dict[str, Any]) -> object:
    """Call a function that makes a part of a recipe."""
    try:
        return function(**options)
    except ConfigError:
        raise
    except Exception as error:  # the user's code: anything can come
        raise ConfigError(
            f"{part}: {getattr(function, '__name__', function)}"
            f"({redacted(options, named=True) or ''}) raised {type(error).__name__}: "
            + scrubbed(str(error), options)
        ) from error


def _resolve(record: dict[str, Any], fields: dict[str, Any]) -> Recipe:
    """Make the config, and import and call what a record names."""
    if lost := sorted(missing(record)):
        again = " ".join(f"--set {path}=..." for path in lost)
        raise ConfigError(
            f"{', '.join(lost)} must be given again, for secrets are not kept: {again}; or "
            "continue from the file that has them, with 'distsampler run FILE.yaml --resume must'"
        )
    folder = Path(str(record["folder"]))
    if "restrict_to" in fields:
        fields = {**fields, "restrict_to": restriction(fields["restrict_to"], folder)}
    config = RunConfig(**fields)
    model, data, loss = (find_callable(part, record[part], folder) for part in PARTS)
    bound = record["loss_kwargs"]
    config = with_functions(config, folder)
    return Recipe(
        call("model", model, record["model_kwargs"]),
        call("data", data, record["data_kwargs"]),
        functools.partial(loss, **bound) if bound else loss,
        config,
        {name: _data_of(name, made, folder) for name, made in record.get("probes", {}).items()},
        record,
    )


def _take_probes(path: str | Path, fields: dict[str, Any], record: dict[str, Any]) -> None:
    """Take what makes the data of the named probes from the fields into the record."""
    before, probes = record.get("probes", {}), fields.get("probes") or {}
    _check_options(path, "probes", probes)
    made, settings = dict[str, Any](), dict[str, Any]()
    for name, options in probes.items():
        _check_options(path, f"probes.{name}", options)
        made[name] = before.get(name, {}) | {k: options[k] for k in PROBE_PARTS if k in options}
        settings[name] = {k: v for k, v in options.items() if k not in PROBE_PARTS}
        _check_options(path, f"probes.{name}.data_kwargs", made[name].get("data_kwargs") or {})
    if probes:
        record["probes"], fields["probes"] = made, settings


def _data_of(name: str, made: dict[str, Any], folder: Path) -> object:
    """The data of a named probe."""
    part = f"probes.{name}.data"
    function = find_callable(part, made.get("data"), folder)
    return call(part, function, made.get("data_kwargs") or {})


def _check_options(path: str | Path, name: str, options: object) -> None:
    """Check that a field holds options by name."""
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        shown = redacted(options, named=True)
        raise ConfigError(f"{path}: {name} must hold options as 'name: value', got {shown!r}")


def _seen_from(out: Path, name: str, folder: Path) -> str:
    """Return the name of a callable for a YAML file that may lie in another folder."""
    home, _, attribute = name.rpartition(":")
    if not home.endswith(".py") or folder == out.parent.absolute():
        return name
    return f"{(folder / home).resolve()}:{attribute}"


def _parse(path: Path) -> dict[str, Any]:
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


def _number(value: object) -> object:
    """Return the number that a text was meant as: YAML 1.1 reads 1e-5 as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
