"""Which parameters, and which of their entries, move: ``restrict_to`` against a model."""

import re

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distsampler.errors import ConfigError, unknown_name
from distsampler.references import Mask

Restriction = tuple[str, ...] | dict[str, Mask] | None


def selected(model: nn.Module, restriction: Restriction) -> set[str]:
    """Return the names of the parameters that move.

    A restriction is names, or regular expressions that match a whole name; or masks by name; None:
    all parameters that require a gradient.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = list(trainable)
    if not names:
        raise ConfigError(
            f"the model must have a parameter with requires_grad=True: {type(model).__name__} has "
            f"{sum(1 for _ in model.parameters())} parameters, none of them trainable"
        )
    match restriction:
        case None:
            return set(names)
        case dict():
            return _masked(trainable, restriction)
        case _:
            return {name for pattern in restriction for name in _matching(pattern, names)}


def flat_masks(
    moving: dict[str, nn.Parameter], restriction: Restriction, flats: list[Tensor]
) -> list[Tensor] | None:
    """Return the masks of the parameters that move, one for each flat tensor; None: all moves."""
    if not isinstance(restriction, dict):
        return None
    masks = [torch.ones(flat.shape, dtype=torch.bool, device=flat.device) for flat in flats]
    for name, p in moving.items():
        entries = torch.from_numpy(_entries(name, restriction[name], p))
        home = next(i for i, flat in enumerate(flats) if flat.dtype == p.dtype)
        start = p.storage_offset()
        masks[home].as_strided(p.shape, p.stride(), start).copy_(entries)
    return None if all(bool(mask.all()) for mask in masks) else masks


def _masked(trainable: dict[str, nn.Parameter], masks: dict[str, Mask]) -> set[str]:
    """Names of the parameters of which a mask lets some entry move."""
    for name in masks:
        if name not in trainable:
            raise ConfigError(
                f"restrict_to must name a trainable parameter: "
                f"{unknown_name('parameter', name, trainable)}"
            )
    names = {name for name, mask in masks.items() if _entries(name, mask, trainable[name]).any()}
    if not names:
        raise ConfigError("restrict_to must let something move, got masks without a single True")
    return names


def _matching(pattern: str, names: list[str]) -> list[str]:
    try:
        matching = [name for name in names if name == pattern or re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(
            f"restrict_to must hold names or regular expressions: {pattern!r}: {error}"
        ) from None
    if not matching:
        raise ConfigError(
            "restrict_to must match a trainable parameter: "
            + unknown_name("pattern", pattern, names)
        )
    return matching


def _entries(name: str, mask: Mask, parameter: Tensor) -> NDArray[np.bool_]:
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
    return mask.entries
