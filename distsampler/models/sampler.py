"""From a RunConfig to an optimizer: the class by its name, its options by its signature."""

import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from distsampler.config import RunConfig, SamplerConfig, unknown_option
from distsampler.errors import ConfigError, unknown_name
from distsampler.facts import Facts, Law, Posterior
from distsampler.optim import SAMPLERS, Sampler
from distsampler.optim.heat_correction import HeatCorrected
from distsampler.optim.law import QuadraticLaw
from distsampler.schedule import Schedule

GIVEN = ("self", "params", "generator")  # what the chain gives, so no option


@dataclass(frozen=True)
class Ground:
    """What a chain stands on: one flat tensor for each dtype of the model's parameters."""

    parameters: Sequence[Tensor]  # the parameters that move
    anchors: Sequence[Tensor]  # w*, shared with whoever else reads it
    masks: Sequence[Tensor] | None = None  # True where an entry moves; None: all do
    variance: Sequence[Tensor] | None = None  # of the gradient between examples; None: not measured


@runtime_checkable
class HasMetrics(Protocol):
    """A user's optimizer that reports on its last step, in 0-d tensors by name."""

    def metrics(self) -> Mapping[str, Tensor]: ...  # noqa: D102 (the class says it)


class UsersOptimizer:
    """A user's own torch optimizer, with what a chain asks of a :class:`Sampler`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._params = optimizer.param_groups[0]["params"]
        self.move = optimizer.step
        self.chain_state, self.restore_chain_state = optimizer.state_dict, optimizer.load_state_dict
        nothing: Callable[[], Mapping[str, Tensor]] = dict
        self.metrics = optimizer.metrics if isinstance(optimizer, HasMetrics) else nothing

    @torch.no_grad()
    def move_to(self, weights: Iterable[Tensor]) -> None:
        """Put the parameters to other weights, one tensor for each."""
        for p, w in zip(self._params, weights, strict=True):
            p.copy_(w)


def mover(optimizer: torch.optim.Optimizer) -> Sampler | UsersOptimizer:
    """Return what moves a chain: one of our samplers as it is, a user's optimizer wrapped."""
    return optimizer if isinstance(optimizer, Sampler) else UsersOptimizer(optimizer)


def ours(name: str) -> type[Sampler]:
    """Return the class of one of our samplers; of others, of which nothing is known, the base."""
    return SAMPLERS.get(name, Sampler)


def names(of: Callable[[type[Sampler]], bool]) -> str:
    """Return the names of our samplers of which something holds, for a sentence."""
    return ", ".join(name for name, kind in SAMPLERS.items() if of(kind))


def resolve(name: str) -> type[torch.optim.Optimizer]:
    """Return the class of a sampler by its name in ``SAMPLERS``, or ``"package.module:Class"``."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(
            unknown_name("sampler", name, SAMPLERS) + "; one of your own is 'package.module:Class'"
        )
    try:
        sampler = getattr(import_module(module), attribute)
    except Exception as error:  # importing runs the user's code: anything can come
        raise ConfigError(
            f"sampler.name must be importable, got {name!r}: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(sampler, type) and issubclass(sampler, torch.optim.Optimizer)):
        raise ConfigError(
            f"sampler.name must name a torch.optim.Optimizer, got {name!r}: {sampler}"
        )
    if "generator" not in inspect.signature(sampler).parameters:
        raise ConfigError(
            f"a sampler must take generator=, the torch.Generator of its noise: {name!r} does not"
        )
    return sampler


def signature_options(config: SamplerConfig) -> dict[str, Any]:
    """Return all options of the sampler, those not given at their defaults."""
    parameters = inspect.signature(resolve(config.name)).parameters
    known = {
        key: parameter.default
        for key, parameter in parameters.items()
        if key not in GIVEN
        and parameter.kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    }
    for key in config.options:
        if key not in known:
            what = f"option of sampler {config.name!r}"
            raise ConfigError(unknown_option("sampler", key, known, what) + _having(key))
    chosen = known | config.options
    return {key: value for key, value in chosen.items() if value is not Parameter.empty}


def _having(option: str) -> str:
    """The samplers that have an option which another has not, as the end of a sentence."""
    having = names(lambda kind: option in inspect.signature(kind).parameters)
    return f"; {option} is an option of {having}" if having else ""


def lacks_lr(config: SamplerConfig) -> bool:
    """Return whether a sampler has a step size and the config gives none."""
    parameters = inspect.signature(resolve(config.name)).parameters
    return "lr" in parameters and "lr" not in config.options


def effective_options(config: RunConfig, nbeta: float) -> dict[str, Any]:
    """Return the sampler's name and each of its options with the value it has, for JSON."""
    sampler = config.sampler
    options = signature_options(sampler) | supplied(config, nbeta)
    named = {"name": sampler.name, "correct_heat": sampler.correct_heat, **options}
    return {key: _plain(value) for key, value in named.items()}


def posterior_of(config: SamplerConfig, nbeta: float) -> Posterior:
    """Return the density that a sampler samples at some nbeta."""
    options = signature_options(config)
    localization, decay = (options.get(key) or 0.0 for key in ("localization", "weight_decay"))
    return Posterior(nbeta, float(localization), float(decay))


def facts_of(config: SamplerConfig, nbeta: float, n: int, examples: int | None = None) -> Facts:
    """Return what is known of a run before its first draw; ``examples`` where n counts tokens."""
    lr, law = signature_options(config).get("lr"), law_of(config)
    return Facts(
        n,
        posterior_of(config, nbeta),
        None if lr is None else float(lr),
        law and Law(law.name, law.limit),
        examples,
    )


