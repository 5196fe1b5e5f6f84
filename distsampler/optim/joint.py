"""Joint: samplers of several chains that step as one.

The equations take lists of tensors, so that one list may hold the parameters of all. What is a
chain's own stays so: its noise comes of its own generator, its thermostat of its own momentum, and
its state is the very dictionary that its sampler has. Between two joint steps each sampler may take
a step of its own.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from distsampler.optim.noise_streams import Owners
from distsampler.optim.readouts import QUIET
from distsampler.optim.sampler import Sampler

COUNTERS = ("steps", "adapted")


class Joint:
    """The joint step of samplers that have one class, one parameter group and equal options.

    Args:
        samplers: of built-in classes; until one of them loads a state.
    """

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        for sampler in samplers:
            sampler._current_plans()  # makes what state is missing, from its own noise
        self._groups = [sampler.param_groups[0] for sampler in samplers]
        first, shared = samplers[0], self._groups[0]
        group = {key: self._merged(key) if isinstance(v, list) else v for key, v in shared.items()}
        group["anchors"] = [s.state[p]["anchor"] for s in samplers for p in _params(s)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the cautions were given with each sampler
            self._sampler = type(first)([group | QUIET], generator=first.generator)  # type: ignore[call-arg]
        for sampler in samplers:
            self._sampler.state.update({p: sampler.state[p] for p in _params(sampler)})
        self._sampler.join(Owners.of([s.generator for s in samplers], len(shared["params"])))
        self._counters = [key for key in COUNTERS if key in shared]

    def move(self) -> None:
        """Moves all once, from the gradients that are there, and takes no readings."""
        (group,) = self._sampler.param_groups
        group.update({key: self._groups[0][key] for key in self._counters})
        self._sampler.move()
        now = {key: group[key] for key in self._counters}
        for each in self._groups:
            each.update(now)

    def _merged(self, key: str) -> list[Any]:
        """An option that holds a tensor a parameter, and the parameters, one after another."""
        return [entry for group in self._groups for entry in group[key]]


def _params(sampler: Sampler) -> list[Any]:
    params: list[Any] = sampler.param_groups[0]["params"]
    return params
