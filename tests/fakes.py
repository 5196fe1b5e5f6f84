"""A pool that plays faults: real chains in this process, places that die when the script says."""

from collections import deque
from collections.abc import Container, Sequence

import torch

from distsampler.chains.worker import Inspect, Work, Worker
from distsampler.execution.pool import (
    LostReason,
    PlaceLost,
    PlaceReady,
    PoolEvent,
    perform,
    place_info,
)
from distsampler.models.replica import ChainSpec


class FlakyPool:
    """Several places in this process.

    Args:
        places: how many there is room for.
        deaths: numbers of the works (0, 1, ...) whose place dies before it answers.
        kind: of these losses; after a "fatal" one the place is gone for good.
        hangs: numbers of the works that are never answered.
    """

    def __init__(
        self,
        places: int = 2,
        deaths: Sequence[int] = (),
        kind: LostReason = "infrastructure",
        hangs: Container[int] = (),
    ) -> None:
        self._room, self._deaths, self._kind = places, set(deaths), kind
        self._hangs = hangs
        self._workers: dict[int, Worker] = {}
        self._todo: deque[tuple[int, Work]] = deque()
        self._events: deque[PoolEvent] = deque()
        self.works = 0
        self.died = 0
        self.stopped = False

    def start(self, spec: ChainSpec, places: Sequence[int]) -> Sequence[int]:
        accepted = places[: self._room]
        for place in accepted:
            self._workers[place] = Worker(spec, torch.device("cpu"), capacity=1)
            self._events.append(PlaceReady(place, place_info(torch.device("cpu"))))
        return accepted

    def submit(self, place: int, work: Work) -> None:
        self._todo.append((place, work))

    def wait(self, timeout: float) -> Sequence[PoolEvent]:
        if self._todo and not self._events:
            self._events.extend(self._answer(*self._todo.popleft()))
        events = list(self._events)
        self._events.clear()
        return events

    def stop(self) -> None:
        self.stopped = True

    def _answer(self, place: int, work: Work) -> list[PoolEvent]:
        if isinstance(work, Inspect):  # before the script begins
            return [perform(self._workers[place], place, work)]
        number, self.works = self.works, self.works + 1
        if number in self._hangs:
            return []
        if number not in self._deaths:
            return [perform(self._workers[place], place, work)]
        perform(self._workers.pop(place), place, work)  # done, but the answer is lost
        self.died += 1
        return [PlaceLost(place, "killed by the script", self._kind)]
