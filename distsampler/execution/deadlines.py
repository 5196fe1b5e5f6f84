"""Deadlines: how long a place may take for a work before it counts as hung.

A process that lives can wait for ever: for a lock, a file, a network. Only the pace of the works
before tells that from a work that is long. A wrong suspicion costs time and no bit: another process
does the work again, with twice the deadline.
"""

import logging
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

from distsampler.chains.worker import Advance, AnchorPass, Inspect, NotResident, Result, Work
from distsampler.config import RunConfig
from distsampler.errors import RunFailed
from distsampler.execution.pool import (
    ChainPool,
    PlaceLost,
    PlaceReady,
    PoolEvent,
    WorkDone,
    WorkFailed,
)
from distsampler.execution.run_state import Phase, Task, task_of
from distsampler.models.replica import ChainSpec

log = logging.getLogger(__name__)
ANSWER_WAIT = 0.2  # seconds
LOST_FOR_GOOD = {"fatal": 1, "memory": 1, "hung": 2}  # losses before the first work; of others 5
NOBODY = -1  # no place
FACTOR = 20.0  # a work may take this many times what the slowest of its kind took
RECENT = 200  # works of a kind among which the slowest is looked for
FIRST = 6.0  # while none has ended, the first work of a place may take so many start_timeouts
ENDING = (5.0, 30.0)  # least and most seconds that a run which ends waits for a work
SAY_AFTER = 10.0  # seconds without an answer, from which on the place is named
ATTENTION = 1.0  # most seconds counted between two looks: a driver that was away does not judge


@dataclass(frozen=True)
class _UnderWay:
    """A work that has not been answered."""

    work: Work
    since: float  # when it was given, by the clock of ``Deadlines``
    first: bool  # whether the place has yet to load, compile or warm up what it needs for it


class Deadlines:
    """Knows what each place is at, and since when.

    Args:
        config: of the run; ``placement.answer_timeout`` is the shortest deadline.
        first: how many ``start_timeout`` the first work of all may take.
    """

    def __init__(self, config: RunConfig, first: float = FIRST) -> None:
        self._shortest = config.placement.answer_timeout
        self._longest_first = first * config.placement.start_timeout
        self._compiles = config.compile
        self._clock, self._last = 0.0, math.nan
        self._ending: float | None = None  # when the run began to end
        self._under_way: dict[int, _UnderWay] = {}
        self._where: dict[int, str] = {}  # place -> host and process
        self._warm: defaultdict[int, set[object]] = defaultdict(set)  # what it has done before
        # seconds for each draw or row, and seconds of the longest first work, by kind
        self._paces: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._slowest: dict[str, float] = {}  # of these paces, by kind: asked for at every event
        self._firsts: dict[str, float] = {}

    def given(self, place: int, work: Work) -> None:
        """Take in that a place was given a work."""
        first = self._warmth(work) not in self._warm[place]
        self._under_way[place] = _UnderWay(work, self._clock, first)

    def heard(self, event: PoolEvent) -> None:
        """Take in what the pool reports."""
        if isinstance(event, PlaceReady):
            info = event.info
            self._where[event.place] = f"on {info.get('host', '?')}, pid {info.get('pid', '?')},"
            self._warm.pop(event.place, None)
        under_way = self._under_way.pop(event.place, None)
        if under_way is None or not isinstance(event, WorkDone):
            return
        self._warm[event.place].add(self._warmth(under_way.work))
        if not isinstance(event.result, NotResident):
            self._learn(under_way)

    def tick(self, now: float, phase: Phase) -> None:
        """Let time pass, up to now."""
        if not math.isnan(self._last):
            self._clock += min(now - self._last, ATTENTION)
        self._last = now
        if phase is Phase.DRAINING and self._ending is None:
            self._ending = self._clock

    def overdue(self, hung: Mapping[Task, int]) -> list[PlaceLost]:
        """Return the loss of each place whose deadline is over; ``hung`` as in ``State``."""
        late = [place for place in self._under_way if self._left(place, hung) <= 0]
        lost = [PlaceLost(place, self._silence(place), "hung") for place in late]
        for place in late:
            del self._under_way[place]
        return lost

    def waiting(self, hung: Mapping[Task, int]) -> dict[int, str]:
        """Return, by place, what is waited for longer than usual, and for how long at most."""
        return {
            place: f"{self._silence(place)}: waiting {self._left(place, hung):.0f} s more"
            for place, under_way in self._under_way.items()
            if self._clock - under_way.since > max(SAY_AFTER, 3 * self._usual(under_way.work))
            or (self._ending is not None and self._clock - self._ending > ENDING[0])
        }

    def _warmth(self, work: Work) -> object:
        """What a place must have done before for a work not to be its first of the kind."""
        if isinstance(work, Advance) and self._compiles:
            return work.chains  # each chain compiles its own
        return _kind(work)

    def _learn(self, ended: _UnderWay) -> None:
        seconds, kind = self._clock - ended.since, _kind(ended.work)
        if ended.first:
            self._firsts[kind] = max(seconds, self._firsts.get(kind, 0.0))
        else:
            self._paces[kind].append(seconds / _size(ended.work))
            self._slowest[kind] = max(self._paces[kind])

    def _usual(self, work: Work) -> float:
        """Seconds that the slowest recent work of this size took; 0: there was none."""
        return self._slowest.get(_kind(work), 0.0) * _size(work)

    def _left(self, place: int, hung: Mapping[Task, int]) -> float:
        """Seconds until a place counts as hung."""
        under_way = self._under_way[place]
        work, usual = under_way.work, self._usual(under_way.work)
        limit = max(self._shortest, FACTOR * usual) * 2.0 ** hung.get(task_of(work), 0)
        kind, since = _kind(work), under_way.since
        if under_way.first or kind not in self._slowest:
            first = self._firsts.get(kind)
            limit = max(limit, self._longest_first if first is None else FACTOR * first)
        left = since + limit - self._clock
        if self._ending is None:
            return left
        least, most = ENDING
        patience = min(max(FACTOR * usual, least), most)
        return min(left, max(since, self._ending) + patience - self._clock)

    def _silence(self, place: int) -> str:
        """Return who has not answered, for how long, and how long it usually takes."""
        under_way = self._under_way[place]
        seconds, usual = self._clock - under_way.since, self._usual(under_way.work)
        actor = f"{_owner(under_way.work)} actor {self._where.get(place, '')}".rstrip()
        usually = f" (it usually takes {usual:.2g} s)" if usual else ""
        return f"{actor} has not answered for {seconds:.0f} s{usually}"


