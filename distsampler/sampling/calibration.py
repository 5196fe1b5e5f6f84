"""Calibration: short pilots say what a run's sampler, step, localization and length should be.

Everything is measured along pilot chains, which run as any run does: the largest curvature h of
the mean loss, the biases that follow from it and from the gradient's noise (``curvature.watch``),
and the ESS. A pilot starts at w* with the step that the curvature there allows; where it meets a
larger curvature, or diverges, it is repeated with a smaller one. Then

``lr``  is a fixed fraction of ``1 / kappa``, ``kappa = nbeta h + gamma`` the largest that was met;
        smaller where the predicted bias would be above the wanted one.
``A``   the friction of a sampler with momentum: as small as the heat of minibatches allows.

The localization, where it is free, is a fixed part of the largest ``nbeta h`` at w*: it defines
what is estimated, and so hangs on model, data and loss alone, not on seed, batches or length.

A chain spreads over slow directions by its **reach**, ``lr`` without momentum and ``2 lr / A`` with
it, and minibatches heat it in proportion to the reach, whatever the sampler. (The thermostat of
SGNHT would take the mean of the heat away, but at the small lr of real problems it has no time to
move: it needs 1 / lr steps. So it gets no credit for that.) The candidates are LMSGLD, LMSGLD with
heat correction, and BADODAB, where momentum lets the friction, not the curvature, limit the reach;
the one with the longest reach within the wanted bias is taken.

Measured on deep linear networks (4 chains of 10,000 steps, second half, error against Gibbs): where
LMSGLD at 1 / kappa is 9 and 26 % low because it is not relaxed, BADODAB at 0.25 / kappa and A =
0.05 is within 0.1 % and 5 % low; where minibatches bring much heat, A = 0.05 is 4 % high, 0.1 is
3 %, and 0.5 or LMSGLD 0.3 %. Hence the bound on A.

What is chosen is a function of model, data, loss, config and seed; no clock enters it.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from distsampler.analysis.heatmap import Heatmap
from distsampler.analysis.run import Run
from distsampler.config import RunConfig
from distsampler.errors import ConfigError
from distsampler.execution.pool import ChainPool
from distsampler.models.loss import LossFn
from distsampler.models.replica import ChainSpec
from distsampler.models.sampler import signature_options
from distsampler.recipe import Recipe
from distsampler.sampling.job import lasting_pool
from distsampler.sampling.pilots import PILOT_CHAINS, THIN, Pilots, label, relaxation, short
from distsampler.sampling.prepare import prepare
from distsampler.sampling.stopping import Stopped, interruptible, keyboard_interrupt
from distsampler.sampling.tuning import REHEARSAL, Choice, Tuner
from distsampler.schedule import Schedule

BIAS = 0.005  # of the LLC: what the step may bring, and what minibatches may
SHARE = 0.2  # of the run, for pilots
STEPS, MOST_STEPS = 10_000, 100_000  # per chain, burn-in included, where the length is free
RELAXATIONS = 20  # times that a flat direction should relax within the run, where it is free
GRID = ((0.25, 0.5, 1.0, 2.0, 4.0), (0.25, 1.0, 4.0))  # of lr and nbeta, in a heatmap


@dataclass(frozen=True)
class Calibration(Choice):
    """A run's configuration, and why it is what it is."""

    pilot_seconds: float
    """Seconds that all pilots took."""
    heatmap: Heatmap | None = None
    """The LLC over lr and nbeta, if asked for."""

    @property
    def pilot_steps(self) -> int:
        """Steps of the chains of all pilots."""
        return sum(pilot.steps for pilot in self.pilots)

    @property
    def missed(self) -> tuple[str, ...]:
        """What has more bias than was wished for: "discretisation", "heat"."""
        biases = {"discretisation": self.discretisation_bias, "heat": self.heat_bias}
        return tuple(name for name, value in biases.items() if abs(value) > self.bias)

    @property
    def run_steps(self) -> int:
        """Steps of all chains of the chosen run."""
        return self.config.chains * Schedule.of(self.config).total * self.config.thin

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON; NaN as None."""
        return {
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "reasons": self.reasons,
            "curvature": _number(self.curvature),
            "discretisation_bias": _number(self.discretisation_bias),
            "heat_bias": _number(self.heat_bias),
            "bias": self.bias,
            "missed": list(self.missed),
            "pilots": len(self.pilots),
            "pilot_steps": self.pilot_steps,
            "pilot_seconds": round(self.pilot_seconds, 3),
            "run_steps": self.run_steps,
            "heatmap": None if self.heatmap is None else self.heatmap.as_dict(),
        }

    def __str__(self) -> str:
        rows = [(name, _shown(self.config, name), why) for name, why in self.reasons.items()]
        wide = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{name:{wide[0]}}  {value:{wide[1]}}  {why}" for name, value, why in rows]
        lines.append(f"predicted bias of the LLC: {self._biases()}")
        lines.append(self._cost())
        return "\n".join(lines + ([] if self.heatmap is None else ["", str(self.heatmap)]))

    @property
    def line(self) -> str:
        """What was chosen, at which cost and with which bias, in one line."""
        sampler = self.config.sampler
        chosen = [
            f"{name.removeprefix('sampler.')} {_shown(self.config, name)}"
            for name, why in self.reasons.items()
            if why != "as given" and name != "sampler.name"
        ]
        share = self.pilot_steps / self.run_steps
        return (
            f"pilots of {self.pilot_steps} steps, {share:.1%} of the run's, chose "
            f"{', '.join([label(sampler).removesuffix(','), *chosen])}; predicted bias of the LLC: "
            f"{self._biases()}"
        )

    def _biases(self) -> str:
        values = (self.discretisation_bias, self.heat_bias)
        step, heat = (f"{v:+.2%}" if math.isfinite(v) else "not known" for v in values)
        missed = f"; MISSED: the {self.bias:.2%} that was wished for" if self.missed else ""
        return f"{step} by the step, {heat} by minibatches{missed}"

    def _cost(self) -> str:
        share = self.pilot_steps / self.run_steps
        caution = f": more than {SHARE:.0%}, because the run is short" if share > SHARE else ""
        return (
            f"{len(self.pilots)} pilots took {self.pilot_steps} steps, {share:.0%} of the run's "
            f"{self.run_steps}, and {self.pilot_seconds:.1f} s{caution}"
        )


def calibrate(  # noqa: PLR0913 (as sample)
    model: nn.Module,
    data: object,
    loss: LossFn,
    config: RunConfig | Mapping[str, Any] | None = None,
    *,
    pool: ChainPool | None = None,
    bias: float = BIAS,
    heatmap: bool = False,
) -> Calibration:
    """Choose sampler, step size, localization and length of a run by short pilots.

    What the config sets is kept: a name or lr of the sampler, its localization, ``burn_in``,
    ``draws``, ``thin`` and all other fields; what it leaves out is chosen.

    Args:
        model: the trained model, as for ``sample``.
        data: the data, as for ``sample``.
        loss: the loss, as for ``sample``.
        config: what is fixed beforehand, as for ``sample``; None: nothing.
        pool: where the pilots' chains run; None: ``RayPool(config.placement)``.
        bias: relative bias of the LLC that the step may bring, and that minibatches may.
        heatmap: sample the LLC over a grid of lr and nbeta around the choice as well.

    Raises:
        ConfigError: if something cannot be sampled, the law of the sampler is not known, or its
            biases cannot be predicted.
        RunFailed: if pilots survive at no step size, or were ended by SIGTERM.
        KeyboardInterrupt: after Ctrl-C.

    Example:
        >>> calibration = calibrate(model, train_set, loss)  # doctest: +SKIP
        >>> print(calibration)  # doctest: +SKIP
        >>> run = sample(model, train_set, loss, calibration.config)  # doctest: +SKIP
    """
    with keyboard_interrupt(str):
        return _calibrate(Recipe(model, data, loss, RunConfig.of(config)), pool, bias, heatmap)


def _calibrate(recipe: Recipe, pool: ChainPool | None, bias: float, heatmap: bool) -> Calibration:
    if not 0 < bias < 1:
        raise ConfigError(f"bias must be between 0 and 1, a part of the LLC: got {bias}")

    def choose(stopped: Stopped) -> Calibration:
        with lasting_pool(pool, recipe.config) as places:
            spec = prepare(recipe.model, recipe.data, recipe.loss, recipe.config, places)
            pilots = Pilots(spec, places, stopped)
            calibration = choose_all(spec, pilots, bias)
            chart = _heatmap(calibration.config, pilots, spec.nbeta) if heatmap else None
        return replace(calibration, heatmap=chart)

    return interruptible(choose)


def choose_all(spec: ChainSpec, pilots: Pilots, bias: float) -> Calibration:
    """Choose sampler, step, localization and length, as far as they are free."""
    began = time.monotonic()
    return recorded(with_length(Tuner(spec, pilots, bias).run()), time.monotonic() - began)


def recorded(choice: Choice, seconds: float) -> Calibration:
    """Return a choice for a run of its length, with the seconds that the pilots took."""
    reasons, config = dict(choice.reasons), choice.config
    if (why := reasons["sampler.localization"]) != "as given":
        rate, steps = _relaxation(config), Schedule.of(config).total * config.thin
        needed = math.ceil(RELAXATIONS / rate)
        few = f": too few, {RELAXATIONS} times take {needed} steps" if steps < needed else ""
        reasons["sampler.localization"] = (
            f"{why}; a flat one relaxes about {steps * rate:.2g} times in the {steps} steps of a "
            f"chain{few}"
        )
    return Calibration(**vars(choice) | {"reasons": reasons}, pilot_seconds=seconds)


def with_length(choice: Choice) -> Choice:
    """Choose burn-in, draws and thin where they are free: long enough for ESS and localization."""
    config, reasons, given = choice.config, dict(choice.reasons), choice.config.model_fields_set
    thin = config.thin if "thin" in given else THIN
    every = choice.pilots[-1].ess * thin / THIN  # effective draws a draw
    enough = 1.5 * config.gate.ess / (config.chains * max(min(every, 1.0), 1e-9))
    free = reasons["sampler.localization"] != "as given"
    relaxed = RELAXATIONS / _relaxation(config) / 2 / thin if free else 0.0
    wanted, most = max(enough, relaxed), MOST_STEPS // 2 // thin
    draws = min(max(math.ceil(wanted), STEPS // 2 // thin), most)
    changes: dict[str, Any] = {}
    if "draws" not in given:
        changes["draws"] = draws
        reasons["draws"] = (
            f"the pilot had an ESS of {every:.2g} a draw and {config.gate.ess:.0f} are wanted"
            + (f", and {RELAXATIONS} relaxations of flat directions" if relaxed > enough else "")
            + (f": more than {MOST_STEPS} steps would be needed" if wanted > most else "")
        )
    if "burn_in" not in given:
        kept = changes.get("draws", config.draws)
        changes["burn_in"] = kept if isinstance(kept, int) else "auto"
        reasons["burn_in"] = "half of the run: chains start at w*, below what they reach"
    if "thin" not in given:
        changes["thin"] = thin
        reasons["thin"] = "costs one probe pass in ten steps"
    kept_as_given = dict.fromkeys(("draws", "burn_in", "thin"), "as given")
    return replace(choice, config=config.replaced(**changes), reasons=kept_as_given | reasons)


def calibrate_recipe(
    recipe: Recipe, *, heatmap: bool = False, bias: float = BIAS
) -> tuple[Recipe, Calibration]:
    """Calibrate what a YAML file asks for; a run of the returned recipe records the calibration."""
    calibration = _calibrate(recipe, None, bias, heatmap)
    chosen = replace(recipe, config=calibration.config, calibration=calibration.as_dict())
    return chosen, calibration


def continued(recipe: Recipe, store: str) -> Recipe:
    """Return a recipe with what it leaves open chosen as for the run in a store."""
    stored, asked = Run(store).manifest.config, recipe.config
    sampler = stored.sampler.replaced(**asked.sampler.model_dump(exclude_unset=True))
    fields = {name: getattr(asked, name) for name in asked.model_fields_set}
    return replace(recipe, config=stored.replaced(**{**fields, "sampler": sampler}))


def _heatmap(config: RunConfig, pilots: Pilots, nbeta: float) -> Heatmap:
    """The LLC over a grid around the choice, two chains a cell."""
    lr = config.sampler.options["lr"]
    lrs = tuple(float(f"{lr * factor:.3g}") for factor in GRID[0])
    nbetas = tuple(float(f"{nbeta * factor:.4g}") for factor in GRID[1])
    llc, spread = (np.full((len(nbetas), len(lrs)), np.nan) for _ in range(2))
    for i, j in np.ndindex(*llc.shape):
        sampler = config.sampler.replaced(lr=lrs[j], nbeta=nbetas[i])
        cell = short(config, sampler, REHEARSAL)
        estimate = pilots.run(cell, lambda run: run.llc("ignore"))
        if estimate is not None:
            llc[i, j] = estimate.mean
            spread[i, j] = estimate.spread
    steps = llc.size * PILOT_CHAINS * REHEARSAL * THIN
    return Heatmap(lrs, nbetas, llc, spread, steps)


def _relaxation(config: RunConfig) -> float:
    """The part of its distance that a flat direction loses at a step."""
    return relaxation(config.sampler, float(config.sampler.options["localization"]))


def _shown(config: RunConfig, name: str) -> str:
    """A field's value, as people write it."""
    home, _, option = name.rpartition(".")
    if option == "name":
        return label(config.sampler).removesuffix(",")
    value = signature_options(config.sampler)[option] if home else getattr(config, option)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
