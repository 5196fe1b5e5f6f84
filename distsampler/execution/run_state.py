"""Where a run stands, what can happen to it, and what can be done about it.

Frozen values: ``transition`` decides by them, and ``driver`` does what they say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from distsampler.analysis.verdict import Verdict
from distsampler.chains.anchor_pass import AnchorPart, Part
from distsampler.chains.worker import Advance, AnchorPass, Inspect, Work
from distsampler.draws import DrawBlock
from distsampler.execution.pool import LostReason, PoolEvent
from distsampler.schedule import Schedule
from distsampler.store.events import RunEvent

FIRST_BLOCK = 10  # draws, until it is known how long they take


Task = tuple[str, int]
"""What a work is a part of, however it is cut: a chain, or the anchor pass from some row on."""


def task_of(work: Work) -> Task:
    """Return what a work is a part of."""
    match work:
        case Advance(chains):
            return "chain", chains[0]
        case AnchorPass(part):
            return part.what, part.start
        case Inspect():
            return "inspection", 0


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
    """What does not change during a run."""

    schedule: Schedule  # how many draws each chain makes, and when the gate judges them
    min_chains: int  # number of chains with fewer of which the run fails
    block: int | None  # number of draws of a block; None: sized by time
    parts: tuple[Part, ...]  # parts of the anchor pass
    together: int = 1  # number of chains in a pack, which advance as one


@dataclass(frozen=True)
class Place:
    """One place."""

    up: bool = False  # whether the place can work
    work: Work | None = None  # what it does now
    incarnation: int = 1  # how often it was started; what an earlier incarnation says is not heard
    draining: bool = False  # whether its node goes away: it gets no new work
    # how often it was lost, by reason
    losses: Mapping[LostReason, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Committed:
    """A commit is durable."""

    counts: tuple[int, ...]  # durable draws of each chain


@dataclass(frozen=True)
class Judged:
    """The gate has judged."""

    verdict: Verdict


@dataclass(frozen=True)
class Stop:
    """The run is to end cleanly: a signal came, or the time is up."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """The anchor pass has shown that the run would give a wrong number."""

    reason: str


Event = PoolEvent | Committed | Judged | Stop | Refused


@dataclass(frozen=True)
class Submit:
    """Give a place its next work, completed with what the driver holds."""

    place: int
    work: Work


@dataclass(frozen=True)
class Restart:
    """Start a place again, after a while that grows with its losses."""

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
    """Write down what the anchor pass, now complete, has measured."""

    parts: tuple[AnchorPart, ...]


@dataclass(frozen=True)
class Judge:
    """Let the gate judge the first counted draws of every chain; see ``Schedule``."""

    draws: int


Action = Submit | Restart | Keep | CommitNow | RecordAnchor | Judge | RunEvent
"""What the driver is to do; an event of the run is to be logged, and done as far as it asks."""


@dataclass(frozen=True)
class State:
    """Everything that the next decision depends on."""

    setup: RunSetup  # what does not change
    places: Mapping[int, Place]  # places that are up or being started, by number
    received: tuple[int, ...]  # draws of each chain that the driver has received
    committed: tuple[int, ...]  # draws of each chain that are durable
    phase: Phase = Phase.STARTING  # where the run is
    todo: tuple[Part, ...] = ()  # parts of the anchor pass that no place has
    parts: tuple[AnchorPart, ...] = ()  # parts of the anchor pass that are done
    # rows per second that a place last made in the anchor pass; None: not known yet
    pace: float | None = None
    retired: frozenset[int] = frozenset()  # chains that were taken out
    # how often a place hung at a task since it last got on
    hung: Mapping[Task, int] = field(default_factory=dict)
    gate_round: int = 0  # number of the next gate round, from 0
    judging: bool = False  # whether the gate was asked to judge it
    block: int = FIRST_BLOCK  # number of draws of the next blocks
    # counted draws that all chains are cut to at the end; None: not decided
    kept: int | None = None
    reason: str = ""  # why the run ends
    interrupted: bool = False  # whether it ends before its gate says so

    def hung_at(self, work: Work) -> State:
        """Return the state after a place has hung once more at this work."""
        task = task_of(work)
        return replace(self, hung={**self.hung, task: self.hung.get(task, 0) + 1})

    def moved_on(self, work: Work) -> State:
        """Return the state after this work is done."""
        task = task_of(work)
        if task not in self.hung:
            return self
        return replace(self, hung={other: n for other, n in self.hung.items() if other != task})

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
        """Whether all draws that count are committed: no fault matters any more."""
        return self.kept is not None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in (Phase.FINISHED, Phase.FAILED)
