"""Where the tensors of a parameter group lie: chunks with one flat buffer for a step.

A sampler needs fresh noise for every coordinate of every step. The step of a chunk of parameters is
summed in one flat buffer, filled with noise by a single ``normal_`` and viewed once per parameter,
so that the equations work on lists of tensors. Chunks keep that buffer small however large the
model is; all chunks of an optimizer share it. A layout is made once and holds no tensor that a step
replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distsampler.errors import ConfigError

# A CPU chunk stays in the cache between the passes of a step; elsewhere the limit is memory.
NOISE_CHUNK_BYTES = {"cpu": 4 * 2**20}
CHUNK_BYTES_ELSEWHERE = 60_000_000


class Potential(NamedTuple):
    """The coefficients of U = nbeta L + localization/2 |w - w*|^2 + weight_decay/2 |w|^2."""

    nbeta: float
    localization: float
    weight_decay: float


class Piece(NamedTuple):
    """A parameter of the group, whole (``stop`` None) or a flat slice of it."""

    parameter: int
    start: int
    stop: int | None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor shaped like the parameter that is this piece."""
        return tensor if self.stop is None else tensor.reshape(-1)[self.start : self.stop]

    def entries(self, weights: Sequence[Tensor]) -> int:
        """Return the number of entries of this piece."""
        return weights[self.parameter].numel() if self.stop is None else self.stop - self.start


