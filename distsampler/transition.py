"""What the driver decides: ``transition(state, event) -> (state, actions)``, pure and total.

It knows no clock, no disk and no Ray; ``driver`` takes the events from the pool and performs the
actions.

A chain advances in blocks; a free place takes the chain that is furthest behind, so that all
chains keep together however many places there are. The gate looks at fixed draws, when all chains
have committed them: a fault can delay a look but not move it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never

from distsampler.anchor import AnchorPart, Part
from distsampler.chain import ChainDiverged
from distsampler.diagnostics import Verdict
from distsampler.draws import DrawBlock
from distsampler.pool import PlaceLost, PlaceReady, PoolEvent, WorkDone, WorkFailed
from distsampler.worker import Advance, AnchorPass, Work

LOSSES = 5  # of one place, without progress between them, until it is given up
BLOCK_SECONDS = 2.0
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
class Plan:
    """What does not change while a run runs.

    Args:
        burn_in: draws before the posterior.
        looks: draws after burn-in at which the gate looks; the last is the budget.
        min_chains: with fewer left, the run fails.
        block: draws of a block; None: sized by time.
        parts: of the anchor pass.
    """

    burn_in: int
    looks: tuple[int, ...]
    min_chains: int
    block: int | None
    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        """Draws of a chain, burn-in included."""
        return self.burn_in + self.looks[-1]


@dataclass(frozen=True)
class Place:
    """One place: up or not, what it does, how often it was lost since it last did something."""

    up: bool = False
    work: Work | None = None
    losses: int = 0


@dataclass(frozen=True)
class Committed:
    """A commit is durable; the draws of each chain."""

    counts: tuple[int, ...]


@dataclass(frozen=True)
class Judged:
    """The gate has looked."""

    verdict: Verdict


@dataclass(frozen=True)
class Stop:
    """End the run cleanly: a signal, or the time is up."""

    reason: str


Event = PoolEvent | Committed | Judged | Stop


@dataclass(frozen=True)
class Submit:
    """Give a place its next work; the loop adds the chain's state and the anchor."""

    place: int
    work: Work


@dataclass(frozen=True)
class Restart:
    """Bring a lost place up again, after a while."""

    place: int
    losses: int


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
    """Let the gate look at the first draws after burn-in of every chain."""

    draws: int


@dataclass(frozen=True)
class Retire:
    """Take a chain out of the posterior."""

    chain: int
    reason: str


@dataclass(frozen=True)
class Note:
    """Write an event that needs nothing else done."""

    kind: str
    details: Mapping[str, object]


Action = Submit | Restart | Keep | CommitNow | RecordAnchor | Judge | Retire | Note


@dataclass(frozen=True)
class State:
    """Everything the next decision depends on."""

    plan: Plan
    places: Mapping[int, Place]
    received: tuple[int, ...]
    committed: tuple[int, ...]
    phase: Phase = Phase.STARTING
    todo: tuple[Part, ...] = ()
    parts: tuple[AnchorPart, ...] = ()
    retired: frozenset[int] = frozenset()
    look: int = 0
    judging: bool = False
    block: int = FIRST_BLOCK
    kept: int | None = None
    reason: str = ""
    interrupted: bool = False

    @property
    def alive(self) -> tuple[int, ...]:
        """Chains that were not retired."""
        return tuple(c for c in range(len(self.received)) if c not in self.retired)

    @property
    def busy(self) -> dict[int, Work]:
        """Places at work, and their work."""
        return {p: place.work for p, place in self.places.items() if place.work is not None}

    @property
    def boundary(self) -> int:
        """The draw, burn-in included, at which the gate looks next."""
        return self.plan.burn_in + self.plan.looks[self.look]

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in (Phase.FINISHED, Phase.FAILED)


Step = tuple[State, list[Action]]


