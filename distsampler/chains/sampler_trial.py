"""A sampler is tried before a run starts, on four numbers, with errors that say what to do.

What a chain asks of a sampler, and what is tried: it is built from its options; ``step()`` needs no
closure, moves its parameters in place and draws its noise from ``generator=`` alone; and all that
the next step depends on is in ``state_dict()``, as tensors and plain values, so that a chain can be
continued after a fault.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from distsampler.chains.state import dump, parse
from distsampler.config import RunConfig
from distsampler.errors import ConfigError
from distsampler.models.sampler import Ground, build, check_options, mover
from distsampler.optim import Sampler

TRIAL_SIZE = 4


class Trial:
    """A sampler of four zeros, on a constant gradient.

    Args:
        sampler: class of the optimizer.
        config: the run's config.
        nbeta: inverse temperature times n.
        masked: whether it is to leave some entries of a parameter as they are.
    """

    def __init__(
        self, sampler: type[torch.optim.Optimizer], config: RunConfig, nbeta: float, masked: bool
    ) -> None:
        self.parameter = torch.zeros(TRIAL_SIZE, requires_grad=True)
        self.generator = torch.Generator()
        anchors = [self.parameter.detach().clone()]
        masks = [torch.ones(TRIAL_SIZE, dtype=torch.bool)] if masked else None
        variance = [torch.ones(TRIAL_SIZE)] if config.sampler.correct_heat else None
        ground = Ground([self.parameter], anchors, masks, variance)
        self.sampler: Any = build(sampler, config, nbeta, ground, self.generator)

    def step(self) -> None:
        """Make one step, as a chain does."""

        def closure() -> Tensor:
            self.parameter.grad = torch.ones(TRIAL_SIZE)
            return self.parameter.detach().sum()

        closure()
        self.sampler.step(closure) if needs_closure(type(self.sampler)) else self.sampler.step()


def needs_closure(sampler: type[torch.optim.Optimizer]) -> bool:
    """Return whether a step evaluates the loss itself, and so takes all data."""
    return issubclass(sampler, Sampler) and sampler.needs_closure


def measures_acceptance(sampler: type[torch.optim.Optimizer], config: RunConfig) -> bool:
    """Return whether the acceptance of the step behind each draw is asked for, and can be had."""
    asked = bool(config.sampler.options.get("save_mala_vars"))
    return asked and issubclass(sampler, Sampler) and sampler.has_side


def check(
    sampler: type[torch.optim.Optimizer], config: RunConfig, nbeta: float, masked: bool = False
) -> tuple[str, ...]:
    """Try the sampler.

    Args:
        sampler: class of the optimizer.
        config: the run's config.
        nbeta: inverse temperature times n.
        masked: whether it is to leave some entries of a parameter as they are.

    Returns:
        Names of what can be recorded of the step behind each draw.

    Raises:
        ConfigError: if the sampler or an option is refused, or something that a chain needs is
            missing.
    """
    name = config.sampler.name
    if not isinstance(nbeta, int | float):
        raise ConfigError(
            f"sampler.nbeta must be a number in a run, got {nbeta!r}: a callable is for the bare "
            "optimizer"
        )
    check_options(config, masked)
    trial = Trial(sampler, config, nbeta, masked)
    if measures_acceptance(sampler, config):
        trial.sampler.side(torch.zeros(()))
    _check_step(trial, name, quiet=config.sampler.options.get("noise_level") == 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its cautions have been given
        _check_state(trial, Trial(sampler, config, nbeta, masked), name)
    own = ("acceptance",) if measures_acceptance(sampler, config) else ()
    return (*mover(trial.sampler).metrics(), *own)


def _check_step(trial: Trial, name: str, quiet: bool) -> None:
    before, home = trial.generator.get_state(), trial.parameter.data_ptr()
    global_before = torch.get_rng_state()
    try:
        trial.step()
    except ConfigError:
        raise
    except Exception as error:  # the user's code: anything can come
        raise ConfigError(
            f"sampler {name!r} must make a step() from the gradients in p.grad, without closure, "
            f"but it raised {type(error).__name__}: {error}"
        ) from error
    if trial.parameter.data_ptr() != home:
        raise ConfigError(
            f"sampler {name!r} must move its parameters in place (p.add_(...) under no_grad), but "
            "it put new memory under them, which the model does not see"
        )
    if not torch.equal(global_before, torch.get_rng_state()):
        raise ConfigError(
            f"sampler {name!r} must draw its noise from generator=, but it drew from torch's "
            "global generator: pass generator= to torch.randn or normal_"
        )
    if torch.equal(before, trial.generator.get_state()) and not quiet:
        raise ConfigError(f"sampler {name!r} must draw its noise from generator=")
    may_stay = quiet or needs_closure(type(trial.sampler))  # which may refuse a proposal
    if not (may_stay or trial.parameter.detach().any()):
        raise ConfigError(f"sampler {name!r} must move its parameters, but step() left them")


def _check_state(trial: Trial, other: Trial, name: str) -> None:
    """Continue another sampler from the state of the tried one: both must take the same step."""
    must = f"the state_dict() of sampler {name!r} must hold all that the next step depends on"
    try:
        state = parse(dump(trial.sampler.state_dict()))
        other.sampler.load_state_dict(state)
    except Exception as error:  # the user's code: anything can come
        raise ConfigError(
            f"{must}, as tensors, numbers, texts, lists and dicts: {type(error).__name__}: {error}"
        ) from error
    with torch.no_grad():
        other.parameter.copy_(trial.parameter)
    other.generator.set_state(trial.generator.get_state())
    for each in (trial, other):
        each.step()
    if not torch.equal(trial.parameter, other.parameter):
        raise ConfigError(
            f"{must}, but one that was restored from it goes elsewhere: keep tensors in "
            "self.state[p] and numbers in the parameter groups"
        )
