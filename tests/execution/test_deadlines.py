"""When a place counts as hung; the clock is an argument."""

from dataclasses import replace
from typing import Any

import pytest

import distsampler as ds
from distsampler.chains.anchor_pass import AnchorPart, Part
from distsampler.chains.steps import Advanced
from distsampler.chains.worker import Advance, AnchorPass, NotResident, Work
from distsampler.execution.deadlines import ATTENTION, Deadlines, first_answer
from distsampler.execution.pool import PlaceReady, WorkDone
from distsampler.execution.run_state import Phase, RunSetup, State
from distsampler.execution.transition import begin
from distsampler.sampling.prepare import draft
from distsampler.schedule import Schedule
from tests.fakes import FlakyPool
from tests.problems import config, regression, squared_error

PLACEMENT = ds.PlacementConfig(answer_timeout=10.0, start_timeout=100.0)
STATE = begin(RunSetup(Schedule(10, (30,)), 1, 8, ()), (0, 1), (0, 0))


class Clock:
    """Deadlines of a run, and the time."""

    def __init__(self, **fields: Any) -> None:
        self.deadlines = Deadlines(ds.RunConfig(placement=PLACEMENT, **fields))
        self.now, self.state = 1000.0, replace(STATE, phase=Phase.SAMPLING)
        self.deadlines.tick(self.now, self.state.phase)
        for place in (0, 1):
            self.deadlines.heard(PlaceReady(place, {"host": "node", "pid": str(70 + place)}))

    def after(self, seconds: float) -> None:
        """Let time pass, in steps as short as the driver's."""
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            self.deadlines.tick(self.now, self.state.phase)

    def works(self, place: int, work: Work, seconds: float, result: Any = None) -> None:
        """A place does a work, in so many seconds."""
        self.deadlines.given(place, work)
        self.after(seconds)
        self.deadlines.heard(WorkDone(place, work, result or Advanced(())))

    def lost_after(self, limit: float = 10_000.0) -> float:
        """Seconds until a place is lost."""
        began = self.now
        while not (lost := self.deadlines.overdue(self.state.hung)):
            assert self.now - began < limit, "never"
            self.after(0.5)
        assert all(loss.kind == "hung" for loss in lost)
        return self.now - began


def block(chain: int, draws: int = 8, first: int = 0) -> Advance:
    return Advance((chain,), first, draws)


@pytest.mark.parametrize(("seconds", "deadline"), [(0.0, 10.0), (2.0, 40.0), (60.0, 1200.0)])
def test_a_deadline_is_twenty_times_what_such_works_take_and_at_least_answer_timeout(
    seconds: float, deadline: float
) -> None:
    clock = Clock()
    clock.works(0, block(0), 90.0)  # the first, which loads and compiles, is no measure
    clock.works(0, block(0, first=8), seconds)
    clock.deadlines.given(0, block(0, first=16))
    assert clock.lost_after() == pytest.approx(deadline, abs=1.0)


def test_it_grows_with_the_draws_of_a_block_and_the_rows_of_a_part() -> None:
    clock = Clock()
    for _ in range(2):
        clock.works(0, block(0), 1.0)
        clock.works(1, AnchorPass(Part(0, 1000)), 1.0, AnchorPart(Part(0, 1000), None))  # type: ignore[arg-type]
    clock.deadlines.given(0, block(0, draws=32))
    assert clock.lost_after() == pytest.approx(80.0, abs=1.0)
    clock.deadlines.given(1, AnchorPass(Part(1000, 6000)))
    assert clock.lost_after() == pytest.approx(100.0, abs=1.0)


def test_the_first_work_of_a_place_has_six_start_timeouts_or_twenty_times_the_first_of_others() -> (
    None
):
    clock = Clock()
    clock.deadlines.given(0, block(0))
    assert clock.lost_after() == pytest.approx(600.0, abs=1.0)
    clock = Clock()
    clock.works(0, block(0), 3.0)
    clock.deadlines.given(1, block(1))
    assert clock.lost_after() == pytest.approx(60.0, abs=1.0)


