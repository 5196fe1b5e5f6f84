"""Heads: which entries of an attention's parameters belong to each, or to a group of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from distsampler.errors import ConfigError
from distsampler.models.components.regions import Region, Regions, Slice, united
from distsampler.models.components.structure import Place, Structure


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
