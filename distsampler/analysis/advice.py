"""Advice on a verdict that refuses: the levers that apply to this run, and the call for it.

``advise`` alone decides, so that no lever contradicts another. In its order:

1. A step that is too large, or from which a chain has diverged, is lowered: what its draws say of
   mixing is not the posterior's. The draws keep their pace, by ``thin``.
2. A predicted bias of more than a tenth of the LLC: a larger batch against the heat of minibatches,
   a smaller step where that cannot be, or against the discretisation.
3. What draws can mend: as many as the criterion needs that needs most, after a longer burn-in where
   the drift ends within the run; or what would need fewer of them.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from distsampler.analysis.bias import BEARABLE, GENTLE, Steepness, two_digits
from distsampler.analysis.diagnosis import Diagnosis
from distsampler.analysis.error_budget import ErrorBudget
from distsampler.config import RunConfig
from distsampler.facts import Facts
from distsampler.schedule import Schedule
from distsampler.store.files import is_url
from distsampler.store.manifest import RunStatus

LIKELY = 10.0  # times the draws: where more are needed, other levers are named too
BIASED, AIM = 0.1, 0.05  # share of the LLC beyond which a bias is noted; what is aimed at then
RELAXATIONS = 20  # times that a flat direction relaxes, where localization is chosen for it
OVERDAMPED = ("sgld", "lmsgld")  # laws of which 2 / (lr gamma) steps relax a flat direction
CHAINS = 4  # that are advised where there are too few
LENGTHS = {"draws", "max_draws"}  # fields that a run which has begun can change


class Criterion(StrEnum):
    """A condition that a verdict checks."""

    CHAINS = "chains"  # enough of them for R-hat
    LENGTH = "length"  # enough draws for a verdict
    MOVING = "moving"  # no gated quantity is constant or NaN
    BOTH_SIDES = "both sides"  # chains from w* and dispersed ones are left
    R_HAT = "R-hat"
    NESTED_R_HAT = "nested R-hat"
    DRIFT = "drift"
    ESS_BULK = "bulk ESS"
    ESS_TAIL = "tail ESS"
    ERROR = "relative error"
    SCALE = "scale"  # an LLC to which an error can be relative


ONLY_COUNTED = {Criterion.ESS_BULK, Criterion.ESS_TAIL, Criterion.ERROR}  # more chains help as well


@dataclass(frozen=True)
class Failure:
    """A criterion that is not met."""

    criterion: Criterion
    reason: str  # the criterion, its number and its threshold, in words
    value: float  # the worst number that was got
    threshold: float  # what it is held against
    factor: float = 1.0  # times the draws that it needs, as far as draws help


class Lever(StrEnum):
    """A part of a run that can be changed."""

    CONTINUE = "continue"  # nothing: it is made to its end
    DRAWS = "draws"
    MAX_DRAWS = "max_draws"
    BURN_IN = "burn_in"
    CHAINS = "chains"
    LR = "sampler.lr"
    THIN = "thin"
    BATCH_SIZE = "batch_size"
    LOCALIZATION = "sampler.localization"
    GATE = "gate"
    LOOK = "look"  # at what went wrong: nothing in the config mends it


@dataclass(frozen=True)
class Measure:
    """One thing to do."""

    lever: Lever
    text: str  # what to do, in words
    # fields of the config, as --set names them, and their new values
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Advice:
    """Measures that belong together, and the call that takes them; empty where none is needed."""

    measures: tuple[Measure, ...] = ()
    alternatives: tuple[Measure, ...] = ()  # each in place of the measures, in a new run
    factor: float = 1.0  # times the draws that the criterion needs which needs most
    call: str = ""  # the command or the call that does it; empty: there is none
    new_run: bool = False  # whether it takes a new run: this one cannot change so

    @property
    def levers(self) -> tuple[Lever, ...]:
        """The levers of the measures."""
        return tuple(measure.lever for measure in self.measures)

    def as_dict(self) -> dict[str, Any]:
        """Return the advice for JSON."""
        measures, alternatives = (
            [{"lever": str(m.lever), "text": m.text, "changes": dict(m.changes)} for m in part]
            for part in (self.measures, self.alternatives)
        )
        return {
            "measures": measures,
            "alternatives": alternatives,
            "factor": self.factor,
            "call": self.call,
            "new_run": self.new_run,
        }

    def __str__(self) -> str:
        text = "; ".join(measure.text for measure in self.measures)
        text += ", in a new run" if self.new_run else ""
        text += f": {self.call}" if self.call else ""
        if self.alternatives:
            text += "; or, in a new run, " + ", or ".join(m.text for m in self.alternatives)
        return text


@dataclass(frozen=True)
class Situation:
    """The facts of a run on which advice depends; the defaults are those of a run under way."""

    config: RunConfig
    facts: Facts | None = None  # None: not asked for, or not known yet
    burn_in: int = 0  # draws before those that were judged
    store: str = ""  # address of the run; empty: no call is given
    from_file: bool = False  # whether a config file names model, data and loss
    status: RunStatus = "running"
    lost: Mapping[int, str] = field(default_factory=dict)  # retired chain -> why
    # those of them that left for infinity -> step size that was advised then; NaN: none was
    diverged: Mapping[int, float] = field(default_factory=dict)
    seen: tuple[str, ...] = ()  # what was noted of model, data and loss before the run
    step: Steepness | None = None  # the steepest that the judged chains met; None: not known
    budget: ErrorBudget | None = None  # None: without facts

    @property
    def discretisation(self) -> float:
        """Size of the step's predicted bias, as a share of the LLC; 0: not known."""
        return _share(self.budget, None if self.budget is None else self.budget.discretisation)

    @property
    def heat(self) -> float:
        """Size of the minibatches' predicted bias, as a share of the LLC; 0: not known."""
        return _share(self.budget, None if self.budget is None else self.budget.heat)


