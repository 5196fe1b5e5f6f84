"""What the driver decides: ``transition(state, event) -> (state, actions)``, pure and total.

It knows no clock, no disk and no Ray: ``driver`` takes the events from the pool and performs the
actions. Inside, each function returns the next state and appends the actions that go with it.

A chain advances in blocks. A free place takes the chain that is furthest behind, so that all chains
keep together however many places there are. The gate judges at fixed draws, once all chains have
committed them: a fault can delay a gate round but not move it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from heapq import heapify, heappop
from operator import ge
from typing import assert_never

from distsampler.analysis.bias import Slower
from distsampler.analysis.verdict import Verdict
from distsampler.chains.anchor_pass import AnchorPart, cut
from distsampler.chains.inspection import Inspection
from distsampler.chains.steps import Advanced
from distsampler.chains.worker import Advance, AnchorPass, NotResident, Work
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
    Phase,
    Place,
    RecordAnchor,
    Refused,
    Restart,
    RunSetup,
    State,
    Stop,
    Submit,
    task_of,
)
from distsampler.store.events import Draining, GateRound, Lost, Retired, Started

BUDGETS: dict[LostReason, float] = {  # losses of one place until it is given up
    "infrastructure": 5,  # without progress between them
    "start": 5,  # before it was up, likewise
    "memory": 2,
    "hung": 3,  # likewise, and of one chain or part of the anchor pass, wherever it hangs
    "preempted": math.inf,
    "fatal": 0,
}
RENEWED = ("infrastructure", "start", "hung")  # by a work that is done
BLOCK_SECONDS = 2.0
REPLIES = 100.0  # that a driver takes in per second without being late
STATE_SHARE = 40.0  # a block takes at least this many times as long as writing its state


def begin(
    setup: RunSetup,
    places: tuple[int, ...],
    committed: tuple[int, ...],
    retired: frozenset[int] = frozenset(),
    anchored: bool = False,
    received: tuple[int, ...] | None = None,
) -> State:
    """Return the state before anything has happened.

    Args:
        setup: what does not change during the run.
        places: numbers of the places that are being started.
        committed: draws of each chain that exist already.
        retired: chains that were taken out already.
        anchored: whether the anchor pass is recorded already.
        received: draws from which each chain continues, where its last states were lost.
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


def transition(state: State, event: Event) -> tuple[State, list[Action]]:
    """Return what follows: the same state and event always give the same answer."""
    actions: list[Action] = []
    if state.over or (isinstance(event, PoolEvent) and _is_late(state, event)):
        return state, actions
    match event:
        case Committed(counts):
            state = replace(state, committed=counts)
        case Judged(verdict):
            state = _judged(state, verdict, actions)
        case Stop(reason):
            state = _stop(state, reason)
        case Refused(reason):
            state = _fail(state, reason)
        case _:
            state = _reported(state, event, actions)
    return _proceed(state, actions), actions


def _is_late(state: State, event: PoolEvent) -> bool:
    """Whether an event is about an earlier incarnation of its place."""
    place = state.places.get(event.place)
    return place is None or place.incarnation != event.incarnation


def _reported(state: State, event: PoolEvent, actions: list[Action]) -> State:
    match event:
        case PlaceReady():
            return _ready(state, event, actions)
        case WorkDone():
            return _done(state, event, actions)
        case WorkFailed():
            return _failed(state, event, actions)
        case PlaceLost():
            return _lost(state, event, actions)
        case PlaceDraining():
            return _draining(state, event, actions)
        case _:
            assert_never(event)


def _ready(state: State, event: PlaceReady, actions: list[Action]) -> State:
    place = state.places[event.place]
    if place.up:
        return state
    actions.append(Started(event.place, event.info))
    return _with_place(state, event.place, replace(place, up=True))


def _done(state: State, event: WorkDone, actions: list[Action]) -> State:
    if state.places[event.place].work != event.work:
        return state  # a reply that came twice
    match event.result:
        case NotResident():
            return _with_states(state, event, actions)
        case AnchorPart(part):
            state = _freed(state.moved_on(event.work), event.place, actions, progress=True)
            pace = state.pace
            if part.what == "losses":
                pace = (part.stop - part.start) / max(event.seconds, 1e-3)
            return replace(state, parts=(*state.parts, event.result), pace=pace)
        case Advanced() as done:
            state = _freed(state.moved_on(event.work), event.place, actions, progress=True)
            state = replace(state, block=_block_size(state, event, done))
            return _advanced(state, done, actions)
        case Inspection():
            return state  # it is asked for before a driver is at work


