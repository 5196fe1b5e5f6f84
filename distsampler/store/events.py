"""events.jsonl: what happened to a run, one JSON object a line, the oldest first.

Each kind of event is a frozen value, whose fields are the keys of its line. The log is for people
and for ``Run.events``; nothing that a run computes depends on it.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from distsampler.errors import StoreError
from distsampler.redaction import redacted
from distsampler.store import integrity
from distsampler.store.files import Files

EVENTS = "events.jsonl"
LATEST = 2**36  # seconds since 1970 that an event may be at


@dataclass(frozen=True)
class RunEvent:
    """Something that happened to a run."""

    kind: ClassVar[str]

    def line(self) -> dict[str, object]:
        """Return the event as its line has it, without the time; what is None is left out."""
        values = {"event": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Packed(RunEvent):
    """The size of the packs was settled, as ``sampling.packing`` says."""

    kind = "packing"
    asked: int | str
    pack: int
    refused: str
    speeds: Mapping[int, float]


@dataclass(frozen=True)
class Inspected(RunEvent):
    """Model, data and loss were tried before the run; ``notes`` are what a user should know."""

    kind = "inspected"
    notes: Sequence[str]


@dataclass(frozen=True)
class Started(RunEvent):
    """A place is up; ``info`` says where: host, pid, device."""

    kind = "started"
    place: int
    info: Mapping[str, object]

    def line(self) -> dict[str, object]:
        """Return the place's number with its info beside it."""
        return {"event": self.kind, "place": self.place, **self.info}


@dataclass(frozen=True)
class Draining(RunEvent):
    """The node of a place is about to go away."""

    kind = "draining"
    place: int
    reason: str


@dataclass(frozen=True)
class Lost(RunEvent):
    """A place died, for the ``losses``-th time by this fault; ``chains`` were at work there."""

    kind = "lost"
    place: int
    fault: str
    chains: Sequence[int] | None
    losses: int
    reason: str


FAULTS = {  # of Lost, as people read them
    "infrastructure": "died",
    "preempted": "preempted",
    "memory": "out of memory",
    "start": "never started",
    "hung": "hung",
    "fatal": "given up at once",
}


@dataclass(frozen=True)
class Retired(RunEvent):
    """A chain was taken out of the posterior."""

    kind = "retired"
    chain: int
    reason: str
    diverged: bool | None = None  # whether its numbers left for infinity
    gentle_lr: float | None = None  # the step size that is advised then


@dataclass(frozen=True)
class GateRound(RunEvent):
    """The gate gave its verdict on the first draws of every chain."""

    kind = "verdict"
    draws: int
    status: str
    reason: str


@dataclass(frozen=True)
class StepTooLarge(RunEvent):
    """A chain met a curvature for which its step is too large."""

    kind = "step_too_large"
    chain: int
    reason: str
    gentle_lr: float | None = None  # the step size that is advised


@dataclass(frozen=True)
class DeviceChanged(RunEvent):
    """The run continues on another model of the same type of device."""

    kind = "device_changed"
    stored: str
    now: str


@dataclass(frozen=True)
class Damaged(RunEvent):
    """A resume met damage: it goes back to the intact draws of each chain, or mends ``what``."""

    kind = "damaged"
    committed: Sequence[int] | None = None
    intact: Sequence[int] | None = None
    what: str | None = None


@dataclass(frozen=True)
class Ended(RunEvent):
    """The run has ended; its kind is its status: finished, interrupted or failed."""

    kind = "ended"
    event: str
    reason: str


def append(files: Files, event: RunEvent) -> None:
    """Write an event, with the time and without secrets."""
    record = redacted({"time": round(time.time(), 3), **event.line()})
    files.append(EVENTS, json.dumps(record))


def read(files: Files) -> list[dict[str, Any]]:
    """Return all lines that are whole, as they were written.

    Raises:
        StoreError: if the log is not a file that can be read.
    """
    try:
        lines = files.read(EVENTS).decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{files.path(EVENTS)} cannot be read: {error}; remove it") from error
    return [line for line in map(_parsed, lines) if line is not None]


def of_kind(lines: Iterable[dict[str, Any]], kind: type[RunEvent]) -> list[dict[str, Any]]:
    """Return the lines of one kind of event."""
    return [line for line in lines if line["event"] == kind.kind]


def gate_rounds(lines: Iterable[dict[str, Any]]) -> list[GateRound]:
    """Return what the gate said, the oldest first; a line that lacks a part is left out."""
    parts = ((e.get("draws"), e.get("status"), e.get("reason")) for e in of_kind(lines, GateRound))
    return [
        GateRound(draws, status, str(reason))
        for draws, status, reason in parts
        if isinstance(draws, int) and isinstance(status, str)
    ]


def inspected(lines: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    """Return what was seen of model, data and loss before the run, each once."""
    each = (line.get("notes") for line in of_kind(lines, Inspected))
    notes = (note for notes in each if isinstance(notes, list) for note in notes)
    return tuple(dict.fromkeys(map(str, notes)))


def divergences(lines: Iterable[dict[str, Any]]) -> dict[int, float]:
    """Return the step size that was advised when a chain diverged, by chain; NaN: none was."""
    lrs = {}
    for line in of_kind(lines, Retired):
        chain, lr = line.get("chain"), line.get("gentle_lr")
        if line.get("diverged") is True and isinstance(chain, int):
            lrs[chain] = float(lr) if isinstance(lr, int | float) and lr > 0 else math.nan
    return lrs


def losses(lines: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Return how often actors were lost, by fault."""
    return dict(Counter(str(line.get("fault")) for line in of_kind(lines, Lost)))


def losses_named(losses: Mapping[str, int]) -> str:
    """Return the losses as people read them: "3 actors lost (1 hung, 2 preempted)"."""
    count = sum(losses.values())
    named = ", ".join(f"{number} {FAULTS.get(f, f)}" for f, number in sorted(losses.items()))
    return f"{count} actor{'' if count == 1 else 's'} lost{f' ({named})' if named else ''}"


def _parsed(line: str) -> dict[str, Any] | None:
    """An event, which has a kind and a time; None of anything else."""
    try:
        parsed = integrity.parsed(line)
        whole = isinstance(parsed["event"], str) and 0 <= float(parsed["time"]) < LATEST
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    return parsed if whole else None
