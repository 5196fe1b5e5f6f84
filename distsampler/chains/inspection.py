"""Inspection: the user's model, loss and observables are tried on replicas before a run."""

from dataclasses import dataclass, replace

import torch

from distsampler.chains.observables import variables, wide_variables
from distsampler.chains.user_observables import try_observables
from distsampler.curvature import watch
from distsampler.draws import Variable, WideVariable
from distsampler.models.inspection import inspect_loss
from distsampler.models.loss import LossKind
from distsampler.models.replica import ChainSpec, Replica


@dataclass(frozen=True)
class Inspection:
    """What model, loss and observables were seen to do."""

    kind: LossKind
    observed: tuple[Variable | WideVariable, ...]  # what the user's observables return
    unwatched: str  # why the curvature cannot be watched; empty if it can, or need not be
    notes: tuple[str, ...]  # what a user should know, in sentences


def inspect(spec: ChainSpec, device: torch.device) -> Inspection:
    """Inspect a recipe on a device.

    Raises:
        ConfigError: if it cannot be sampled.
    """
    kind, notes = inspect_loss(Replica(spec, device), spec)
    spec = replace(spec, kind=kind)
    taken: list[Variable | WideVariable] = [*variables(spec), *wide_variables(spec)]
    observed = try_observables(spec, taken, device)
    return Inspection(kind, observed, watch.obstacle(spec, device), notes)
