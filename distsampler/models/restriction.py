"""Which parameters, and which of their entries, move: ``restrict_to`` against a model.

A text of it is looked up in this order: the name of a parameter, a regular expression that matches
whole names, a component or a union of components.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from distsampler.config import RunConfig
from distsampler.errors import ConfigError, unknown_name
from distsampler.models.components.listing import components, looks_like_one
from distsampler.models.components.regions import Region, Regions, united
from distsampler.references import Mask


class Entries(Protocol):
    """Which entries of a parameter move."""

    @property
    def mask(self) -> Tensor:
        """A boolean tensor in the parameter's shape, True where an entry moves."""

    @property
    def count(self) -> int:
        """Number of entries that move."""

    @property
    def whole(self) -> bool:
        """Whether all entries move."""


Selection = Mapping[str, Entries]
"""Name of a parameter -> which of its entries move."""


@dataclass(frozen=True)
class MaskedEntries:
    """Entries of a parameter that a user's mask lets move."""

    mask: Tensor

    @property
    def count(self) -> int:
        """Number of entries that move."""
        return int(self.mask.sum())

    @property
    def whole(self) -> bool:
        """Whether all entries move."""
        return bool(self.mask.all())


def selected(model: nn.Module, config: RunConfig) -> Selection:
    """Return the parameters of which something moves, and which of their entries do.

    Without ``restrict_to`` these are all that require a gradient, whole.
    """
    trainable = _trainable(model)
    match config.restrict_to:
        case None:
            return _whole(trainable, trainable)
        case dict() as masks:
            return _masked(trainable, masks)
        case texts:
            matching = {text: _matching(text, trainable) for text in texts}
            named = united(_whole(trainable, names) for names in matching.values())
            others = [text for text, names in matching.items() if not names]
            return united((named, _moving(model, config, trainable, others)))


def masks_entries(config: RunConfig, selection: Selection) -> bool:
    """Return whether a sampler must move some entries of a parameter and leave others."""
    return isinstance(config.restrict_to, dict) or not all(e.whole for e in selection.values())


def flat_masks(
    moving: Mapping[str, nn.Parameter], selection: Selection, flats: Sequence[Tensor]
) -> list[Tensor] | None:
    """Return the masks of the parameters that move, one for each flat tensor; None: all moves."""
    if all(selection[name].whole for name in moving):
        return None
    masks = [torch.ones(flat.shape, dtype=torch.bool, device=flat.device) for flat in flats]
    for name, p in moving.items():
        home = next(i for i, flat in enumerate(flats) if flat.dtype == p.dtype)
        start = p.storage_offset()
        masks[home].as_strided(p.shape, p.stride(), start).copy_(selection[name].mask)
    return masks


def digest_of_components(model: nn.Module, config: RunConfig) -> str | None:
    """Return which entries the components in ``restrict_to`` stand for; None: it names none."""
    trainable = _trainable(model)
    if config.restrict_to is None or isinstance(config.restrict_to, dict):
        return None
    texts = [text for text in config.restrict_to if not _matching(text, trainable)]
    if not texts:
        return None
    regions = _moving(model, config, trainable, texts)
    entries = hashlib.blake2b(digest_size=16)
    for name, region in sorted(regions.items()):
        entries.update(repr((name, region.shape, region.slices)).encode())
    count = sum(region.count for region in regions.values())
    return f"{count} entries, {entries.hexdigest()}"


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ConfigError(
            f"the model must have a parameter with requires_grad=True: {type(model).__name__} has "
            f"{sum(1 for _ in model.parameters())} parameters, none of them trainable"
        )
    return trainable


def _whole(trainable: Mapping[str, Tensor], names: Sequence[str] | Mapping[str, Tensor]) -> Regions:
    return {name: Region(tuple(trainable[name].shape)) for name in names}


def _masked(trainable: Mapping[str, Tensor], masks: Mapping[str, Mask]) -> Selection:
    """The parameters of which a mask lets some entry move."""
    for name in masks:
        if name not in trainable:
            raise ConfigError(
                f"restrict_to must name a trainable parameter: "
                f"{unknown_name('parameter', name, trainable)}"
            )
    entries = {name: _entries(name, mask, trainable[name]) for name, mask in masks.items()}
    moving = {name: each for name, each in entries.items() if each.count}
    if not moving:
        raise ConfigError("restrict_to must let something move, got masks without a single True")
    return moving


def _matching(pattern: str, trainable: Mapping[str, Tensor]) -> list[str]:
    """Names that a text of ``restrict_to`` matches; none, where it names components."""
    try:
        matching = [name for name in trainable if name == pattern or re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(
            f"restrict_to must hold names or regular expressions: {pattern!r}: {error}"
        ) from None
    if not matching and not looks_like_one(pattern):
        raise ConfigError(
            "restrict_to must match a trainable parameter, or name a component such as l0h1 or "
            "l0.mlp, which ds.components(model) lists: "
            f"{unknown_name('pattern', pattern, trainable)}"
        )
    return matching


def _moving(
    model: nn.Module, config: RunConfig, trainable: Mapping[str, Tensor], texts: Sequence[str]
) -> Regions:
    """What moves of the components that are named, which may be frozen in part."""
    if not texts:
        return {}
    try:
        parts = components(model, config.components)
        every = {text: parts.united(text) for text in texts}
    except ConfigError as error:
        raise ConfigError(
            f"restrict_to: {', '.join(map(repr, texts))} must name parameters or components: "
            f"{error}"
        ) from None
    for text, regions in every.items():
        if not regions.keys() & trainable.keys():
            raise ConfigError(
                f"restrict_to: {text!r} must have a parameter with requires_grad=True, and all of "
                f"{', '.join(regions)} are frozen: call requires_grad_() on them, or name others"
            )
    moving = united(every.values())
    return {name: region for name, region in moving.items() if name in trainable}


def _entries(name: str, mask: Mask, parameter: Tensor) -> MaskedEntries:
    """A mask's entries, in its parameter's shape."""
    if mask.entries is None:
        raise ConfigError(
            f"restrict_to: {name}: a mask must hold its entries, got what a run directory keeps of "
            f"one ({mask}): give the masks again, in the config of "
            "sample(model, data, loss, config, store=..., resume='must')"
        )
    if mask.entries.shape != parameter.shape:
        raise ConfigError(
            f"restrict_to: {name}: a mask must have its parameter's shape "
            f"{tuple(parameter.shape)}, got {mask.entries.shape}"
        )
    return MaskedEntries(torch.from_numpy(mask.entries))