def begin(
    plan: Plan,
    places: tuple[int, ...],
    committed: tuple[int, ...],
    retired: frozenset[int] = frozenset(),
    anchored: bool = False,
) -> State:
    """The state before anything has happened.

    Args:
        plan: of the run.
        places: that are being brought up.
        committed: draws of each chain that exist already.
        retired: chains that were taken out already.
        anchored: whether the anchor pass is recorded already.
    """
    state = State(
        plan,
        {place: Place() for place in places},
        received=committed,
        committed=committed,
        retired=retired,
        todo=() if anchored else plan.parts,
        block=plan.block or FIRST_BLOCK,
    )
    return _enough_left(state, "they were lost before")


def transition(state: State, event: Event) -> Step:
    """What happens next. Pure and total: the same state and event always give the same answer."""
    if state.over:
        return state, []
    match event:
        case PlaceReady():
            state, actions = _ready(state, event)
        case WorkDone():
            state, actions = _done(state, event)
        case WorkFailed():
            state, actions = _failed(state, event)
        case PlaceLost():
            state, actions = _lost(state, event)
        case Committed():
            state, actions = replace(state, committed=event.counts), []
        case Judged():
            state, actions = _judged(state, event)
        case Stop():
            state, actions = _stop(state, event.reason), []
        case _:
            assert_never(event)
    return _proceed(state, actions)


def _ready(state: State, event: PlaceReady) -> Step:
    place = replace(state.places[event.place], up=True, work=None)
    note = Note("started", {"place": event.place, **event.info})
    return _with_place(state, event.place, place), [note]


def _done(state: State, event: WorkDone) -> Step:
    if state.places[event.place].work != event.work:
        return state, []  # a late reply: its work was given to another
    state = _with_place(state, event.place, Place(up=True))
    match event.result:
        case AnchorPart():
            return replace(state, parts=(*state.parts, event.result)), []
        case DrawBlock(chain=chain) as block:
            if block.first_draw != state.received[chain]:
                return state, []
            state = replace(_received(state, block), block=_block_size(state, event))
            return state, [Keep(block)]


def _failed(state: State, event: WorkFailed) -> Step:
    if state.places[event.place].work != event.work:
        return state, []
    state = _with_place(state, event.place, Place(up=True))
    if isinstance(event.work, AnchorPass):
        return _fail(state, str(event.error)), []
    chain, actions = event.work.chain, list[Action]()
    if isinstance(event.error, ChainDiverged) and event.error.block.draws:
        actions.append(Keep(event.error.block))
        state = _received(state, event.error.block)
    state = replace(state, retired=state.retired | {chain})
    actions += [Retire(chain, str(event.error)), CommitNow()]
    return _enough_left(state, str(event.error)), actions


def _lost(state: State, event: PlaceLost) -> Step:
    before = state.places[event.place]
    todo = state.todo
    if isinstance(before.work, AnchorPass):
        todo = (*todo, before.work.part)
    losses = before.losses + 1
    details = {"place": event.place, "reason": event.reason, "losses": losses}
    actions: list[Action] = [Note("lost", details)]
    if not event.fatal and losses <= LOSSES:
        actions.append(Restart(event.place, losses))
        state = _with_place(replace(state, todo=todo), event.place, Place(losses=losses))
        return state, actions
    places = {p: place for p, place in state.places.items() if p != event.place}
    state = replace(state, places=places, todo=todo)
    if not places:
        state = _fail(state, f"no place is left to run on: {event.reason}")
    return state, actions


def _judged(state: State, event: Judged) -> Step:
    draws = state.plan.looks[state.look]
    state = replace(state, judging=False)
    details = {"draws": draws, "status": event.verdict.status, "reason": event.verdict.reason}
    note = Note("verdict", details)
    last = state.look == len(state.plan.looks) - 1
    if event.verdict.converged or last:
        reason = "converged" if event.verdict.converged else "the draw budget is used up"
        return replace(state, phase=Phase.DRAINING, kept=draws, reason=reason), [note]
    return replace(state, look=state.look + 1), [note]


