"""Joint: samplers of several chains that step as one.

The equations take lists of tensors, so that one list may hold the parameters of all. What is a
chain's own stays so: its noise comes from its own generator, its thermostat from its own momentum,
and its state is the very dictionary that its sampler has. Between two joint steps each sampler may
take a step of its own.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from distsampler.optim.noise_streams import Owners
from distsampler.optim.readouts import QUIET
from distsampler.optim.sampler import Sampler


class Joint:
    """The joint step of samplers that have one class, one parameter group and equal options.

    Args:
        samplers: Samplers of built-in classes. Once one of them loads a state, make another Joint.
    """

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        for sampler in samplers:
            sampler._current_layouts()  # makes what state is missing, from its own noise
        first, self._groups = samplers[0], [sampler.param_groups[0] for sampler in samplers]
        group = {
            key: self._merged(key) if isinstance(value, list) else value
            for key, value in first.param_groups[0].items()
        }
        group["anchors"] = [s.state[p]["anchor"] for s in samplers for p in _params(s)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the cautions were given with each sampler
            make: Callable[..., Sampler] = type(first)
            self._sampler = make([group | QUIET], generator=first.generator)
        for sampler in samplers:
            self._sampler.state.update({p: sampler.state[p] for p in _params(sampler)})
        owner = [chain for chain, sampler in enumerate(samplers) for _ in _params(sampler)]
        generators = tuple(sampler.generator for sampler in samplers)
        self._sampler._owners = Owners(generators, tuple(owner))

    def move(self) -> None:
        """Move all once, from the gradients that are there, and take no readouts."""
        (group,) = self._sampler.param_groups
        counters = self._sampler.counters
        group.update({key: self._groups[0][key] for key in counters})
        self._sampler.move()
        for each in self._groups:
            each.update({key: group[key] for key in counters})

    def _merged(self, option: str) -> list[Any]:
        """Return an option that holds a tensor a parameter, or the parameters, of all chains."""
        return [entry for group in self._groups for entry in group[option]]


def _params(sampler: Sampler) -> list[Tensor]:
    params: list[Tensor] = sampler.param_groups[0]["params"]
    return params
