"""The choice of sampler, step and localization from pilots; see ``calibration``.

Where pilots may take so few steps that not all of them can be made, those that matter least are
left out: first the pilot of the heat correction, then the rehearsal is shortened, then left out;
where not even one pilot can be made, the step follows from the curvature at w* alone, and is said
to. A step is never raised beyond what a pilot has tried.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from distsampler.analysis.bias import unpredicted
from distsampler.config import RunConfig, SamplerConfig
from distsampler.curvature.watch import LEAST
from distsampler.errors import ConfigError, RunFailed
from distsampler.models.replica import ChainSpec
from distsampler.models.sampler import facts_of, law_of, ours, posterior_of, signature_options
from distsampler.optim import SAMPLERS
from distsampler.optim.checks import DENSITY_OPTIONS
from distsampler.sampling.pilots import (
    PILOT_CHAINS,
    THIN,
    Pilot,
    Pilots,
    label,
    reach,
    short,
)

PLAIN, FAST = "lmsgld", "sgnht"  # the candidates: without momentum, and with it
PILOT, REHEARSAL = 41, 136  # draws: just past steps 400 and 1,350, where curvature is measured
ATTEMPTS = 8  # pilots of one candidate
REHEARSALS = 3
GROWN = 1.3  # a pilot is repeated where kappa has grown by this factor
JUMP = 1e3  # the factor on kappa after a pilot that diverged
GUESSED = 30.0  # where a pilot meets this factor less, kappa was a guess
HEATED = 2.0  # a larger batch_size is advised where heat makes the step this factor smaller
SOFTEST = 125  # the largest nbeta h at w*, over the localization, where that is free
GROWTH = 3.0  # of the curvature beyond that at w*, where no pilot can look
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
    """Predicted bias of minibatch noise, relative to the LLC; NaN: no pilot could tell."""
    bias: float
    """Most of either that was wished for."""
    pilots: tuple[Pilot, ...]
    """In the order in which they were run."""


class Tuner:
    """Decides from pilots what sampler a run has; ``bias`` is the relative one of ``calibrate``."""

    def __init__(self, spec: ChainSpec, pilots: Pilots, bias: float) -> None:
        check_law(spec.config.sampler)
        self._spec, self._pilots, self._bias = spec, pilots, bias
        self._config = spec.config
        self._given = set(spec.config.sampler.options)
        self._named = bool(spec.config.sampler.model_fields_set & {"name", "correct_heat"})
        self._made: list[Pilot] = []
        self._reasons: dict[str, str] = {}
        self._fitted: Pilot | None = None  # of the sampler without momentum
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
            self._reasons["sampler.lr"] = "as given"
            self._reasons["sampler.name"] = "as given" if self._named else "the default, as lr is"
            best = given.replaced(localization=gamma)
        elif self._pilots.draws_left < PILOT:
            best = self._unpiloted(first.replaced(localization=gamma))
        else:
            best = self._choose(first.replaced(localization=gamma))
        last = self._rehearse(best)
        if "lr" not in self._given:
            self._explain(last)
        merged = last.sampler.replaced(**given.options)
        heat = last.heat
        if ours(merged.name).friction_option is not None:
            heat = max(heat, self._warmth * reach(merged), key=abs)
        return Choice(
            self._config.replaced(sampler=merged),
            self._reasons,
            self._h,
            last.discretisation,
            heat,
            self._bias,
            tuple(self._made),
        )

    def _check(self, given: SamplerConfig) -> None:
        """Check that what is chosen by its biases has biases that are predicted."""
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
        """The largest curvature at w*, as a chain measures it that has not moved.

        A localization that follows from it is part of the question: neither the seed nor the batch
        size may move it.
        """
        lr, config = self._config.sampler.options.get("lr", 1e-12), self._config
        if "localization" not in self._given:
            least = min(self._spec.rows.shard_sizes or (len(self._spec.rows),))
            config = config.replaced(seed=0, batch_size=min(LEAST, least))
        return self._pilot(sampler.replaced(lr=lr), 1, thin=1, config=config).h

    def _localization(self) -> float:
        """The given one; else a fixed part of the largest curvature at w*."""
        if "localization" in self._given:
            self._reasons["sampler.localization"] = "as given"
            return float(self._config.sampler.options["localization"])
        if not self._h > 0:
            raise ConfigError(
                f"localization must be given where no curvature at w* tells its scale: the largest "
                f"is {self._h:.3g}; set sampler.localization"
            )
        self._reasons["sampler.localization"] = (
            f"1 / {SOFTEST} of the largest nbeta h at w*; directions of less curvature count by "
            "less than half"
        )
        return float(f"{self._spec.nbeta * self._h / SOFTEST:.2g}")

    def _unpiloted(self, sampler: SamplerConfig) -> SamplerConfig:
        """A step for three times the curvature at w*, where there are too few steps for a pilot."""
        takes = PILOT_CHAINS * PILOT * THIN
        if not self._h > 0:
            raise ConfigError(
                f"sampler.lr must be given: pilots may take a tenth of the run's steps, one takes "
                f"{takes}, and without one nothing tells a step: the largest curvature at w* is "
                f"{self._h:.3g}"
            )
        if self._named:
            sampler = self._settled(sampler.replaced(lr=1.0))
        self._reasons["sampler.name"] = "as given" if self._named else "without pilots: the default"
        safe = _safe(sampler)
        kappa = posterior_of(sampler, self._spec.nbeta).kappa(GROWTH * self._h)
        self._reasons["sampler.lr"] = (
            f"{safe:.2g} / kappa; kappa = nbeta h + gamma, {kappa:.3g}, for {GROWTH:g} times the "
            f"curvature at w*: too few steps for a pilot, which takes {takes}; heat is not known"
        )
        name = ours(sampler.name).friction_option
        friction = {} if name is None else {name: self._frictions(sampler)[1]}
        return sampler.replaced(lr=_round(safe / kappa), **friction)

    def _choose(self, first: SamplerConfig) -> SamplerConfig:
        """The candidate of the longest reach within the wanted bias, or the one that was named."""
        pilot = self._fitted = self._fit(first)
        self._warmth = abs(pilot.heat) / pilot.sampler.options["lr"]
        if self._named:
            self._reasons["sampler.name"] = "as given"
            return self._within(self._settled(pilot.sampler), self._warmth)
        candidates = [self._within(pilot.sampler, self._warmth)]
        whole = self._config.batches == "replacement" and self._config.data_mode == "replicate"
        if whole and pilot.heat > self._bias / 10 and self._pilots.draws_left >= 2 * PILOT:
            cooled = self._pilot(pilot.sampler.replaced(correct_heat=True), PILOT)
            if not cooled.diverged:
                warmth = abs(cooled.heat) / cooled.sampler.options["lr"]
                candidates.append(self._within(cooled.sampler, warmth))
        plain = max(candidates, key=reach)
        rehearsed = self._pilots.draws_left >= PILOT  # or momentum would go untried
        if rehearsed and signature_options(SamplerConfig(name=FAST)).keys() >= self._given:
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
            last = self._pilots.draws_left < PILOT
            if pilot.diverged:
                self._h = JUMP * kappa / self._spec.nbeta
                if last:
                    break
                continue
            if last:  # what is larger has not been tried
                self._h = max(before, pilot.h)
                return pilot
            # Far below the guess after a jump: the guess was too high, and is dropped.
            self._h = pilot.h if pilot.h < before / GUESSED else max(before, pilot.h)
            if max(self._kappa(sampler) / kappa, kappa / self._kappa(sampler)) <= GROWN:
                return pilot
        raise RunFailed(
            f"no step size fitted in {len(self._made)} pilots, the last of {sampler.name} at lr="
            f"{sampler.options['lr']:.3g}: raise sampler.localization, or give sampler.lr"
        )

    def _kappa(self, sampler: SamplerConfig) -> float:
        """Curvature of the log posterior where that of the loss was largest so far."""
        kappa = posterior_of(sampler, self._spec.nbeta).kappa(max(self._h, 0.0))
        return kappa if kappa > 0 else 1.0

    def _within(self, sampler: SamplerConfig, warmth: float) -> SamplerConfig:
        """Take the step that curvature allows, or a slower one where its heat would be too much."""
        lr, most = _safe(sampler) / self._kappa(sampler), self._bias / max(warmth, 1e-300)
        name = ours(sampler.name).friction_option
        if name is None:
            return sampler.replaced(lr=_round(min(lr, most)))
        low, high = self._frictions(sampler)
        friction = min(max(2 * lr / most, low), high)
        lr = min(lr, most * friction / 2)
        return sampler.replaced(lr=_round(lr), **{name: float(f"{friction:.2g}")})

    def _frictions(self, sampler: SamplerConfig) -> tuple[float, float]:
        """The least and the largest friction that a sampler with momentum may have."""
        name, law = ours(sampler.name).friction_option, law_of(sampler)
        if name in self._given:
            fixed = float(self._config.sampler.options[name])
            return fixed, fixed
        bias = 0.0 if law is None else abs(law.friction_bias)
        return FRICTION[0], self._bias / bias if bias else FRICTION[1]

    def _rehearse(self, sampler: SamplerConfig) -> Pilot:
        """Run a longer pilot of what was chosen, and a slower one where it was too fast."""
        pilot = self._unrehearsed(sampler)
        for _ in range(REHEARSALS):
            draws = int(min(REHEARSAL, self._pilots.draws_left))
            if draws < PILOT:
                break
            pilot = self._pilot(sampler, draws)
            if "lr" in self._given:
                break
            slower = self._slower(pilot)
            if slower is None:
                return pilot
            sampler = sampler.replaced(lr=_round(slower))
        if pilot.diverged:
            raise RunFailed(
                f"the pilot diverged at sampler.lr={pilot.sampler.options['lr']:.3g}: lower it, or "
                "raise sampler.localization"
            )
        if not math.isnan(pilot.h):
            self._h = max(self._h, pilot.h)
        return replace(pilot, sampler=sampler)

    def _unrehearsed(self, sampler: SamplerConfig) -> Pilot:
        """What the pilots so far tell of a sampler, if it is not rehearsed."""
        like = self._fitted
        if like is None:
            return Pilot(sampler, 0)
        heat = self._warmth * reach(sampler)
        same = like.sampler.name == sampler.name
        bias = like.discretisation if same else math.nan
        return replace(like, sampler=sampler, discretisation=bias, heat=heat)

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
        """Note the reasons for the step, unless there were no pilots."""
        if self._fitted is None:
            return
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

    def _pilot(
        self, sampler: SamplerConfig, draws: int, thin: int = THIN, config: RunConfig | None = None
    ) -> Pilot:
        """Run a pilot with a seed of its own."""
        config = config or self._config
        seed = np.random.SeedSequence(config.seed, spawn_key=(77, len(self._made)))
        number = int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1))
        pilot = self._pilots.pilot(config.replaced(seed=number), sampler, draws, thin)
        self._made.append(pilot)
        return pilot


def check_law(sampler: SamplerConfig) -> None:
    """Check that the step of a sampler can be chosen: by its law on a quadratic."""
    if math.isnan(_safe(sampler)):
        names = sorted(n for n in SAMPLERS if not math.isnan(_safe(SamplerConfig(name=n))))
        raise ConfigError(
            f"sampler.lr must be given for {sampler.name!r}: calibration knows the laws of "
            f"{', '.join(names)}, and not that of others; give sampler.lr to sample(), name one of "
            "these, or leave sampler.name out"
        )


def _safe(sampler: SamplerConfig) -> float:
    """The ``lr kappa`` to take; NaN where no law tells it."""
    law = law_of(sampler)
    return math.nan if law is None or law.safe is None else law.safe


def _round(lr: float) -> float:
    """A step size that can be read and written."""
    return float(f"{lr:.3g}")
