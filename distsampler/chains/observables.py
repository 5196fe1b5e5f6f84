"""What is measured at a draw, all of it at one point w_t.

The minibatch readouts are noisy and unbiased: they carry the LLC. The probe readouts have no
minibatch noise: they carry the verdict. Distances and projections of the weights are advisory.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.chains import probe
from distsampler.chains.probe import NamedLosses, Probe, named_variables
from distsampler.chains.user_observables import UserObservables, dims_of
from distsampler.curvature.watch import watched
from distsampler.draws import (
    ACCEPTANCE,
    DISTANCE,
    EXCESS_LOSS,
    LOSS,
    PROBE_LOSS,
    PROJECTIONS,
    STEP,
    WEIGHT_PROJECTIONS,
    AtAnchor,
    Variable,
    WideVariable,
)
from distsampler.errors import ConfigError
from distsampler.models.replica import ChainSpec, Replica
from distsampler.models.restriction import selected
from distsampler.seeding import Stream, generator
from distsampler.store.large_arrays import LOSSES, WEIGHTS

DIRECTIONS = 8  # onto which losses and weights are projected
COORDINATES = 4096  # entries of the weights that enter their projections, at most

STEP_METRICS = {
    "noise_norm": "|N|, unscaled noise of the step that leaves w_t",
    "grad_norm": "|g|, minibatch gradient at w_t",
    "weight_norm": "|w_t|, L2 over the parameters that move",
    DISTANCE: "|w_t - w*|, L2 over the parameters that move",
    "localization_loss": "gamma/2 |w_t - w*|^2",
    ACCEPTANCE: "chance that Metropolis would accept the step that leaves w_t",
    "noise_clipped": "share of entries whose minibatch noise exceeds the noise of a step",
    "thermostat": "friction after the step that leaves w_t",
}
"""What our samplers' metrics mean."""

Values = dict[str, float | NDArray[np.floating]]
"""Name -> value, of one draw."""


def variables(spec: ChainSpec) -> tuple[Variable, ...]:
    """Return what a draw of this run holds."""
    measured = (*_measured(spec), *watched(spec))
    metrics = (_metric(name, measured) for name in spec.metrics)
    users = (each for each in spec.observed if isinstance(each, Variable))
    return (*measured, *metrics, *users)


def wide_variables(spec: ChainSpec) -> tuple[WideVariable, ...]:
    """Return what of a draw is too large to travel."""
    users = (each for each in spec.observed if isinstance(each, WideVariable))
    named = (variable for each in spec.probes for variable in named_variables(each))
    return (*_saved_losses(spec), *_saved_weights(spec), *named, *users)


def _saved_losses(spec: ChainSpec) -> Iterator[WideVariable]:
    if spec.config.save_losses:
        shape = (probe.size(spec),)
        yield WideVariable(LOSSES, "loss of each probe example at w_t", ("example",), shape)


def _saved_weights(spec: ChainSpec) -> Iterator[WideVariable]:
    every = spec.config.save_weights_every
    if every is None:
        return
    moving = selected(spec.model, spec.config)
    for name, parameter in spec.model.named_parameters():
        if name in moving:
            dims = dims_of(name, parameter.ndim)
            shape = tuple(parameter.shape)
            yield WideVariable(f"{WEIGHTS}/{name}", f"{name} at w_t", dims, shape, every)


def _metric(name: str, measured: Sequence[Variable]) -> Variable:
    """What the sampler measures: of w_t, or of the step that leaves it."""
    if name != DISTANCE and name in [variable.name for variable in measured]:
        raise ConfigError(f"a sampler's metrics() must not be named like a readout, got {name!r}")
    return Variable(
        name, "sample_stats", STEP_METRICS.get(name, f"{name} of the step that leaves w_t")
    )


def _measured(spec: ChainSpec) -> tuple[Variable, ...]:
    def projected(name: str, what: str, count: int) -> Variable:
        dim = name.removesuffix("s")
        return Variable(name, "posterior", f"random projections of {what}", (dim,), (count,))

    return (
        Variable(LOSS, "posterior", "minibatch loss at w_t"),
        Variable(EXCESS_LOSS, "posterior", "minibatch loss minus the same examples' loss at w*"),
        Variable(PROBE_LOSS, "posterior", "loss on the probe examples at w_t"),
        projected(PROJECTIONS, "the probe's per-example excess losses", _projections(spec)),
        Variable(DISTANCE, "posterior", STEP_METRICS[DISTANCE]),
        projected(WEIGHT_PROJECTIONS, "w_t - w*", DIRECTIONS),
        Variable(STEP, "sample_stats", "steps made before the draw", dtype="int64"),
    )


