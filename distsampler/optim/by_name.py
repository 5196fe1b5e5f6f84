"""From a SamplerConfig to an optimizer: the class by its name, its options by its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from distsampler.config import SamplerConfig
from distsampler.errors import ConfigError, unknown_name
from distsampler.optim import SAMPLERS
from distsampler.optim.base import Sampler

GIVEN = ("self", "params", "generator")  # what the chain gives, so no option


def resolve(name: str) -> type[torch.optim.Optimizer]:
    """The class of a sampler.

    Args:
        name: of ``SAMPLERS``, or ``"package.module:Class"``.

    Raises:
        ConfigError: if there is none, or it is no optimizer that takes a generator.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(
            unknown_name("sampler", name, SAMPLERS) + "; one of your own is 'package.module:Class'"
        )
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"sampler.name must be importable, got {name!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"sampler.name must name a torch.optim.Optimizer, got {name!r}: {found}")
    if "generator" not in inspect.signature(found).parameters:
        raise ConfigError(
            f"a sampler must take generator=, the torch.Generator of its noise: {name!r} does not"
        )
    return found


def signature_options(config: SamplerConfig) -> dict[str, Any]:
    """All options of the sampler, those not given at their defaults.

    Raises:
        ConfigError: if one is given that its signature does not know.
    """
    parameters = inspect.signature(resolve(config.name)).parameters
    known = {
        key: parameter.default
        for key, parameter in parameters.items()
        if key not in GIVEN and parameter.default is not inspect.Parameter.empty
    }
    for key in config.options:
        if key not in known:
            raise ConfigError(unknown_name(f"option of sampler {config.name!r}", key, known))
    return known | config.options


def build(
    config: SamplerConfig,
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    nbeta: float,
    generator: torch.Generator,
) -> torch.optim.Optimizer:
    """The sampler of some parameters.

    Args:
        config: name and options.
        parameters: that move.
        anchors: w*, shared with whoever else reads it.
        nbeta: inverse temperature times n.
        generator: of its noise.

    Raises:
        ConfigError: if an option's value is refused.
    """
    found = resolve(config.name)
    known = signature_options(config)
    options: Mapping[str, Any] = config.options | ({"nbeta": nbeta} if "nbeta" in known else {})
    group: dict[str, Any] = {"params": list(parameters)}
    if issubclass(found, Sampler):
        group["anchors"] = list(anchors)
    try:
        return found([group], generator=generator, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in config.options.items())
        raise ConfigError(f"sampler {config.name!r} refuses ({given}): {error}") from None


def check(config: SamplerConfig, nbeta: float) -> tuple[str, ...]:
    """Builds the sampler once on a parameter of its own and makes a step.

    Returns:
        Names of what it reports of each step, but the distance, which every draw holds anyway.

    Raises:
        ConfigError: if the sampler or an option is refused, or it does not step.
    """
    if not isinstance(nbeta, int | float):
        raise ConfigError(
            f"sampler.nbeta must be a number in a run, got {nbeta!r}: a callable is for the bare "
            "optimizer"
        )
    parameter = torch.zeros(4, requires_grad=True)
    generator = torch.Generator()
    sampler = build(config, [parameter], [parameter.detach().clone()], nbeta, generator)
    parameter.grad = torch.ones(4)
    before = generator.get_state()
    sampler.step()
    if torch.equal(before, generator.get_state()) and config.options.get("noise_level") != 0:
        raise ConfigError(f"sampler {config.name!r} must draw its noise from generator=")
    metrics: Callable[[], Mapping[str, Tensor]] = getattr(sampler, "metrics", dict)
    return tuple(name for name in metrics() if name != "distance")
