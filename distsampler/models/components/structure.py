"""What a model is made of: its parameters by layer, matched against the table of architectures.

Read from the names and shapes of parameters, the classes of modules, and the number of heads in a
config; nothing is imported.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from torch import nn

from distsampler.errors import ConfigError, unknown_name
from distsampler.models.components.architectures import (
    ATTENTION,
    TABLE,
    Architecture,
    Patterns,
    compiled,
)

HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")  # as configs and modules call it
WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.)")  # of peft
ADAPTER = re.compile(r"(.*\.)?lora_\w+(\..*)?")  # likewise


class Place(NamedTuple):
    """A place where a model has a parameter; tied weights have several."""

    name: str  # as ``named_parameters`` has it
    path: str  # name of this place, without what adapters put between
    module: str  # name of the module in which it is
    shape: tuple[int, ...]

    @property
    def is_adapter(self) -> bool:
        """Whether it is a low-rank adapter's."""
        return bool(ADAPTER.fullmatch(self.path))


@dataclass(frozen=True)
class Structure:
    """What a model is made of."""

    architecture: Architecture
    layers: Mapping[int, Mapping[str, Place]]  # number of a layer -> name in it -> place
    places: Sequence[Place]  # of all parameters
    outside: Sequence[Place]  # of those in no layer
    heads: Mapping[int, int]  # number of a layer -> number of heads, where known


def places(model: nn.Module) -> list[Place]:
    """Return the places of all parameters of a model."""
    names: dict[int, str] = {}
    every = []
    for name, p in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(p), name)
        every.append(Place(first, WRAPPERS.sub("", name), name.rpartition(".")[0], tuple(p.shape)))
    return every


def structure_of(model: nn.Module, patterns: Patterns | None = None) -> Structure:
    """Return what a model is made of.

    Args:
        model: the model.
        patterns: fields of ``Architecture``, where the table has no such architecture or is wrong.

    Raises:
        ConfigError: if the architecture is not known; shows which patterns to give.
    """
    every = places(model)
    own = _checked(patterns or {})
    for architecture in _candidates(own):
        homes = _homes(architecture, every)
        if len(homes) > 1:
            raise ConfigError(
                f"a model must have one list of layers, but these look alike: {', '.join(homes)}: "
                f"say which, components={{'layers': {next(iter(homes))!r}}}"
            )
        for layers in homes.values():
            if _is_known(model, architecture, layers):
                return _structure(model, architecture, layers, every)
    if own.get("layers"):
        return _described(model, Architecture(**own), every)  # type: ignore[arg-type]  # checked
    raise ConfigError(_unknown(model, every))


def _structure(
    model: nn.Module,
    architecture: Architecture,
    layers: Mapping[int, Mapping[str, Place]],
    every: Sequence[Place],
) -> Structure:
    inside = {place.path for layer in layers.values() for place in layer.values()}
    heads = {number: _heads(model, architecture, layer) for number, layer in layers.items()}
    return Structure(
        architecture,
        dict(sorted(layers.items())),
        every,
        [place for place in every if place.path not in inside],
        {number: count for number, count in heads.items() if count},
    )


def _candidates(own: Patterns) -> list[Architecture]:
    """The architectures of the table, with patterns that say more of them."""
    if own.keys() & set(ATTENTION):
        return []
    return [replace(row, **own) for row in TABLE.values()]  # type: ignore[arg-type]  # checked


def _homes(
    architecture: Architecture, every: Sequence[Place]
) -> dict[str, dict[int, dict[str, Place]]]:
    """Lists of layers that have an attention like this, by their names."""
    homes: dict[str, dict[int, dict[str, Place]]] = {}
    for place in every:
        match = architecture.in_layer(place.path)
        if match:
            layer = homes.setdefault(match["home"], {}).setdefault(int(match["layer"]), {})
            layer[match["rest"]] = place
    return {
        home: layers
        for home, layers in homes.items()
        if any(
            all(
                any(architecture.has(part, rest) for rest in layer)
                for part in architecture.whole_attention
            )
            for layer in layers.values()
        )
    }


def _is_known(
    model: nn.Module, architecture: Architecture, layers: Mapping[int, Mapping[str, Place]]
) -> bool:
    """Return whether fused heads lie as the table says: of another type they may not."""
    place = next(iter(next(iter(layers.values())).values()))
    kind = next(_settings(model, place.module, ("model_type",)), None)
    return not architecture.types or kind is None or kind in architecture.types


def _heads(model: nn.Module, architecture: Architecture, layer: Mapping[str, Place]) -> int:
    """Return the number of heads of a layer; 0: not known."""
    part = "qkv" if architecture.qkv else "q"
    for rest, place in layer.items():
        if architecture.has(part, rest) and not place.is_adapter:
            if len(place.shape) == 3:
                return place.shape[0]
            known = _settings(model, place.module, HEADS)
            counts = (n for n in known if isinstance(n, int) and n > 0)
            return architecture.heads or next(counts, 0)
    return 0


