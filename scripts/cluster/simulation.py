"""A cluster that is not there: places that work and die by the clock of a simulation.

The decisions are the library's own: every event goes through ``transition``. What the driver does
about them costs it time, as measured (``Costs``); while it does that it hears nothing, and places
wait. Only the places' work is invented.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from distsampler.chains.steps import Advanced
from distsampler.chains.worker import Advance
from distsampler.draws import DrawBlock
from distsampler.execution import transition as decisions
from distsampler.execution.driver import COMMIT_SHARE, SHORT_COMMIT, SHOW_SHARE, WAIT_SECONDS
from distsampler.execution.pool import PlaceLost, PlaceReady, PoolEvent, WorkDone
from distsampler.execution.run_state import (
    Action,
    CommitNow,
    Committed,
    Event,
    Keep,
    Phase,
    Restart,
    RunSetup,
    State,
    Submit,
)
from distsampler.schedule import Schedule
from distsampler.store.zarr_arrays import CHUNK

COMMIT_SECONDS = 5.0
DRAWS = 10**9  # nobody comes to the end
NO_STATE = b""


@dataclass(frozen=True)
class Costs:
    """What things cost, in seconds of the driver, but for ``start`` and ``latency``.

    Args:
        start: from asking for an actor until it is ready, on an idle node.
        latency: of a call, there and back, beside what the driver does for it.
        submit: to send a work.
        collect: to take in a reply.
        wait: of a look for replies, for each call that is under way.
        commit: of a commit.
        commit_block: of it, for each block.
        commit_chain: of it, for each chain whose chunk is touched: 64 chains share one.
        snapshot: of the progress shown, for each chain.
    """

    start: float
    latency: float
    submit: float
    collect: float
    wait: float
    commit: float
    commit_block: float
    commit_chain: float
    snapshot: float


@dataclass(frozen=True)
class Cluster:
    """What is simulated.

    Args:
        actors: places, a chain each.
        seconds: that are simulated.
        deaths_per_hour: of an actor.
        draw: seconds of a draw.
        block: draws of a block; None: as ``transition`` sizes it.
        spread: of the actors' speeds, relative.
        seed: of deaths and speeds.
    """

    actors: int
    seconds: float
    deaths_per_hour: float
    draw: float
    block: int | None = None
    spread: float = 0.05
    seed: int = 0


@dataclass
class Tally:
    """Where time went: the driver's by what it did, the actors' by what they lacked."""

    driver: Counter[str] = field(default_factory=Counter)
    useful: float = 0.0
    lost: float = 0.0
    waiting: float = 0.0
    down: float = 0.0
    deaths: int = 0
    replies: int = 0
    commits: int = 0
    draws: int = 0
    elapsed: float = 0.0

    def report(self, actors: int) -> dict[str, Any]:
        """Shares of the time simulated, and what limits it first."""
        whole = actors * self.elapsed
        parts = {
            "lost work": self.lost / whole,
            "waiting for the driver": self.waiting / whole,
            "actors that start": self.down / whole,
        }
        load = {name: seconds / self.elapsed for name, seconds in self.driver.items()}
        return {
            "efficiency": self.useful / whole,
            "driver_load": sum(load.values()),
            "driver": load,
            "missing": parts,
            "bottleneck": self._bottleneck(load, parts),
            "deaths": self.deaths,
            "replies_per_second": self.replies / self.elapsed,
            "draws_per_second": self.draws / self.elapsed,
            "commits": self.commits,
            "elapsed": self.elapsed,
        }

    def _bottleneck(self, load: dict[str, float], parts: dict[str, float]) -> str:
        """What would give way first if the cluster grew: the driver where it is half busy."""
        first = max(load, key=lambda name: load[name], default="")
        if sum(load.values()) > 0.5:
            return f"driver: {first}"
        worst = max(parts, key=lambda name: parts[name])
        if parts[worst] <= 0.01:
            return f"none yet; of the driver: {first}"
        by_driver = worst == "waiting for the driver" and sum(load.values()) > 0.01
        return f"{worst}: {first}" if by_driver else worst


class Simulation:
    """One run of a cluster.

    Args:
        cluster: what is simulated.
        costs: what things cost.
        clock: with which the decisions are timed: of this thread's own work.
    """

    def __init__(
        self, cluster: Cluster, costs: Costs, clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._cluster, self._costs, self._clock = cluster, costs, clock
        self._chance = random.Random(cluster.seed)
        self._speed = [
            self._chance.lognormvariate(0.0, cluster.spread) for _ in range(cluster.actors)
        ]
        self._now, self._last_commit, self._next_snapshot = 0.0, 0.0, 0.0
        self._commit_took = 0.0
        self._due: list[tuple[float, int, PoolEvent]] = []
        self._order = 0
        self._down: dict[int, float] = {}
        self._began: dict[int, tuple[float, float]] = {}
        self._free: dict[int, float] = {}
        self._incarnations = Counter[int]()
        self._pending: list[DrawBlock] = []
        self._said: list[Event] = []
        self.tally = Tally()
        setup = RunSetup(Schedule(0, (DRAWS,)), 1, cluster.block, ())
        self.state: State = decisions.begin(
            setup, tuple(range(cluster.actors)), (0,) * cluster.actors, anchored=True
        )

    def run(self) -> Tally:
        """Until its time is up; an actor's time counts from when it was first ready."""
        for place in range(self._cluster.actors):
            self._start(place)
        while self._now < self._cluster.seconds and self.state.phase is not Phase.FAILED:
            for event in self._next_events():
                self._hear(event)
            self._show()
        return self._closed()

    def _next_events(self) -> list[Event]:
        """As the driver does: commit if it is time, then what has come in, or a pause."""
        if self._now - self._last_commit > max(
            COMMIT_SECONDS, COMMIT_SHARE * (self._commit_took - SHORT_COMMIT)
        ):
            self._commit()
        if self._said:
            said, self._said = self._said, []
            return said
        self._charge("looking for replies", self._costs.wait * len(self._began))
        nearest = self._due[0][0] if self._due else self._now + WAIT_SECONDS
        self._now = max(self._now, min(nearest, self._now + WAIT_SECONDS))
        events: list[Event] = []
        while self._due and self._due[0][0] <= self._now:
            events.append(heapq.heappop(self._due)[2])
        return events

    def _hear(self, event: Event) -> None:
        """Takes an event in, decides with the library's own ``transition``, and acts."""
        if isinstance(event, WorkDone | PlaceLost):
            if self._incarnations[event.place] != event.incarnation:
                return
            self._taken_in(event)
        elif isinstance(event, PlaceReady):
            self._up(event.place)
        began = self._clock()
        self.state, actions = decisions.transition(self.state, event)
        self._charge("decisions", self._clock() - began)
        for action in actions:
            self._perform(action)

    def _taken_in(self, event: WorkDone | PlaceLost) -> None:
        began, works = self._began.pop(event.place, (self._now, 0.0))
        if isinstance(event, WorkDone):
            self._charge("replies", self._costs.collect)
            self.tally.useful += works
            self.tally.waiting += max(0.0, self._now - began - works)
            self.tally.replies += 1
            self._free[event.place] = self._now
        else:
            self.tally.deaths += 1
            self.tally.lost += min(self._now - began, works)
            self._free.pop(event.place, None)
            self._down[event.place] = self._now

    def _perform(self, action: Action) -> None:
        match action:
            case Submit(place, work) if isinstance(work, Advance):
                self._submit(place, work)
            case Restart(place, _, losses):
                self._start(place, self._chance.uniform(2.0, 3.0 + 0.5 * min(losses, 4)))
            case Keep(block):
                self._pending.append(block)
                self.tally.draws += block.draws
            case CommitNow():
                self._commit()
            case _:
                pass

    def _start(self, place: int, delay: float = 0.0) -> None:
        self._incarnations[place] += 1
        self._down.setdefault(place, self._now)
        took = self._costs.start * self._chance.uniform(0.8, 1.5)
        ready = PlaceReady(place, {}, self._incarnations[place])
        self._plan(self._now + delay + took, ready)

    def _up(self, place: int) -> None:
        self.tally.down += self._now - self._down.pop(place, self._now)
        self._free[place] = self._now
        if self._cluster.deaths_per_hour > 0:
            dies = self._now + self._chance.expovariate(self._cluster.deaths_per_hour / 3600)
            lost = PlaceLost(place, "", "infrastructure", self._incarnations[place])
            self._plan(dies, lost)

    def _submit(self, place: int, work: Advance) -> None:
        self._charge("calls", self._costs.submit)
        self.tally.waiting += self._now - self._free.pop(place, self._now)
        works = work.draws * self._cluster.draw * self._speed[place]
        step = np.broadcast_to(np.int64(0), (work.draws,))
        blocks = tuple(DrawBlock(c, work.first_draw, {"step": step}, NO_STATE) for c in work.chains)
        done = WorkDone(place, work, Advanced(blocks, ()), works, self._incarnations[place])
        self._began[place] = (self._now, works)
        self._plan(self._now + works + self._costs.latency, done)

    def _commit(self) -> None:
        self._last_commit = self._now
        if self._pending:
            costs = self._costs
            blocks = costs.commit_block * len(self._pending)
            rows = {block.chain // CHUNK[0] for block in self._pending}
            chains = costs.commit_chain * min(CHUNK[0] * len(rows), self._cluster.actors)
            self._commit_took = costs.commit + blocks + chains
            self._charge("commits", self._commit_took)
            self._pending.clear()
            self.tally.commits += 1
            self._said.append(Committed(self.state.received))

    def _show(self) -> None:
        """Of the progress: as often as the driver does."""
        if self._now >= self._next_snapshot:
            took = self._costs.snapshot * self._cluster.actors
            self._charge("progress", took)
            self._next_snapshot = self._now + SHOW_SHARE * took

    def _plan(self, when: float, event: PoolEvent) -> None:
        self._order += 1
        heapq.heappush(self._due, (when, self._order, event))

    def _charge(self, what: str, seconds: float) -> None:
        self.tally.driver[what] += seconds
        self._now += seconds

    def _closed(self) -> Tally:
        """The tally, with what is under way when the time is up."""
        tally = self.tally
        for began, works in self._began.values():
            done = min(self._now - began, works)
            tally.useful += done
            tally.waiting += self._now - began - done
        tally.waiting += sum(self._now - since for since in self._free.values())
        tally.down += sum(self._now - since for since in self._down.values())
        tally.elapsed = self._now
        return tally


def simulate(cluster: Cluster, costs: Costs) -> dict[str, Any]:
    """What became of a cluster: its description, and the report."""
    tally = Simulation(cluster, costs).run()
    return {**asdict(cluster), **tally.report(cluster.actors)}
