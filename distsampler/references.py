"""What a config refers to and a run directory cannot hold: functions by name, masks by digest.

A config that was read from a run directory says what was asked for. A function is imported by its
name, or given again; a mask must be given again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distsampler.errors import ConfigError


@dataclass(frozen=True)
class Named:
    """A function by its name.

    Args:
        name: ``module:callable`` or ``path/to/file.py:callable``; two are equal if it is.
        function: itself; None if it has not been imported.
    """

    name: str
    function: Callable[..., Any] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, given: object) -> Named:
        """A function, or the name of one.

        Raises:
            ConfigError: if it is neither.
        """
        if isinstance(given, Named):
            return given
        if isinstance(given, str):
            return cls(given)
        if not callable(given):
            raise ConfigError(f"must be a function, or 'module:callable', got {given!r}")
        function = given.func if isinstance(given, functools.partial) else given
        known = function if hasattr(function, "__qualname__") else type(function)
        return cls(f"{known.__module__}:{known.__qualname__}{_bound(given)}", given)

    def __str__(self) -> str:
        return self.name


def _bound(given: object) -> str:
    """What a partial function has bound: another one is another function."""
    if not isinstance(given, functools.partial):
        return ""
    pairs = (f"{key}={value!r}" for key, value in given.keywords.items())
    return f"({', '.join([*map(repr, given.args), *pairs])})"


@dataclass(frozen=True)
class Mask:
    """The entries of one parameter that move.

    Args:
        text: how many of which shape, and their digest; two masks are equal if it is.
        entries: True where an entry moves, in the parameter's shape; None if read from a run
            directory.
    """

    text: str
    entries: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, given: object) -> Mask:
        """A mask from a boolean tensor, array or nested list; from a text, its digest alone.

        Raises:
            ConfigError: if the entries are no booleans.
        """
        if isinstance(given, Mask):
            return given
        if isinstance(given, str):
            return cls(given)
        tensor: Any = given
        if hasattr(tensor, "detach"):
            given = tensor.detach().cpu().numpy()
        try:
            entries = np.asarray(given)
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


def patterns_or_masks(given: object) -> object:
    """``restrict_to`` as patterns or masks by name; what is neither is left to be refused.

    Raises:
        ConfigError: if it is nothing of the kind, or a mask is wrong.
    """
    match given:
        case None:
            return None
        case str():
            return (given,)
        case Mapping():
            return {str(name): _named(str(name), mask) for name, mask in given.items()}
        case list() | tuple() if all(isinstance(pattern, str) for pattern in given):
            return tuple(given)
        case _:
            raise ConfigError(
                "must be names or regular expressions of parameters, or masks by name, got "
                f"{given!r}"
            )


def _named(name: str, given: object) -> Mask:
    try:
        return Mask.of(given)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
