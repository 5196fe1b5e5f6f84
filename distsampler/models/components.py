"""The components of a transformer by the names of the field, and the entries that belong to each.

``l0`` a layer; ``l0.attn`` its attention; ``l0h3`` a head: its rows of q with their bias, its
columns of o, and its rows of k and v where no other head shares them; ``l0g1`` a key-value group:
its k and v, and its heads; ``l0.mlp``; ``l0e2`` an expert; ``l0.router``; ``l0.shared`` the experts
that every token passes; ``l0.norm``; ``l0.lora``, ``lora`` low-rank adapters; ``embed`` tokens and
learned positions; ``unembed``; ``full``; ``other`` what no component has, as a final norm.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distsampler.errors import ConfigError, unknown_name
from distsampler.models.architectures import ATTENTION, Patterns, Place, Structure, structure_of
from distsampler.table import Column, Table

NAME = re.compile(r"full|embed|unembed|lora|other|l\d+([hge]\d+|\.[a-z]+)?")
"""What the name of a component looks like."""
MANY = 4  # parameters that a row of the table names


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


@dataclass(frozen=True)
class Component:
    """A part of a model that can move alone."""

    name: str  # such as "l0h3"
    regions: Mapping[str, Region]  # name of a parameter -> entries of it
    share: float  # of the model's parameters, from 0 to 1
    note: str  # what a user should know of it, if anything

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean tensors by parameter name, True where an entry belongs here; made now."""
        return {name: region.mask for name, region in self.regions.items()}

    @property
    def count(self) -> int:
        """Number of entries."""
        return sum(region.count for region in self.regions.values())

    @property
    def shapes(self) -> dict[str, str]:
        """Name of a parameter -> shape of its entries here, such as "8x32"."""
        return {name: region.size for name, region in self.regions.items()}

    def as_dict(self) -> dict[str, object]:
        """Return all but the masks, for JSON."""
        return {
            "name": self.name,
            "parameters": self.shapes,
            "count": self.count,
            "share": self.share,
            "note": self.note,
        }


class Components(Mapping[str, Component]):
    """The components of a model, by name; ``str()`` is a table."""

    def __init__(self, components: Sequence[Component]) -> None:
        self._components = {each.name: each for each in components}

    def __getitem__(self, name: str) -> Component:
        return self._components[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)

    def united(self, names: str) -> Regions:
        """Return the entries of a component, or of several joined by "+".

        Raises:
            ConfigError: if there is no such component; says which are near.
        """
        parts = [name.strip() for name in names.split("+")]
        for name in parts:
            if name not in self:
                raise ConfigError(self.unknown(name))
        return united(self[name].regions for name in parts)

    def unknown(self, name: str) -> str:
        """Return a sentence for a component that does not exist."""
        kin = re.match(r"l\d+[hge]?", name)
        known = [each for each in self if kin and each.startswith(kin[0])]
        known += [each for each in self if not re.search(r"\d[hge]\d", each)]
        return unknown_name("component", name, dict.fromkeys(known))

    def table(self) -> Table:
        """Return a row for each component; heads, groups and experts alike share one."""
        columns = (
            Column("component", "label"),
            Column("parameters", "label"),
            Column("entries"),
            Column("share"),
            Column("note", "sentence"),
        )
        return Table(columns, [_row(alike) for alike in self._alike()])

    def _alike(self) -> Iterator[list[Component]]:
        """Components next to each other that differ in their number alone."""
        alike: list[Component] = []
        for each in self.values():
            if alike and _kind(each) != _kind(alike[0]):
                yield alike
                alike = []
            alike.append(each)
        if alike:
            yield alike

    def __str__(self) -> str:
        return self.table().text()


def _kind(each: Component) -> tuple[object, ...]:
    numbered = re.fullmatch(r"(l\d+[hge])\d+", each.name)
    return (numbered[1] if numbered else each.name, each.shapes, re.sub(r"\d+", "", each.note))