@dataclass(slots=True)
class Chunk:
    """Some pieces of a group, and the buffer in which their step is summed."""

    pieces: list[Piece]
    flat: Tensor
    """The buffer, one-dimensional."""
    views: list[Tensor]
    """The same memory, one view a piece."""
    frozen: Tensor | None
    """Flat boolean mask of the entries that must not move; None: all may."""
    whole: bool
    """The chunk is the whole group, parameter for parameter."""
    number: int
    """Its place among the chunks of the group."""

    def part(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the chunk's pieces of one tensor a trainable parameter."""
        if self.whole:
            return tensors
        return [piece.of(tensors[piece.parameter]) for piece in self.pieces]

    def freeze(self, value: float = -0.0) -> None:
        """Set the buffer at frozen entries; adding -0.0, the default, changes no bits."""
        if self.frozen is not None:
            self.flat.masked_fill_(self.frozen, value)


class Point(NamedTuple):
    """A chunk at the present weights: what the equations read, and where they sum the step."""

    flat: Tensor
    """The chunk's buffer, one-dimensional."""
    step: list[Tensor]
    """The same memory, one view a piece: first the noise, in the end what w moves by."""
    weights: list[Tensor]
    anchors: list[Tensor]
    grads: list[Tensor]
    with_grad: list[int] | None
    """Positions of the pieces that have a gradient; None: all have."""
    u: Potential
    chunk: Chunk
    layout: Layout

    def column(self, key: str) -> list[Tensor]:
        """Return the pieces of ``state[p][key]``."""
        return self.chunk.part(self.layout.column(key))

    def pulled(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return those of one tensor a piece whose piece has a gradient."""
        return tensors if self.with_grad is None else [tensors[i] for i in self.with_grad]


@dataclass(slots=True)
class Layout:
    """The trainable parameters of a group and their chunks."""

    index: int
    """The group's place among the optimizer's groups."""
    group: dict[str, Any]
    """The group, with its options."""
    state: Mapping[Tensor, Mapping[str, Any]]
    """The optimizer's state."""
    params: list[Tensor]
    positions: list[int]
    """Of each trainable parameter, its place in the group."""
    idle: list[Tensor]
    """Parameters that require no gradient: left alone until they do."""
    weights: list[Tensor]
    """fp32 masters of half-precision parameters, the parameters themselves of all others."""
    masks: list[Tensor | None] | None
    """The group's ``optimize_over`` that this layout was made for."""
    dimension: int
    """Number of trainable entries."""
    rounded: bool
    """Some weights are masters and are written back rounded."""
    dtype: torch.dtype | None
    """Precision of the parameters when this layout was made."""
    chunks: list[Chunk] = field(default_factory=list)
    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    """State tensors by name, one a trainable parameter; filled when first asked for."""
    derived: dict[object, Any] = field(default_factory=dict)
    """What is computed from options and columns, and goes with this layout."""

    def fits(self, group: Mapping[str, Any]) -> bool:
        """Return whether the group still is what this layout was made for."""
        if self.params and self.params[0].dtype != self.dtype:
            raise ConfigError(
                f"parameters must keep their precision once a sampler has them; got "
                f"{self.params[0].dtype} where {self.dtype} was; convert the model first"
            )
        if self.masks is not group["optimize_over"] or any(p.requires_grad for p in self.idle):
            return False
        return self.group is group and all(p.requires_grad for p in self.params)

    def column(self, key: str) -> list[Tensor]:
        """Return ``state[p][key]`` of every trainable parameter, looked up once."""
        if key not in self.columns:
            self.columns[key] = [self.state[p][key] for p in self.params]
        return self.columns[key]

    def points(self, u: Potential) -> Iterator[Point]:
        """Yield every chunk at the present weights; sparse gradients are refused."""
        grads = [p.grad for p in self.params]
        if any(g is not None and g.is_sparse for g in grads):
            raise ConfigError(
                "gradients must be dense: noise moves every entry of the posterior; got a "
                "sparse gradient; build the embedding with sparse=False"
            )
        for chunk in self.chunks:
            yield self.point(chunk, grads, u)

    def point(self, chunk: Chunk, grads: list[Tensor | None], u: Potential) -> Point:
        """Return a chunk at the present weights."""
        places: list[int] | None = None
        kept = [g for g in grads if g is not None]
        if len(kept) == len(grads):
            kept = chunk.part(kept)
        else:
            pieces = [(i, piece, grads[piece.parameter]) for i, piece in enumerate(chunk.pieces)]
            places = [i for i, _, g in pieces if g is not None]
            kept = [piece.of(g) for _, piece, g in pieces if g is not None]
        weights, anchors = chunk.part(self.weights), chunk.part(self.column("anchor"))
        return Point(chunk.flat, chunk.views, weights, anchors, kept, places, u, chunk, self)


def is_half(param: Tensor) -> bool:
    """Whether the parameter needs an fp32 master."""
    return param.dtype in (torch.float16, torch.bfloat16)


def working_dtype(param: Tensor) -> torch.dtype:
    """The precision of state, drift and noise: that of the parameter, at least fp32."""
    return torch.float32 if is_half(param) else param.dtype


def make_layouts(
    groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
) -> list[Layout]:
    """Lay out all groups over one buffer for each device and precision."""
    layouts = [_outline(i, group, state) for i, group in enumerate(groups)]
    cuts = [_cut(layout.weights) for layout in layouts]
    buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for layout, chunks in zip(layouts, cuts, strict=True):
        for pieces in chunks:  # all buffers have their size before the first view is taken
            entries = sum(piece.entries(layout.weights) for piece in pieces)
            like = layout.weights[pieces[0].parameter]
            key = (like.device, like.dtype)
            if key not in buffers or buffers[key].numel() < entries:
                buffers[key] = torch.empty(entries, dtype=like.dtype, device=like.device)
    for layout, chunks in zip(layouts, cuts, strict=True):
        layout.chunks += [_chunk(n, pieces, layout, buffers) for n, pieces in enumerate(chunks)]
    return layouts


def _outline(
    index: int, group: dict[str, Any], state: Mapping[Tensor, Mapping[str, Any]]
) -> Layout:
    """A layout without chunks."""
    masks = group["optimize_over"] or [None] * len(group["params"])
    members = [
        (i, p, m)
        for i, (p, m) in enumerate(zip(group["params"], masks, strict=True))
        if p.requires_grad and p.numel() and (m is None or bool(m.any()))
    ]
    params = [p for _, p, _ in members]
    return Layout(
        index=index,
        group=group,
        state=state,
        params=params,
        positions=[i for i, _, _ in members],
        idle=[p for p in group["params"] if not p.requires_grad],
        weights=[state[p]["master"] if is_half(p) else p for p in params],
        masks=group["optimize_over"],
        dimension=sum(p.numel() if m is None else int(m.sum()) for _, p, m in members),
        rounded=any(is_half(p) for p in params),
        dtype=params[0].dtype if params else None,
    )


def _cut(weights: Sequence[Tensor]) -> list[list[Piece]]:
    """Pieces by chunk: same precision within a chunk, never more than its size."""
    chunks: list[list[Piece]] = []
    room, dtype = 0, None
    for index, w in enumerate(weights):
        size = NOISE_CHUNK_BYTES.get(w.device.type, CHUNK_BYTES_ELSEWHERE) // w.element_size()
        for piece in _slices(index, w, size):
            length = piece.entries(weights)
            if not chunks or w.dtype != dtype or length > room:
                chunks.append([])
                room, dtype = size, w.dtype
            chunks[-1].append(piece)
            room -= length
    return chunks


def _slices(index: int, weight: Tensor, size: int) -> list[Piece]:
    """A parameter whole if it fits a chunk, else in flat slices (which need flat memory)."""
    if weight.numel() <= size or not weight.is_contiguous():
        return [Piece(index, 0, None)]
    edges = [*range(0, weight.numel(), size), weight.numel()]
    return [Piece(index, a, b) for a, b in pairwise(edges)]


def _chunk(
    number: int,
    pieces: list[Piece],
    layout: Layout,
    buffers: Mapping[tuple[torch.device, torch.dtype], Tensor],
) -> Chunk:
    parts = [piece.of(layout.weights[piece.parameter].detach()) for piece in pieces]
    all_masks = layout.masks or [None] * len(layout.group["params"])
    masks = [all_masks[layout.positions[piece.parameter]] for piece in pieces]
    sizes = [part.numel() for part in parts]
    flat = buffers[parts[0].device, parts[0].dtype][: sum(sizes)]
    views = [v.view(p.shape) for v, p in zip(torch.split(flat, sizes), parts, strict=True)]
    frozen = None
    if any(mask is not None for mask in masks):
        frozen = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
        for part, piece, mask in zip(torch.split(frozen, sizes), pieces, masks, strict=True):
            if mask is not None:
                part.copy_(piece.of(mask).reshape(-1).logical_not())
    whole = len(pieces) == len(layout.weights) and all(piece.stop is None for piece in pieces)
    return Chunk(pieces, flat, views, frozen, whole, number)
