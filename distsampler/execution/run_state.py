"""Situation: where a run stands, what can happen to it, and what can be done about it.

Frozen values, of which ``transition`` makes decisions and ``driver`` deeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from distsampler.analysis.verdict import Verdict
from distsampler.chains.anchor_pass import AnchorPart, Part
from distsampler.chains.worker import Work
from distsampler.draws import DrawBlock
from distsampler.execution.pool import LostReason, PoolEvent
from distsampler.schedule import Schedule
from distsampler.store.events import RunEvent

FIRST_BLOCK = 10


class Phase(StrEnum):
    """Where a run is."""

    STARTING = "starting"
    ANCHORING = "anchoring"
    SAMPLING = "sampling"
    DRAINING = "draining"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class RunSetup:
    """What does not change while a run runs.

    Args:
        schedule: how many draws each chain makes, and when the gate judges them.
        min_chains: with fewer left, the run fails.
        block: draws of a block; None: sized by time.
        parts: of the anchor pass.
        together: chains of a pack, which are advanced as one.
    """

    schedule: Schedule
    min_chains: int
    block: int | None
    parts: tuple[Part, ...]
    together: int = 1


@dataclass(frozen=True)
class Place:
    """One place.

    Args:
        up: whether it can work.
        work: what it does.
        incarnation: how often it was brought up; what an earlier one says is not heard.
        draining: its node goes away: it gets no new work.
        losses: how often it was lost, by kind.
    """

    up: bool = False
    work: Work | None = None
    incarnation: int = 1
    draining: bool = False
    losses: Mapping[LostReason, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Committed:
    """A commit is durable; the draws of each chain."""

    counts: tuple[int, ...]


@dataclass(frozen=True)
class Judged:
    """The gate has judged."""

    verdict: Verdict


@dataclass(frozen=True)
class Stop:
    """End the run cleanly: a signal, or the time is up."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """The anchor pass has shown that the run would give a wrong number."""

    reason: str


Event = PoolEvent | Committed | Judged | Stop | Refused


@dataclass(frozen=True)
class Submit:
    """Give a place its next work; the loop adds the chain's state and the losses at w*."""

    place: int
    work: Work


@dataclass(frozen=True)
class Restart:
    """Bring a place up anew, after a while."""

    place: int
    incarnation: int
    losses: int = 0


@dataclass(frozen=True)
class Keep:
    """Put a block into the next commit."""

    block: DrawBlock


@dataclass(frozen=True)
class CommitNow:
    """Do not wait for the next commit."""


@dataclass(frozen=True)
class RecordAnchor:
    """The anchor pass is complete."""

    parts: tuple[AnchorPart, ...]


@dataclass(frozen=True)
class Judge:
    """Let the gate judge the first counted draws of every chain; see ``Schedule``."""

    draws: int


@dataclass(frozen=True)
class Retire:
    """Take a chain out of the posterior."""

    chain: int
    reason: str


@dataclass(frozen=True)
class Note:
    """Write an event that needs nothing else done."""

    event: RunEvent


Action = Submit | Restart | Keep | CommitNow | RecordAnchor | Judge | Retire | Note


@dataclass(frozen=True)
class State:
    """Everything the next decision depends on."""

    setup: RunSetup
    places: Mapping[int, Place]
    received: tuple[int, ...]
    committed: tuple[int, ...]
    phase: Phase = Phase.STARTING
    todo: tuple[Part, ...] = ()
    parts: tuple[AnchorPart, ...] = ()
    pace: float | None = None  # rows a second that a place last made in the anchor pass
    retired: frozenset[int] = frozenset()
    gate_round: int = 0
    judging: bool = False
    block: int = FIRST_BLOCK
    kept: int | None = None
    reason: str = ""
    interrupted: bool = False

    @property
    def alive(self) -> Sequence[int]:
        """Chains that were not retired."""
        chains = range(len(self.received))
        return tuple(c for c in chains if c not in self.retired) if self.retired else chains

    @property
    def busy(self) -> dict[int, Work]:
        """Places at work, and their work."""
        return {p: place.work for p, place in self.places.items() if place.work is not None}

    @property
    def boundary(self) -> int:
        """The draw, burn-in included, at which the gate judges next."""
        return self.setup.schedule.round_ends[self.gate_round]

    @property
    def settled(self) -> bool:
        """Whether all draws that count are committed: what befalls those beyond is no matter."""
        return self.kept is not None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in (Phase.FINISHED, Phase.FAILED)
