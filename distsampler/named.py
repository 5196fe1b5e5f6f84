"""Named: a function that a config holds, and the name that stands for it in YAML and JSON.

A run directory holds the name alone: a config that was read from there says what was asked for, and
the function is imported by that name, or given again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
