"""The components of a model, listed by name: what ``restrict_to`` takes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from distsampler.errors import ConfigError, unknown_name
from distsampler.models.components.architectures import ATTENTION, Patterns
from distsampler.models.components.attention import Attention
from distsampler.models.components.regions import Region, Regions, Slice, united
from distsampler.models.components.structure import Place, Structure, structure_of
from distsampler.table import Column, Table

NAME = re.compile(r"full|embed|unembed|lora|other|l\d+\.?\w*")
"""What the name of a component looks like."""
MANY = 4  # parameters that a row of the table names


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


def looks_like_one(text: str) -> bool:
    """Return whether a text looks like a component, or a union of components."""
    return any(NAME.fullmatch(name.strip()) for name in text.split("+"))


def components(model: nn.Module, patterns: Patterns | None = None) -> Components:
    """List the parts of a transformer that can move alone: its heads, layers, experts, embeddings.

    Each name is one that ``restrict_to`` takes, alone or in a union, ``"l0h3+l1.mlp"``.

    Args:
        model: the model; nothing of it is changed or copied.
        patterns: where an architecture that is not known has its parts; see
            ``models.components.architectures.Architecture``.

    Raises:
        ConfigError: if the architecture is not known; shows which patterns to give.

    Example:
        >>> parts = components(GPT2LMHeadModel(GPT2Config()))  # doctest: +SKIP
        >>> parts["l0h3"].count, parts["l0h3"].masks["transformer.h.0.attn.c_attn.weight"].shape
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
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

    def _of_places(self, name: str, places: Sequence[Place], note: str = "") -> Iterator[Component]:
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