def _row(alike: list[Component]) -> list[str]:
    """A row of the table, for components that differ in their number alone."""
    first, last = alike[0], alike[-1]
    name = first.name if first is last else f"{first.name} .. {last.name}"
    shapes = [f"{'.'.join(key.split('.')[-2:])} {size}" for key, size in first.shapes.items()]
    more = f" and {len(shapes) - MANY} others" if shapes[MANY:] else ""
    parameters = ", ".join(shapes[:MANY]) + more
    each = "" if first is last else " each"
    return [name, parameters, f"{first.count:,}{each}", f"{first.share:.2%}", first.note]


def components(model: nn.Module, patterns: Patterns | None = None) -> Components:
    """List the parts of a transformer that can move alone: its heads, layers, experts, embeddings.

    Each name is one that ``restrict_to`` takes, alone or in a union, ``"l0h3+l1.mlp"``.

    Args:
        model: the model; nothing of it is changed or copied.
        patterns: where an architecture that is not known has its parts; see
            ``models.architectures.Architecture``.

    Raises:
        ConfigError: if the architecture is not known; shows which patterns to give.

    Example:
        >>> parts = components(GPT2LMHeadModel(GPT2Config()))  # doctest: +SKIP
        >>> parts["l0h3"].count, parts["l0h3"].masks["transformer.h.0.attn.c_attn.weight"].shape
    """
    reader = _Reader(model, structure_of(model, patterns))
    return Components(list(reader.components()))