def advise(failures: Sequence[Failure], diagnosis: Diagnosis, about: Situation) -> Advice:
    """Return what to do about criteria that are not met."""
    if not failures:
        return Advice()
    kinds = {failure.criterion for failure in failures}
    factor = max(failure.factor for failure in failures)
    remedies = list(against_biases(about))
    if Criterion.MOVING in kinds and not remedies:
        return Advice((_look_why_still(about),))
    measures = [*remedies, *_lost(kinds, remedies, about)]
    if any(measure.lever is Lever.LOOK for measure in measures):
        return Advice(tuple(measures))
    measures += _draws(factor, kinds, diagnosis, about, bool(measures))
    if Criterion.R_HAT in kinds and diagnosis.outliers and not diagnosis.settled:
        measures.insert(0, _look_at_outliers(diagnosis))
    alternatives = () if remedies else tuple(_instead(factor, kinds, diagnosis, about))
    changes = {name: value for measure in measures for name, value in measure.changes.items()}
    new, call = bool(changes) and not _resumes(changes, about), ""
    if about.store and (changes or any(each.lever is Lever.CONTINUE for each in measures)):
        call = _call(changes, new, about)
    return Advice(tuple(measures), alternatives, factor, call, new)


def against_biases(about: Situation) -> Iterator[Measure]:
    """Yield what makes the step, or the heat of minibatches, bearable."""
    facts, size = about.facts, about.config.batch_size
    if facts is None or not facts.lr:
        return
    lr = wanted = facts.lr
    biased = about.discretisation + about.heat > BIASED
    if about.step is not None and about.step.too_large:
        wanted = about.step.gentle_lr
    elif biased and about.discretisation > AIM:
        wanted = two_digits(lr * AIM / about.discretisation)
    if about.diverged:
        advised = [lr for lr in about.diverged.values() if lr > 0]
        wanted = min(wanted, two_digits(lr / 2), *advised)
    heat = about.heat * wanted / lr  # it falls with the step
    larger = _rounded_up(size * heat / AIM)
    hot = biased and heat > AIM
    if hot and larger > facts.rows and wanted == lr:
        wanted = two_digits(lr * AIM / heat)
    if 0 < wanted < lr:
        thin = math.ceil(about.config.thin * lr / wanted)
        text = f"lower sampler.lr from {lr:.3g} to {wanted:g}"
        yield Measure(Lever.LR, text, {"sampler.lr": wanted})
        text = f"raise thin from {about.config.thin} to {thin}, so that draws keep their pace"
        if thin <= LIKELY * about.config.thin:  # else there was no pace to keep
            yield Measure(Lever.THIN, text, {"thin": thin})
    if hot and larger <= facts.rows:
        text = f"raise batch_size from {size} to {larger}"
        yield Measure(Lever.BATCH_SIZE, text, {"batch_size": larger})