def _stop(state: State, reason: str) -> State:
    if state.phase is Phase.DRAINING:
        return state
    return replace(state, phase=Phase.DRAINING, reason=reason, interrupted=True)


def _enough_left(state: State, cause: str) -> State:
    if len(state.alive) >= state.plan.min_chains:
        return state
    left = f"{len(state.alive)} of {len(state.received)} chains are left"
    return _fail(state, f"{left}, and the run needs {state.plan.min_chains}: {cause}")


def _fail(state: State, reason: str) -> State:
    return replace(state, phase=Phase.FAILED, reason=reason)


def _proceed(state: State, actions: list[Action]) -> Step:
    """Moves on to the next phase where this one is done, and gives free places work."""
    if state.phase is Phase.STARTING and all(place.up for place in state.places.values()):
        state = replace(state, phase=Phase.ANCHORING)
    if state.phase is Phase.ANCHORING:
        state, more = _anchor(state)
        actions = actions + more
    if state.phase is Phase.SAMPLING:
        state, more = _sample(state)
        actions = actions + more
    if state.phase is Phase.DRAINING and not state.busy:
        if state.committed == state.received:
            state = replace(state, phase=Phase.FINISHED)
        else:
            actions = [*actions, CommitNow()]
    return state, actions


def _anchor(state: State) -> Step:
    """Parts of the anchor pass to the free places; sampling once all are in."""
    actions: list[Action] = []
    for place in _free(state)[: len(state.todo)]:
        work = AnchorPass(state.todo[0])
        state = _at_work(replace(state, todo=state.todo[1:]), place, work)
        actions.append(Submit(place, work))
    if state.todo or state.busy:
        return state, actions
    if state.parts:
        actions.append(RecordAnchor(state.parts))
    return replace(state, phase=Phase.SAMPLING), actions


def _sample(state: State) -> Step:
    """A look of the gate where one is due, and a block to each free place."""
    actions: list[Action] = []
    if all(state.committed[c] >= state.boundary for c in state.alive):
        if not state.judging:
            actions.append(Judge(state.plan.looks[state.look]))
            state = replace(state, judging=True)
    elif all(state.received[c] >= state.boundary for c in state.alive):
        actions.append(CommitNow())
    for place in _free(state):
        work = _next_block(state)
        if work is not None:
            state = _at_work(state, place, work)
            actions.append(Submit(place, work))
    return state, actions


def _next_block(state: State) -> Advance | None:
    """The next block of the idle chain that is furthest behind; none crosses a look."""
    taken = {work.chain for work in state.busy.values() if isinstance(work, Advance)}
    idle = [c for c in state.alive if c not in taken and state.received[c] < state.plan.total]
    if not idle:
        return None
    chain = min(idle, key=lambda c: (state.received[c], c))
    first = state.received[chain]
    ends = (state.plan.burn_in + look for look in state.plan.looks)
    end = min(first + state.block, next(end for end in ends if end > first))
    return Advance(chain, first, end - first)


def _block_size(state: State, event: WorkDone) -> int:
    """Draws that take about two seconds; at most twice as many as before."""
    if state.plan.block is not None or not isinstance(event.work, Advance):
        return state.block
    wanted = BLOCK_SECONDS * event.work.draws / max(event.seconds, 1e-3)
    return max(1, min(int(wanted), 2 * state.block))


def _received(state: State, block: DrawBlock) -> State:
    received = list(state.received)
    received[block.chain] = block.end
    return replace(state, received=tuple(received))


def _free(state: State) -> list[int]:
    return [p for p, place in sorted(state.places.items()) if place.up and place.work is None]


def _at_work(state: State, place: int, work: Work) -> State:
    return _with_place(state, place, replace(state.places[place], work=work))


def _with_place(state: State, number: int, place: Place) -> State:
    return replace(state, places={**state.places, number: place})
