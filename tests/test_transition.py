"""The driver's decisions, without pool, disk or clock."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distsampler.anchor import AnchorPart
from distsampler.chain import ChainDiverged
from distsampler.diagnostics import Status, Verdict
from distsampler.draws import DrawBlock
from distsampler.errors import WorkFailedError
from distsampler.pool import PlaceLost, PlaceReady, WorkDone, WorkFailed
from distsampler.transition import (
    LOSSES,
    Action,
    CommitNow,
    Committed,
    Event,
    Judge,
    Judged,
    Keep,
    Phase,
    Plan,
    RecordAnchor,
    Restart,
    Retire,
    State,
    Stop,
    Submit,
    begin,
    transition,
)
from distsampler.worker import Advance, AnchorPass, Work

PLAN = Plan(burn_in=10, looks=(30, 45), min_chains=2, block=8, parts=((0, 0), (0, 1024)))


def verdict(status: Status) -> Verdict:
    return Verdict(status, "for a reason", "", 1.0, 500.0)


def result(work: Work) -> AnchorPart | DrawBlock:
    if isinstance(work, AnchorPass):
        return AnchorPart(work.part, np.zeros(1))
    return block(work, work.draws)


def block(work: Advance, draws: int) -> DrawBlock:
    return DrawBlock(work.chain, work.first_draw, {"loss": np.zeros(draws)}, b"state")


class Play:
    """A run played by hand: keeps what a driver would."""

    def __init__(self, plan: Plan = PLAN, places: int = 3, chains: int = 4) -> None:
        self.state = begin(plan, tuple(range(places)), (0,) * chains)
        self.actions: list[Action] = []
        self.ends = [0] * chains
        self.verdicts = [Status.NOT_CONVERGED, Status.CONVERGED]

    def send(self, event: Event) -> None:
        self.state, actions = transition(self.state, event)
        for action in actions:
            self.actions.append(action)
            self._perform(action)

    def _perform(self, action: Action) -> None:
        if isinstance(action, Keep):
            kept = action.block
            assert kept.first_draw == self.ends[kept.chain], "a gap or a repetition"
            self.ends[kept.chain] = kept.end

    def done(self, place: int) -> None:
        work = self.state.busy[place]
        self.send(WorkDone(place, work, result(work), seconds=1.0))

    def commit(self) -> None:
        self.send(Committed(tuple(self.ends)))

    def start(self) -> None:
        for place in list(self.state.places):
            self.send(PlaceReady(place, {}))
        while self.state.phase is Phase.ANCHORING:
            self.done(min(self.state.busy))

    def run(self, limit: int = 500) -> None:
        """Plays on without faults to the end."""
        judged = 0
        for _ in range(limit):
            if self.state.over:
                return
            asked = sum(isinstance(action, Judge) for action in self.actions)
            if asked > judged:
                judged += 1
                last = self.verdicts[min(judged, len(self.verdicts)) - 1]
                self.send(Judged(verdict(last)))
            elif self.state.busy:
                self.done(self.longest_at_work())
            elif any(isinstance(a, Restart) for a in self.actions) and not all(
                p.up for p in self.state.places.values()
            ):
                down = next(p for p, place in self.state.places.items() if not place.up)
                self.send(PlaceReady(down, {}))
            else:
                self.commit()
        raise AssertionError(f"does not end: {self.state}")

    def longest_at_work(self) -> int:
        order = [action.place for action in self.actions if isinstance(action, Submit)]
        return max(self.state.busy, key=lambda place: order[::-1].index(place))

    def submitted(self, kind: type) -> list[Work]:
        return [a.work for a in self.actions if isinstance(a, Submit) and isinstance(a.work, kind)]


def test_a_run_starts_anchors_samples_looks_and_finishes() -> None:
    play = Play()
    assert play.state.phase is Phase.STARTING
    play.send(PlaceReady(0, {}))
    assert play.state.phase is Phase.STARTING
    assert not play.submitted(AnchorPass)
    play.start()
    assert play.state.phase is Phase.SAMPLING
    assert [w.part for w in play.submitted(AnchorPass)] == [(0, 0), (0, 1024)]  # type: ignore[union-attr]
    assert sum(isinstance(a, RecordAnchor) for a in play.actions) == 1
    play.run()
    assert play.state.phase is Phase.FINISHED
    assert [a.draws for a in play.actions if isinstance(a, Judge)] == [30, 45]
    assert (play.state.kept, play.state.reason) == (45, "converged")


def test_it_stops_at_the_first_look_that_converged() -> None:
    play = Play()
    play.verdicts = [Status.CONVERGED]
    play.start()
    play.run()
    assert play.state.kept == 30
    assert all(end >= 40 for end in play.ends)


def test_it_says_when_the_budget_is_used_up() -> None:
    play = Play()
    play.verdicts = [Status.NOT_CONVERGED]
    play.start()
    play.run()
    assert (play.state.kept, play.state.reason) == (45, "the draw budget is used up")


def test_no_block_crosses_a_look_and_chains_keep_together() -> None:
    play = Play(places=2, chains=5)
    play.start()
    play.run()
    for work in play.submitted(Advance):
        assert isinstance(work, Advance)
        end = work.first_draw + work.draws
        assert not any(work.first_draw < look < end for look in (40, 55))
    firsts = [w.first_draw for w in play.submitted(Advance)]  # type: ignore[union-attr]
    assert all(b >= a - 8 for a, b in pairwise(firsts))


def test_the_gate_looks_at_committed_draws_only() -> None:
    play = Play(places=4)
    play.start()
    while min(play.state.received) < 40:
        play.done(min(play.state.busy, key=lambda p: play.state.received[play.state.busy[p].chain]))  # type: ignore[union-attr]
    assert not any(isinstance(a, Judge) for a in play.actions)
    assert any(isinstance(a, CommitNow) for a in play.actions)
    play.commit()
    assert any(isinstance(a, Judge) for a in play.actions)


def test_a_lost_places_block_is_asked_for_again() -> None:
    play = Play()
    play.start()
    lost = play.state.busy[1]
    assert isinstance(lost, Advance)
    play.send(PlaceLost(1, "killed"))
    assert Restart(1, 1) in play.actions
    play.done(0)
    assert play.state.busy[0] == lost
    play.send(PlaceReady(1, {}))
    play.run()
    assert play.state.phase is Phase.FINISHED


def test_an_anchor_part_of_a_lost_place_is_measured_elsewhere() -> None:
    play = Play(places=2)
    for place in (0, 1):
        play.send(PlaceReady(place, {}))
    play.send(PlaceLost(0, "killed"))
    play.done(1)
    assert play.state.busy[1] == AnchorPass((0, 0))


def test_a_place_that_is_lost_again_and_again_is_given_up_and_the_others_go_on() -> None:
    play = Play(places=2)
    play.start()
    for _ in range(LOSSES):
        play.send(PlaceLost(1, "killed"))
        play.send(PlaceReady(1, {}))
    play.send(PlaceLost(1, "killed"))
    assert set(play.state.places) == {0}
    assert sum(isinstance(a, Restart) for a in play.actions) == LOSSES
    play.run()
    assert play.state.phase is Phase.FINISHED


def test_progress_renews_the_budget() -> None:
    play = Play()
    play.start()
    play.send(PlaceLost(1, "killed"))
    play.send(PlaceReady(1, {}))
    assert play.state.places[1].losses == 1
    play.done(1)
    assert play.state.places[1].losses == 0


def test_without_a_place_the_run_fails() -> None:
    play = Play(places=1)
    play.start()
    play.send(PlaceLost(0, "no such node", fatal=True))
    assert play.state.phase is Phase.FAILED
    assert "no place is left to run on: no such node" in play.state.reason


def test_a_diverged_chain_is_retired_and_its_finite_draws_are_kept() -> None:
    play = Play()
    play.start()
    work = play.state.busy[1]
    assert isinstance(work, Advance)
    error = ChainDiverged(work.chain, 20, "loss", 1.0, block(work, 3))
    play.send(WorkFailed(1, work, error))
    assert Retire(work.chain, str(error)) in play.actions
    assert play.ends[work.chain] == 3
    play.run()
    assert play.state.phase is Phase.FINISHED
    assert all(w.chain != work.chain for w in play.state.busy.values())  # type: ignore[union-attr]


def test_below_min_chains_the_run_fails_and_says_why() -> None:
    play = Play(replace(PLAN, min_chains=4))
    play.start()
    work = play.state.busy[0]
    play.send(WorkFailed(0, work, WorkFailedError("the loss raised")))
    assert play.state.phase is Phase.FAILED
    assert "3 of 4 chains are left, and the run needs 4: the loss raised" in play.state.reason


def test_a_failure_of_the_anchor_pass_fails_the_run() -> None:
    play = Play()
    for place in range(3):
        play.send(PlaceReady(place, {}))
    play.send(WorkFailed(0, play.state.busy[0], WorkFailedError("the data raised")))
    assert play.state.phase is Phase.FAILED


def test_a_stopped_run_collects_what_is_in_flight() -> None:
    play = Play()
    play.start()
    play.send(Stop("SIGTERM"))
    assert play.state.phase is Phase.DRAINING
    while play.state.busy:
        assert not play.state.over
        play.done(min(play.state.busy))
    play.commit()
    assert play.state.phase is Phase.FINISHED
    assert (play.state.interrupted, play.state.kept, play.state.reason) == (True, None, "SIGTERM")


def test_a_late_reply_changes_nothing() -> None:
    play = Play()
    play.start()
    work = play.state.busy[1]
    play.send(PlaceLost(1, "killed"))
    play.send(PlaceReady(1, {}))
    before = play.state
    late = Advance(0, 400, 3)
    play.send(WorkDone(1, late, block(late, 3)))
    play.send(WorkFailed(1, late, WorkFailedError("late")))
    assert play.state == before
    assert play.state.busy[1] == work


def test_blocks_are_sized_by_time() -> None:
    play = Play(replace(PLAN, block=None, looks=(10_000,)), places=1, chains=2)
    play.start()
    for _ in range(12):
        work = play.state.busy[0]
        assert isinstance(work, Advance)
        play.send(WorkDone(0, work, result(work), seconds=0.01 * work.draws))
    assert play.state.block == 200
    work = play.state.busy[0]
    assert isinstance(work, Advance)
    play.send(WorkDone(0, work, result(work), seconds=10.0 * work.draws))
    assert play.state.block == 1


faults = st.lists(
    st.tuples(
        st.sampled_from(["done", "lose", "fatal", "ready", "diverge", "late", "commit", "judge"]),
        st.integers(0, 3),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(faults, st.integers(1, 4), st.integers(2, 5))
def test_any_interleaving_keeps_the_trace_sound(
    script: list[tuple[str, int]], places: int, chains: int
) -> None:
    play = Play(places=places, chains=chains)
    for kind, number in script:
        place = number % places
        known = play.state.places.get(place)
        work = play.state.busy.get(place)
        if known is None or play.state.over:
            continue
        if kind == "done" and work is not None:
            play.done(place)
        elif kind in ("lose", "fatal") and known.up:
            play.send(PlaceLost(place, "killed", fatal=kind == "fatal"))
        elif kind == "ready" and not known.up:
            play.send(PlaceReady(place, {}))
        elif kind == "diverge" and isinstance(work, Advance):
            play.send(
                WorkFailed(place, work, ChainDiverged(work.chain, 0, "loss", 1.0, block(work, 1)))
            )
        elif kind == "late":
            late = Advance(number % chains, 0, 8)
            if work != late:
                play.send(WorkDone(place, late, block(late, 8)))
        elif kind == "commit":
            play.commit()
        elif kind == "judge" and play.state.judging:
            play.send(Judged(verdict(Status.NOT_CONVERGED)))
        check(play.state)
    finish(play)


def check(state: State) -> None:
    """No chain at two places, none beyond the budget, no work for the retired."""
    chains = [work.chain for work in state.busy.values() if isinstance(work, Advance)]
    assert len(chains) == len(set(chains))
    assert all(received <= state.plan.total for received in state.received)


def finish(play: Play) -> None:
    """From wherever it is, a run ends once the faults do."""
    for _ in range(1000):
        if play.state.over:
            break
        for place, known in list(play.state.places.items()):
            if not known.up:
                play.send(PlaceReady(place, {}))
        if play.state.judging:
            play.send(Judged(verdict(Status.CONVERGED)))
        elif play.state.busy:
            play.done(min(play.state.busy))
        else:
            play.commit()
        check(play.state)
    assert play.state.over
    if play.state.phase is Phase.FINISHED:
        assert not play.state.busy
        assert play.state.kept is not None
        alive = [end for chain, end in enumerate(play.ends) if chain not in play.state.retired]
        assert min(alive) >= play.state.plan.burn_in + play.state.kept


@pytest.mark.parametrize("phase", [Phase.FINISHED, Phase.FAILED])
def test_nothing_happens_after_the_end(phase: Phase) -> None:
    state = replace(Play().state, phase=phase)
    assert transition(state, PlaceReady(0, {})) == (state, [])
