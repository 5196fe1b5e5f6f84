"""What the options of a sampler must be; the first wrong one raises ConfigError."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from distsampler.errors import ConfigError

DENSITY_OPTIONS = ("localization", "weight_decay", "nbeta", "bounding_box_size", "noise_level")
"""Options that say which density is sampled, whatever the sampler."""


def refuse(must: str, got: object, do: str) -> NoReturn:
    """Raise ConfigError with what must hold, what was got, and what to do."""
    raise ConfigError(f"{must}; got {got}; {do}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def positive(group: Mapping[str, Any], name: str, do: str) -> None:
    """Check that ``group[name]`` is a finite number above zero."""
    if not (_is_number(group[name]) and group[name] > 0):
        refuse(f"{name} must be a finite number above 0", repr(group[name]), do)


def not_negative(group: Mapping[str, Any], name: str, do: str) -> None:
    """Check that ``group[name]`` is a finite number, zero or above."""
    if not (_is_number(group[name]) and group[name] >= 0):
        refuse(f"{name} must be a finite number, 0 or above", repr(group[name]), do)


def fraction(group: Mapping[str, Any], name: str, do: str) -> None:
    """Check that ``group[name]`` lies in [0, 1)."""
    if not (_is_number(group[name]) and 0 <= group[name] < 1):
        refuse(f"{name} must lie in [0, 1)", repr(group[name]), do)


def whole(group: Mapping[str, Any], name: str, do: str, least: int) -> None:
    """Check that ``group[name]`` is a whole number, at least ``least``."""
    value = group[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        refuse(f"{name} must be a whole number, at least {least}", repr(value), do)


def one_of(group: Mapping[str, Any], name: str, known: tuple[str, ...]) -> None:
    """Check that ``group[name]`` is one of the known words."""
    if group[name] not in known:
        words = " or ".join(map(repr, known))
        refuse(f"{name} must be {words}", repr(group[name]), "pass one of these")


def check_common(group: Mapping[str, Any]) -> None:
    """Check the options that samplers have in common."""
    positive(group, "lr", "pass the step size, for example lr=1e-5")
    if not callable(group["nbeta"]):
        positive(group, "nbeta", "pass n / log(n), n the number of training examples")
    not_negative(group, "localization", "pass gamma, the strength of the pull to w*")
    not_negative(group, "weight_decay", "pass lambda, the precision of the Gaussian prior")
    if group["bounding_box_size"] is not None:
        positive(group, "bounding_box_size", "pass the half width of the box, or None for no box")
    if "noise_level" in group:
        not_negative(group, "noise_level", "leave it at 1 to sample the posterior")


def nbeta_at(nbeta: float | Callable[[int], float], step: int) -> float:
    """Return the inverse temperature at a step; what a callable returns is checked."""
    if not callable(nbeta):
        return nbeta
    value = float(nbeta(step))
    if not (math.isfinite(value) and value > 0):
        refuse("nbeta(step) must be a finite number above 0", f"{value} at step {step}", "mend it")
    return value


def check_parameter(param: Tensor) -> None:
    """Check that a parameter is real, floating and dense."""
    if not param.is_floating_point():
        refuse(
            "parameters must be real floating-point tensors: the posterior lives on real vectors",
            f"{param.dtype}",
            "split a complex parameter with torch.view_as_real, leave others out",
        )
    if param.layout is not torch.strided:
        refuse("parameters must be dense", f"layout {param.layout}", "call to_dense() on it")


def check_device(param: Tensor, generator: torch.Generator) -> None:
    """Check that the noise of a parameter can be drawn where it lies."""
    if param.device.type != generator.device.type:
        refuse(
            "parameters and generator must be on one device",
            f"{param.device} and {generator.device}",
            "move the model before the sampler is made, or make the generator on its device",
        )


def per_parameter(value: object, params: Sequence[Tensor], name: str) -> list[Tensor | None] | None:
    """Return one tensor (or None) a parameter, from None, one tensor or a sequence of them."""
    if value is None:
        return None
    tensors = [value] if isinstance(value, Tensor) else value
    if not isinstance(tensors, Sequence) or len(tensors) != len(params):
        refuse(
            f"{name} must hold one tensor for each of the group's {len(params)} parameters",
            f"{len(tensors)}" if isinstance(tensors, Sequence) else repr(type(value)),
            "pass a list in the order of the parameters, or make parameter groups",
        )
    for tensor, param in zip(tensors, params, strict=True):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.shape != param.shape):
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else repr(type(tensor))
            refuse(
                f"each tensor of {name} must have its parameter's shape {tuple(param.shape)}",
                f"{got}",
                "expand it first",
            )
    return list(tensors)


def masks(value: object, params: Sequence[Tensor]) -> list[Tensor | None] | None:
    """Return ``optimize_over`` as boolean masks on the parameters' devices; None: all moves."""
    tensors = per_parameter(value, params, "optimize_over")
    if tensors is None or all(m is None for m in tensors):
        return None
    for mask in tensors:
        if mask is not None and mask.dtype != torch.bool:
            refuse("optimize_over must hold boolean masks", f"{mask.dtype}", "call .bool() on it")
    return [m if m is None else m.to(p.device) for m, p in zip(tensors, params, strict=True)]
