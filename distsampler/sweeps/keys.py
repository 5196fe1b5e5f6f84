"""Names of a checkpoint's tensors: those of the model, or of the same model with or without a head.

A transformers model says how its body is called (``base_model_prefix``) and which tensors of older
files it no longer has; neither is asked of the package, which is not imported.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from distsampler.errors import ConfigError

SHOWN = 5  # keys in an error
OUTDATED = (r"\battn\.masked_bias$", r"rotary_emb\.inv_freq$")  # buffers that were once saved


def fitted(model: nn.Module, weights: object, name: str) -> Mapping[str, Tensor] | nn.Module:
    """Return weights under the names that the model has for them.

    Args:
        model: the model that is to have them.
        weights: a state dict, or a module of the model's architecture.
        name: what the checkpoint is called.

    Raises:
        ConfigError: names the keys that are missing or unexpected, and the shapes that differ.
    """
    own = model.state_dict()
    if isinstance(weights, nn.Module):
        _check(model, own, weights.state_dict(), name)
        return weights
    if not isinstance(weights, Mapping):
        raise ConfigError(
            f"checkpoint {name!r} must be a state dict or a module, got {type(weights).__name__}"
        )
    named = _without_outdated(model, own, _with_prefix(model, own, weights))
    _check(model, own, named, name)
    return named


def _with_prefix(
    model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The weights of a model with a head for its body, or those of a body for one with a head."""
    prefix = getattr(model, "base_model_prefix", "")
    if not isinstance(prefix, str) or not prefix:
        return weights
    body = f"{prefix}."
    has_body = [any(key.startswith(body) for key in keys) for keys in (own, weights)]
    if has_body == [True, False]:
        return {key if key in own else body + key: value for key, value in weights.items()}
    if has_body == [False, True]:
        return {k.removeprefix(body): value for k, value in weights.items() if k.startswith(body)}
    return weights


def _without_outdated(
    model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The weights without buffers that only older versions of the model's code save."""
    patterns = (*OUTDATED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    outdated = {
        key for key in weights if key not in own and any(re.search(p, key) for p in patterns)
    }
    return {key: value for key, value in weights.items() if key not in outdated}


def _check(
    model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], name: str
) -> None:
    """Check that weights have the keys and shapes of a model."""
    shared = {own[key].data_ptr() for key in own if key in weights}
    differences = {
        "missing keys": [  # one of several tied weights is enough
            key for key in own if key not in weights and own[key].data_ptr() not in shared
        ],
        "unexpected keys": [key for key in weights if key not in own],
        "other shapes": [
            f"{key}: {tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
            for key in own
            if key in weights and weights[key].shape != own[key].shape
        ],
    }
    lines = [f"{what}: {_shortened(keys)}" for what, keys in differences.items() if keys]
    if lines:
        raise ConfigError(
            f"checkpoint {name!r} must have the architecture of the model, {type(model).__name__}, "
            f"and does not; {'; '.join(lines)}"
        )


def _shortened(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more