class _Reader:
    """Makes components of the structure of a model."""

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model, self._structure = model, structure
        self._has = structure.architecture.has
        named = dict(model.named_parameters())
        self._all = {name: Region(tuple(p.shape)) for name, p in named.items()}
        self._frozen = {name for name, p in named.items() if not p.requires_grad}
        self._total = sum(region.count for region in self._all.values())
        self._left = set(self._all)  # of no component so far

    def components(self) -> Iterator[Component]:
        """Return the components, in the order of a forward pass."""
        structure = self._structure
        inside = [place for layer in structure.layers.values() for place in layer.values()]
        adapters = [place for place in (*inside, *structure.outside) if place.is_adapter]
        yield self._component("full", self._all)
        yield from self._outside("embed")
        for number, layer in structure.layers.items():
            yield from self._layer(number, layer)
        yield from self._outside("unembed")
        yield from self._of_places("lora", adapters)
        left = {name: region for name, region in self._all.items() if name in self._left}
        if left:
            yield self._component("other", left, f"in no other component: {', '.join(left)}")

    def _component(self, name: str, regions: Mapping[str, Region], note: str = "") -> Component:
        if name != "full":
            self._left -= regions.keys()
        frozen = self._frozen & regions.keys()
        if frozen:
            part = "" if len(frozen) == len(regions) else f" in {len(frozen)} of its parameters"
            note = "; ".join(filter(None, [note, f"frozen{part}: does not move"]))
        count = sum(region.count for region in regions.values())
        return Component(name, regions, count / max(self._total, 1), note)

    def _of_places(
        self, name: str, places: Sequence[Place], note: str = ""
    ) -> Iterator[Component]:
        """A component of whole parameters, if there are any; says what is tied to them."""
        own = {place.path for place in places}
        names = {place.name for place in places}
        tied = [
            f"{place.path}{self._owner(place)}"
            for place in self._structure.places
            if place.name in names and place.path not in own
        ]
        if tied:
            note = "; ".join(filter(None, [note, f"tied: moves {', '.join(tied)} too"]))
        if places:
            yield self._component(name, {place.name: Region(place.shape) for place in places}, note)

    def _owner(self, place: Place) -> str:
        """The component outside the layers that has a place, in brackets."""
        of = self._structure.architecture.has_outside
        owners = (part for part in ("embed", "unembed") if of(part, place.path))
        return "".join(f" ({part})" for part in owners)

    def _outside(self, part: str) -> Iterator[Component]:
        of, every = self._structure.architecture.has_outside, self._structure.outside
        yield from self._of_places(
            part, [each for each in every if of(part, each.path) and not each.is_adapter]
        )

    def _layer(self, number: int, layer: Mapping[str, Place]) -> Iterator[Component]:
        """The components of a layer, itself first."""
        own = {rest: place for rest, place in layer.items() if not place.is_adapter}

        def part(*names: str) -> list[Place]:
            return [p for rest, p in own.items() if any(self._has(name, rest) for name in names)]

        parts = {
            "attn": part("attn", *ATTENTION),
            "mlp": part("mlp", "router", "experts", "shared"),
            "router": part("router"),
            "shared": part("shared"),
            "norm": part("norm"),
            "lora": [place for place in layer.values() if place.is_adapter],
        }
        named = {place.path for places in parts.values() for place in places}
        rest = [key for key, place in layer.items() if place.path not in named]
        note = f"in none of its parts: {', '.join(rest)}" if rest else ""
        yield from self._of_places(f"l{number}", list(layer.values()), note)
        for name, places in parts.items():
            if name == "attn" and places:
                yield from self._attention(number, own, places)
                continue
            yield from self._of_places(f"l{number}.{name}", places)
            if name == "mlp":
                for expert, regions in self._experts(own).items():
                    yield self._component(f"l{number}e{expert}", regions)

    def _attention(
        self, number: int, layer: Mapping[str, Place], places: list[Place]
    ) -> Iterator[Component]:
        """Attention, its heads, and its groups of heads."""
        try:
            attention = Attention.of(self._model, self._structure, number, layer)
        except ConfigError as error:
            yield from self._of_places(f"l{number}.attn", places, f"heads are not known: {error}")
            return
        shared = self._has_norms_across(layer, attention.size)
        across = f"{' and '.join(shared)} mix heads: others change too" if shared else ""
        heads = attention.heads()
        groups = attention.groups(heads)
        covered = united((*heads, *groups))
        beside = [
            rest
            for rest, place in layer.items()
            if place in places and not (place.name in covered and covered[place.name].whole)
        ]
        note = f"of no head: {', '.join(beside)}" if beside else ""
        yield from self._of_places(f"l{number}.attn", places, note)
        for h, regions in enumerate(heads):
            of = f"k and v are those of l{number}g{attention.group(h)}" if groups else ""
            note = "; ".join(filter(None, [of, across]))
            yield self._component(f"l{number}h{h}", regions, note)
        for g, regions in enumerate(groups):
            yield self._component(f"l{number}g{g}", regions, across)

    def _has_norms_across(self, layer: Mapping[str, Place], size: int) -> list[str]:
        """Norms in attention over more than a head, of q and k or of what goes into o."""
        return [
            rest.removesuffix(".weight").rpartition(".")[2]
            for rest, place in layer.items()
            if self._has("attn", rest)
            and "norm" in rest.lower()
            and rest.endswith(".weight")
            and len(place.shape) == 1
            and place.shape[0] > size > 1
        ]

    def _experts(self, layer: Mapping[str, Place]) -> dict[int, Regions]:
        """Number of an expert -> what belongs to it: modules of a list, or slices of tensors."""
        experts: dict[int, Regions] = {}
        pattern = rf"(?:{self._structure.architecture.experts})\.(\d+)\..+"
        for rest, place in layer.items():
            if not self._has("experts", rest):
                continue
            match = re.fullmatch(pattern, rest)
            if match:
                experts.setdefault(int(match[match.lastindex or 0]), {})[place.name] = Region(
                    place.shape
                )
                continue
            for number in range(place.shape[0]):
                only = Region(place.shape, (Slice(0, number, number + 1),))
                experts.setdefault(number, {})[place.name] = only
        return dict(sorted(experts.items()))