class DrawMeter:
    """Measures the draws of one chain, whose replica had the weights ``anchors`` at w*."""

    def __init__(
        self,
        spec: ChainSpec,
        replica: Replica,
        anchors: list[Tensor],
        at_anchor: AtAnchor,
        chain: int,
    ) -> None:
        self._spec, self._replica, self._at_anchor, self._chain = spec, replica, at_anchor, chain
        self._anchors, self._coupled = anchors, spec.coupled
        self._probe = Probe(replica, spec)
        self._named = [(each, NamedLosses(replica, each)) for each in spec.probes]
        self._loss_directions = _loss_directions(spec)
        self._entries, self._weight_directions = _weight_directions(
            spec.config.seed, replica.moving_entries()
        )
        self._entries_at_anchor = self._picked(anchors)
        self._user = UserObservables(spec, replica, chain)

    @torch.no_grad()
    @np.errstate(invalid="ignore", over="ignore")  # a chain that diverges shows it in its values
    def measure(self, losses: Tensor, rows: NDArray[np.int64], step: int) -> Values:
        """Return the draw at the replica's present weights, with a minibatch's losses there."""
        batch = losses.detach().double().cpu().numpy()
        on_device = self._probe.tensor(self._chain, step)
        probe_losses = on_device.double().cpu().numpy()
        moved = self._picked(self._replica.flats) - self._entries_at_anchor
        return {
            LOSS: float(batch.mean()),
            EXCESS_LOSS: float((batch - self._losses_at_anchor(rows, step)).mean()),
            PROBE_LOSS: self._probe.mean(probe_losses),
            PROJECTIONS: self._loss_directions @ (probe_losses - self._at_anchor.probe_losses),
            DISTANCE: self._distance(),
            WEIGHT_PROJECTIONS: self._weight_directions @ moved,
            STEP: step,
            **self._wide(probe_losses, step),
            **self._named_probes(step),
            **self._user.measure(step, on_device),
        }

    def _wide(self, probe_losses: NDArray[np.float64], step: int) -> Values:
        """What is too large to travel."""
        config, values = self._spec.config, Values()
        if config.save_losses:
            values[LOSSES] = probe_losses.astype(np.float32)
        every, draws = config.save_weights_every, step // config.thin + 1
        if every is not None and draws % every == 0:
            for name, p in self._replica.model.named_parameters():
                if p.requires_grad:
                    copied = p.detach().to("cpu", torch.float32, copy=True)
                    values[f"{WEIGHTS}/{name}"] = copied.numpy()
        return values

    def _named_probes(self, step: int) -> Values:
        """The losses of the named probes that are measured at this draw."""
        draws, values = step // self._spec.config.thin + 1, Values()
        for each, losses in self._named:
            if draws % each.config.every == 0:
                values |= losses.values(self._at_anchor.named[each.name])
        return values

    def _losses_at_anchor(self, rows: NDArray[np.int64], step: int) -> NDArray[np.floating] | float:
        """Losses of the same examples at w*; without per-example losses, the mean of all.

        Where an example's loss depends on its batch or on chance, it is measured again, in the same
        batch and with the same random numbers: the anchor pass had others.
        """
        if not self._coupled:
            losses = self._at_anchor.losses
            return self._at_anchor.init_loss if losses is None else losses[rows]
        flats = self._replica.flats
        weights = [flat.clone() for flat in flats]
        torch._foreach_copy_(flats, self._anchors)
        again = self._replica.losses_of_rows(rows, self._chain, step)
        torch._foreach_copy_(flats, weights)
        return again.double().cpu().numpy()

    def _distance(self) -> float:
        pairs = zip(self._replica.flats, self._anchors, strict=True)
        return math.hypot(*(float(torch.dist(w, anchor)) for w, anchor in pairs))

    def _picked(self, tensors: Sequence[Tensor]) -> NDArray[np.float64]:
        """The entries of the weights that enter their projections."""
        pairs = zip(tensors, self._entries, strict=True)
        picked = [flat.index_select(0, entries).double().cpu().numpy() for flat, entries in pairs]
        return picked[0] if len(picked) == 1 else np.concatenate(picked)


def _projections(spec: ChainSpec) -> int:
    return DIRECTIONS if spec.per_example else min(probe.PROBE_PARTS, len(spec.rows))


def _loss_directions(spec: ChainSpec) -> NDArray[np.float64]:
    """Rows of unit length onto which the probe's excess losses are projected.

    Without per-example losses: the parts of the probe themselves.
    """
    if not spec.per_example:
        return np.eye(_projections(spec))
    shape = (DIRECTIONS, probe.size(spec))
    directions = generator(spec.config.seed, Stream.PROJECTIONS).standard_normal(shape)
    return np.asarray(directions / np.linalg.norm(directions, axis=1, keepdims=True))


def _weight_directions(seed: int, moving: list[Tensor]) -> tuple[list[Tensor], NDArray[np.float64]]:
    """Entries of each flat tensor that move, at most 4,096 in all, and a Gaussian matrix."""
    rng = generator(seed, Stream.PROJECTIONS)
    numbers = torch.cat([mask.cpu() for mask in moving]).nonzero().numpy()[:, 0]
    count = min(COORDINATES, len(numbers))
    chosen = numbers[np.sort(rng.choice(len(numbers), count, replace=False))]
    edges = np.cumsum([0] + [mask.numel() for mask in moving])
    entries = [
        torch.from_numpy(chosen[(chosen >= start) & (chosen < stop)] - start).to(mask.device)
        for mask, start, stop in zip(moving, edges[:-1], edges[1:], strict=True)
    ]
    return entries, rng.standard_normal((DIRECTIONS, count)) / np.sqrt(count)
