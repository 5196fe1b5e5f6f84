"""Where the tensors of a parameter group lie: chunks with one flat noise buffer.

A sampler needs fresh noise for every coordinate of every step. The noise of a chunk of parameters
lives in one flat buffer, filled by a single ``normal_`` and viewed once per parameter, so that the
kernels work on lists of tensors. Chunks keep that buffer small however large the model is; all
chunks of an optimizer share it. The plan is made once and holds no tensor that a step replaces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distsampler.errors import ConfigError

# A CPU chunk stays in the cache between the passes of a step; elsewhere the limit is memory.
CHUNK_BYTES = {"cpu": 4 * 2**20}
CHUNK_BYTES_ELSEWHERE = 60_000_000


class Point(NamedTuple):
    """What the equations read at the present weights, one entry a piece of the chunk."""

    weights: list[Tensor]
    anchors: list[Tensor]
    grads: list[Tensor]
    with_grad: list[int] | None
    """Positions of the pieces that have a gradient; None: all have."""


class Piece(NamedTuple):
    """A parameter of the group, whole (``stop`` None) or a flat slice of it."""

    parameter: int
    start: int
    stop: int | None

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor shaped like the parameter that is this piece."""
        return tensor if self.stop is None else tensor.reshape(-1)[self.start : self.stop]


