"""The driver's decisions, without pool, disk or clock."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from distsampler.analysis.bias import Slower
from distsampler.analysis.verdict import Status, Verdict
from distsampler.chains.anchor_pass import AnchorPart, Part
from distsampler.chains.steps import Advanced, ChainDiverged
from distsampler.chains.worker import Advance, AnchorPass, NotResident, Result, Work
from distsampler.draws import DrawBlock
from distsampler.errors import DistsamplerError, StoreError, WorkFailedError
from distsampler.execution.pool import (
    LostReason,
    PlaceDraining,
    PlaceLost,
    PlaceReady,
    WorkDone,
    WorkFailed,
)
from distsampler.execution.run_state import (
    Action,
    CommitNow,
    Committed,
    Event,
    Judge,
    Judged,
    Keep,
    Phase,
    RecordAnchor,
    Restart,
    RunSetup,
    State,
    Stop,
    Submit,
)
from distsampler.execution.transition import BUDGETS, begin, transition
from distsampler.schedule import Schedule
from distsampler.store.events import Retired

SETUP = RunSetup(
    Schedule(10, (30, 45)), min_chains=2, block=8, parts=(Part(0, 0, "probe"), Part(0, 1024))
)


def verdict(status: Status) -> Verdict:
    return Verdict(status, "for a reason", 1.0, 500.0)


def result(work: Work) -> Result:
    if isinstance(work, AnchorPass):
        return AnchorPart(work.part, np.zeros(1))
    return Advanced(tuple(block(work, work.draws, chain) for chain in work.chains))


def block(work: Advance, draws: int, chain: int) -> DrawBlock:
    return DrawBlock(chain, work.first_draw, {"loss": np.zeros(draws)}, b"state")


SLOWER = Slower(0.01, 0.005, 10.0)


def diverged(work: Advance, draws: int) -> Advanced:
    """The first chain of a pack made so many draws only."""
    first, *others = work.chains
    error = ChainDiverged(first, 20, "loss", 1.0, block(work, draws, first), SLOWER)
    return Advanced(tuple(block(work, work.draws, chain) for chain in others), (error,))


class Play:
    """A run played by hand: keeps what a driver would."""

    def __init__(self, setup: RunSetup = SETUP, places: int = 3, chains: int = 4) -> None:
        self.state = begin(setup, tuple(range(places)), (0,) * chains)
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

    def life(self, place: int) -> int:
        return self.state.places[place].incarnation

    def done(self, place: int) -> None:
        work = self.state.busy[place]
        self.send(WorkDone(place, work, result(work), 1.0, self.life(place)))

    def fail(self, place: int, error: DistsamplerError) -> None:
        self.send(WorkFailed(place, self.state.busy[place], error, self.life(place)))

    def ready(self, place: int) -> None:
        self.send(PlaceReady(place, {}, self.life(place)))

    def lose(self, place: int, kind: LostReason = "infrastructure") -> None:
        self.send(PlaceLost(place, "killed", kind, self.life(place)))

    def commit(self) -> None:
        self.send(Committed(tuple(self.ends)))

    def start(self) -> None:
        for place in list(self.state.places):
            self.ready(place)
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
                self.ready(down)
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
    play.ready(0)
    assert play.state.phase is Phase.ANCHORING, "one place is enough to begin"
    play.start()
    assert play.state.phase is Phase.SAMPLING
    assert [w.part for w in play.submitted(AnchorPass)] == list(SETUP.parts)  # type: ignore[union-attr]
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
        behind = {w.chains[0]: p for p, w in play.state.busy.items() if isinstance(w, Advance)}
        play.done(behind[min(behind, key=lambda chain: play.state.received[chain])])
    assert not any(isinstance(a, Judge) for a in play.actions)
    assert any(isinstance(a, CommitNow) for a in play.actions)
    play.commit()
    assert any(isinstance(a, Judge) for a in play.actions)


def test_a_lost_places_block_is_asked_for_again() -> None:
    play = Play()
    play.start()
    lost = play.state.busy[1]
    assert isinstance(lost, Advance)
    play.lose(1)
    assert Restart(1, 2, 1) in play.actions
    play.done(0)
    assert play.state.busy[0] == lost
    play.ready(1)
    play.run()
    assert play.state.phase is Phase.FINISHED


def test_an_anchor_part_of_a_lost_place_is_measured_elsewhere() -> None:
    play = Play(places=2)
    for place in (0, 1):
        play.ready(place)
    play.lose(0)
    play.done(1)
    assert play.state.busy[1] == AnchorPass(SETUP.parts[0])


def test_a_place_that_is_lost_again_and_again_is_given_up_and_the_others_go_on() -> None:
    play = Play(places=2)
    play.start()
    for _ in range(int(BUDGETS["infrastructure"])):
        play.lose(1)
        play.ready(1)
    play.lose(1)
    assert set(play.state.places) == {0}
    assert sum(isinstance(a, Restart) for a in play.actions) == BUDGETS["infrastructure"]
    play.run()
    assert play.state.phase is Phase.FINISHED


def test_progress_renews_the_budget() -> None:
    play = Play()
    play.start()
    play.lose(1)
    play.ready(1)
    assert play.state.places[1].losses == {"infrastructure": 1}
    play.done(1)
    assert not play.state.places[1].losses


def test_without_a_place_the_run_fails() -> None:
    play = Play(places=1)
    play.start()
    play.lose(0, "fatal")
    assert play.state.phase is Phase.FAILED
    assert "no place is left to run on: killed" in play.state.reason


def test_preemption_has_no_budget() -> None:
    play = Play(places=1)
    play.start()
    for _ in range(100):
        play.lose(0, "preempted")
        play.ready(0)
    play.run()
    assert play.state.phase is Phase.FINISHED


def test_a_chain_that_hangs_wherever_it_is_tried_fails_the_run_though_others_get_on() -> None:
    play = Play(places=2, chains=2)
    play.start()
    hung = Advance((1,), 0, 8)
    for _ in range(int(BUDGETS["hung"])):
        place = next(p for p, work in play.state.busy.items() if work == hung)
        play.lose(place, "hung")
        play.ready(place)
        play.done(1 - place)  # the other place is renewed, and given the work that hangs
        if hung not in play.state.busy.values():
            play.done(place)
    place = next(p for p, work in play.state.busy.items() if work == hung)
    play.lose(place, "hung")
    assert play.state.phase is Phase.FAILED
    assert "must return, and hung 4 times at the same work: killed" in play.state.reason
    assert not play.state.retired, "nobody knows that it is the chain's fault"


def test_a_work_that_is_done_forgets_how_often_it_hung() -> None:
    play = Play(places=1, chains=2)
    play.start()
    for _ in range(3 * int(BUDGETS["hung"])):
        play.lose(0, "hung")
        play.ready(0)
        assert play.state.hung
        play.done(0)
        assert not play.state.hung
    play.run()
    assert play.state.phase is Phase.FINISHED


def test_a_place_that_is_lost_while_the_run_ends_is_not_started_again() -> None:
    play = Play(places=2)
    play.start()
    play.send(Stop("SIGTERM"))
    for place in (0, 1):
        play.lose(place, "hung")
    play.commit()
    assert not any(isinstance(action, Restart) for action in play.actions)
    assert (play.state.phase, play.state.interrupted) == (Phase.FINISHED, True)


def test_out_of_memory_has_a_budget_of_its_own_and_fails_with_advice() -> None:
    play = Play()
    play.start()
    for _ in range(int(BUDGETS["memory"])):
        play.lose(1, "memory")
        play.ready(1)
        play.done(1)
    assert play.state.phase is Phase.SAMPLING
    play.lose(1, "memory")
    assert play.state.phase is Phase.FAILED
    assert "ran out of memory 3 times: lower batch_size or placement" in play.state.reason


def test_a_draining_place_ends_its_work_gets_no_other_and_comes_up_elsewhere() -> None:
    play = Play()
    play.start()
    before = len(play.submitted(Advance))
    play.send(PlaceDraining(1, "spot"))
    play.send(PlaceDraining(1, "spot"))
    assert not any(isinstance(a, Restart) for a in play.actions)
    play.done(1)
    assert [a for a in play.actions if isinstance(a, Restart)] == [Restart(1, 2)]
    assert len(play.submitted(Advance)) == before, "its chain waits for a place that stays"
    play.ready(1)
    assert len(play.submitted(Advance)) == before + 1
    play.run()
    assert play.state.phase is Phase.FINISHED


def test_an_idle_draining_place_is_replaced_at_once() -> None:
    play = Play(places=4, chains=2)
    play.start()
    play.send(PlaceDraining(3, "spot"))
    assert Restart(3, 2) in play.actions


def test_the_word_of_an_earlier_incarnation_is_not_heard() -> None:
    play = Play()
    play.start()
    work = play.state.busy[1]
    assert isinstance(work, Advance)
    play.lose(1)
    play.ready(1)
    assert play.state.busy[1] == work
    before = play.state
    play.send(WorkDone(1, work, result(work), 1.0, incarnation=1))
    play.send(PlaceLost(1, "again", incarnation=1))
    play.send(PlaceReady(1, {}, incarnation=1))
    assert play.state == before
    play.done(1)
    assert play.ends[work.chains[0]] == work.draws


def test_a_chain_whose_last_states_are_gone_makes_its_draws_again() -> None:
    play = Play(chains=2)
    play.ends = [0, 24]
    play.state = begin(SETUP, (0, 1), (30, 24), frozenset(), True, (0, 24))
    for place in (0, 1):
        play.ready(place)
    (again,) = [w for w in play.submitted(Advance) if w.chains == (0,)]  # type: ignore[union-attr]
    assert isinstance(again, Advance)
    assert again.first_draw == 0
    play.send(Stop("SIGTERM"))
    while play.state.busy:
        play.done(min(play.state.busy))
    play.send(Committed((30, play.ends[1])))
    assert play.state.phase is Phase.FINISHED


def test_a_diverged_chain_is_retired_and_its_finite_draws_are_kept() -> None:
    play = Play()
    play.start()
    work = play.state.busy[1]
    assert isinstance(work, Advance)
    done = diverged(work, 3)
    play.send(WorkDone(1, work, done, 1.0))
    (chain,) = work.chains
    assert Retired(chain, str(done.diverged[0]), True, SLOWER.gentle_lr) in play.actions
    assert play.ends[chain] == 3
    play.run()
    assert play.state.phase is Phase.FINISHED
    assert play.ends[chain] == 3


def test_the_chains_of_a_pack_are_advanced_as_one() -> None:
    play = Play(replace(SETUP, together=2), places=3, chains=5)
    play.start()
    works = [work for work in play.state.busy.values() if isinstance(work, Advance)]
    assert [work.chains for work in works] == [(0, 1), (2, 3), (4,)]
    play.send(WorkDone(0, works[0], diverged(works[0], 3), 1.0))
    assert (play.ends[0], play.ends[1]) == (3, 8)
    play.run()
    assert play.state.phase is Phase.FINISHED
    later = [work.chains for work in play.submitted(Advance)[3:]]  # type: ignore[union-attr]
    assert set(later) == {(1,), (2, 3), (4,)}


def test_an_error_in_the_loss_retires_the_pack_it_was_met_in() -> None:
    play = Play(replace(SETUP, together=2), places=2, chains=4)
    play.start()
    play.fail(0, WorkFailedError("the loss raised"))
    assert play.state.retired == {0, 1}


def test_a_store_that_an_actor_cannot_write_ends_the_run_and_retires_no_chain() -> None:
    play = Play()
    play.start()
    play.fail(0, StoreError("no space left"))
    assert play.state.phase is Phase.FAILED
    assert play.state.reason == "no space left"
    assert not play.state.retired


def test_below_min_chains_the_run_fails_and_says_why() -> None:
    play = Play(replace(SETUP, min_chains=4))
    play.start()
    play.fail(0, WorkFailedError("the loss raised"))
    assert play.state.phase is Phase.FAILED
    assert "3 of 4 chains are left, and the run needs 4: the loss raised" in play.state.reason


def test_a_failure_of_the_anchor_pass_fails_the_run() -> None:
    play = Play()
    for place in range(3):
        play.ready(place)
    play.fail(0, WorkFailedError("the data raised"))
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


def settled(setup: RunSetup = SETUP, places: int = 2) -> Play:
    """All draws that count are committed and judged; blocks beyond them are in flight."""
    play = Play(setup, places, chains=2)
    play.start()
    while not any(isinstance(action, Judge) for action in play.actions):
        work = {place: w for place, w in play.state.busy.items() if isinstance(w, Advance)}
        behind = min(work, key=lambda place: work[place].first_draw, default=0)
        if work and work[behind].first_draw < 40:
            play.done(behind)
        else:
            play.commit()
    play.send(Judged(verdict(Status.CONVERGED)))
    assert (play.state.phase, play.state.kept) == (Phase.DRAINING, 30)
    assert play.state.busy
    return play


def test_a_fault_beyond_the_draws_that_count_takes_no_chain_out_and_fails_no_run() -> None:
    for together in (1, 2):
        for fault in ("diverged", "failed", "store"):
            play = settled(replace(SETUP, together=together))
            ends = list(play.ends)
            for place, work in play.state.busy.items():
                assert isinstance(work, Advance)
                assert work.first_draw >= 40
                if fault == "diverged":
                    play.send(WorkDone(place, work, diverged(work, 3), 1.0))
                else:
                    play.fail(place, {"failed": WorkFailedError, "store": StoreError}[fault](""))
            play.commit()
            assert (play.state.phase, play.state.kept) == (Phase.FINISHED, 30)
            assert not any(isinstance(action, Retired) for action in play.actions)
            assert play.ends == ends


@pytest.mark.parametrize("kind", ["fatal", "memory"])
def test_a_last_place_lost_beyond_the_draws_that_count_fails_no_run(kind: LostReason) -> None:
    play = settled(places=1)
    budget = {kind: int(BUDGETS[kind])}
    play.state = replace(play.state, places={0: replace(play.state.places[0], losses=budget)})
    play.lose(0, kind)
    assert not play.state.places
    play.commit()
    assert (play.state.phase, play.state.reason) == (Phase.FINISHED, "converged")


def test_a_late_reply_changes_nothing() -> None:
    play = Play()
    play.start()
    work = play.state.busy[1]
    play.lose(1)
    play.ready(1)
    before = play.state
    late = Advance((0,), 400, 3)
    play.send(WorkDone(1, late, result(late), 1.0, play.life(1)))
    play.send(WorkFailed(1, late, WorkFailedError("late"), play.life(1)))
    assert play.state == before
    assert play.state.busy[1] == work


def test_a_place_that_does_not_hold_a_chain_gets_its_states_once() -> None:
    play = Play()
    play.start()
    work = play.state.busy[1]
    assert isinstance(work, Advance)
    assert not work.with_states, "states may be large: they are sent only where they are needed"
    play.send(WorkDone(1, work, NotResident()))
    again = replace(work, with_states=True)
    assert play.actions[-1] == Submit(1, again)
    assert play.state.busy[1] == again
    before = play.state
    play.send(WorkDone(1, work, NotResident()))
    assert play.state == before, "the same reply came twice"
    play.done(1)
    assert play.ends[work.chains[0]] == work.draws


def test_parts_of_the_anchor_pass_are_cut_by_time_into_whole_blocks() -> None:
    rows, setup = 100_000, replace(SETUP, parts=(Part(0, 0, "probe"), Part(0, 100_000)))
    play = Play(setup, places=2)
    for place in range(2):
        play.ready(place)
    cut = list[Part]()
    while play.state.phase is Phase.ANCHORING:
        place, work = next(iter(play.state.busy.items()))
        assert isinstance(work, AnchorPass)
        seconds = max(1e-3, (work.part.stop - work.part.start) / 5_000)
        cut.append(work.part)
        play.send(WorkDone(place, work, result(work), seconds))
    losses = sorted(part for part in cut if part.what == "losses")
    assert (losses[0].start, losses[-1].stop) == (0, rows)
    assert all(a.stop == b.start for a, b in pairwise(losses))
    assert all(part.start % 1024 == 0 for part in losses)
    sizes = [part.stop - part.start for part in losses]
    assert sizes[0] == 1024  # nobody knows yet how long it takes
    assert set(sizes[2:-1]) == {9 * 1024}  # 10,000 rows are two seconds
    assert len(play.state.parts) == len(cut)


def test_the_more_places_the_longer_their_blocks() -> None:
    sizes = []
    for places in (1, 200, 1_000):
        play = Play(replace(SETUP, block=None, parts=()), places, chains=4)
        play.state = replace(play.state, block=500)
        play.ready(0)
        work = play.state.busy[0]
        assert isinstance(work, Advance)
        play.send(WorkDone(0, work, result(work), work.draws / 50))  # 50 draws a second
        sizes.append(play.state.block)
    assert sizes == [100, 100, 500]  # two seconds, and ten: a hundred replies a second in all


def test_thousands_of_places_that_wait_get_their_blocks_in_one_go() -> None:
    places = 3_000
    play = Play(replace(SETUP, parts=(Part(0, 0, "probe"),)), places, chains=places)
    for place in range(places):
        play.ready(place)
    play.actions.clear()
    play.done(0)
    works = [action.work for action in play.actions if isinstance(action, Submit)]
    chains = [chain for work in works if isinstance(work, Advance) for chain in work.chains]
    assert chains == list(range(places))


def test_blocks_are_sized_by_time() -> None:
    play = Play(replace(SETUP, block=None, schedule=Schedule(10, (10_000,))), places=1, chains=2)
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


numbers = st.integers(0, 4)


class AnyInterleaving(RuleBasedStateMachine):
    """Whatever comes in whatever order: no draw twice, no gap, and an end."""

    @initialize(places=st.integers(1, 4), chains=st.integers(2, 5), together=st.integers(1, 3))
    def begin(self, places: int, chains: int, together: int) -> None:
        self.play = Play(replace(SETUP, together=together), places, chains)
        self.heard: list[Event] = []
        self.retired: frozenset[int] | None = None  # when the run was settled

    def place(self, number: int) -> int | None:
        known = sorted(self.play.state.places)
        return known[number % len(known)] if known and not self.play.state.over else None

    def say(self, event: Event) -> None:
        self.heard.append(event)
        self.play.send(event)

    @rule(number=numbers)
    def is_ready(self, number: int) -> None:
        place = self.place(number)
        if place is not None:
            self.say(PlaceReady(place, {}, self.play.life(place)))

    @rule(number=numbers)
    def has_done(self, number: int) -> None:
        place = self.place(number)
        if place in self.play.state.busy:
            work = self.play.state.busy[place]
            self.say(WorkDone(place, work, result(work), 1.0, self.play.life(place)))

    @rule(number=numbers, kind=st.sampled_from(list(BUDGETS)))
    def is_lost(self, number: int, kind: LostReason) -> None:
        place = self.place(number)
        if place is not None:
            self.say(PlaceLost(place, "killed", kind, self.play.life(place)))

    @rule(number=numbers)
    def drains(self, number: int) -> None:
        place = self.place(number)
        if place is not None and self.play.state.places[place].up:
            self.say(PlaceDraining(place, "spot", self.play.life(place)))

    @rule(number=numbers, draws=st.integers(0, 3))
    def diverges(self, number: int, draws: int) -> None:
        place = self.place(number)
        work = self.play.state.busy.get(-1 if place is None else place)
        if place is not None and isinstance(work, Advance):
            self.say(WorkDone(place, work, diverged(work, draws), 1.0, self.play.life(place)))

    @rule(number=numbers, error=st.sampled_from([WorkFailedError, StoreError]))
    def fails(self, number: int, error: type[DistsamplerError]) -> None:
        place = self.place(number)
        work = self.play.state.busy.get(-1 if place is None else place)
        if place is not None and work is not None:
            self.say(WorkFailed(place, work, error("raised"), self.play.life(place)))

    @rule(number=numbers)
    def does_not_hold_the_chains(self, number: int) -> None:
        place = self.place(number)
        work = self.play.state.busy.get(-1 if place is None else place)
        if place is not None and isinstance(work, Advance) and not work.with_states:
            self.say(WorkDone(place, work, NotResident(), 0.0, self.play.life(place)))

    @precondition(lambda self: self.heard)
    @rule(data=st.data())
    def comes_again(self, data: st.DataObject) -> None:
        """Late, twice, and out of order."""
        event = data.draw(st.sampled_from(self.heard))
        if isinstance(event, WorkDone | WorkFailed) and self.is_current(event):
            return  # it is the first word on work that was asked for again
        self.play.send(event)

    def is_current(self, event: WorkDone | WorkFailed) -> bool:
        known = self.play.state.places.get(event.place)
        return (
            known is not None
            and known.work == event.work
            and (known.incarnation == event.incarnation)
        )

    @rule()
    def commits(self) -> None:
        self.play.commit()

    @rule(status=st.sampled_from([Status.NOT_CONVERGED, Status.CONVERGED]))
    def is_judged(self, status: Status) -> None:
        if self.play.state.judging:
            self.play.send(Judged(verdict(status)))

    @rule()
    def is_stopped(self) -> None:
        self.play.send(Stop("SIGTERM"))

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "play"):
            check(self.play.state)

    @invariant()
    def stays_settled(self) -> None:
        if hasattr(self, "play") and self.play.state.settled:
            state = self.play.state
            self.retired = state.retired if self.retired is None else self.retired
            assert state.phase is not Phase.FAILED
            assert state.retired == self.retired

    def teardown(self) -> None:
        if hasattr(self, "play"):
            finish(self.play)


AnyInterleaving.TestCase.settings = settings(max_examples=150, deadline=None)
TestAnyInterleaving = AnyInterleaving.TestCase


def check(state: State) -> None:
    """No chain at two places, none beyond the budget, none lost more often than may be."""
    works = [work for work in state.busy.values() if isinstance(work, Advance)]
    chains = [chain for work in works for chain in work.chains]
    assert len(chains) == len(set(chains))
    assert all(received <= state.setup.schedule.total for received in state.received)
    for place in state.places.values():
        assert all(n <= BUDGETS[kind] for kind, n in place.losses.items()) or state.over
    if state.phase is Phase.FINISHED:
        assert not state.busy


def finish(play: Play) -> None:
    """From wherever it is, a run ends once the faults do."""
    for _ in range(1000):
        if play.state.over:
            break
        for place, known in list(play.state.places.items()):
            if not known.up:
                play.ready(place)
        if play.state.judging and play.state.phase is Phase.SAMPLING:
            play.send(Judged(verdict(Status.CONVERGED)))
        elif play.state.busy:
            play.done(min(play.state.busy))
        else:
            play.commit()
        check(play.state)
    assert play.state.over
    if play.state.phase is Phase.FINISHED and not play.state.interrupted:
        assert play.state.kept is not None
        alive = [end for chain, end in enumerate(play.ends) if chain not in play.state.retired]
        assert min(alive) >= play.state.setup.schedule.counted_from + play.state.kept


@pytest.mark.parametrize("phase", [Phase.FINISHED, Phase.FAILED])
def test_nothing_happens_after_the_end(phase: Phase) -> None:
    state = replace(Play().state, phase=phase)
    assert transition(state, PlaceReady(0, {})) == (state, [])
