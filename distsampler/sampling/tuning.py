"""The choice of sampler, step, localization and length from pilots; see ``calibration``."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distsampler.analysis.bias import unpredicted
from distsampler.config import RunConfig, SamplerConfig
from distsampler.errors import ConfigError, RunFailed
from distsampler.models.replica import ChainSpec
from distsampler.models.sampler import facts_of, law_of, ours, posterior_of, signature_options
from distsampler.optim import SAMPLERS
from distsampler.optim.checks import DENSITY_OPTIONS
from distsampler.sampling.pilots import THIN, Pilot, Pilots, label, reach, short
from distsampler.schedule import Schedule

PLAIN, FAST = "lmsgld", "sgnht"  # the candidates: without momentum, and with it
STEPS, MOST_STEPS = 10_000, 100_000  # per chain, burn-in included
PILOT, REHEARSAL = 41, 136  # draws: just past steps 400 and 1,350, where curvature is measured
ATTEMPTS = 8  # pilots of one candidate
REHEARSALS = 3
GROWN = 1.3  # a pilot is repeated where kappa has grown by this factor
JUMP = 1e3  # the factor on kappa after a pilot that diverged
GUESSED = 30.0  # where a pilot meets this factor less, kappa was a guess
HEATED = 2.0  # a larger batch_size is advised where heat makes the step this factor smaller
RELAXATIONS = 20  # times that a flat direction relaxes within the run, where localization is free
PREFERRED = 1.5  # a sampler with momentum is taken where its reach is longer by this factor
FRICTION = (0.03, 0.5)  # bounds of the friction A


@dataclass(frozen=True)
class Choice:
    """What was chosen for a run, why, and what was measured."""

    config: RunConfig
    """Ready to run."""
    reasons: dict[str, str]
    """Field -> why it is what it is, in a sentence."""
    curvature: float
    """Largest curvature of the mean loss that the pilots met."""
    discretisation_bias: float
    """Predicted bias of the step, relative to the LLC."""
    heat_bias: float
    """Predicted bias of minibatch noise, relative to the LLC."""
    pilots: tuple[Pilot, ...]
    """In the order in which they were run."""


class Tuner:
    """Decides from pilots what the run should be; ``bias`` is the relative one of ``calibrate``."""

    def __init__(self, spec: ChainSpec, pilots: Pilots, bias: float) -> None:
        self._spec, self._pilots, self._bias = spec, pilots, bias
        self._config = spec.config
        self._given = set(spec.config.sampler.options)
        self._named = bool(spec.config.sampler.model_fields_set & {"name", "correct_heat"})
        self._made: list[Pilot] = []
        self._reasons: dict[str, str] = {}
        self._h = math.nan
        self._warmth = 0.0  # heat of minibatches, relative to the LLC, per reach

    def run(self) -> Choice:
        """Measure the curvature at w*, run pilots of what is to be chosen, rehearse the choice."""
        given = self._config.sampler
        self._check(given)
        first = given if "lr" in self._given else self._plain(given)
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
        if ours(merged.name).friction_option is not None:
            heat = max(heat, self._warmth * reach(merged), key=abs)
        made = tuple(self._made)
        return Choice(config, self._reasons, self._h, last.discretisation, heat, made)

    def _check(self, given: SamplerConfig) -> None:
        """Check that what is chosen by its biases has biases that are predicted."""
        if math.isnan(_safe(given)):
            names = sorted(n for n in SAMPLERS if not math.isnan(_safe(SamplerConfig(name=n))))
            raise ConfigError(
                f"calibrate knows the laws of {', '.join(names)}, and not that of {given.name!r}: "
                "name one of them, or leave sampler.name out"
            )
        law = facts_of(given, self._spec.nbeta, len(self._spec.rows)).law
        if missing := unpredicted(short(self._config, given, PILOT), law):
            raise ConfigError(
                "calibrate chooses by the biases that are predicted, and here one cannot be: "
                f"{next(iter(missing.values()))}; change that, or give sampler.lr and "
                "localization and run without calibration"
            )

    def _plain(self, given: SamplerConfig) -> SamplerConfig:
        """The candidate without momentum, on the density that was asked for."""
        options = {key: value for key, value in given.options.items() if key in DENSITY_OPTIONS}
        return SamplerConfig(**{**options, "name": PLAIN})

    def _at_anchor(self, sampler: SamplerConfig) -> float:
        """The largest curvature at w*, as a chain measures it that has not moved."""
        lr = self._config.sampler.options.get("lr", 1e-12)
        return self._pilot(sampler.replaced(lr=lr), 1, thin=1).h

    def _localization(self) -> float:
        """The given one; else such that a flat direction relaxes often enough within the run."""
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
        """Steps of a chain, as far as they are given."""
        config = self._config
        if not ({"draws", "burn_in"} & config.model_fields_set):
            return STEPS
        return Schedule.of(config).total * config.thin

    def _choose(self, first: SamplerConfig) -> SamplerConfig:
        """The candidate of the longest reach within the wanted bias, or the one that was named."""
        pilot = self._fit(first)
        self._warmth = abs(pilot.heat) / pilot.sampler.options["lr"]
        if self._named:
            self._reasons["sampler.name"] = "as given"
            return self._within(self._settled(pilot.sampler), self._warmth)
        candidates = [self._within(pilot.sampler, self._warmth)]
        whole = self._config.batches == "replacement" and self._config.data_mode == "replicate"
        if whole and pilot.heat > self._bias / 10:
            cooled = self._pilot(pilot.sampler.replaced(correct_heat=True), PILOT)
            if not cooled.diverged:
                warmth = abs(cooled.heat) / cooled.sampler.options["lr"]
                candidates.append(self._within(cooled.sampler, warmth))
        plain = max(candidates, key=reach)
        if signature_options(SamplerConfig(name=FAST)).keys() >= self._given:
            candidates.append(self._within(self._momentum(FAST, pilot.sampler), self._warmth))
        fast = max(candidates, key=reach)
        reaches = ", ".join(f"{label(each)} {reach(each):.2g}" for each in candidates)
        self._reasons["sampler.name"] = (
            f"the longest reach (lr, or 2 lr / A) at a heat of {self._bias:.1%}: {reaches}"
        )
        return fast if reach(fast) > PREFERRED * reach(plain) else plain

    def _settled(self, like: SamplerConfig) -> SamplerConfig:
        """The sampler that was named, with the localization that was chosen."""
        given = self._config.sampler
        if ours(given.name).friction_option is not None:
            return self._momentum(given.name, like)
        return given.replaced(localization=like.options["localization"], lr=like.options["lr"])

    def _momentum(self, name: str, like: SamplerConfig) -> SamplerConfig:
        """A sampler with momentum, with the options of another where they are not given."""
        options = {**ours(name).pilot_options, **like.options, **self._config.sampler.options}
        return SamplerConfig(**{**options, "name": name})

    def _fit(self, sampler: SamplerConfig) -> Pilot:
        """Repeat a pilot until its step fits the curvature that it met."""
        for _ in range(ATTEMPTS):
            before = self._h
            kappa = self._kappa(sampler)
            sampler = sampler.replaced(lr=_safe(sampler) / kappa)
            pilot = self._pilot(sampler, PILOT)
            if pilot.diverged:
                self._h = JUMP * kappa / self._spec.nbeta
                continue
            # Far below the guess after a jump: the guess was too high, and is dropped.
            self._h = pilot.h if pilot.h < before / GUESSED else max(before, pilot.h)
            if max(self._kappa(sampler) / kappa, kappa / self._kappa(sampler)) <= GROWN:
                return pilot
        raise RunFailed(
            f"no step size fitted in {ATTEMPTS} pilots of {sampler.name}, the last at lr="
            f"{sampler.options['lr']:.3g}: raise sampler.localization, or give sampler.lr"
        )

    def _kappa(self, sampler: SamplerConfig) -> float:
        """Curvature of the log posterior where that of the loss was largest so far."""
        kappa = posterior_of(sampler, self._spec.nbeta).kappa(max(self._h, 0.0))
        return kappa if kappa > 0 else 1.0

    def _within(self, sampler: SamplerConfig, warmth: float) -> SamplerConfig:
        """Take the step that curvature allows, or a slower one where its heat would be too much."""
        lr, most = _safe(sampler) / self._kappa(sampler), self._bias / max(warmth, 1e-300)
        name, law = ours(sampler.name).friction_option, law_of(sampler)
        if name is None or law is None:
            return sampler.replaced(lr=_round(min(lr, most)))
        low, high = FRICTION
        if law.friction_bias:
            high = self._bias / abs(law.friction_bias)
        if name in self._given:
            low = high = float(self._config.sampler.options[name])
        friction = min(max(2 * lr / most, low), high)
        lr = min(lr, most * friction / 2)
        return sampler.replaced(lr=_round(lr), **{name: float(f"{friction:.2g}")})

    def _rehearse(self, sampler: SamplerConfig) -> Pilot:
        """Run a longer pilot of what was chosen, and a slower one where it was too fast."""
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
        """The lr that a pilot should have had; None: the one it had."""
        lr: float = pilot.sampler.options["lr"]
        if pilot.diverged:
            return lr / 4
        self._h = max(self._h, pilot.h)
        limit = _safe(pilot.sampler) / self._kappa(pilot.sampler)
        factor = max(lr / limit / GROWN, pilot.discretisation / self._bias / GROWN)
        return None if factor <= 1 else lr / factor / GROWN

    def _explain(self, last: Pilot) -> None:
        """Note the reasons for the step."""
        sampler, kappa = last.sampler, self._kappa(last.sampler)
        self._reasons["sampler.lr"] = (
            f"{sampler.options['lr'] * kappa:.2g} / kappa; the largest kappa = nbeta h + gamma met "
            f"is {kappa:.3g}"
        )
        if sampler.options["lr"] * kappa < _safe(sampler) / HEATED:
            self._reasons["sampler.lr"] += (
                "; minibatches limit it: k times the batch_size would allow k times the step"
            )
        name = ours(sampler.name).friction_option
        if name is not None:
            self._reasons[f"sampler.{name}"] = (
                "as given"
                if name in self._given
                else f"the least friction at which minibatches heat by {self._bias:.1%} at most"
            )

    def _length(self, config: RunConfig, last: Pilot) -> RunConfig:
        """Choose burn-in, draws and thin where they are free: long enough for the gate's ESS."""
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
        """Run a pilot with a seed of its own."""
        seed = np.random.SeedSequence(self._config.seed, spawn_key=(77, len(self._made)))
        number = int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1))
        pilot = self._pilots.pilot(self._config.replaced(seed=number), sampler, draws, thin)
        self._made.append(pilot)
        return pilot


def _safe(sampler: SamplerConfig) -> float:
    """The ``lr kappa`` to take; NaN where no law tells it."""
    law = law_of(sampler)
    return math.nan if law is None or law.safe is None else law.safe


def _round(lr: float) -> float:
    """A step size that can be read and written."""
    return float(f"{lr:.3g}")