def _with_states(state: State, event: WorkDone, actions: list[Action]) -> State:
    """Give a place that does not hold the chains the same work again, with their states."""
    assert isinstance(event.work, Advance), "no other work has chains"
    work = replace(event.work, with_states=True)
    return _at_work(state, {event.place: work}, actions)


def _advanced(state: State, done: Advanced, actions: list[Action]) -> State:
    """Keep the draws that are new, and retire the chains that diverged."""
    if state.settled and done.diverged:
        return state
    received = list(state.received)
    for block in (*done.blocks, *(error.block for error in done.diverged)):
        if block.draws and block.first_draw == received[block.chain]:
            received[block.chain] = block.end
            actions.append(Keep(block))
    state = replace(state, received=tuple(received))
    for error in done.diverged:
        state = _retired(state, (error.chain,), str(error), actions, error.remedy)
    return state


def _retired(
    state: State,
    chains: tuple[int, ...],
    cause: str,
    actions: list[Action],
    remedy: Slower | None = None,
) -> State:
    """Take chains out, with a remedy if they diverged; the run fails where too few are left."""
    lr = None if remedy is None else remedy.gentle_lr
    diverged = None if remedy is None else True
    actions += [*(Retired(chain, cause, diverged, lr) for chain in chains), CommitNow()]
    return _enough_left(replace(state, retired=state.retired.union(chains)), cause)


def _failed(state: State, event: WorkFailed, actions: list[Action]) -> State:
    if state.places[event.place].work != event.work:
        return state
    state = _freed(state, event.place, actions, progress=True)
    if state.settled:
        return state
    if not isinstance(event.work, Advance) or isinstance(event.error, StoreError):
        return _fail(state, str(event.error))  # the store's fault is no chain's
    return _retired(state, event.work.chains, str(event.error), actions)


def _lost(state: State, event: PlaceLost, actions: list[Action]) -> State:
    """Start a lost place again, unless its budget of losses is used up."""
    place, reason = state.places[event.place], event.kind
    losses = {**place.losses, reason: place.losses.get(reason, 0) + 1}
    chains = place.work.chains if isinstance(place.work, Advance) else None
    actions.append(Lost(event.place, reason, chains, losses[reason], event.reason))
    if isinstance(place.work, AnchorPass):
        state = replace(state, todo=(*state.todo, place.work.part))
    if reason == "hung" and place.work is not None:
        state = _hung(state, place.work, event.reason)
    ending = state.phase in (Phase.DRAINING, Phase.FAILED)
    if losses[reason] <= BUDGETS[reason] and not ending:
        place = Place(incarnation=place.incarnation + 1, losses=losses)
        actions.append(Restart(event.place, place.incarnation, losses[reason]))
        return _with_place(state, event.place, place)
    places = {number: each for number, each in state.places.items() if number != event.place}
    state = replace(state, places=places)
    if ending:
        return state
    if reason == "memory":
        return _fail(
            state,
            f"a place ran out of memory {losses[reason]} times: lower batch_size or "
            f"placement.chains_per_actor, or give each chain more of a node: {event.reason}",
        )
    return state if places else _fail(state, f"no place is left to run on: {event.reason}")


def _hung(state: State, work: Work, reason: str) -> State:
    """Count that a place hung at a work; the run fails where it hangs wherever it is tried."""
    state = state.hung_at(work)
    times = state.hung[task_of(work)]
    if times <= BUDGETS["hung"] or state.phase is Phase.DRAINING:
        return state
    must = f"the model, loss or data must return, and hung {times} times at the same work: {reason}"
    advice = "mend what it waits for (a lock, a file, a network) and resume the run; if it is only "
    return _fail(state, f"{must}; {advice}slow, raise placement.answer_timeout")


def _draining(state: State, event: PlaceDraining, actions: list[Action]) -> State:
    place = state.places[event.place]
    if place.draining:
        return state
    actions.append(Draining(event.place, event.reason))
    state = _with_place(state, event.place, replace(place, draining=True))
    return state if place.work is not None else _freed(state, event.place, actions)