def notes(about: Situation) -> tuple[str, ...]:
    """Return what does not enter a verdict and should be known.

    What was seen of model, data and loss before the run; a step that is too large or hot.
    """
    remedies = [each.text for each in against_biases(about) if each.lever is not Lever.THIN]
    remedy = " and ".join(remedies or ["lower sampler.lr or raise batch_size"])
    noted = [*about.seen]
    if about.step is not None and about.step.too_large:
        noted.append(f"{about.step.reason}; {remedy}")
    budget = about.budget
    share = budget.bias / budget.llc if budget is not None and budget.llc > 0 else math.nan
    if budget is not None and abs(share) > BIASED:
        noted.append(
            f"step and minibatches are predicted to make the LLC {abs(budget.bias):.3g} "
            f"too {'large' if share > 0 else 'small'}, {abs(share):.0%} of it: "
            f"{remedy}, or let ds.calibrate choose; the interval holds it"
        )
    return tuple(noted)


def _lost(kinds: set[Criterion], remedies: list[Measure], about: Situation) -> Iterator[Measure]:
    """Yield what brings back the chains that are missing, or adds some."""
    failed = about.status == "failed" and about.lost
    if remedies or not (failed or kinds & {Criterion.CHAINS, Criterion.BOTH_SIDES}):
        return
    if about.lost:
        chains = ", ".join(map(str, about.lost))
        why = next(iter(about.lost.values())).splitlines()[0]
        yield Measure(Lever.LOOK, f"mend what retired chain {chains}: {why}")
    else:
        yield Measure(Lever.CHAINS, f"run {CHAINS} chains", {"chains": CHAINS})


def _draws(
    factor: float, kinds: set[Criterion], diagnosis: Diagnosis, about: Situation, new: bool
) -> Iterator[Measure]:
    """As many draws as are needed, of this run where it can go on; of a new one else."""
    if kinds <= {Criterion.CHAINS, Criterion.BOTH_SIDES}:
        return
    schedule, auto = Schedule.of(about.config), about.config.burn_in == "auto"
    made = diagnosis.draws + (about.burn_in if auto else 0)
    needed = max(_rounded_up(factor * made), schedule.budget)
    if not auto and 0 < diagnosis.settled < diagnosis.draws // 2:
        burn_in = about.burn_in + diagnosis.settled
        text = f"burn_in={burn_in}, {diagnosis.settled} draws more, where the drift seems to end"
        yield Measure(Lever.BURN_IN, text, {"burn_in": burn_in})
    elif about.status != "finished" and not new and needed == schedule.budget:
        state = "wait for its end" if about.status == "running" else "continue it"
        text = f"{state}: {made} of its {schedule.budget} draws are judged so far"
        yield Measure(Lever.CONTINUE, text)
        return
    endless = about.config.draws == "auto"
    if Criterion.SCALE in kinds:
        text, free = "ask for no error relative to the LLC", {"gate.relative_error": None}
        fixed = {"draws": needed, "max_draws": None, "gate.every": None}
        yield Measure(Lever.GATE, text, {**fixed, **free} if endless else free)
    elif factor > 1:
        name = Lever.MAX_DRAWS if endless else Lever.DRAWS
        so_far = " so far" if made < schedule.budget else ""
        text = f"{times(factor)} times the draws{so_far}, " if made else "as many draws as needed, "
        text += f"{needed} in place of {max(made, schedule.budget)}"
        if needed > schedule.budget:
            yield Measure(name, text, {str(name): needed})


def _instead(
    factor: float, kinds: set[Criterion], diagnosis: Diagnosis, about: Situation
) -> Iterator[Measure]:
    """Yield what saves draws: more chains, a larger step where there is room, localization."""
    config, facts, step = about.config, about.facts, about.step
    if kinds <= ONLY_COUNTED:
        chains = math.ceil(config.chains * factor)
        yield Measure(Lever.CHAINS, f"chains={chains}", {"chains": chains})
    if facts is None or facts.lr is None or about.lost or not factor >= 2:
        return
    if step is not None:
        bias = max(about.discretisation, about.heat)
        room = min(GENTLE / step.share, LIKELY, AIM / bias if bias else math.inf)
        lr = two_digits(facts.lr * room)
        if room >= 2:
            text = f"sampler.lr={lr:g}, for which the curvature that was met leaves room"
            yield Measure(Lever.LR, text, {"sampler.lr": lr})
    if factor >= LIKELY:
        yield from _more_localized(diagnosis, facts, about)


