"""What the driver decides: ``transition(state, event) -> (state, actions)``, pure and total.

It knows no clock, no disk and no Ray; ``driver`` takes the events from the pool and performs the
actions.

A chain advances in blocks; a free place takes the chain that is furthest behind, so that all
chains keep together however many places there are. The gate looks at fixed draws, when all chains
have committed them: a fault can delay a look but not move it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from heapq import heapify, heappop
from operator import ge
from typing import assert_never

from distsampler.chains.anchor_pass import BLOCK, AnchorPart, Part
from distsampler.chains.steps import Advanced
from distsampler.chains.worker import Advance, AnchorPass, NotResident, Work
from distsampler.draws import DrawBlock
from distsampler.errors import StoreError
from distsampler.execution.pool import (
    LostReason,
    PlaceDraining,
    PlaceLost,
    PlaceReady,
    PoolEvent,
    WorkDone,
    WorkFailed,
)
from distsampler.execution.run_state import (
    FIRST_BLOCK,
    Action,
    CommitNow,
    Committed,
    Event,
    Judge,
    Judged,
    Keep,
    Note,
    Phase,
    Place,
    RecordAnchor,
    Refused,
    Restart,
    Retire,
    RunSetup,
    State,
    Stop,
    Submit,
)
from distsampler.store.events import Draining, GateRound, Lost, Started

BUDGETS: dict[LostReason, float] = {  # losses of one place until it is given up
    "infrastructure": 5,  # without progress between them
    "start": 5,  # before it was up, likewise
    "memory": 2,
    "preempted": math.inf,
    "fatal": 0,
}
BLOCK_SECONDS = 2.0
REPLIES = 100.0  # a second, at most: what a driver takes in without being late
STATE_SHARE = 40.0  # a block takes so many times as long as its state to write
Step = tuple[State, list[Action]]


def begin(
    setup: RunSetup,
    places: tuple[int, ...],
    committed: tuple[int, ...],
    retired: frozenset[int] = frozenset(),
    anchored: bool = False,
    received: tuple[int, ...] | None = None,
) -> State:
    """The state before anything has happened.

    Args:
        setup: of the run.
        places: that are being brought up.
        committed: draws of each chain that exist already.
        retired: chains that were taken out already.
        anchored: whether the anchor pass is recorded already.
        received: draws from which each chain goes on, where its last states were lost.
    """
    state = State(
        setup,
        {place: Place() for place in places},
        received=received or committed,
        committed=committed,
        retired=retired,
        todo=() if anchored else setup.parts,
        block=setup.block or FIRST_BLOCK,
    )
    return _enough_left(state, "they were lost before")


def transition(state: State, event: Event) -> Step:
    """What happens next. Pure and total: the same state and event always give the same answer."""
    if state.over:
        return state, []
    match event:
        case PlaceReady() | WorkDone() | WorkFailed() | PlaceLost() | PlaceDraining():
            place = state.places.get(event.place)
            if place is None or place.incarnation != event.incarnation:
                return state, []  # a late word of one that was given up
            state, actions = _heard(state, event)
        case Committed():
            state, actions = replace(state, committed=event.counts), []
        case Judged():
            state, actions = _judged(state, event)
        case Stop():
            state, actions = _stop(state, event.reason), []
        case Refused():
            state, actions = _fail(state, event.reason), []
        case _:
            assert_never(event)
    return _proceed(state, actions)


def _heard(state: State, event: PoolEvent) -> Step:
    match event:
        case PlaceReady():
            return _ready(state, event)
        case WorkDone():
            return _done(state, event)
        case WorkFailed():
            return _failed(state, event)
        case PlaceLost():
            return _lost(state, event)
        case PlaceDraining():
            return _draining(state, event)
        case _:
            assert_never(event)


def _ready(state: State, event: PlaceReady) -> Step:
    if state.places[event.place].up:
        return state, []
    place = replace(state.places[event.place], up=True)
    note = Note(Started(event.place, event.info))
    return _with_place(state, event.place, place), [note]


def _done(state: State, event: WorkDone) -> Step:
    if state.places[event.place].work != event.work:
        return state, []  # a reply that came twice
    if isinstance(event.result, NotResident):
        return _sent_again(state, event)
    state, actions = _freed(state, event.place, progress=True)
    match event.result:
        case AnchorPart(part):
            pace = state.pace
            if part.what == "losses":
                pace = (part.stop - part.start) / max(event.seconds, 1e-3)
            return replace(state, parts=(*state.parts, event.result), pace=pace), actions
        case Advanced() as done:
            state, more = _advanced(replace(state, block=_block_size(state, event, done)), done)
            return state, actions + more


def _sent_again(state: State, event: WorkDone) -> Step:
    """Gives the place the same work, with the states of its chains."""
    assert isinstance(event.work, Advance), "no other work has chains"
    work = replace(event.work, with_states=True)
    place = replace(state.places[event.place], work=work)
    return _with_place(state, event.place, place), [Submit(event.place, work)]


def _advanced(state: State, done: Advanced) -> Step:
    """Keeps the draws that are new, and retires the chains that diverged."""
    if state.settled and done.diverged:
        return state, []
    actions: list[Action] = []
    for block in (*done.blocks, *(error.block for error in done.diverged)):
        if block.draws and block.first_draw == state.received[block.chain]:
            state = _received(state, block)
            actions.append(Keep(block))
    for error in done.diverged:
        state, more = _retired(state, (error.chain,), str(error))
        actions += more
    return state, actions


def _retired(state: State, chains: tuple[int, ...], cause: str) -> Step:
    """Takes chains out; the run fails where too few are left."""
    actions: list[Action] = [Retire(chain, cause) for chain in chains]
    state = replace(state, retired=state.retired.union(chains))
    return _enough_left(state, cause), [*actions, CommitNow()]


def _failed(state: State, event: WorkFailed) -> Step:
    if state.places[event.place].work != event.work:
        return state, []
    state, actions = _freed(state, event.place, progress=True)
    if state.settled:
        return state, actions
    if isinstance(event.work, AnchorPass) or isinstance(event.error, StoreError):
        return _fail(state, str(event.error)), actions  # the store's fault is no chain's
    state, more = _retired(state, event.work.chains, str(event.error))
    return state, actions + more


def _lost(state: State, event: PlaceLost) -> Step:
    before = state.places[event.place]
    losses = {**before.losses, event.kind: before.losses.get(event.kind, 0) + 1}
    chains = before.work.chains if isinstance(before.work, Advance) else None
    note = Note(Lost(event.place, event.kind, chains, losses[event.kind], event.reason))
    if isinstance(before.work, AnchorPass):
        state = replace(state, todo=(*state.todo, before.work.part))
    if losses[event.kind] <= BUDGETS[event.kind]:
        place = Place(incarnation=before.incarnation + 1, losses=losses)
        state = _with_place(state, event.place, place)
        return state, [note, Restart(event.place, place.incarnation, losses[event.kind])]
    places = {p: place for p, place in state.places.items() if p != event.place}
    state = replace(state, places=places)
    if state.settled:
        return state, [note]
    if event.kind == "memory":
        state = _fail(
            state,
            f"a place ran out of memory {losses[event.kind]} times: lower batch_size or "
            f"placement.chains_per_actor, or give each chain more of a node: {event.reason}",
        )
    elif not places:
        state = _fail(state, f"no place is left to run on: {event.reason}")
    return state, [note]


def _draining(state: State, event: PlaceDraining) -> Step:
    place = state.places[event.place]
    if place.draining:
        return state, []
    note = Note(Draining(event.place, event.reason))
    state = _with_place(state, event.place, replace(place, draining=True))
    if place.work is not None:
        return state, [note]
    state, actions = _freed(state, event.place)
    return state, [note, *actions]


def _freed(state: State, number: int, progress: bool = False) -> Step:
    """A place without work: ready for the next, or brought up elsewhere if its node goes away."""
    place = state.places[number]
    losses = place.losses
    if progress:
        losses = {kind: n for kind, n in losses.items() if kind not in ("infrastructure", "start")}
    if not place.draining:
        return _with_place(state, number, replace(place, work=None, losses=losses)), []
    place = Place(incarnation=place.incarnation + 1, losses=losses)
    return _with_place(state, number, place), [Restart(number, place.incarnation)]


def _judged(state: State, event: Judged) -> Step:
    rounds = state.setup.schedule.gate_rounds
    draws = rounds[state.gate_round]
    state = replace(state, judging=False)
    note = Note(GateRound(draws, event.verdict.status, event.verdict.reason))
    last = state.gate_round == len(rounds) - 1
    if event.verdict.converged or last:
        reason = "converged" if event.verdict.converged else "the draw budget is used up"
        return replace(state, phase=Phase.DRAINING, kept=draws, reason=reason), [note]
    return replace(state, gate_round=state.gate_round + 1), [note]


def _stop(state: State, reason: str) -> State:
    if state.phase is Phase.DRAINING:
        return state
    return replace(state, phase=Phase.DRAINING, reason=reason, interrupted=True)


def _enough_left(state: State, cause: str) -> State:
    if len(state.alive) >= state.setup.min_chains:
        return state
    left = f"{len(state.alive)} of {len(state.received)} chains are left"
    return _fail(state, f"{left}, and the run needs {state.setup.min_chains}: {cause}")


def _fail(state: State, reason: str) -> State:
    return replace(state, phase=Phase.FAILED, reason=reason)


def _proceed(state: State, actions: list[Action]) -> Step:
    """Moves on to the next phase where this one is done, and gives free places work."""
    if state.phase is Phase.STARTING and any(place.up for place in state.places.values()):
        state = replace(state, phase=Phase.ANCHORING)
    if state.phase is Phase.ANCHORING:
        state, more = _anchor(state)
        actions = actions + more
    if state.phase is Phase.SAMPLING:
        state, more = _sample(state)
        actions = actions + more
    if state.phase is Phase.DRAINING and not state.busy:
        if all(map(ge, state.committed, state.received)):
            state = replace(state, phase=Phase.FINISHED)
        else:
            actions = [*actions, CommitNow()]
    return state, actions


def _anchor(state: State) -> Step:
    """Parts of the anchor pass to the free places; sampling once all are in."""
    given = dict[int, Work]()
    for place in _free(state):
        if state.todo:
            part, *rest = _cut(state.todo[0], state.pace)
            given[place] = AnchorPass(part)
            state = replace(state, todo=(*rest, *state.todo[1:]))
    state = _all_at_work(state, given)
    actions: list[Action] = [Submit(place, work) for place, work in given.items()]
    if state.todo or state.busy:
        return state, actions
    if state.parts:
        actions.append(RecordAnchor(state.parts))
    return replace(state, phase=Phase.SAMPLING), actions


def _cut(part: Part, pace: float | None) -> tuple[Part, ...]:
    """A part, and its rest where it would take longer than a block; one of rows not timed yet."""
    whole = round(BLOCK_SECONDS * (pace or 0.0)) // BLOCK * BLOCK
    stop = part.start + max(whole, BLOCK)
    if part.what != "losses" or stop >= part.stop:
        return (part,)
    return part._replace(stop=stop), part._replace(start=stop)


def _sample(state: State) -> Step:
    """Judge where a gate round has ended, and give each free place a block."""
    actions: list[Action] = []
    if all(state.committed[c] >= state.boundary for c in state.alive):
        if not state.judging:
            actions.append(Judge(state.setup.schedule.gate_rounds[state.gate_round]))
            state = replace(state, judging=True)
    elif all(state.received[c] >= state.boundary for c in state.alive):
        actions.append(CommitNow())
    given = dict(zip(_free(state), _next_blocks(state), strict=False))
    return _all_at_work(state, given), actions + [Submit(p, work) for p, work in given.items()]


def _next_blocks(state: State) -> Iterator[Advance]:
    """The next blocks of the idle packs, those furthest behind first; none crosses a round."""
    works = [place.work for place in state.places.values()]
    taken = {chain for work in works if isinstance(work, Advance) for chain in work.chains}
    received, size = state.received, state.setup.together
    round_ends = state.setup.schedule.round_ends
    left = set(state.alive).difference(taken)
    waiting = [(received[c], c) for c in left if received[c] < round_ends[-1]]
    heapify(waiting)
    while waiting:
        first, chain = heappop(waiting)
        if chain in taken:
            continue  # with another of its pack
        mates = range(chain // size * size, min((chain // size + 1) * size, len(received)))
        pack = tuple(c for c in mates if c not in state.retired)
        taken.update(pack)
        end = min(first + state.block, next(end for end in round_ends if end > first))
        yield Advance(pack, first, end - first)


def _block_size(state: State, event: WorkDone, done: Advanced) -> int:
    """Draws that take about two seconds, longer for many places and for large states.

    At most twice as before.
    """
    if state.setup.block is not None or not done.blocks:
        return state.block
    writing = sum(block.state_seconds for block in done.blocks)
    seconds = max(event.seconds - writing, 1e-3)
    longest = max(BLOCK_SECONDS, len(state.places) / REPLIES, STATE_SHARE * writing)
    wanted = longest * done.blocks[0].draws / seconds
    return max(1, min(int(wanted), 2 * state.block))


def _received(state: State, block: DrawBlock) -> State:
    received = list(state.received)
    received[block.chain] = block.end
    return replace(state, received=tuple(received))


def _free(state: State) -> list[int]:
    return sorted(
        number
        for number, place in state.places.items()
        if place.work is None and place.up and not place.draining
    )


def _all_at_work(state: State, given: Mapping[int, Work]) -> State:
    """Gives places their works, in one go: there may be thousands of them."""
    if not given:
        return state
    changed = {number: replace(state.places[number], work=work) for number, work in given.items()}
    return replace(state, places={**state.places, **changed})


def _with_place(state: State, number: int, place: Place) -> State:
    return replace(state, places={**state.places, number: place})
