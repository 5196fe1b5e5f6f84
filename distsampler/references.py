"""What a config refers to and a run directory cannot hold: functions by name, masks by digest.

A config that was read from a run directory says what was asked for: a function is imported by its
name, or given again; a mask must be given again. What is neither is a ConfigError.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distsampler.errors import ConfigError


@dataclass(frozen=True)
class Named:
    """A function by its name; two are equal if their names are."""

    name: str  # ``module:callable`` or ``path/to/file.py:callable``
    # the function; None if it has not been imported
    function: Callable[..., Any] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, function: object) -> Named:
        """Return a function, or what has the name of one, by its name."""
        if isinstance(function, Named):
            return function
        if isinstance(function, str):
            return cls(function)
        if not callable(function):
            raise ConfigError(f"must be a function, or 'module:callable', got {function!r}")
        inner = function.func if isinstance(function, functools.partial) else function
        home = inner if hasattr(inner, "__qualname__") else type(inner)
        return cls(f"{home.__module__}:{home.__qualname__}{_bound(function)}", function)

    def __str__(self) -> str:
        return self.name


def _bound(function: object) -> str:
    """Return what a partial function has bound: with other values it is another function."""
    if not isinstance(function, functools.partial):
        return ""
    pairs = (f"{key}={value!r}" for key, value in function.keywords.items())
    return f"({', '.join([*map(repr, function.args), *pairs])})"


def find_callable(part: str, name: object, folder: Path) -> Callable[..., Any]:
    """Return the callable of the name ``module:callable`` or ``path/to/file.py:callable``.

    Args:
        part: what needs it, for the error.
        name: its name.
        folder: where paths of files start.
    """
    how = f"{part}: must be 'module:callable' or 'path/to/file.py:callable'"
    if not isinstance(name, str) or ":" not in name:
        raise ConfigError(f"{how}, got {name!r}")
    home, _, attribute = name.rpartition(":")
    try:
        module = _import_file(folder / home) if home.endswith(".py") else _import(home)
        value = getattr(module, attribute)
    except Exception as error:  # importing runs the user's code: anything can come
        raise ConfigError(
            f"{part}: {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(value):
        raise ConfigError(f"{how}, but {name!r} is not callable: {type(value).__name__}")
    return value  # type: ignore[no-any-return]  # callable() does not narrow Any


def _import(name: str) -> object:
    """Import a module; the working directory comes first, as for a script."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(name)


def _import_file(path: Path) -> object:
    """Import a file, beside which it finds its neighbours, as a script does.

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


@dataclass(frozen=True)
class Mask:
    """The entries of one parameter that move; two masks are equal if their texts are."""

    text: str  # number of entries that move, shape, and digest of the entries
    # True where an entry moves, in the parameter's shape; None if read from a run directory
    entries: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, mask: object) -> Mask:
        """Return the mask of a boolean tensor, array or nested list, or, by a text, its digest."""
        if isinstance(mask, Mask):
            return mask
        if isinstance(mask, str):
            return cls(mask)
        tensor: Any = mask
        try:
            entries = np.asarray(tensor.detach().cpu() if hasattr(tensor, "detach") else mask)
        except ValueError as error:  # rows of different lengths
            raise ConfigError(f"a mask must be rectangular: {error}") from None
        if entries.dtype != np.bool_:
            raise ConfigError(
                f"a mask must hold booleans, got {entries.dtype}: compare, or call .bool() on it"
            )
        bits = hashlib.blake2b(np.packbits(entries).tobytes(), digest_size=16)
        bits.update(str(entries.shape).encode())
        count = f"{int(entries.sum())} of {entries.size} entries"
        return cls(f"{count}, shape {entries.shape}, {bits.hexdigest()}", entries.copy())

    def __str__(self) -> str:
        return self.text


def patterns_or_masks(restrict_to: object) -> object:
    """Return ``restrict_to`` as patterns, or as masks by name."""
    match restrict_to:
        case None:
            return None
        case str():
            return (restrict_to,)
        case Mapping():
            return {str(name): _mask(str(name), mask) for name, mask in restrict_to.items()}
        case list() | tuple() if all(isinstance(pattern, str) for pattern in restrict_to):
            return tuple(restrict_to)
        case _:
            raise ConfigError(
                "must be names or regular expressions of parameters, components, or masks by name, "
                f"got {restrict_to!r}"
            )


def _mask(name: str, mask: object) -> Mask:
    try:
        return Mask.of(mask)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def path_here() -> list[str]:
    """Return the folders from which this process imports."""
    return [os.path.abspath(folder) for folder in sys.path]


def follow_path(path: Sequence[str], code_was_sent: bool) -> None:
    """Let this process import from the driver's folders too, as far as they exist here.

    Those that stand before the standard library in the driver stand first here too, so that the
    same name is the same module, unless code was sent with the runtime environment: that is first.
    """
    others = [folder for folder in path if folder not in sys.path and os.path.exists(folder)]
    library = os.path.dirname(os.__file__)
    first = path.index(library) if library in path and not code_was_sent else 0
    before = [folder for folder in others if folder in path[:first]]
    sys.path[:] = [*before, *sys.path, *(folder for folder in others if folder not in before)]
