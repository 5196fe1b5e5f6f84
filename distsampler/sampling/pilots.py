"""Pilots: short runs of the ordinary kind, from whose stores a calibration reads."""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from distsampler.analysis.arviz_bridge import group
from distsampler.analysis.run import Run
from distsampler.config import GateConfig, RunConfig, SamplerConfig
from distsampler.errors import ConfigError, RunFailed
from distsampler.execution.pool import ChainPool
from distsampler.models.replica import ChainSpec
from distsampler.models.sampler import ours, signature_options
from distsampler.sampling.job import Job
from distsampler.sampling.prepare import draft
from distsampler.sampling.stopping import PilotsStopped, Stopped

PILOT_CHAINS, THIN = 2, 10

Read = TypeVar("Read")


@dataclass(frozen=True)
class Pilot:
    """What one short run gave; numbers are NaN if it diverged."""

    sampler: SamplerConfig  # the sampler it ran with
    steps: int  # steps of all its chains together
    h: float = math.nan  # largest curvature of the mean loss when it was last measured
    discretisation: float = math.nan  # bias of the step predicted there, relative to the LLC
    heat: float = math.nan  # bias of minibatch noise predicted there, relative to the LLC
    ess: float = math.nan  # effective draws per draw, of the slowest gated quantity
    diverged: bool = False  # whether a chain diverged


class Pilots:
    """Runs the pilots of a run on a pool, each into a store that is deleted afterwards.

    Args:
        spec: the run's; each pilot has a config of its own.
        pool: where the pilots' chains run.
        stopped: why the pilots must end early; see ``stopping``.
        allowance: steps that all pilots together may take.
    """

    def __init__(
        self,
        spec: ChainSpec,
        pool: ChainPool,
        stopped: Stopped = lambda: None,
        allowance: float = math.inf,
    ) -> None:
        self._spec, self._pool, self._stopped, self._left = spec, pool, stopped, allowance

    @property
    def draws_left(self) -> float:
        """Draws of a pilot for which there are steps left."""
        return self._left / (PILOT_CHAINS * THIN)

    def pilot(
        self, config: RunConfig, sampler: SamplerConfig, draws: int, thin: int = THIN
    ) -> Pilot:
        """Try a sampler in a pilot of a run; see ``short``."""
        steps = PILOT_CHAINS * draws * thin
        self._left -= steps
        pilot = self.run(
            short(config, sampler, draws, thin=thin), lambda run: read_pilot(run, sampler, steps)
        )
        return pilot or Pilot(sampler, steps, diverged=True)

    def run(self, config: RunConfig, read: Callable[[Run], Read]) -> Read | None:
        """Return what is read from a finished run; None where a chain diverged.

        Raises:
            PilotsStopped: if it was ended early.
        """
        with tempfile.TemporaryDirectory(prefix="distsampler-pilot-") as home:
            store, spec, pool = f"{home}/run", self._spec, self._pool
            try:
                made = draft(spec.model, spec.rows, spec.loss, config, pool)
                job = Job(replace(made, pilot=True), store, pool, "never")
                run = job.run(lambda snapshot: None, self._stopped)
            except RunFailed as failed:
                if not failed.lost_chains:
                    raise
                _check_diverged(failed.lost_chains)
                return None
            if run.manifest.status == "interrupted":
                raise PilotsStopped(f"the calibration was interrupted: {run.manifest.reason}")
            _check_diverged(run.lost_chains)
            return None if run.lost_chains else read(run)


def _check_diverged(lost_chains: Mapping[int, str]) -> None:
    """Check that chains were lost to their step, and to nothing else."""
    for reason in lost_chains.values():
        if "diverged" not in reason:
            raise RunFailed(f"a pilot lost a chain: {reason}")


def read_pilot(run: Run, sampler: SamplerConfig, steps: int) -> Pilot:
    """Read a pilot from its store: curvature and biases as they are at the last draw."""
    stats = group(run.inference_data, "sample_stats")
    if "curvature" not in stats:
        raise ConfigError(
            "calibration measures the curvature, and this loss has no double backward: give "
            "sampler.lr and localization and run without calibration, or write the loss of "
            "operations that autograd differentiates twice"
        )
    llc = run.llc("ignore").mean

    def last(name: str) -> float:
        return float(stats[name].values[:, -1].mean())

    ess = [min(row.ess_bulk, row.ess_tail) for row in run.diagnosis.gated]
    size = run.posterior.sizes["chain"] * run.posterior.sizes["draw"]
    discretisation, heat = last("discretisation_bias"), last("heat_bias")
    # At weights that are no minimum the LLC may be below zero: then relative to all there is of it.
    scale = llc if llc > 0 else abs(llc) + abs(discretisation) + abs(heat)
    relative = 1 / scale if scale > 0 else 0.0
    return Pilot(
        sampler,
        steps,
        float(stats["curvature"].values[:, -1].max()),
        discretisation * relative,
        heat * relative,
        float(np.nanmin(ess)) / size if np.isfinite(ess).any() else math.nan,
    )


def short(config: RunConfig, sampler: SamplerConfig, draws: int, *, thin: int = THIN) -> RunConfig:
    """Return a pilot's config: two chains from w*, watched, never stopped by a clock or a gate.

    Half of its draws are burn-in; it keeps nothing that a calibration does not read.
    """
    burn_in = draws // 2
    return config.replaced(
        sampler=sampler,
        burn_in=burn_in,
        draws=draws - burn_in,
        thin=thin,
        chains=PILOT_CHAINS,
        min_chains=1,
        gate=GateConfig(),
        max_seconds=None,
        max_draws=None,
        init="anchor",
        init_radius=None,
        watch=True,
        fsync=False,
        pack=1,
        observables={},
        probes={},
        save_losses=False,
        save_weights_every=None,
    )


def reach(sampler: SamplerConfig) -> float:
    """Return the step of Langevin dynamics that spreads as fast over slow directions."""
    options, friction = signature_options(sampler), ours(sampler.name).friction_option
    return float(options["lr"]) * (1.0 if friction is None else 2 / float(options[friction]))


def relaxation(sampler: SamplerConfig, kappa: float) -> float:
    """Return the part of its distance that a direction of curvature kappa loses at a step.

    A small one; with momentum, friction limits it where ``4 lr kappa`` exceeds its square.
    """
    options, name = signature_options(sampler), ours(sampler.name).friction_option
    force = float(options["lr"]) * kappa
    if name is None:
        return force / 2
    friction = float(options[name])
    return (friction - math.sqrt(max(friction**2 - 4 * force, 0.0))) / 2


def label(sampler: SamplerConfig) -> str:
    """Return what people call a sampler."""
    scheme = sampler.options.get("scheme")
    heat = ", heat corrected," if sampler.correct_heat else ""
    return f"{scheme or sampler.name}{heat}"
