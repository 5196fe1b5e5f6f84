"""The cells of a sweep: every checkpoint with every restriction, setting and data set.

A cell's name is made of its labels along the dimensions that were asked for, and its seed of the
sweep's seed and that name: so the cells' errors are independent, and a cell's bits do not depend on
which other cells there are.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distsampler.config import Config, RunConfig
from distsampler.errors import ConfigError, unknown_name

DIMS = ("checkpoint", "restriction", "setting", "data")
PLURALS = {dim: f"{dim}s" for dim in DIMS} | {"data": "data sets"}
SHARED = ("device", "placement", "deterministic", "threads")  # actors go from cell to cell
_SEEDS = 78  # spawn key: apart from chains' and pilots'


@dataclass(frozen=True)
class Cell:
    """One estimate of a sweep.

    Args:
        name: of its store, under ``cells``.
        checkpoint: label, and so are the others.
        restriction: which parameters move.
        setting: what differs from the config.
        data: which data set.
    """

    name: str
    checkpoint: str
    restriction: str
    setting: str
    data: str

    @property
    def row(self) -> tuple[str, str, str]:
        """What it shares with the same estimate at the other checkpoints."""
        return self.restriction, self.setting, self.data

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def cells(labels: Mapping[str, Iterable[str]], named: Iterable[str]) -> tuple[Cell, ...]:
    """All cells, the checkpoints of one row after another.

    Args:
        labels: of each dimension.
        named: dimensions that cells are named by, beside the checkpoint.

    Raises:
        ConfigError: if two have one name.
    """
    kept = [dim for dim in DIMS if dim == "checkpoint" or dim in set(named)]
    lists = {dim: tuple(labels[dim]) for dim in DIMS}
    found = []
    for restriction, setting, data in itertools.product(*(lists[dim] for dim in DIMS[1:])):
        for checkpoint in lists["checkpoint"]:
            place = dict(zip(DIMS, (checkpoint, restriction, setting, data), strict=True))
            found.append(Cell("--".join(place[dim] for dim in kept), **place))
    _check_unique("cells", [cell.name for cell in found])
    return tuple(found)


def check_number(labels: Mapping[str, Iterable[str]], max_cells: int) -> None:
    """Sees that a sweep is not larger than was meant.

    Raises:
        ConfigError: says how many cells there would be.
    """
    sizes = {dim: len(tuple(labels[dim])) for dim in DIMS}
    number = int(np.prod(list(sizes.values())))
    if number > max_cells:
        shown = " x ".join(f"{size} {PLURALS[dim]}" for dim, size in sizes.items())
        raise ConfigError(
            f"a sweep must have at most max_cells={max_cells} cells, and this one would have "
            f"{number} ({shown}): raise max_cells, or ask for fewer"
        )


def altered(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """A config with the fields of a setting, validated anew.

    Args:
        config: of the sweep.
        overrides: fields, nested (``{"sampler": {"lr": 1e-4}}``) or by path (``{"sampler.lr":
            1e-4}``).

    Raises:
        ConfigError: if there is no such field, or it belongs to the sweep as a whole.
    """
    changes: dict[str, Any] = {}
    for path, value in overrides.items():
        home, _, option = path.partition(".")
        if home not in RunConfig.model_fields:
            raise ConfigError(unknown_name("option", home, RunConfig.model_fields))
        if home in SHARED:
            raise ConfigError(f"{home} must be the same for all cells: set it in the config")
        before = changes.get(home, getattr(config, home))
        if isinstance(before, Config) and (option or isinstance(value, Mapping)):
            changes[home] = before.replaced(**({option: value} if option else value))
        elif option:
            raise ConfigError(f"{path}: {home} holds no options")
        else:
            changes[home] = value
    return config.replaced(**changes)


def seed_of(config: RunConfig, cell: Cell) -> int:
    """A seed of the cell's own."""
    words = np.frombuffer(hashlib.blake2b(cell.name.encode(), digest_size=16).digest(), np.uint32)
    found = np.random.SeedSequence(config.seed, spawn_key=(_SEEDS, *words.tolist()))
    return int(found.generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_labels(dim: str, names: Sequence[str]) -> None:
    """Sees that labels can name folders, and are different.

    Raises:
        ConfigError: if not.
    """
    if not names:
        raise ConfigError(f"a sweep must have at least one {dim}, got none")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w+=@][\w.+=@-]*", name):
            raise ConfigError(
                f"the name of a {dim} must be letters, digits and any of . _ + = @ -, for it names "
                f"a folder: got {name!r}; give a mapping of names"
            )
    _check_unique(PLURALS[dim], names)


def _check_unique(what: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"two {what} must not have one name: got {', '.join(map(repr, twice[:5]))} more than "
            "once; give a mapping of names"
        )
