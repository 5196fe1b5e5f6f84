"""Mask: which entries of a parameter move, as a value of the config.

A run directory holds a mask's digest, not its entries: that tells one mask from another, whatever
their size. So a config that was read from a run directory says what was masked, and cannot mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distsampler.errors import ConfigError


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


def parse(given: object) -> object:
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
