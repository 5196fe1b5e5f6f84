"""Warm start: what one checkpoint's calibration chose, handed to the other checkpoints of its row.

The first checkpoint of a row (one restriction, setting and data set) is calibrated by pilots. The
others keep its sampler, localization and length, so that all estimates of the row are of the same
posterior, and run one short pilot of their own, at the first one's lr (a quarter of it, and so on,
where a chain diverges). With the largest curvature h that it met,

    lr = lr_1 min(1, kappa_1 / kappa),  kappa = nbeta h + gamma + weight_decay

(_1: of the first checkpoint). Where the pilot's minibatches heat more than wanted, as they come to
do in the course of training, friction is raised until they do not, as far as it can be, and the
step is lowered for the rest. The step is never raised. Where the length is not chosen, pilots take
at most a tenth of each cell's steps; where that is too little, h is that at w*. All of it is a
function of the two checkpoints, data, loss, config and seed, and not of which cell ran when.
"""

import math
from collections.abc import Container
from dataclasses import dataclass

from torch import nn

from distsampler.config import RunConfig, SamplerConfig
from distsampler.errors import RunFailed
from distsampler.execution.pool import ChainPool
from distsampler.models.loss import LossFn
from distsampler.models.replica import ChainSpec
from distsampler.models.sampler import ours, signature_options
from distsampler.sampling.calibration import choose_all
from distsampler.sampling.piloted import allowance, chosen_step
from distsampler.sampling.pilots import THIN, Pilot, Pilots, reach
from distsampler.sampling.prepare import prepare
from distsampler.sampling.stopping import Stopped
from distsampler.sampling.tuning import ATTEMPTS, FRICTION, PILOT
from distsampler.sweeps.manifest import Chosen

LOWER = 4.0  # the lr is divided by it after a pilot that diverged


@dataclass(frozen=True)
class Asked:
    """A cell that needs a step, and how its pilots may be run."""

    model: nn.Module
    data: object
    loss: LossFn
    config: RunConfig  # of the cell, before anything is chosen
    pool: ChainPool
    bias: float  # relative bias of the LLC that step and minibatches may bring
    length: bool = True  # whether the length is chosen too; else pilots take a tenth of it
    stopped: Stopped = lambda: None

    def prepared(self, config: RunConfig) -> ChainSpec:
        """Return what the cell's chains are made of with a config."""
        return prepare(self.model, self.data, self.loss, config, self.pool)

    def pilots(self, spec: ChainSpec) -> Pilots:
        """Return what runs the cell's pilots."""
        most = math.inf if self.length else allowance(spec.config)
        return Pilots(spec, self.pool, self.stopped, most)


def lead(asked: Asked) -> Chosen:
    """Choose for the first checkpoint of a row, by pilots; see ``calibrate``."""
    spec = asked.prepared(asked.config)
    choose = choose_all if asked.length else chosen_step
    calibration = choose(spec, asked.pilots(spec), asked.bias)
    config = calibration.config
    return Chosen(
        sampler=config.sampler.model_dump(exclude_unset=True),
        draws=config.draws,
        burn_in=config.burn_in,
        thin=config.thin,
        curvature=calibration.curvature,
        bias=asked.bias,
        reasons=calibration.reasons,
    )


def start_from(first: Chosen, asked: Asked) -> Chosen:
    """Choose for another checkpoint of the row, from what was chosen for the first.

    Raises:
        RunFailed: if its pilots diverge, however small the step.
    """
    given = asked.config.sampler.options
    if "lr" in given:
        return first
    spec = asked.prepared(first.applied(asked.config))
    sampler, pilots = spec.config.sampler, asked.pilots(spec)
    lr, few = float(sampler.options["lr"]), pilots.draws_left < PILOT
    for attempt in range(ATTEMPTS):
        tried = sampler.replaced(lr=lr / LOWER**attempt)
        pilot = pilots.pilot(spec.config, tried, *((1, 1) if few else (PILOT, THIN)))
        if not pilot.diverged:
            ratio = _kappa(spec, first.curvature) / _kappa(spec, pilot.h)
            slow = tried.replaced(lr=float(f"{min(tried.options['lr'], lr * ratio):.3g}"))
            # at w*, where nothing has moved, heat is no part of an LLC
            return _scaled(first, slow if few else cooled(slow, pilot, first.bias, given), pilot.h)
        if pilots.draws_left < PILOT:
            break
    raise RunFailed(
        f"the pilots diverged down to sampler.lr={tried.options['lr']:.3g}, from the first "
        f"checkpoint's {lr:.3g}: raise sampler.localization, or give sampler.lr"
    )


def cooled(
    sampler: SamplerConfig, pilot: Pilot, bias: float, fixed: Container[str] = ()
) -> SamplerConfig:
    """Return a sampler whose minibatches heat by ``bias`` at most.

    The heat goes as lr, or, for a sampler with momentum and friction A, as 2 lr / A.

    Args:
        sampler: the sampler to cool.
        pilot: a pilot of a sampler like it, whose heat is known.
        bias: relative bias of the LLC that minibatches may bring.
        fixed: options that stay; a friction among them is not raised.
    """
    lr, heat = float(sampler.options["lr"]), abs(pilot.heat)
    most = bias * reach(pilot.sampler) / max(heat, 1e-300)  # the longest reach within the bias
    name = ours(sampler.name).friction_option
    if name is None:
        return sampler.replaced(lr=float(f"{min(lr, most):.3g}"))
    friction = float(signature_options(sampler)[name])
    if name not in fixed:
        friction = max(friction, float(f"{min(2 * lr / most, FRICTION[1]):.2g}"))
    return sampler.replaced(lr=float(f"{min(lr, most * friction / 2):.3g}"), **{name: friction})


def _scaled(first: Chosen, sampler: SamplerConfig, h: float) -> Chosen:
    lr = f"the first checkpoint's {first.sampler['lr']:.3g}, for a curvature of {h:.3g} here"
    reasons = {**first.reasons, "sampler.lr": f"{lr} and {first.curvature:.3g} there"}
    name = ours(sampler.name).friction_option
    if name is not None and sampler.options.get(name) != first.sampler.get(name):
        reasons[f"sampler.{name}"] = f"minibatches would heat by more than {first.bias:.1%}"
    options = sampler.model_dump(exclude_unset=True)
    return first.replaced(sampler=options, curvature=h, reasons=reasons)


def _kappa(spec: ChainSpec, h: float) -> float:
    """Curvature of the log posterior, from that of the mean loss."""
    return max(spec.posterior.kappa(max(h, 0.0)), 1e-300)