def law_of(config: SamplerConfig) -> QuadraticLaw | None:
    """Return the law of a sampler's chain on a quadratic; None: not known."""
    return ours(config.name).law(signature_options(config))


def _plain(value: object) -> object:
    """An option as JSON can keep it."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def check_options(config: RunConfig, masked: bool = False) -> None:
    """Check that the options can be those of a run, whose config holds plain values.

    ``masked``: some entries of a parameter move, and others do not.
    """
    sampler = config.sampler
    options = signature_options(sampler)
    tensor_options = {k: do for kind in SAMPLERS.values() for k, do in kind.tensor_options.items()}
    for name, do in tensor_options.items():
        value = sampler.options.get(name)
        number = name in HeatCorrected.heat_options and isinstance(value, int | float)
        if value is not None and not number:
            raise ConfigError(
                f"sampler.{name} must be left out of a run, got {type(value).__name__}: {do}"
            )
    size = sampler.options.get("batch_size")
    if size is not None and size != config.batch_size:
        raise ConfigError(
            f"sampler.batch_size must be the run's, which supplies it, got {size!r} and "
            f"{config.batch_size}: set RunConfig(batch_size=...), in YAML batch_size"
        )
    if sampler.correct_heat:
        _check_heat(config, options)
    if sampler.options.get("save_mala_vars") and config.data_mode == "hop":
        raise ConfigError(
            "save_mala_vars needs the loss whose gradient moves the chain, and data_mode='hop' "
            "corrects the gradient alone: leave save_mala_vars out"
        )
    if masked and "optimize_over" not in options:
        raise ConfigError(
            f"masks need a sampler with the option optimize_over=, which {sampler.name!r} has not, "
            "and a component that is a part of parameters, as a head, is a mask too: restrict to "
            "whole parameters by name, or use another sampler"
        )
    if "freeze_after" in options:
        _check_freeze(config)


def _check_heat(config: RunConfig, options: Container[str]) -> None:
    needed = HeatCorrected.heat_options
    if not all(name in options for name in needed):
        raise ConfigError(
            f"sampler.correct_heat needs a sampler with the options {'= and '.join(needed)}=, "
            f"which {config.sampler.name!r} has not: use one of "
            + names(lambda kind: issubclass(kind, HeatCorrected))
        )
    given = [name for name in needed if config.sampler.options.get(name) is not None]
    if given:
        raise ConfigError(
            f"sampler.correct_heat supplies {' and '.join(needed)}: leave out {' and '.join(given)}"
        )
    if config.batches != "replacement":
        raise ConfigError(
            "sampler.correct_heat must know the noise of a minibatch: batches must be "
            f"'replacement', got {config.batches!r}, whose batches are not independent"
        )


def _check_freeze(config: RunConfig) -> None:
    """Check that adaptation, which biases draws, is over when the first draw is kept."""
    given, schedule = config.sampler.options.get("freeze_after"), Schedule.of(config)
    auto = schedule.burn_in is None
    # A chosen burn-in may take half of the first gate round, and no less is sure.
    steps = schedule.provisional_burn_in * config.thin
    if schedule.adapting == 0 and not (auto and given):
        first = schedule.gate_rounds[0]
        got = f"and 'auto' gives it a quarter of the first gate round, {first} draws"
        raise ConfigError(
            f"sampler {config.sampler.name!r} adapts until the end of burn-in: burn_in must be at "
            f"least 1 draw, {f'{got}: raise draws or gate.every' if auto else 'got 0'}"
        )
    if isinstance(given, int) and given > steps:
        limit = "half of the first gate round" if auto else "burn_in"
        raise ConfigError(
            f"sampler.freeze_after must be at most {limit} * thin = {steps} "
            "steps, or draws are kept from a chain that still adapts, and are biased; got "
            f"{given}: lower it, raise {'gate.every' if auto else 'burn_in'}, or leave it out"
        )


def freeze_after(config: RunConfig) -> int:
    """Return the steps in which the sampler adapts; 0 for one that does not."""
    options = signature_options(config.sampler)
    if "freeze_after" not in options:
        return 0
    given = options["freeze_after"]
    return Schedule.of(config).adapting * config.thin if given is None else int(given)


def supplied(config: RunConfig, nbeta: float) -> dict[str, Any]:
    """Return what the run gives where the user does not: nbeta, freeze_after, batch_size."""
    options, given = signature_options(config.sampler), config.sampler.options
    supply = {"nbeta": nbeta, "freeze_after": Schedule.of(config).adapting * config.thin}
    if options.get("gradient_variance") is not None:
        supply["batch_size"] = config.batch_size
    return {k: v for k, v in supply.items() if k in options and given.get(k) is None}


def build(
    sampler: type[torch.optim.Optimizer],
    config: RunConfig,
    nbeta: float,
    ground: Ground,
    generator: torch.Generator,
) -> torch.optim.Optimizer:
    """Make the sampler of a chain."""
    options = config.sampler.options | supplied(config, nbeta)
    group: dict[str, Any] = {"params": list(ground.parameters)}
    if issubclass(sampler, Sampler):
        group["anchors"] = list(ground.anchors)
    if ground.masks is not None:
        options["optimize_over"] = list(ground.masks)
    if ground.variance is not None:
        options |= {"gradient_variance": list(ground.variance), "batch_size": config.batch_size}
    try:
        return sampler([group], generator=generator, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in config.sampler.options.items())
        raise ConfigError(f"sampler {config.sampler.name!r} refuses ({given}): {error}") from None