def _more_localized(diagnosis: Diagnosis, facts: Facts, about: Situation) -> Iterator[Measure]:
    """A localization with which flat directions relax within the draws that there are."""
    law, lr, gamma = facts.law, facts.lr, facts.posterior.localization
    steps = diagnosis.draws * about.config.thin
    if law is None or law.name not in OVERDAMPED or law.limit is None or not lr or not steps:
        return
    relaxed, wanted = lr * gamma * steps / 2, two_digits(2 * RELAXATIONS / (lr * steps))
    before = 0.0 if about.step is None else about.step.share
    if relaxed < RELAXATIONS / 2 and before + lr * (wanted - gamma) / law.limit < BEARABLE:
        text = (
            f"sampler.localization={wanted:g} in place of {gamma:g}, with which flat directions "
            f"relax {RELAXATIONS} times within these draws, not {relaxed:.2g} times; its price: "
            "another posterior, with another LLC"
        )
        yield Measure(Lever.LOCALIZATION, text, {"sampler.localization": wanted})


def _look_why_still(about: Situation) -> Measure:
    lr = None if about.facts is None else about.facts.lr
    used = "" if lr is None else f" ({lr:.3g})"
    return Measure(
        Lever.LOOK,
        f"see that sampler.lr{used} moves the chains at all, that restrict_to names parameters on "
        "which the loss depends, and that the loss is finite",
    )


def _look_at_outliers(diagnosis: Diagnosis) -> Measure:
    chains = ", ".join(str(each.chain) for each in diagnosis.outliers)
    text = f"see in the report whether chain {chains} is stuck or in a basin of its own"
    return Measure(Lever.LOOK, text)


def _share(budget: ErrorBudget | None, bias: float | None) -> float:
    return abs(bias) / budget.llc if bias and budget is not None and budget.llc > 0 else 0.0


def times(factor: float) -> str:
    """Return a factor in words."""
    return f"about {factor:.1f}" if factor < LIKELY else f"about {factor:.0f}"


def _rounded_up(value: float) -> int:
    """The next integer of two digits."""
    if not math.isfinite(value) or value <= 0:
        return 1
    unit = 10.0 ** max(0, math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / unit) * unit)


# How a change is made


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return a config with other values of fields, which are named as ``--set`` names them."""
    plain, parts = _by_part(changes)
    inner = {part: getattr(config, part).replaced(**options) for part, options in parts.items()}
    return config.replaced(**plain, **inner)


def _by_part(changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Changes of the config's own fields, and those of its parts, by part."""
    plain, parts = dict[str, Any](), dict[str, dict[str, Any]]()
    for name, value in changes.items():
        part, dot, option = name.partition(".")
        if dot:
            parts.setdefault(part, {})[option] = value
        else:
            plain[name] = value
    return plain, parts


def _resumes(changes: Mapping[str, Any], about: Situation) -> bool:
    """Return whether a run that has begun can change so: longer, its adaptation the same."""
    lengths = {name for name in changes if name in LENGTHS or name.startswith("gate.")}
    if lengths != changes.keys() or not LENGTHS & changes.keys():
        return False
    config, facts = about.config, about.facts
    if facts is None or facts.law is not None or "freeze_after" in config.sampler.options:
        return True
    return Schedule.of(config).adapting == Schedule.of(changed(config, changes)).adapting


def _call(changes: Mapping[str, Any], new: bool, about: Situation) -> str:
    """The command, or the call in Python."""
    if about.from_file:
        words = [f"--set {k}={'null' if v is None else v}" for k, v in changes.items()]
        if new:
            return " ".join(["distsampler run CONFIG.yaml", *words, "--store NEW"])
        trust = ["--trust"] if is_url(about.store) else []  # whose it is, nobody knows
        return " ".join(["distsampler resume", shlex.quote(about.store), *trust, *words])
    plain, parts = _by_part(changes)
    words = [f"{name}={value!r}" for name, value in plain.items()]
    if not new:
        lengths = [f"{k}={v!r}" for k, v in plain.items() if v is not None]
        return f"ds.resume({', '.join([repr(about.store), 'model, data, loss', *lengths])})"
    for part, options in parts.items():
        inner = ", ".join(f"{name}={value!r}" for name, value in options.items())
        words.append(f"{part}=config.{part}.replaced({inner})")
    return f"ds.sample(model, data, loss, config.replaced({', '.join(words)}), store='NEW')"
