"""Calibration: short pilots say what a run's sampler, step, localisation and length should be.

Everything is measured along pilot chains, which run as any run does: the largest curvature h of
the mean loss, the biases that follow from it and from the gradient's noise (``spectrum``,
``bias``), and the ESS. A pilot starts at w* with the step that the curvature there allows; where it
meets a larger curvature, or diverges, it is repeated with a smaller one. Then

``lr``  is a fixed fraction of ``1 / kappa``, ``kappa = nbeta h + gamma`` the largest that was met;
        smaller where the predicted bias would be above the wanted one.
``A``   the friction of a sampler with momentum: as small as the heat of minibatches allows.

A chain spreads over slow directions by its **reach**, ``lr`` without momentum and ``2 lr / A`` with
it, and minibatches heat it in proportion to the reach, whatever the sampler. (The thermostat of
SGNHT would take the mean of the heat away, but at the small lr of real problems it has not the
time to move: it needs 1 / lr steps. So no credit is given for it.) Of the candidates the one of the
longest reach within the wanted bias is taken: LMSGLD, LMSGLD with heat correction, and BADODAB,
where momentum lets the friction, not the curvature, limit the reach.

Measured on deep linear networks (4 chains of 10,000 steps, second half, error against Gibbs): where
LMSGLD at 1 / kappa is 9 and 26 % low because it is not relaxed, BADODAB at 0.25 / kappa and A =
0.05 is within 0.1 % and 5 % low; where minibatches bring much heat, A = 0.05 is 4 % high, 0.1 is
3 %, and 0.5 or LMSGLD 0.3 %. Hence the bound on A.

What is chosen is a function of model, data, loss, config and seed; no clock enters it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from torch import nn

from distsampler.bias import Law, law_of
from distsampler.config import GateConfig, RunConfig, SamplerConfig
from distsampler.errors import ConfigError, RunFailed
from distsampler.heatmap import Heatmap
from distsampler.inference_data import group
from distsampler.optim.by_name import HEAT, signature_options
from distsampler.pool import ChainPool
from distsampler.recipe import Recipe
from distsampler.replica import ChainSpec, Loss
from distsampler.results import Run
from distsampler.run import prepare, sample

STEPS, MOST_STEPS = 10_000, 100_000  # of a chain, burn-in included
BIAS = 0.005  # of the LLC: what the step may bring, and what minibatches may
PILOT_CHAINS, THIN = 2, 10
PILOT, REHEARSAL = 41, 136  # draws: just past the looks at steps 400 and 1,350
ATTEMPTS = 8  # of one candidate
REHEARSALS = 3
GROWN, JUMP = 1.3, 1e3  # of kappa: where a pilot is repeated; and how, if it diverged
HEATED = 2.0  # times less than curvature allows: where a larger batch_size is advised
GUESSED = 30.0  # times what a pilot met: kappa was a guess
SHARE = 0.2  # of the run, for pilots
RELAXATIONS = 20  # of a flat direction within the run, where localization is free
PREFERRED = 1.5  # times the reach of a sampler without momentum, for one with it
FRICTION = (0.03, 0.5)  # bounds of A
FRACTIONS: dict[Law, float] = {
    "sgld": 0.2,
    "lmsgld": 0.7,
    "sghmc": 0.2,
    "sgnht": 0.2,
    "badodab": 0.25,
}
"""Lr kappa: what curvature allows, with room for it to grow along the run."""
MOMENTUM = {"sgnht": "diffusion_factor", "sghmc": "friction"}
"""Samplers with momentum, and what their friction is called."""
COMMON = ("localization", "weight_decay", "nbeta", "bounding_box_size", "noise_level")
GRID = ((0.25, 0.5, 1.0, 2.0, 4.0), (0.25, 1.0, 4.0))  # of lr and nbeta, in a heatmap


Read = TypeVar("Read")


@dataclass(frozen=True)
class Pilot:
    """What one short run gave.

    Args:
        sampler: that it ran with.
        h: largest curvature of the mean loss at the last look; NaN if it diverged.
        discretisation: bias of the step, relative to the LLC, predicted there.
        heat: bias of minibatch noise, likewise.
        ess: effective draws a draw, of the slowest gated quantity.
        steps: of all its chains.
        diverged: whether every chain was retired.
    """

    sampler: SamplerConfig
    h: float
    discretisation: float
    heat: float
    ess: float
    steps: int
    diverged: bool = False


@dataclass(frozen=True)
class Calibration:
    """A run's configuration, and why it is what it is.

    Args:
        config: ready to run.
        reasons: by field, a sentence each.
        curvature: largest curvature of the mean loss that the pilots met.
        discretisation_bias: predicted, relative to the LLC.
        heat_bias: of minibatches, likewise.
        pilots: in the order they were run.
        pilot_seconds: all of them took.
        heatmap: of the LLC over lr and nbeta, if asked for.
    """

    config: RunConfig
    reasons: dict[str, str]
    curvature: float
    discretisation_bias: float
    heat_bias: float
    pilots: tuple[Pilot, ...]
    pilot_seconds: float
    heatmap: Heatmap | None = None

    @property
    def pilot_steps(self) -> int:
        """Steps of all pilots' chains together."""
        return sum(pilot.steps for pilot in self.pilots)

    @property
    def run_steps(self) -> int:
        """Steps of all chains of the run that is proposed."""
        return self.config.chains * self.config.total_draws * self.config.thin

    def as_dict(self) -> dict[str, Any]:
        """For JSON; NaN as None."""
        return {
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "reasons": self.reasons,
            "curvature": _number(self.curvature),
            "discretisation_bias": _number(self.discretisation_bias),
            "heat_bias": _number(self.heat_bias),
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
        lines.append(
            f"predicted bias of the LLC: {self.discretisation_bias:+.2%} by the step, "
            f"{self.heat_bias:+.2%} by minibatches"
        )
        lines.append(self._cost())
        return "\n".join(lines + ([] if self.heatmap is None else ["", str(self.heatmap)]))

    def _cost(self) -> str:
        share = self.pilot_steps / self.run_steps
        found = (
            f"{len(self.pilots)} pilots took {self.pilot_steps} steps, {share:.0%} of the run's "
            f"{self.run_steps}, and {self.pilot_seconds:.1f} s"
        )
        if share <= SHARE:
            return found
        return f"{found}: more than {SHARE:.0%}, because the run is short"


def calibrate(  # noqa: PLR0913 (as sample)
    model: nn.Module,
    data: object,
    loss: Loss,
    config: RunConfig | None = None,
    *,
    pool: ChainPool | None = None,
    bias: float = BIAS,
    heatmap: bool = False,
) -> Calibration:
    """Chooses sampler, step size, localisation and length of a run by short pilots.

    What the config sets is kept: a name or lr of the sampler, its localization, ``burn_in``,
    ``draws``, ``thin`` and all other fields; what it leaves out is chosen.

    Args:
        model: as for ``sample``, and so are data, loss and pool.
        data: see ``sample``.
        loss: see ``sample``.
        config: what is fixed beforehand; None: nothing.
        pool: where the pilots' chains run; None: ``RayPool(config.placement)``.
        bias: of the LLC, relative, that step and minibatches may bring.
        heatmap: sample the LLC over a grid of lr and nbeta around the choice as well.

    Raises:
        ConfigError: if something cannot be sampled, or the law of the sampler is not known.
        RunFailed: if no step size was found at which pilots survive, or they were interrupted.

    Example:
        >>> found = calibrate(model, train_set, loss)  # doctest: +SKIP
        >>> print(found)  # doctest: +SKIP
        >>> run = sample(model, train_set, loss, found.config)  # doctest: +SKIP
    """
    if not 0 < bias < 1:
        raise ConfigError(f"bias must be between 0 and 1, a part of the LLC: got {bias}")
    began = time.monotonic()
    spec = prepare(model, data, loss, config or RunConfig())
    with _held(pool, spec.config) as held:
        pilots = _Pilots(spec, data, held)
        found = _Calibrator(spec, pilots, bias).run()
        found = replace(found, pilot_seconds=time.monotonic() - began)
        chart = _heatmap(found.config, pilots, spec.nbeta) if heatmap else None
    return replace(found, heatmap=chart)


def calibrate_recipe(
    recipe: Recipe, *, heatmap: bool = False, bias: float = BIAS
) -> tuple[Recipe, Calibration]:
    """``calibrate`` of what a YAML file asks for; a run of the recipe remembers what was found."""
    found = calibrate(
        recipe.model, recipe.data, recipe.loss, recipe.config, heatmap=heatmap, bias=bias
    )
    record = {**recipe.record, "calibration": found.as_dict()}
    return replace(recipe, record=record, config=found.config), found


def continued(recipe: Recipe, store: str) -> Recipe:
    """A recipe whose run the store holds already: what it leaves open is as it was chosen then."""
    stored, given = Run(store).manifest.config, recipe.config
    sampler = _with(stored.sampler, **given.sampler.model_dump(exclude_unset=True))
    fields = {name: getattr(given, name) for name in given.model_fields_set}
    return replace(recipe, config=_changed(stored, **{**fields, "sampler": sampler}))


class _Pilots:
    """Runs short runs of a model on a pool, each into a store that is gone afterwards."""

    def __init__(self, spec: ChainSpec, data: object, pool: ChainPool) -> None:
        self._model, self._data, self._loss, self._pool = spec.model, data, spec.loss, pool

    def run(self, config: RunConfig, read: Callable[[Run], Read]) -> Read | None:
        """What is read of a finished run; None where a chain diverged."""
        with tempfile.TemporaryDirectory(prefix="distsampler-pilot-") as home:
            store = f"{home}/run"
            try:
                run = sample(
                    self._model,
                    self._data,
                    self._loss,
                    config,
                    store=store,
                    pool=self._pool,
                    quiet=True,
                )
            except RunFailed:
                run = Run(store)
                if not run.lost_chains:
                    raise
            if run.manifest.status == "interrupted":
                raise RunFailed(f"the calibration was interrupted: {run.manifest.reason}")
            for reason in run.lost_chains.values():
                if "diverged" not in reason:  # it says nothing of the step
                    raise RunFailed(f"a pilot lost a chain: {reason}")
            return None if run.lost_chains else read(run)


class _Calibrator:
    """Decides from pilots what the run should be."""

    def __init__(self, spec: ChainSpec, runs: _Pilots, bias: float) -> None:
        self._spec, self._runs, self._bias = spec, runs, bias
        self._config = spec.config
        self._given = set(spec.config.sampler.options)
        self._named = bool(spec.config.sampler.model_fields_set & {"name", "correct_heat"})
        self._pilots: list[Pilot] = []
        self._reasons: dict[str, str] = {}
        self._h = math.nan
        self._warmth = 0.0  # heat of minibatches, relative to the LLC, by reach

    def run(self) -> Calibration:
        """The whole: curvature at w*, pilots of what is to be chosen, a rehearsal of the choice."""
        given = self._config.sampler
        self._check(given)
        first = given if "lr" in self._given else _sampler("lmsgld", given)
        self._h = self._at_anchor(first)
        gamma = self._localization()
        if "lr" in self._given:
            self._reasons["sampler.name"] = "as given" if self._named else "the default, as lr is"
            best = _with(given, localization=gamma)
        else:
            best = self._choose(_with(first, localization=gamma))
        last = self._rehearse(best)
        if "lr" not in self._given:
            self._explain(last)
        merged = _with(last.sampler, **given.options)
        config = self._length(_changed(self._config, sampler=merged), last)
        for name in ("sampler.lr", "draws", "burn_in", "thin"):
            self._reasons.setdefault(name, "as given")
        heat = max(last.heat, self._warmth * _reach(merged), key=abs)
        heat = last.heat if merged.name not in MOMENTUM else heat
        pilots = tuple(self._pilots)
        return Calibration(config, self._reasons, self._h, last.discretisation, heat, pilots, 0.0)

    def _check(self, given: SamplerConfig) -> None:
        """Sees that the law of a sampler that was named is known."""
        if law_of(self._config) not in FRACTIONS:
            raise ConfigError(
                f"calibrate knows the laws of {', '.join(sorted({*FRACTIONS} - {'badodab'}))}, and "
                f"not that of {given.name!r}: name one of them, or leave sampler.name out"
            )

    def _at_anchor(self, sampler: SamplerConfig) -> float:
        """The largest curvature at w*: the first look of a chain that has not moved."""
        lr = self._config.sampler.options.get("lr", 1e-12)
        return self._pilot(_with(sampler, lr=lr), 1, thin=1).h

    def _localization(self) -> float:
        """As given; else such that a flat direction relaxes often enough within the run."""
        if "localization" in self._given:
            self._reasons["sampler.localization"] = "as given"
            return float(self._config.sampler.options["localization"])
        if not self._h > 0:
            raise ConfigError(
                f"localization must be given where no curvature at w* tells its scale: the largest "
                f"is {self._h:.3g}; set sampler.localization"
            )
        kappa = self._spec.nbeta * self._h
        gamma = float(f"{4 * RELAXATIONS * kappa / self._steps():.2g}")
        self._reasons["sampler.localization"] = (
            f"a flat direction relaxes about {RELAXATIONS} times within the run at lr = 0.5 / kappa"
        )
        return gamma

    def _steps(self) -> int:
        """Of a chain, as far as they are given."""
        config = self._config
        if not ({"draws", "burn_in"} & config.model_fields_set):
            return STEPS
        return config.total_draws * config.thin

    def _choose(self, probe: SamplerConfig) -> SamplerConfig:
        """The candidate of the longest reach within the wanted bias, or the one that was named."""
        pilot = self._fit(probe)
        self._warmth = abs(pilot.heat) / pilot.sampler.options["lr"]
        if self._named:
            self._reasons["sampler.name"] = "as given"
            return self._within(self._settled(pilot.sampler), self._warmth)
        found = [self._within(pilot.sampler, self._warmth)]
        if self._config.batches == "replacement" and pilot.heat > self._bias / 10:
            cooled = self._pilot(_with(pilot.sampler, correct_heat=True), PILOT)
            if not cooled.diverged:
                warmth = abs(cooled.heat) / cooled.sampler.options["lr"]
                found.append(self._within(cooled.sampler, warmth))
        plain = max(found, key=_reach)
        if not {"noise_level", *HEAT} & self._given:  # which a thermostat has not
            found.append(self._within(self._momentum("sgnht", pilot.sampler), self._warmth))
        fast = max(found, key=_reach)
        chosen = fast if _reach(fast) > PREFERRED * _reach(plain) else plain
        reaches = ", ".join(f"{_label(each)} {_reach(each):.2g}" for each in found)
        self._reasons["sampler.name"] = (
            f"the longest reach (lr, or 2 lr / A) at a heat of {self._bias:.1%}: {reaches}"
        )
        return chosen

    def _settled(self, like: SamplerConfig) -> SamplerConfig:
        """The sampler that was named, with the localisation that was chosen."""
        given, gamma = self._config.sampler, like.options["localization"]
        if given.name in MOMENTUM:
            return self._momentum(given.name, like)
        return _with(given, localization=gamma, lr=like.options["lr"])

    def _momentum(self, name: str, like: SamplerConfig) -> SamplerConfig:
        """A sampler with momentum; the thermostat in its second-order form unless told."""
        options = {MOMENTUM[name]: 0.1, "scheme": "badodab", **like.options}
        if name == "sghmc":
            del options["scheme"]
        return SamplerConfig(**{**options, **self._config.sampler.options, "name": name})

    def _fit(self, sampler: SamplerConfig) -> Pilot:
        """A pilot whose step fits the curvature that it met."""
        for _ in range(ATTEMPTS):
            before = self._h
            kappa = self._kappa(sampler)
            sampler = _with(sampler, lr=self._fraction(sampler) / kappa)
            pilot = self._pilot(sampler, PILOT)
            if pilot.diverged:
                self._h = JUMP * kappa / self._spec.nbeta
                continue
            # Far below the guess after a jump: the guess was too high, and is dropped.
            self._h = pilot.h if pilot.h < before / GUESSED else max(before, pilot.h)
            if max(self._kappa(sampler) / kappa, kappa / self._kappa(sampler)) <= GROWN:
                return pilot
        raise RunFailed(
            f"no step size was found in {ATTEMPTS} pilots of {sampler.name}, the last at lr="
            f"{sampler.options['lr']:.3g}: raise sampler.localization, or give sampler.lr"
        )

    def _fraction(self, sampler: SamplerConfig) -> float:
        law = law_of(_changed(self._config, sampler=sampler))
        return FRACTIONS[law] if law is not None else math.nan  # None was refused before

    def _kappa(self, sampler: SamplerConfig) -> float:
        """Nbeta h + gamma + lam, of the largest curvature so far."""
        options = signature_options(sampler)
        pull = float(options["localization"]) + float(options["weight_decay"])
        found = self._spec.nbeta * max(self._h, 0.0) + pull
        return found if found > 0 else 1.0

    def _within(self, sampler: SamplerConfig, warmth: float) -> SamplerConfig:
        """At the step that curvature allows, or, where its heat would be too much, slower."""
        lr, most = self._fraction(sampler) / self._kappa(sampler), self._bias / max(warmth, 1e-300)
        name = MOMENTUM.get(sampler.name)
        if name is None:
            return _with(sampler, lr=_round(min(lr, most)))
        low, high = FRICTION
        if sampler.options.get("scheme") == "ding":
            high = 2 * self._bias  # its LLC is A / 2 too low
        if name in self._given:
            low = high = float(self._config.sampler.options[name])
        friction = min(max(2 * lr / most, low), high)
        lr = min(lr, most * friction / 2)
        return _with(sampler, lr=_round(lr), **{name: float(f"{friction:.2g}")})

    def _rehearse(self, sampler: SamplerConfig) -> Pilot:
        """A longer pilot of what was chosen, slower if it turns out to be too fast."""
        for _ in range(REHEARSALS):
            pilot = self._pilot(sampler, REHEARSAL)
            if "lr" in self._given:
                break
            slower = self._slower(pilot)
            if slower is None:
                return pilot
            sampler = _with(sampler, lr=_round(slower))
        if pilot.diverged:
            raise RunFailed(
                f"the pilot diverged at sampler.lr={sampler.options['lr']:.3g}: lower it, or raise "
                "sampler.localization"
            )
        self._h = max(self._h, pilot.h)
        return replace(pilot, sampler=sampler)

    def _slower(self, pilot: Pilot) -> float | None:
        """The lr that a pilot should have had; None: its own."""
        lr: float = pilot.sampler.options["lr"]
        if pilot.diverged:
            return lr / 4
        self._h = max(self._h, pilot.h)
        limit = self._fraction(pilot.sampler) / self._kappa(pilot.sampler)
        factor = max(lr / limit / GROWN, pilot.discretisation / self._bias / GROWN)
        return None if factor <= 1 else lr / factor / GROWN

    def _explain(self, last: Pilot) -> None:
        """The reasons of the step."""
        sampler, kappa = last.sampler, self._kappa(last.sampler)
        self._reasons["sampler.lr"] = (
            f"{sampler.options['lr'] * kappa:.2g} / kappa; the largest kappa = nbeta h + gamma met "
            f"is {kappa:.3g}"
        )
        if sampler.options["lr"] * kappa < self._fraction(sampler) / HEATED:
            self._reasons["sampler.lr"] += (
                "; minibatches limit it: k times the batch_size would allow k times the step"
            )
        name = MOMENTUM.get(sampler.name)
        if name is not None:
            self._reasons[f"sampler.{name}"] = (
                "as given"
                if name in self._given
                else f"the least friction at which minibatches heat by {self._bias:.1%} at most"
            )

    def _length(self, config: RunConfig, last: Pilot) -> RunConfig:
        """Burn-in, draws and thin where they are free: long enough for the gate's ESS."""
        given = self._config.model_fields_set
        thin = config.thin if "thin" in given else THIN
        every = last.ess * thin / THIN  # effective draws a draw
        wanted = 1.5 * config.gate.ess / (config.chains * max(min(every, 1.0), 1e-9))
        most = MOST_STEPS // 2 // thin
        draws = min(max(math.ceil(wanted), STEPS // 2 // thin), most)
        changes: dict[str, Any] = {}
        if "draws" not in given:
            changes["draws"] = draws
            self._reasons["draws"] = (
                f"the pilot had an ESS of {every:.2g} a draw and {config.gate.ess:.0f} are wanted"
                + (f": more than {MOST_STEPS} steps would be needed" if wanted > most else "")
            )
        if "burn_in" not in given:
            kept = changes.get("draws", config.draws)
            changes["burn_in"] = kept if isinstance(kept, int) else "auto"
            self._reasons["burn_in"] = "half of the run: chains start at w*, below what they reach"
        if "thin" not in given:
            changes["thin"] = thin
            self._reasons["thin"] = "costs one probe pass in ten steps"
        return _changed(config, **changes)

    def _pilot(self, sampler: SamplerConfig, draws: int, thin: int = THIN) -> Pilot:
        """One short run into a temporary store."""
        burn_in = draws // 2
        seed = np.random.SeedSequence(self._config.seed, spawn_key=(77, len(self._pilots)))
        config = _short(
            self._config,
            sampler=sampler,
            seed=int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)),
            burn_in=burn_in,
            draws=draws - burn_in,
            thin=thin,
        )
        steps = PILOT_CHAINS * draws * thin
        pilot = self._runs.run(config, lambda run: _read(run, sampler, steps))
        if pilot is None:
            pilot = Pilot(sampler, math.nan, math.nan, math.nan, math.nan, steps, diverged=True)
        self._pilots.append(pilot)
        return pilot


def _read(run: Run, sampler: SamplerConfig, steps: int) -> Pilot:
    """What a pilot's store says, of its last draw where a look is meant."""
    stats = group(run.inference_data, "sample_stats")
    llc = run.llc("ignore").mean

    def last(name: str) -> float:
        if name not in stats:
            return 0.0  # nothing is predicted of it, and that is said in the run's budget
        return float(stats[name].values[:, -1].mean())

    ess = [min(row.ess_bulk, row.ess_tail) for row in run.diagnosis.gated]
    size = run.posterior.sizes["chain"] * run.posterior.sizes["draw"]
    relative = 1 / llc if llc > 0 else 0.0
    return Pilot(
        sampler,
        float(stats["curvature"].values[:, -1].max()),
        last("discretisation_bias") * relative,
        last("heat_bias") * relative,
        float(np.nanmin(ess)) / size if np.isfinite(ess).any() else math.nan,
        steps,
    )


def _heatmap(config: RunConfig, runs: _Pilots, nbeta: float) -> Heatmap:
    """The LLC over a grid around the choice, two chains a cell."""
    lr = config.sampler.options["lr"]
    lrs = tuple(float(f"{lr * factor:.3g}") for factor in GRID[0])
    nbetas = tuple(float(f"{nbeta * factor:.4g}") for factor in GRID[1])
    llc, spread = (np.full((len(nbetas), len(lrs)), np.nan) for _ in range(2))
    for i, j in np.ndindex(*llc.shape):
        sampler = _with(config.sampler, lr=lrs[j], nbeta=nbetas[i])
        half = REHEARSAL // 2
        cell = _short(config, sampler=sampler, burn_in=half, draws=half, thin=THIN)
        found = runs.run(cell, lambda run: run.llc("ignore"))
        if found is not None:
            llc[i, j] = found.mean
            spread[i, j] = np.std(found.per_chain, ddof=1) / abs(found.mean)
    steps = llc.size * PILOT_CHAINS * 2 * half * THIN
    return Heatmap(lrs, nbetas, llc, spread, steps)


def _short(config: RunConfig, **changes: Any) -> RunConfig:  # noqa: ANN401 (fields of RunConfig)
    """A pilot's config: two chains from w*, watched, never stopped by a clock or a gate."""
    fixed = {
        "chains": PILOT_CHAINS,
        "min_chains": 1,
        "gate": GateConfig(),
        "max_seconds": None,
        "max_draws": None,
        "init": "anchor",
        "init_radius": None,
        "watch": True,
        "fsync": False,
    }
    known = {key: value for key, value in fixed.items() if key in RunConfig.model_fields}
    return config.model_copy(update={**known, **changes})


def _changed(config: RunConfig, **changes: Any) -> RunConfig:  # noqa: ANN401 (as above)
    """A config with other fields, validated anew."""
    given = {key: getattr(config, key) for key in config.model_fields_set}
    return RunConfig(**{**given, **changes})


def _with(sampler: SamplerConfig, **options: Any) -> SamplerConfig:  # noqa: ANN401 (as above)
    """A sampler with other options."""
    return SamplerConfig(**{**sampler.model_dump(exclude_unset=True), **options})


def _sampler(name: str, given: SamplerConfig) -> SamplerConfig:
    """A sampler with those of the given options that every sampler has."""
    options = {key: value for key, value in given.options.items() if key in COMMON}
    return SamplerConfig(**{**options, "name": name})


def _reach(sampler: SamplerConfig) -> float:
    """The step of Langevin dynamics that spreads as fast over slow directions."""
    options = signature_options(sampler)
    name = MOMENTUM.get(sampler.name)
    return float(options["lr"]) * (1.0 if name is None else 2 / float(options[name]))


def _label(sampler: SamplerConfig) -> str:
    scheme = sampler.options.get("scheme")
    heat = ", heat corrected," if sampler.correct_heat else ""
    return f"{scheme or sampler.name}{heat}"


def _shown(config: RunConfig, name: str) -> str:
    """A field's value, as people write it."""
    home, _, option = name.rpartition(".")
    if option == "name":
        return _label(config.sampler).removesuffix(",")
    value = signature_options(config.sampler)[option] if home else getattr(config, option)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def _held(pool: ChainPool | None, config: RunConfig) -> Iterator[ChainPool]:
    """The pool, or one whose Ray stays up from pilot to pilot."""
    if pool is not None:
        yield pool
        return
    from distsampler.ray_pool import RayPool

    with RayPool(config.placement).joined() as joined:
        yield joined


def _round(lr: float) -> float:
    """A step size that can be read and written."""
    return float(f"{lr:.3g}")
