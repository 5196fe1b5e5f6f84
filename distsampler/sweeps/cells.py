"""The cells of a sweep: every checkpoint with every restriction, setting and data set.

A cell's name joins its labels along the dimensions that were asked for, and its seed is made of the
sweep's seed and that name: so the cells' errors are independent, and a cell's bits do not depend on
which other cells there are.
"""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distsampler.errors import ConfigError

CELL_DIMS = ("checkpoint", "restriction", "setting", "data")
PLURALS = {dim: f"{dim}s" for dim in CELL_DIMS} | {"data": "data sets"}
_SEEDS = 78  # spawn key: apart from chains' and pilots'


@dataclass(frozen=True)
class Cell:
    """One estimate of a sweep."""

    name: str  # of its store, under ``cells``
    checkpoint: str  # label of the weights
    restriction: str  # label of the parameters that move
    setting: str  # label of the fields that differ from the config
    data: str  # label of the data set

    @property
    def row(self) -> tuple[str, str, str]:
        """What the cell shares with the same estimate at the other checkpoints."""
        return self.restriction, self.setting, self.data

    @property
    def labels(self) -> dict[str, str]:
        """Dimension -> label."""
        return {dim: getattr(self, dim) for dim in CELL_DIMS}

    def seed(self, sweep_seed: int) -> int:
        """Return a seed of the cell's own, from the sweep's and the cell's name."""
        digest = hashlib.blake2b(self.name.encode(), digest_size=16).digest()
        key = (_SEEDS, *np.frombuffer(digest, np.uint32).tolist())
        state = np.random.SeedSequence(sweep_seed, spawn_key=key).generate_state(1, np.uint64)
        return int(state[0] >> np.uint64(1))


@dataclass(frozen=True)
class Grid:
    """The labels of a sweep along each dimension."""

    checkpoint: tuple[str, ...]  # labels of the checkpoints, in their order
    restriction: tuple[str, ...]  # labels of the restrictions
    setting: tuple[str, ...]  # labels of the settings
    data: tuple[str, ...]  # labels of the data sets
    named: tuple[str, ...] = ()  # dimensions that cells are named by, beside the checkpoint

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Dimension -> its labels."""
        return {dim: getattr(self, dim) for dim in CELL_DIMS}

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of labels along each dimension."""
        return tuple(map(len, self.labels.values()))

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, the checkpoints of one row after another."""
        naming = [dim for dim in CELL_DIMS if dim == "checkpoint" or dim in self.named]
        cells = []
        for row in itertools.product(self.restriction, self.setting, self.data):
            for checkpoint in self.checkpoint:
                labels = dict(zip(CELL_DIMS, (checkpoint, *row), strict=True))
                cells.append(Cell("--".join(labels[dim] for dim in naming), **labels))
        return tuple(cells)

    def arranged(self, values: Sequence[object]) -> NDArray[Any]:
        """Return a value per cell, in the order of the cells, as an array over the dimensions."""
        checkpoints, *row = self.shape
        return np.moveaxis(np.array(values).reshape(*row, checkpoints), -1, 0)

    def check(self, max_cells: int) -> None:
        """Check that the sweep is no larger than meant, and that its labels can name folders.

        Raises:
            ConfigError: says what is too large, no name, or there twice.
        """
        number = math.prod(self.shape)
        if number > max_cells:
            sizes = zip(self.shape, PLURALS.values(), strict=True)
            raise ConfigError(
                f"a sweep must have at most max_cells={max_cells} cells, and this one would have "
                f"{number} ({' x '.join(f'{size} {plural}' for size, plural in sizes)}): raise "
                "max_cells, or ask for fewer"
            )
        for dim, names in self.labels.items():
            _check_labels(dim, names)
        _check_unique("cells", [cell.name for cell in self.cells])


def _check_labels(dim: str, names: Sequence[object]) -> None:
    if not names:
        raise ConfigError(f"a sweep must have at least one {dim}, got none")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w+=@][\w.+=@-]*", name):
            raise ConfigError(
                f"the name of a {dim} must be letters, digits and any of . _ + = @ -, for it names "
                f"a folder: got {name!r}; give a mapping of names"
            )
    _check_unique(PLURALS[dim], names)


def _check_unique(what: str, names: Iterable[object]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"two {what} must not have one name: got {', '.join(map(repr, twice[:5]))} more than "
            "once; give a mapping of names"
        )
