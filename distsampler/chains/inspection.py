"""Inspection: the user's model, loss, probes and observables are tried before a run."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from distsampler.chains.observables import variables, wide_variables
from distsampler.chains.probe import Seen, try_probe
from distsampler.chains.user_observables import try_observables
from distsampler.curvature import watch
from distsampler.draws import Variable, WideVariable
from distsampler.models.inspection import inspect_loss
from distsampler.models.loss import LossKind
from distsampler.models.replica import ChainSpec, NamedProbe, Replica


@dataclass(frozen=True)
class Inspection:
    """What model, loss and observables were seen to do."""

    kind: LossKind
    observed: tuple[Variable | WideVariable, ...]  # what the user's observables return
    probes: tuple[Seen, ...]  # what the losses of the named probes are
    unwatched: str  # why the curvature cannot be watched; empty if it can, or need not be
    notes: tuple[str, ...]  # what a user should know, in sentences


def inspect(spec: ChainSpec, device: torch.device) -> Inspection:
    """Inspect a recipe on a device.

    Raises:
        ConfigError: if it cannot be sampled.
    """
    kind, notes = inspect_loss(Replica(spec, device), spec)
    spec = replace(spec, kind=kind)
    seen = tuple(try_probe(spec, each, device) for each in spec.probes)
    spec = replace(spec, probes=with_seen(spec.probes, seen))
    taken: list[Variable | WideVariable] = [*variables(spec), *wide_variables(spec)]
    observed = try_observables(spec, taken, device)
    return Inspection(kind, observed, seen, watch.obstacle(spec, device), notes)


def with_seen(probes: Iterable[NamedProbe], seen: Iterable[Seen]) -> tuple[NamedProbe, ...]:
    """Return named probes with what was seen of their losses."""
    pairs = zip(probes, seen, strict=True)
    return tuple(replace(each, kind=saw.kind, shape=saw.shape) for each, saw in pairs)