def test_a_place_started_again_is_new_and_so_is_each_chain_of_a_compiled_loss() -> None:
    for compiles, again in ((True, False), (False, True)):
        clock = Clock(compile=compiles)
        for _ in range(2):
            clock.works(0, block(0), 5.0)
        if again:
            clock.deadlines.heard(PlaceReady(0, {}))
        clock.deadlines.given(0, block(1))
        assert clock.lost_after() == pytest.approx(100.0, abs=1.0), "20 times the first block"


def test_a_work_that_hung_before_has_twice_the_time_and_then_four_times() -> None:
    clock = Clock()
    for _ in range(2):
        clock.works(0, block(0), 1.0)
    for times, deadline in ((0, 20.0), (1, 40.0), (2, 80.0)):
        clock.state = replace(clock.state, hung={("chain", 0): times, ("chain", 1): 7})
        clock.deadlines.given(0, block(0))
        assert clock.lost_after() == pytest.approx(deadline, abs=1.0)


def test_a_reply_that_asks_for_states_is_no_measure_of_a_block() -> None:
    clock = Clock()
    for _ in range(2):
        clock.works(0, block(0), 2.0)
    clock.works(0, block(1), 9.0, NotResident())
    clock.deadlines.given(0, block(1))
    assert clock.lost_after() == pytest.approx(40.0, abs=1.0)


def test_a_driver_that_was_away_does_not_hold_it_against_its_places() -> None:
    clock = Clock()
    for _ in range(2):
        clock.works(0, block(0), 1.0)
    clock.deadlines.given(0, block(0))
    clock.now += 3600.0  # a long commit, or a stopped process
    clock.deadlines.tick(clock.now, Phase.SAMPLING)
    assert clock.lost_after() == pytest.approx(20.0 - ATTENTION, abs=1.0)


@pytest.mark.parametrize(("seconds", "deadline"), [(0.0, 5.0), (60.0, 30.0)])
def test_a_run_that_ends_waits_for_a_work_at_least_five_and_at_most_thirty_seconds(
    seconds: float, deadline: float
) -> None:
    clock = Clock()
    for _ in range(2):
        clock.works(0, block(0), seconds)
    clock.deadlines.given(0, block(0))
    clock.after(3.0)
    clock.state = replace(clock.state, phase=Phase.DRAINING)
    clock.after(0.5)
    assert clock.lost_after() == pytest.approx(deadline, abs=1.0)


def test_a_first_work_that_does_not_return_is_tried_twice_and_given_up() -> None:
    model, data = regression()
    soon = ds.PlacementConfig(answer_timeout=0.01, start_timeout=0.01)
    spec, pool = (
        draft(model, data, squared_error, config(placement=soon)),
        FlakyPool(1, hangs={0, 1}),
    )
    with pytest.raises(
        ds.RunFailed, match=r"no place could begin: the anchor pass's actor on .* pid \d+"
    ):
        first_answer(pool, spec, AnchorPass(Part(0, 0, "probe")))
    result = first_answer(FlakyPool(1, hangs={0}), spec, AnchorPass(Part(0, 0, "probe")))
    assert isinstance(result, AnchorPart), "it is tried twice"


def test_who_is_waited_for_is_named_with_what_is_usual_and_how_long_it_may_still_take() -> None:
    clock = Clock()
    for _ in range(2):
        clock.works(1, block(2), 2.0)
    clock.deadlines.given(1, block(2))
    clock.after(9.0)
    assert not clock.deadlines.waiting(clock.state.hung)
    clock.after(11.0)
    assert clock.deadlines.waiting(clock.state.hung) == {
        1: "chain 2's actor on node, pid 71, has not answered for 20 s (it usually takes 2 s): "
        "waiting 20 s more"
    }
    state: State = replace(clock.state, hung={("chain", 2): 1})
    assert clock.deadlines.waiting(state.hung)[1].endswith("waiting 60 s more")
