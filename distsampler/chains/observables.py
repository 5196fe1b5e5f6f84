"""What is measured at a draw, all of it at one point w_t.

The minibatch readouts are noisy and unbiased: they carry the LLC. The probe readouts have no
minibatch noise: they carry the verdict. Distances and projections of the weights are advisory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.chains.anchor_pass import (
    PARTS,
    probe_batches,
    probe_losses,
    probe_size,
    probe_weights,
)
from distsampler.chains.user_observables import OwnObservables, dims_of
from distsampler.curvature.watch import watched
from distsampler.draws import AtAnchor, Variable, WideVariable
from distsampler.errors import ConfigError
from distsampler.models.replica import ChainSpec, Replica
from distsampler.models.restriction import selected
from distsampler.seeding import Stream, generator
from distsampler.store.large_arrays import LOSSES, WEIGHTS

PROJECTIONS = 8
COORDINATES = 4096  # entries of the weights that enter their projections, at most

MEANINGS = {
    "noise_norm": "|N|, unscaled noise of the step that leaves w_t",
    "grad_norm": "|g|, minibatch gradient at w_t",
    "weight_norm": "|w_t|, L2 over the parameters that move",
    "distance": "|w_t - w*|, L2 over the parameters that move",
    "localization_loss": "gamma/2 |w_t - w*|^2",
    "acceptance": "chance that Metropolis would accept the step that leaves w_t",
    "noise_clipped": "share of entries whose minibatch noise exceeds the noise of a step",
    "thermostat": "friction after the step that leaves w_t",
}

Values = dict[str, float | NDArray[np.floating]]


def variables(spec: ChainSpec) -> tuple[Variable, ...]:
    """What a draw of this run holds."""
    measured = (*_measured(spec), *watched(spec))
    own = (each for each in spec.observed if isinstance(each, Variable))
    return (*measured, *(_told(name, measured) for name in spec.metrics), *own)


def wide_variables(spec: ChainSpec) -> tuple[WideVariable, ...]:
    """What of a draw is too large to travel."""
    own = (each for each in spec.observed if isinstance(each, WideVariable))
    return (*_saved_losses(spec), *_saved_weights(spec), *own)


def _saved_losses(spec: ChainSpec) -> Iterator[WideVariable]:
    if spec.config.save_losses:
        shape = (probe_size(spec.config, len(spec.rows)),)
        yield WideVariable(LOSSES, "loss of each probe example at w_t", ("example",), shape)


def _saved_weights(spec: ChainSpec) -> Iterator[WideVariable]:
    every, names = spec.config.save_weights_every, selected(spec.model, spec.config.restrict_to)
    for name, parameter in spec.model.named_parameters():
        if every is not None and name in names:
            dims = dims_of(name, parameter.ndim)
            shape = tuple(parameter.shape)
            yield WideVariable(f"{WEIGHTS}/{name}", f"{name} at w_t", dims, shape, every)


def _told(name: str, measured: Sequence[Variable]) -> Variable:
    """What the sampler tells: of w_t, or of the step that leaves it."""
    if name != "distance" and name in [variable.name for variable in measured]:
        raise ConfigError(f"a sampler's metrics() must not be named like a readout, got {name!r}")
    return Variable(name, "sample_stats", MEANINGS.get(name, f"{name} of the step behind the draw"))


def _measured(spec: ChainSpec) -> tuple[Variable, ...]:
    return (
        Variable("loss", "posterior", "minibatch loss at w_t"),
        Variable("excess_loss", "posterior", "minibatch loss minus the same examples' loss at w*"),
        Variable("probe_loss", "posterior", "loss on the probe examples at w_t"),
        Variable(
            "projections",
            "posterior",
            "random projections of the probe's per-example excess losses",
            ("projection",),
            (_projections(spec),),
        ),
        Variable("distance", "posterior", "|w_t - w*|, L2 over the parameters that move"),
        Variable(
            "weight_projections",
            "posterior",
            "random projections of w_t - w*",
            ("weight_projection",),
            (PROJECTIONS,),
        ),
        Variable("step", "sample_stats", "steps made before the draw", dtype="int64"),
    )


class DrawMeter:
    """Measures the draws of one chain.

    Args:
        spec: the recipe.
        replica: the chain's model.
        anchors: the replica's flat parameters at w*.
        at_anchor: losses at w*.
        chain: index.
    """

    def __init__(
        self,
        spec: ChainSpec,
        replica: Replica,
        anchors: list[Tensor],
        at_anchor: AtAnchor,
        chain: int,
    ) -> None:
        self._spec, self._replica, self._at_anchor, self._chain = spec, replica, at_anchor, chain
        self._anchors = anchors
        self._probe = probe_batches(replica, spec)
        self._weights = probe_weights(spec)
        self._onto = _probe_projection(spec)
        self._picks, self._weight_onto = _weight_projection(
            spec.config.seed,
            replica.masks or [torch.ones_like(w, dtype=torch.bool) for w in anchors],
        )
        self._picked = self._pick(anchors)
        self._own = OwnObservables(spec, replica, chain)
        self._coupled = spec.coupled

    @torch.no_grad()
    @np.errstate(invalid="ignore", over="ignore")  # a chain that diverges is told by its values
    def measure(self, losses: Tensor, rows: NDArray[np.int64], step: int) -> Values:
        """The draw at the replica's present weights.

        Args:
            losses: of the minibatch there: (batch,) or ().
            rows: of the minibatch.
            step: of the chain.
        """
        batch = losses.detach().double().cpu().numpy()
        probe = probe_losses(self._replica, self._spec, self._probe, self._chain, step)
        anchors = self._init_losses(rows, step)
        return {
            "loss": float(batch.mean()),
            "excess_loss": float((batch - anchors).mean()),
            "probe_loss": float(np.average(probe, weights=self._weights)),
            "projections": self._onto @ (probe - self._at_anchor.probe_losses),
            "distance": self._distance(),
            "weight_projections": self._weight_onto @ self._moved(),
            "step": step,
            **self._wide(probe, step),
            **self._own.measure(step),
        }

    def _wide(self, probe: NDArray[np.float64], step: int) -> Values:
        """What is too large to travel."""
        config, found = self._spec.config, Values()
        if config.save_losses:
            found[LOSSES] = probe.astype(np.float32)
        every, draws = config.save_weights_every, step // config.thin + 1
        if every is not None and draws % every == 0:
            for name, p in self._replica.model.named_parameters():
                if p.requires_grad:
                    copied = p.detach().to("cpu", torch.float32, copy=True)
                    found[f"{WEIGHTS}/{name}"] = copied.numpy()
        return found

    def _init_losses(self, rows: NDArray[np.int64], step: int) -> NDArray[np.floating] | float:
        """What the same examples lost at w*; without per-example losses, what all did.

        Where their losses depend on the batch or on chance, they are measured anew, in the same
        batch and by the same chance: what was measured before is of others.
        """
        if self._coupled:
            return self._losses_at_anchor(rows, step)
        return (
            self._at_anchor.init_loss
            if self._at_anchor.losses is None
            else self._at_anchor.losses[rows]
        )

    def _losses_at_anchor(self, rows: NDArray[np.int64], step: int) -> NDArray[np.float64]:
        flats = self._replica.flats
        held = [flat.clone() for flat in flats]
        torch._foreach_copy_(flats, self._anchors)
        losses = self._replica.values(rows, self._chain, step)
        torch._foreach_copy_(flats, held)
        return losses.double().cpu().numpy()

    def _distance(self) -> float:
        pairs = zip(self._replica.flats, self._anchors, strict=True)
        return math.hypot(*(float(torch.dist(w, anchor)) for w, anchor in pairs))

    def _moved(self) -> NDArray[np.float64]:
        return self._pick(self._replica.flats) - self._picked

    def _pick(self, tensors: Sequence[Tensor]) -> NDArray[np.float64]:
        pairs = zip(tensors, self._picks, strict=True)
        picked = [flat.index_select(0, picks).double().cpu().numpy() for flat, picks in pairs]
        return picked[0] if len(picked) == 1 else np.concatenate(picked)


def _projections(spec: ChainSpec) -> int:
    return PROJECTIONS if spec.per_example else min(PARTS, len(spec.rows))


def _probe_projection(spec: ChainSpec) -> NDArray[np.float64]:
    """Rows of unit length onto which the probe's excess losses are projected.

    Without per-example losses: the parts of the probe themselves.
    """
    if not spec.per_example:
        return np.eye(_projections(spec))
    size = probe_size(spec.config, len(spec.rows))
    onto = generator(spec.config.seed, Stream.PROJECTIONS).standard_normal((PROJECTIONS, size))
    return np.asarray(onto / np.linalg.norm(onto, axis=1, keepdims=True))


def _weight_projection(seed: int, masks: list[Tensor]) -> tuple[list[Tensor], NDArray[np.float64]]:
    """Entries of each flat tensor that move, at most 4,096 in all, and a Gaussian matrix."""
    rng = generator(seed, Stream.PROJECTIONS)
    moving = torch.cat([mask.cpu() for mask in masks]).nonzero().numpy()[:, 0]
    count = min(COORDINATES, len(moving))
    flat = moving[np.sort(rng.choice(len(moving), count, replace=False))]
    edges = np.cumsum([0] + [mask.numel() for mask in masks])
    picks = [
        torch.from_numpy(flat[(flat >= start) & (flat < stop)] - start).to(mask.device)
        for mask, start, stop in zip(masks, edges[:-1], edges[1:], strict=True)
    ]
    return picks, rng.standard_normal((PROJECTIONS, count)) / np.sqrt(count)
