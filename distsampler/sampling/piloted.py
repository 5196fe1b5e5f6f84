"""A run without lr: pilots choose its step within a tenth of its steps; a resume keeps it.

They choose the sampler where none is named, its lr, and the localization where none is given. The
length of the run stays what the config says.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from distsampler.analysis.run import Run
from distsampler.config import RunConfig, SamplerConfig
from distsampler.errors import ConfigError
from distsampler.execution.pool import ChainPool
from distsampler.execution.progress import Observer
from distsampler.models.replica import ChainSpec
from distsampler.models.sampler import lacks_lr
from distsampler.recipe import Recipe
from distsampler.sampling.calibration import BIAS, Calibration, recorded
from distsampler.sampling.directory import Resume, continues
from distsampler.sampling.job import Job, check, ray_pool, stopped_on_error
from distsampler.sampling.pilots import PILOT_CHAINS, Pilots
from distsampler.sampling.prepare import prepare
from distsampler.sampling.stopping import Stopped
from distsampler.sampling.tuning import Tuner, check_law
from distsampler.schedule import Schedule
from distsampler.store.files import Files, as_files

SHARE = 10  # pilots may take one step for so many of the run

Say = Callable[[str], None]


def plan(
    recipe: Recipe, store: str | Path | None, pool: ChainPool | None, resume: Resume, say: Say
) -> "Job | PilotedJob":
    """Check a recipe, and return the job that runs it: after pilots, if it gives no lr.

    ``say`` is called with one line that says what pilots chose; store, pool and resume are those of
    ``sample``.
    """
    if not lacks_lr(recipe.config.sampler):
        return check(recipe, store, pool, resume)
    store = tempfile.mkdtemp(prefix="distsampler-") if store is None else store
    if continues(as_files(store), resume):
        return check(as_stored(recipe, as_files(store)), store, pool, resume)
    return PilotedJob(recipe, store, pool, resume, say)


class PilotedJob:
    """A run that was checked, and begins with pilots; see ``plan``."""

    def __init__(
        self,
        recipe: Recipe,
        store: str | Path,
        pool: ChainPool | None,
        resume: Resume,
        say: Say,
    ) -> None:
        check_law(recipe.config.sampler)
        self._recipe, self._store, self._resume, self._say = recipe, store, resume, say
        self._pool, self._lasting = _lasting(pool, recipe.config)
        with stopped_on_error(self._pool):
            self._spec = prepare(
                recipe.model, recipe.data, recipe.loss, recipe.config, self._pool, recipe.probes
            )
            self._allowance = allowance(self._spec.config)

    def run(self, observer: Observer, stopped: Stopped) -> Run:
        """Run the pilots, then the run; see ``Job.run``."""
        with self._lasting():
            pilots = Pilots(self._spec, self._pool, stopped, self._allowance)
            calibration = chosen_step(self._spec, pilots)
            self._say(calibration.line)
            recipe = replace(
                self._recipe,
                data=self._spec.rows,
                config=calibration.config,
                calibration=calibration.as_dict(),
            )
            return check(recipe, self._store, self._pool, self._resume).run(observer, stopped)


def _lasting(
    pool: ChainPool | None, config: RunConfig
) -> tuple[ChainPool, Callable[[], AbstractContextManager[object]]]:
    """A pool, and what keeps it up from pilot to pilot: Ray, if it is our own."""
    if pool is not None:
        return pool, nullcontext
    own = ray_pool(config)
    return own, own.joined


def chosen_step(spec: ChainSpec, pilots: Pilots, bias: float = BIAS) -> Calibration:
    """Let pilots choose the sampler and its step, and leave the length of the run as it is."""
    began = time.monotonic()
    return recorded(Tuner(spec, pilots, bias).run(), time.monotonic() - began)


def allowance(config: RunConfig) -> int:
    """Return the steps that pilots may take: a tenth of those of all chains."""
    steps = config.chains * Schedule.of(config).total * config.thin
    if steps // SHARE < PILOT_CHAINS:
        raise ConfigError(
            f"sampler.lr must be given for a run of {steps} steps: pilots that choose it may take "
            f"a tenth of them, and the curvature at w* alone takes {PILOT_CHAINS}"
        )
    return steps // SHARE


def as_stored(recipe: Recipe, files: Files) -> Recipe:
    """Return a recipe with what pilots chose for the run in a store; else with the lr it has."""
    manifest, asked = Run(files).manifest, recipe.config.sampler
    options = manifest.config.sampler.model_dump(exclude_unset=True)
    named = asked.name if "name" in asked.model_fields_set else options.get("name")
    if manifest.calibration is None or named != options.get("name"):
        options = {name: options[name] for name in ("lr",) if name in options}
    sampler = SamplerConfig(**options | asked.model_dump(exclude_unset=True))
    return replace(recipe, config=recipe.config.replaced(sampler=sampler))