def _settings(model: nn.Module, name: str, options: Sequence[str]) -> Iterator[object]:
    """Values of options of a module and its config, then of those around it."""
    path = name.split(".") if name else []
    for depth in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:depth]))
        for home in (module, getattr(module, "config", None), getattr(module, "cfg", None)):
            for option in options:
                value = getattr(home, option, None)
                if value is not None:
                    yield value


def _described(model: nn.Module, own: Architecture, every: Sequence[Place]) -> Structure:
    """The structure that a user describes; a pattern that matches nothing is an error."""
    layers: dict[int, dict[str, Place]] = {}
    for place in every:
        match = own.in_layer(place.path)
        if match:
            layers.setdefault(int(match["layer"]), {})[match["rest"]] = place
    if not layers:
        raise ConfigError(
            f"components: layers: {own.layers!r} must name a list of layers: no parameter is "
            f"called like {own.layers}.0.weight; they are {_some(p.path for p in every)}"
        )
    first = next(iter(layers.values()))
    structure = _structure(model, own, layers, every)
    outside = [place.path for place in structure.outside]
    for each in fields(own):
        pattern = getattr(own, each.name)
        if each.name in ("embed", "unembed"):
            matches = any(own.has_outside(each.name, path) for path in outside)
            names: Sequence[str] = outside
        else:
            matches = any(own.has(each.name, rest) for layer in layers.values() for rest in layer)
            names = list(first)
        part = each.name not in ("layers", "fused", "heads", "types")
        if part and pattern and not matches:
            raise ConfigError(
                f"components: {each.name}: {pattern!r} must match a module or parameter; there are "
                f"{_some(names)}"
            )
    return structure


def _checked(patterns: Patterns) -> dict[str, str | int]:
    """Patterns that are fields of an architecture, of their types."""
    known = {each.name: each.type for each in fields(Architecture) if each.name != "types"}
    for key, value in patterns.items():
        if key not in known:
            raise ConfigError(f"components: {unknown_name('part', str(key), known)}")
        kind = int if known[key] is int else str
        if not isinstance(value, kind):
            raise ConfigError(f"components: {key} must be of type {kind.__name__}, got {value!r}")
        if kind is str:
            compiled(str(value))
    if patterns.get("fused", "stacked") not in ("stacked", "interleaved"):
        raise ConfigError(
            f"components: fused must be 'stacked' or 'interleaved', got {patterns['fused']!r}"
        )
    return dict(patterns)


GUESSES = {  # part -> what the last word of a module's name may look like
    "q": r"(to_?|w_?)?q(uery)?(_?proj|_?lin)?",
    "k": r"(to_?|w_?)?k(ey)?(_?proj|_?lin)?",
    "v": r"(to_?|w_?)?v(alue)?(_?proj|_?lin)?",
    "qkv": r"\w*qkv\w*|query_key_value|c_attn|in_proj\w*",
    "o": r"(to_?|w_?)?o(ut|utput)?(_?proj|_?lin)?|c_proj|proj|dense",
    "mlp": r"\w*(mlp|ff|ffn|feed_?forward)\w*",
    "norm": r"\w*(norm|ln)\w*",
    "embed": r"\w*(emb|tok|wte|wpe|pos)\w*",
    "unembed": r"\w*(head|unemb|decode)\w*",
}


def _unknown(model: nn.Module, every: Sequence[Place]) -> str:
    """A sentence for a model that is like no row of the table, with patterns of its own names."""
    matches = [re.fullmatch(r"(.*?)\.(\d+)\.(.+)", place.path) for place in every]
    homes = [match[1] for match in matches if match]
    home = max(homes, key=homes.count) if homes else ""
    inside = list(dict.fromkeys(m[3] for m in matches if m and m[1] == home))
    outside = [p.path for p, m in zip(every, matches, strict=True) if not (m and m[1] == home)]
    own: dict[str, str | int] = {"layers": home or "blocks", "heads": 4}
    for part, guess in GUESSES.items():
        names = outside if part in ("embed", "unembed") else inside
        like = list(dict.fromkeys(filter(None, (_like(guess, name) for name in names))))
        if like:
            own[part] = "|".join(like)
    own = (
        own if len(own) > 2 else own | {"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.o"}
    )
    return (
        f"the parts of {type(model).__name__} must be known to be named, and it is like none of "
        f"{', '.join(TABLE)}: say in components= (of RunConfig, or patterns= of ds.components) "
        f"where they are, by regular expressions, those of a layer relative to it; for example "
        f"{own}, if that is what these parameters are: {_some(p.path for p in every)}"
    )


def _like(guess: str, name: str) -> str:
    """The name up to the first word that looks like what is guessed; empty: none does."""
    words = name.split(".")
    for number, word in enumerate(words):
        if re.fullmatch(guess, word, re.IGNORECASE):
            return ".".join(words[: number + 1])
    return ""


def _some(names: Iterable[str]) -> str:
    """The first few names, for an error."""
    every = list(names)
    return ", ".join(every[:12]) + (f" and {len(every) - 12} others" if every[12:] else "")