@dataclass(slots=True)
class Chunk:
    """Some pieces of a group and the buffer that holds their noise."""

    pieces: list[Piece]
    flat: Tensor
    """The noise of the chunk, one-dimensional."""
    views: list[Tensor]
    """The same memory, one view a piece."""
    frozen: Tensor | None
    """Flat boolean mask of the entries that must not move; None: all may."""
    sizes: list[int]
    """Entries of each piece."""
    whole: bool
    """The chunk is the whole group, parameter for parameter."""
    number: int
    """Its place among the chunks of the group."""

    def part(self, tensors: list[Tensor]) -> list[Tensor]:
        """Of one tensor a trainable parameter: the chunk's pieces."""
        if self.whole:
            return tensors
        return [piece.of(tensors[piece.parameter]) for piece in self.pieces]

    def freeze(self, value: float = -0.0) -> None:
        """Set the buffer at frozen entries; adding -0.0, the default, changes no bits."""
        if self.frozen is not None:
            self.flat.masked_fill_(self.frozen, value)

    def view(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor in the shapes of the pieces."""
        parts = torch.split(flat, self.sizes)
        return [part.view(v.shape) for part, v in zip(parts, self.views, strict=True)]

    def gather(self, tensors: list[Tensor | None], flat: Tensor) -> None:
        """Copy one tensor a trainable parameter into a flat one; zero where there is none."""
        for part, piece in zip(torch.split(flat, self.sizes), self.pieces, strict=True):
            tensor = tensors[piece.parameter]
            if tensor is None:
                part.zero_()
            else:
                part.copy_(piece.of(tensor).reshape(-1))


@dataclass(slots=True)
class Plan:
    """The trainable parameters of a group and their chunks."""

    index: int
    """The group's place among the optimizer's groups."""
    params: list[Tensor]
    positions: list[int]
    """Of each trainable parameter, its place in the group."""
    idle: list[Tensor]
    """Parameters that require no gradient: left alone until they do."""
    weights: list[Tensor]
    """fp32 masters of half-precision parameters, the parameters themselves of all others."""
    chunks: list[Chunk]
    dimension: int
    """Number of trainable entries."""
    masks: list[Tensor | None] | None
    """The group's ``optimize_over`` that this plan was made for."""
    rounded: bool
    """Some weights are masters and are written back rounded."""
    dtype: torch.dtype | None
    """Precision of the first parameter when the plan was made."""
    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    """State tensors by name, one a trainable parameter; filled when first asked for."""

    def fits(self, group: Mapping[str, Any]) -> bool:
        """Whether the group still is what this plan was made for."""
        if self.params and self.params[0].dtype != self.dtype:
            raise ConfigError(
                f"parameters must keep their precision once a sampler has them; got "
                f"{self.params[0].dtype} where {self.dtype} was; convert the model first"
            )
        if self.masks is not group["optimize_over"] or any(p.requires_grad for p in self.idle):
            return False
        return all(p.requires_grad for p in self.params)

    def column(self, state: Mapping[Tensor, Mapping[str, Any]], key: str) -> list[Tensor]:
        """``state[p][key]`` of every trainable parameter, looked up once."""
        if key not in self.columns:
            self.columns[key] = [state[p][key] for p in self.params]
        return self.columns[key]

    def grads(self) -> list[Tensor | None]:
        """The gradients now; sparse ones are refused."""
        grads = [p.grad for p in self.params]
        if any(g is not None and g.is_sparse for g in grads):
            raise ConfigError(
                "gradients must be dense: noise moves every entry of the posterior; got a "
                "sparse gradient; build the embedding with sparse=False"
            )
        return grads

    def point(self, chunk: Chunk, grads: list[Tensor | None], anchors: list[Tensor]) -> Point:
        """What the kernels read for this chunk."""
        weights = chunk.part(self.weights)
        present = [g for g in grads if g is not None]
        if len(present) == len(grads):
            return Point(weights, chunk.part(anchors), chunk.part(present), None)
        places = [i for i, piece in enumerate(chunk.pieces) if grads[piece.parameter] is not None]
        pieces = [chunk.pieces[i] for i in places]
        kept = [piece.of(g) for piece in pieces if (g := grads[piece.parameter]) is not None]
        return Point(weights, chunk.part(anchors), kept, places)


def is_half(param: Tensor) -> bool:
    """Whether the parameter needs an fp32 master."""
    return param.dtype in (torch.float16, torch.bfloat16)


def working_dtype(param: Tensor) -> torch.dtype:
    """The precision of state, drift and noise: that of the parameter, at least fp32."""
    return torch.float32 if is_half(param) else param.dtype


class Workspace:
    """The buffer that all chunks of one precision share."""

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def reserve(self, like: Tensor, entries: int) -> None:
        """See to it that ``entries`` fit; before the first view is taken."""
        key = (like.device, like.dtype)
        if key not in self._flat or self._flat[key].numel() < entries:
            self._flat[key] = torch.empty(entries, dtype=like.dtype, device=like.device)

    def view(self, like: Tensor, entries: int) -> Tensor:
        """The first ``entries`` of the buffer."""
        return self._flat[like.device, like.dtype][:entries]


def make_plans(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
) -> list[Plan]:
    """Lay out all groups over one shared workspace."""
    plans = [_outline(i, group, state) for i, group in enumerate(groups)]
    workspace = Workspace()
    cuts = [_cut(plan.weights) for plan, _ in plans]
    for (plan, _), chunks in zip(plans, cuts, strict=True):
        for pieces in chunks:
            parts = _parts(pieces, plan.weights)
            workspace.reserve(parts[0], sum(p.numel() for p in parts))
    for (plan, masks), chunks in zip(plans, cuts, strict=True):
        plan.chunks.extend(
            _chunk(number, pieces, plan.weights, masks, workspace)
            for number, pieces in enumerate(chunks)
        )
    return [plan for plan, _ in plans]


def _outline(
    index: int, group: Mapping[str, Any], state: Mapping[Tensor, Mapping[str, Any]]
) -> tuple[Plan, list[Tensor | None]]:
    """A plan without chunks, and the masks of its trainable parameters."""
    masks = group["optimize_over"] or [None] * len(group["params"])
    members = [
        (i, p, m)
        for i, (p, m) in enumerate(zip(group["params"], masks, strict=True))
        if p.requires_grad and p.numel() and (m is None or bool(m.any()))
    ]
    params = [p for _, p, _ in members]
    kept = [m for _, _, m in members]
    plan = Plan(
        index=index,
        params=params,
        positions=[i for i, _, _ in members],
        idle=[p for p in group["params"] if not p.requires_grad],
        weights=[state[p]["master"] if is_half(p) else p for p in params],
        chunks=[],
        dimension=sum(p.numel() if m is None else int(m.sum()) for _, p, m in members),
        masks=group["optimize_over"],
        rounded=any(is_half(p) for p in params),
        dtype=params[0].dtype if params else None,
    )
    return plan, kept


def _cut(weights: Sequence[Tensor]) -> list[list[Piece]]:
    """Pieces by chunk: same precision within a chunk, never more than its size."""
    chunks: list[list[Piece]] = []
    room, dtype = 0, None
    for index, w in enumerate(weights):
        size = CHUNK_BYTES.get(w.device.type, CHUNK_BYTES_ELSEWHERE) // w.element_size()
        for piece in _slices(index, w, size):
            length = w.numel() if piece.stop is None else piece.stop - piece.start
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


def _parts(pieces: list[Piece], weights: list[Tensor]) -> list[Tensor]:
    return [piece.of(weights[piece.parameter].detach()) for piece in pieces]


def _chunk(
    number: int,
    pieces: list[Piece],
    weights: list[Tensor],
    masks: Sequence[Tensor | None],
    workspace: Workspace,
) -> Chunk:
    parts = _parts(pieces, weights)
    sizes = [part.numel() for part in parts]
    flat = workspace.view(parts[0], sum(sizes))
    views = [v.view(p.shape) for v, p in zip(torch.split(flat, sizes), parts, strict=True)]
    frozen = None
    if any(masks[piece.parameter] is not None for piece in pieces):
        frozen = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
        for part, piece in zip(torch.split(frozen, sizes), pieces, strict=True):
            mask = masks[piece.parameter]
            if mask is not None:
                part.copy_(piece.of(mask).reshape(-1).logical_not())
    whole = len(pieces) == len(weights) and all(piece.stop is None for piece in pieces)
    return Chunk(pieces, flat, views, frozen, sizes, whole, number)
