"""Which parameters, and which of their entries, move: ``restrict_to`` against a model.

A text is looked up in this order: the name of a parameter, a regular expression that matches whole
names, a component or a union of components.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from distsampler.config import RunConfig
from distsampler.errors import ConfigError, unknown_name
from distsampler.models.components import NAME, Region, Regions, components, united
from distsampler.references import Mask


def selected(model: nn.Module, config: RunConfig) -> set[str]:
    """Return the names of the parameters that move, or of which some entries do.

    Without ``restrict_to`` these are all that require a gradient.
    """
    trainable = _trainable(model)
    match config.restrict_to:
        case None:
            return set(trainable)
        case dict() as masks:
            return _masked(trainable, masks)
        case _:
            return set(_regions(model, config))


def flat_masks(
    model: nn.Module, config: RunConfig, moving: Mapping[str, Tensor], flats: list[Tensor]
) -> list[Tensor] | None:
    """Return the masks of the parameters that move, one for each flat tensor; None: all moves."""
    if not masks_entries(model, config):
        return None
    restriction = config.restrict_to
    regions = {} if isinstance(restriction, dict) else _regions(model, config)
    masks = [torch.ones(flat.shape, dtype=torch.bool, device=flat.device) for flat in flats]
    for name, p in moving.items():
        whole = isinstance(restriction, dict)
        entries = _entries(name, restriction[name], p) if whole else regions[name].mask
        home = next(i for i, flat in enumerate(flats) if flat.dtype == p.dtype)
        start = p.storage_offset()
        masks[home].as_strided(p.shape, p.stride(), start).copy_(entries)
    return None if all(bool(mask.all()) for mask in masks) else masks