@dataclass(frozen=True)
class Attention:
    """Where the heads of an attention are in its parameters.

    ``size`` entries of q belong to a head, and ``size`` of k and of v to a group of heads.
    """

    parts: Mapping[str, Sequence[tuple[Place, int]]]  # "q" -> its parameters, dimension of heads
    interleaved: bool  # whether a fused matrix goes group by group
    size: int
    head_count: int
    group_count: int

    @classmethod
    def of(
        cls, model: nn.Module, structure: Structure, number: int, layer: Mapping[str, Place]
    ) -> "Attention":
        """Return the attention of a layer.

        Raises:
            ConfigError: if the shapes do not fit the number of heads.
        """
        architecture, heads = structure.architecture, structure.heads.get(number)
        parts: dict[str, list[tuple[Place, int]]] = {}
        for part in architecture.whole_attention:
            for rest, place in layer.items():
                bias = len(place.shape) == 1
                if architecture.has(part, rest) and not (part == "o" and bias):
                    into = type(model.get_submodule(place.module)).__name__ == "Conv1D"
                    if part == "o":
                        into = not into and len(place.shape) == 2
                    dim = int(into and not bias)
                    parts.setdefault(part, []).append((place, dim))
        if not heads:
            raise ConfigError("their number is in no config: give components={'heads': ...}")

        def length(part: str) -> int:
            lengths = {place.shape[dim] for place, dim in parts.get(part, ())}
            if len(lengths) != 1:
                raise ConfigError(f"{part} must be one matrix, with its bias")
            return lengths.pop()

        size = length("o") // heads
        if "qkv" in parts:
            groups = (length("qkv") // max(size, 1) - heads) // 2
            fits = length("qkv") == (heads + 2 * groups) * size
        else:
            groups = length("k") // max(size, 1)
            fits = length("q") == length("o") and length("k") == length("v") == groups * size
        if not fits or groups < 1 or heads % groups or length("o") % heads:
            shapes = [f"{p} {'x'.join(map(str, e[0][0].shape))}" for p, e in parts.items()]
            raise ConfigError(f"{heads} of them do not fit {', '.join(shapes)}")
        return cls(parts, architecture.fused == "interleaved", size, heads, groups)

    def group(self, head: int) -> int:
        """Return the group of a head."""
        return head * self.group_count // self.head_count

    def heads(self) -> list[Regions]:
        """Return what belongs to each head."""
        every = []
        for head in range(self.head_count):
            regions = united([self._at("q", head), self._at("o", head)])
            if self.group_count == self.head_count:
                regions = united([regions, self._at("k", head), self._at("v", head)])
            every.append(regions)
        return every

    def groups(self, heads: Sequence[Regions]) -> list[Regions]:
        """Return what belongs to each group of heads; none, where each head has its own k and v."""
        if self.group_count == self.head_count:
            return []
        every = []
        for group in range(self.group_count):
            members = [own for head, own in enumerate(heads) if self.group(head) == group]
            every.append(united([self._at("k", group), self._at("v", group), *members]))
        return every

    def _at(self, part: str, number: int) -> Regions:
        """The entries of q or o that belong to a head, or of k or v that belong to a group."""
        fused = part != "o" and "qkv" in self.parts
        start = (self._place(part, number) if fused else number) * self.size
        return {
            place.name: Region(place.shape, (Slice(dim, start, start + self.size),))
            for place, dim in self.parts["qkv" if fused else part]
        }

    def _place(self, part: str, number: int) -> int:
        """Where a head or group is in a fused matrix, in units of ``size``."""
        each, groups = self.head_count // self.group_count, self.group_count
        if self.interleaved:
            before = {"q": number % each, "k": each, "v": each + 1}[part]
            return (number // each if part == "q" else number) * (each + 2) + before
        return {"q": 0, "k": self.head_count, "v": self.head_count + groups}[part] + number
