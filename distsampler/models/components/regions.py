"""Which entries of parameters a component has, as ranges: a mask is made where one is needed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Slice(NamedTuple):
    """Entries of a tensor: a range of one of its dimensions."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Region:
    """Entries of a parameter: all of them, or slices."""

    shape: tuple[int, ...]  # of the parameter
    slices: tuple[Slice, ...] | None = None  # None: all entries

    @property
    def mask(self) -> Tensor:
        """A boolean tensor in the parameter's shape, True where an entry belongs here."""
        mask = torch.full(self.shape, self.slices is None)
        for each in self.slices or ():
            mask.narrow(each.dim, each.start, each.stop - each.start).fill_(True)
        return mask

    @property
    def count(self) -> int:
        """Number of entries."""
        size = math.prod(self.shape)
        dims = {each.dim for each in self.slices or ()}
        if self.slices is None or not size:
            return size
        if len(dims) > 1:
            return int(self.mask.sum())
        return size // self.shape[dims.pop()] * sum(e.stop - e.start for e in self.slices)

    @property
    def whole(self) -> bool:
        """Whether all entries of the parameter belong here."""
        return self.count == math.prod(self.shape)

    @property
    def size(self) -> str:
        """The shape of the entries, as ``8x32``; their number where they form no block."""
        dims = {each.dim for each in self.slices or ()}
        if len(dims) > 1:
            return str(self.count)
        lengths = list(self.shape)
        for dim in dims:
            lengths[dim] = sum(e.stop - e.start for e in self.slices or ())
        return "x".join(map(str, lengths))

    def __or__(self, other: "Region") -> "Region":
        if self.slices is None or other.slices is None:
            return Region(self.shape)
        return Region(self.shape, _merged((*self.slices, *other.slices)))


def _merged(slices: Iterable[Slice]) -> tuple[Slice, ...]:
    """The same entries, in order, none twice in one dimension."""
    merged: list[Slice] = []
    for each in sorted(slices):
        last = merged[-1] if merged else None
        if last and last.dim == each.dim and each.start <= last.stop:
            merged[-1] = Slice(each.dim, last.start, max(last.stop, each.stop))
        else:
            merged.append(each)
    return tuple(merged)


Regions = dict[str, Region]
"""Name of a parameter -> entries of it."""


def united(parts: Iterable[Mapping[str, Region]]) -> Regions:
    """Return the entries that belong to any of several components."""
    union: Regions = {}
    for regions in parts:
        for name, region in regions.items():
            union[name] = union[name] | region if name in union else region
    return union
