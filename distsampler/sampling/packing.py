"""Packing: how many chains advance together, settled once, before anything starts."""

import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from textwrap import shorten

import numpy as np
import torch
from torch import Tensor

from distsampler.chains.anchor_pass import Part, measure
from distsampler.chains.pack import Pack
from distsampler.chains.sampler_trial import needs_closure
from distsampler.draws import AtAnchor
from distsampler.models.numerics import numerics
from distsampler.models.replica import ChainSpec, Replica
from distsampler.models.stack import Lanes
from distsampler.optim import SAMPLERS

WARM_UP = 2  # draws before a number of chains is timed
SECONDS = 0.2  # for which each number of chains is timed
AWAY = 0.02  # from w*, in weight units and in their size: where gradients are compared
GRADIENT_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative, of gradients
ROUGH = 0.1  # likewise, of other dtypes


@dataclass(frozen=True)
class Packing:
    """What was settled."""

    pack: int  # number of chains that advance together
    refused: str = ""  # why it is not as asked; empty if it is
    # number of chains -> steps per second of them together in one process; empty where
    # nothing was measured
    speeds: Mapping[int, float] = field(default_factory=dict)


def choose_pack(spec: ChainSpec, places: int | None, stored: int | None) -> Packing:
    """Settle how many chains advance together.

    "auto" is measured in this process, and counts as many places as this machine has cores, unless
    the pool knows its places: on a cluster a number is better. What was settled when the run began
    (``stored``) stays.
    """
    config = spec.config
    if config.pack == 1 or config.chains == 1:
        return Packing(1)
    if config.pack == "auto" and stored is not None:
        return Packing(stored)
    refused = refusal(spec)
    if refused is not None:
        warnings.warn(
            f"chains advance one after another in this run, though pack={config.pack!r}: {refused}",
            stacklevel=4,
        )
        return Packing(1, refused)
    return _measured(spec, places) if config.pack == "auto" else Packing(config.together)


def refusal(spec: ChainSpec) -> str | None:
    """Return why the chains of a run cannot advance together; None if they can."""
    known = next((reason for holds, reason in _obstacles(spec) if holds), None)
    if known is not None:
        return known
    try:
        with numerics(spec):
            return _disagreement(spec)
    except Exception as error:  # the user's code under torch.func: anything can come
        reason = shorten(f"{type(error).__name__}: {error}", 240)
        return f"torch.func refuses the model: {reason}"


def _obstacles(spec: ChainSpec) -> Iterator[tuple[bool, str]]:
    """Yield the known obstacles: whether each is there, and what it is."""
    config = spec.config
    name = config.sampler.name
    yield name not in SAMPLERS, f"{name!r} is a sampler of your own, which may keep hold of memory"
    yield needs_closure(spec.sampler), f"sampler {name!r} evaluates the loss inside its step"
    yield (
        bool(config.sampler.options.get("save_mala_vars")),
        "save_mala_vars takes a second gradient of each chain",
    )
    yield config.microbatch is not None, "microbatch cuts what a pack computes at once"
    yield spec.stochastic, "the loss draws at random, for each chain from a seed of its own"
    yield (
        spec.moves_buffers,
        "in mode 'train' a forward pass may move the model's buffers, as batch norm does",
    )
    yield spec.rows.pack_obstacle is not None, spec.rows.pack_obstacle or ""


def _disagreement(spec: ChainSpec) -> str | None:
    """Compare recorded gradients with the loss's own, on a batch that was not recorded."""
    device = next(spec.model.parameters()).device
    base, other = Replica(spec, device), Replica(spec, device)
    lanes, random = Lanes(base, spec, 2), np.random.default_rng(0)
    size = (2, spec.config.batch_size)
    lanes.losses_and_gradients(random.integers(0, len(spec.rows), size))
    rows = random.integers(0, len(spec.rows), size)
    for stack in lanes.weights:
        noise = torch.from_numpy(random.standard_normal(stack.shape)).to(stack)
        stack += AWAY * (1 + stack.square().mean().sqrt()) * noise
    losses = lanes.losses_and_gradients(rows)
    for lane in range(2):
        with torch.no_grad():
            for flat, stack in zip(other.flats, lanes.weights, strict=True):
                flat.copy_(stack[lane])
        expected = other.losses(other.batch(rows[lane]))
        other.backward(expected)
        gradients = zip(lanes.gradients, other.flats, strict=True)
        pairs = [(losses[lane], expected.detach())]
        pairs += [(stack[lane], flat.grad) for stack, flat in gradients if flat.grad is not None]
        if not all(_close(recorded, direct) for recorded, direct in pairs):
            return (
                "its loss or gradient, recorded on one batch, is another on the next: the loss "
                "must do the same operations at every call"
            )
    return None


def _close(recorded: Tensor, direct: Tensor) -> bool:
    away = torch.linalg.vector_norm((recorded - direct).double())
    size = torch.linalg.vector_norm(direct.double())
    return bool(away <= GRADIENT_AGREEMENT.get(direct.dtype, ROUGH) * size)


def _measured(spec: ChainSpec, places: int | None) -> Packing:
    """Measure with which number the chains of the run are done first, on these places."""
    config, speeds = spec.config, dict[int, float]()
    counts = [2**k for k in range(config.chains.bit_length()) if 2**k < config.chains]
    cores = (os.cpu_count() or 1) / max(config.placement.cpus_per_chain, 1e-9)
    places = places or max(1, int(cores))
    for count in [*counts, config.chains]:
        speeds[count] = _speed(spec, count)
    rounds = {n: math.ceil(math.ceil(config.chains / n) / places) * n for n in speeds}
    best = min(speeds, key=lambda n: (rounds[n] / speeds[n], n))
    return Packing(best, speeds={n: round(speed, 1) for n, speed in speeds.items()})


def _speed(spec: ChainSpec, count: int) -> float:
    """Return the steps per second of all chains of a pack, in this process."""
    plain = spec.config.replaced(
        pack=count, watch=False, init="anchor", init_radius=None, divergence_factor=None
    )
    spec = replace(spec, config=plain, probes=())
    device = next(spec.model.parameters()).device
    base, draws = Replica(spec, device), 0
    with numerics(spec):
        probe = np.asarray(measure(base, spec, Part(0, 0, "probe")).values, np.float64)
        pack = Pack(spec, range(count), AtAnchor(None, 0.0, 0.0, probe), base)
        pack.advance(WARM_UP)
        began = time.perf_counter()
        while time.perf_counter() - began < SECONDS:
            draws += WARM_UP
            if not pack.advance(WARM_UP).blocks:
                break  # all chains have diverged
        return draws * spec.config.thin * count / (time.perf_counter() - began)