def _freed(state: State, number: int, actions: list[Action], progress: bool = False) -> State:
    """Make a place ready for its next work, or start it elsewhere if its node goes away."""
    place = state.places[number]
    losses = place.losses
    if progress:
        losses = {kind: n for kind, n in losses.items() if kind not in RENEWED}
    if not place.draining:
        return _with_place(state, number, replace(place, work=None, losses=losses))
    place = Place(incarnation=place.incarnation + 1, losses=losses)
    actions.append(Restart(number, place.incarnation))
    return _with_place(state, number, place)


def _judged(state: State, verdict: Verdict, actions: list[Action]) -> State:
    rounds = state.setup.schedule.gate_rounds
    draws, last = rounds[state.gate_round], state.gate_round == len(rounds) - 1
    actions.append(GateRound(draws, verdict.status, verdict.reason))
    state = replace(state, judging=False)
    if verdict.converged or last:
        reason = "converged" if verdict.converged else "the draw budget is used up"
        return replace(state, phase=Phase.DRAINING, kept=draws, reason=reason)
    return replace(state, gate_round=state.gate_round + 1)


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


def _proceed(state: State, actions: list[Action]) -> State:
    """Begin the next phase where this one is done, and give free places work."""
    if state.phase is Phase.STARTING and any(place.up for place in state.places.values()):
        state = replace(state, phase=Phase.ANCHORING)
    if state.phase is Phase.ANCHORING:
        state = _anchor(state, actions)
    if state.phase is Phase.SAMPLING:
        state = _sample(state, actions)
    if state.phase is Phase.DRAINING and not state.busy:
        if all(map(ge, state.committed, state.received)):
            return replace(state, phase=Phase.FINISHED)
        actions.append(CommitNow())
    return state


def _anchor(state: State, actions: list[Action]) -> State:
    """Give free places parts of the anchor pass; sample once all are done."""
    works = dict[int, Work]()
    for place in _free(state):
        if state.todo:
            part, *rest = cut(state.todo[0], round(BLOCK_SECONDS * (state.pace or 0.0)))
            works[place] = AnchorPass(part)
            state = replace(state, todo=(*rest, *state.todo[1:]))
    state = _at_work(state, works, actions)
    if state.todo or state.busy:
        return state
    if state.parts:
        actions.append(RecordAnchor(state.parts))
    return replace(state, phase=Phase.SAMPLING)


def _sample(state: State, actions: list[Action]) -> State:
    """Judge where a gate round has ended, and give each free place a block."""
    if all(state.committed[c] >= state.boundary for c in state.alive):
        if not state.judging:
            actions.append(Judge(state.setup.schedule.gate_rounds[state.gate_round]))
            state = replace(state, judging=True)
    elif all(state.received[c] >= state.boundary for c in state.alive):
        actions.append(CommitNow())
    works = dict(zip(_free(state), _next_blocks(state), strict=False))
    return _at_work(state, works, actions)


def _next_blocks(state: State) -> Iterator[Advance]:
    """The next blocks of the idle packs, those furthest behind first; none crosses a gate round."""
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

    At most twice as many as before.
    """
    if state.setup.block is not None or not done.blocks:
        return state.block
    writing = sum(block.state_seconds for block in done.blocks)
    seconds = max(event.seconds - writing, 1e-3)
    longest = max(BLOCK_SECONDS, len(state.places) / REPLIES, STATE_SHARE * writing)
    wanted = longest * done.blocks[0].draws / seconds
    return max(1, min(int(wanted), 2 * state.block))


def _free(state: State) -> list[int]:
    """Places that can be given work, in ascending order."""
    return sorted(
        number
        for number, place in state.places.items()
        if place.work is None and place.up and not place.draining
    )


def _at_work(state: State, works: Mapping[int, Work], actions: list[Action]) -> State:
    """Give places their works, in one go: there may be thousands of them."""
    actions += [Submit(number, work) for number, work in works.items()]
    changed = {number: replace(state.places[number], work=work) for number, work in works.items()}
    return replace(state, places={**state.places, **changed}) if works else state


def _with_place(state: State, number: int, place: Place) -> State:
    return replace(state, places={**state.places, number: place})