def _kind(work: Work) -> str:
    return "blocks" if isinstance(work, Advance) else task_of(work)[0]


def _size(work: Work) -> int:
    """Draws of a block, or rows of a part of the anchor pass."""
    if isinstance(work, AnchorPass):
        return max(1, work.part.stop - work.part.start)
    return work.draws if isinstance(work, Advance) else 1


def _owner(work: Work) -> str:
    match work:
        case Advance(chains):
            return f"chain{'s' if len(chains) > 1 else ''} {', '.join(map(str, chains))}'s"
        case AnchorPass():
            return "the anchor pass's"
        case Inspect():
            return "the inspection's"


def first_answer(pool: ChainPool, spec: ChainSpec, work: Work) -> Result:
    """Start the places of a pool, let the first that is up do one work, and return what it gave.

    The places stay, and may be started with another recipe.

    Raises:
        DistsamplerError: if the work failed.
        RunFailed: if no place could do it.
    """
    deadlines = Deadlines(spec.config, first=1.0)
    started = set(pool.start(spec, range(len(spec.config.packs))))
    lost, asked, up, said = Counter[str](), NOBODY, deque[int](), False
    while True:
        hung = {task_of(work): lost["hung"]}
        for event in (*_reported(pool, deadlines), *deadlines.overdue(hung)):
            match event:
                case PlaceReady(place):
                    up.append(place)
                case WorkDone():
                    return event.result
                case WorkFailed():
                    raise event.error
                case PlaceLost(place):
                    up = deque(other for other in up if other != place)
                    if asked not in (NOBODY, place):
                        started.discard(place)  # it is started again with the run
                        continue
                    asked, lost[event.kind] = NOBODY, lost[event.kind] + 1
                    _replace(pool, spec, event, lost[event.kind], started)
        if asked == NOBODY and up:
            asked = up.popleft()
            pool.submit(asked, work)
            deadlines.given(asked, work)
        for waiting in deadlines.waiting(hung).values() if not said else ():
            log.warning("%s", waiting)
            said = True


def _replace(
    pool: ChainPool, spec: ChainSpec, event: PlaceLost, losses: int, started: set[int]
) -> None:
    """Start a lost place again, unless it is lost for good; RunFailed: there is no other."""
    if losses < LOST_FOR_GOOD.get(event.kind, 5):
        pool.start(spec, (event.place,))
        return
    started.discard(event.place)
    if event.kind in ("memory", "hung") or not started:
        raise RunFailed(f"no place could begin: {event.reason}")


def _reported(pool: ChainPool, deadlines: Deadlines) -> list[PoolEvent]:
    """What a pool reports, which the deadlines take in."""
    events = list(pool.wait(ANSWER_WAIT))
    deadlines.tick(time.monotonic(), Phase.STARTING)
    for event in events:
        deadlines.heard(event)
    return events
