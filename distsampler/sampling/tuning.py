"""The choice of sampler, step, localisation and length from pilots; see ``calibration``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from distsampler.analysis.bias import unpredicted
from distsampler.config import RunConfig, SamplerConfig
from distsampler.errors import ConfigError, RunFailed
from distsampler.models.replica import ChainSpec
from distsampler.models.sampler import HEAT, facts_of, posterior_of
from distsampler.sampling.pilots import (
    MOMENTUM,
    PILOT_CHAINS,
    THIN,
    Pilot,
    Pilots,
    label,
    reach,
    read_pilot,
    sampler_like,
    short,
)
from distsampler.schedule import Schedule

STEPS, MOST_STEPS = 10_000, 100_000  # of a chain, burn-in included
PILOT, REHEARSAL = 41, 136  # draws: just past the curvature's looks at steps 400 and 1,350
ATTEMPTS = 8  # of one candidate
REHEARSALS = 3
GROWN, JUMP = 1.3, 1e3  # of kappa: where a pilot is repeated; and how, if it diverged
HEATED = 2.0  # times less than curvature allows: where a larger batch_size is advised
GUESSED = 30.0  # times what a pilot met: kappa was a guess
RELAXATIONS = 20  # of a flat direction within the run, where localization is free
PREFERRED = 1.5  # times the reach of a sampler without momentum, for one with it
FRICTION = (0.03, 0.5)  # bounds of A
FRACTIONS: dict[str, float] = {
    "sgld": 0.2,
    "lmsgld": 0.7,
    "sghmc": 0.2,
    "sgnht": 0.2,
    "badodab": 0.25,
}
"""Lr kappa: what curvature allows, with room for it to grow along the run."""


class Tuned(NamedTuple):
    """What was chosen, why, and what was seen: as ``Calibration`` has it."""

    config: RunConfig
    reasons: dict[str, str]
    curvature: float
    discretisation_bias: float
    heat_bias: float
    pilots: tuple[Pilot, ...]


class Tuner:
    """Decides from pilots what the run should be."""

    def __init__(self, spec: ChainSpec, runs: Pilots, bias: float) -> None:
        self._spec, self._runs, self._bias = spec, runs, bias
        self._config = spec.config
        self._given = set(spec.config.sampler.options)
        self._named = bool(spec.config.sampler.model_fields_set & {"name", "correct_heat"})
        self._pilots: list[Pilot] = []
        self._reasons: dict[str, str] = {}
        self._h = math.nan
        self._warmth = 0.0  # heat of minibatches, relative to the LLC, by reach

    def run(self) -> Tuned:
        """The whole: curvature at w*, pilots of what is to be chosen, a rehearsal of the choice."""
        given = self._config.sampler
        self._check(given)
        first = given if "lr" in self._given else sampler_like("lmsgld", given)
        self._h = self._at_anchor(first)
        gamma = self._localization()
        if "lr" in self._given:
            self._reasons["sampler.name"] = "as given" if self._named else "the default, as lr is"
            best = given.replaced(localization=gamma)
        else:
            best = self._choose(first.replaced(localization=gamma))
        last = self._rehearse(best)
        if "lr" not in self._given:
            self._explain(last)
        merged = last.sampler.replaced(**given.options)
        config = self._length(self._config.replaced(sampler=merged), last)
        for name in ("sampler.lr", "draws", "burn_in", "thin"):
            self._reasons.setdefault(name, "as given")
        heat = last.heat
        if merged.name in MOMENTUM:
            heat = max(heat, self._warmth * reach(merged), key=abs)
        pilots = tuple(self._pilots)
        return Tuned(config, self._reasons, self._h, last.discretisation, heat, pilots)

    def _check(self, given: SamplerConfig) -> None:
        """Sees that what is to be chosen by its biases has biases that are predicted."""
        law = facts_of(given, self._spec.nbeta, len(self._spec.rows)).law
        if law is None or law.name not in FRACTIONS:
            raise ConfigError(
                f"calibrate knows the laws of {', '.join(sorted({*FRACTIONS} - {'badodab'}))}, and "
                f"not that of {given.name!r}: name one of them, or leave sampler.name out"
            )
        if missing := unpredicted(short(self._config, given, PILOT), law):
            raise ConfigError(
                "calibrate chooses by the biases that are predicted, and here one cannot be: "
                f"{next(iter(missing.values()))}; change that, or give sampler.lr and "
                "localization and run without calibration"
            )

    def _at_anchor(self, sampler: SamplerConfig) -> float:
        """The largest curvature at w*: the first look of a chain that has not moved."""
        lr = self._config.sampler.options.get("lr", 1e-12)
        return self._pilot(sampler.replaced(lr=lr), 1, thin=1).h

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
        return Schedule.of(config).total * config.thin

    def _choose(self, probe: SamplerConfig) -> SamplerConfig:
        """The candidate of the longest reach within the wanted bias, or the one that was named."""
        pilot = self._fit(probe)
        self._warmth = abs(pilot.heat) / pilot.sampler.options["lr"]
        if self._named:
            self._reasons["sampler.name"] = "as given"
            return self._within(self._settled(pilot.sampler), self._warmth)
        found = [self._within(pilot.sampler, self._warmth)]
        whole = self._config.batches == "replacement" and self._config.data_mode == "replicate"
        if whole and pilot.heat > self._bias / 10:
            cooled = self._pilot(pilot.sampler.replaced(correct_heat=True), PILOT)
            if not cooled.diverged:
                warmth = abs(cooled.heat) / cooled.sampler.options["lr"]
                found.append(self._within(cooled.sampler, warmth))
        plain = max(found, key=reach)
        if not {"noise_level", *HEAT} & self._given:  # which a thermostat has not
            found.append(self._within(self._momentum("sgnht", pilot.sampler), self._warmth))
        fast = max(found, key=reach)
        chosen = fast if reach(fast) > PREFERRED * reach(plain) else plain
        reaches = ", ".join(f"{label(each)} {reach(each):.2g}" for each in found)
        self._reasons["sampler.name"] = (
            f"the longest reach (lr, or 2 lr / A) at a heat of {self._bias:.1%}: {reaches}"
        )
        return chosen

    def _settled(self, like: SamplerConfig) -> SamplerConfig:
        """The sampler that was named, with the localisation that was chosen."""
        given, gamma = self._config.sampler, like.options["localization"]
        if given.name in MOMENTUM:
            return self._momentum(given.name, like)
        return given.replaced(localization=gamma, lr=like.options["lr"])

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
            sampler = sampler.replaced(lr=self._fraction(sampler) / kappa)
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
        law = facts_of(sampler, self._spec.nbeta, len(self._spec.rows)).law
        return math.nan if law is None else FRACTIONS[law.name]  # None was refused before

    def _kappa(self, sampler: SamplerConfig) -> float:
        """Nbeta h + gamma + lam, of the largest curvature so far."""
        kappa = posterior_of(sampler, self._spec.nbeta).kappa(max(self._h, 0.0))
        return kappa if kappa > 0 else 1.0

    def _within(self, sampler: SamplerConfig, warmth: float) -> SamplerConfig:
        """At the step that curvature allows, or, where its heat would be too much, slower."""
        lr, most = self._fraction(sampler) / self._kappa(sampler), self._bias / max(warmth, 1e-300)
        name = MOMENTUM.get(sampler.name)
        if name is None:
            return sampler.replaced(lr=_round(min(lr, most)))
        low, high = FRICTION
        if sampler.options.get("scheme") == "ding":
            high = 2 * self._bias  # its LLC is A / 2 too low
        if name in self._given:
            low = high = float(self._config.sampler.options[name])
        friction = min(max(2 * lr / most, low), high)
        lr = min(lr, most * friction / 2)
        return sampler.replaced(lr=_round(lr), **{name: float(f"{friction:.2g}")})

    def _rehearse(self, sampler: SamplerConfig) -> Pilot:
        """A longer pilot of what was chosen, slower if it turns out to be too fast."""
        for _ in range(REHEARSALS):
            pilot = self._pilot(sampler, REHEARSAL)
            if "lr" in self._given:
                break
            slower = self._slower(pilot)
            if slower is None:
                return pilot
            sampler = sampler.replaced(lr=_round(slower))
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
        return config.replaced(**changes)

    def _pilot(self, sampler: SamplerConfig, draws: int, thin: int = THIN) -> Pilot:
        """One short run into a temporary store."""
        seed = np.random.SeedSequence(self._config.seed, spawn_key=(77, len(self._pilots)))
        number = int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1))
        config = short(self._config.replaced(seed=number), sampler, draws, thin=thin)
        steps = PILOT_CHAINS * draws * thin
        pilot = self._runs.run(config, lambda run: read_pilot(run, sampler, steps))
        if pilot is None:
            pilot = Pilot(sampler, math.nan, math.nan, math.nan, math.nan, steps, diverged=True)
        self._pilots.append(pilot)
        return pilot


def _round(lr: float) -> float:
    """A step size that can be read and written."""
    return float(f"{lr:.3g}")
