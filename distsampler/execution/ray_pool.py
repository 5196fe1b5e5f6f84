"""RayPool: places are Ray actors (``ray_actor``) on a cluster (``ray_cluster``)."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import ray
from numpy.typing import NDArray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.metrics import Gauge

from distsampler.chains.worker import Advance, Work
from distsampler.config import PlacementConfig, RunConfig
from distsampler.data.shards import Shard, ShardSummary
from distsampler.errors import ConfigError
from distsampler.execution.pickling import check_picklable, send_by_value, send_values
from distsampler.execution.placement import choose_device, start_failure
from distsampler.execution.pool import (
    LostReason,
    PlaceDraining,
    PlaceLost,
    PlaceReady,
    PoolEvent,
    WorkDone,
    WorkFailed,
)
from distsampler.execution.ray_actor import Slot, end, inspect_there, new_actor
from distsampler.execution.ray_cluster import RayCluster, draining_nodes
from distsampler.models.numerics import ProcessSettings
from distsampler.models.replica import ChainSpec
from distsampler.references import path_here

if TYPE_CHECKING:  # it imports xarray, which takes a second
    from distsampler.execution.progress import Observer

log = logging.getLogger(__name__)
SAY_FIRST, SAY_EVERY = 10.0, 20.0  # seconds until it is said what is waited for, and said again
SILENCE = 5.0  # seconds of a call before its actor is asked whether it lives
DRAIN_EVERY = 2.0  # seconds between two questions which nodes will go away
NODE_LABEL = "ray.io/node-id"
Receive = Callable[[int, Any], PoolEvent | None]  # takes in what a call to a place's actor gave


class RayPool:
    """Places on a Ray cluster, one actor each.

    Args:
        placement: what an actor asks of the cluster; None: the fields given.
        **fields: fields of PlacementConfig: ``gpus_per_chain``, ``cpus_per_chain``, ``address`` ...

    Raises:
        PlacementError: at the start of a run, if no node can ever hold an actor.

    Example:
        >>> pool = RayPool(cpus_per_chain=0.5)
    """

    def __init__(self, placement: PlacementConfig | None = None, **fields: object) -> None:
        self._placement = placement or PlacementConfig.model_validate(fields)
        self._cluster = RayCluster(self._placement)
        self._slots: dict[int, Slot] = {}
        self._left: dict[int, str] = {}  # place -> the node it was lost on
        self._drained: dict[str, int] = {}
        self._drain_seen = 0.0
        self._recipe: ChainSpec | None = None  # while a run is on
        self._spec: Any = None  # Ray's reference to it
        self._at_anchor: tuple[Any, Any] = (None, None)  # as given, and Ray's reference to it
        self._stock: deque[Any] = deque()  # idle actors, for the first starts of places
        self._lent = False  # whether actors go back to the stock
        self._most = sys.maxsize  # places, however many the cluster has room for
        self._said = 0.0

    def start(self, spec: ChainSpec, places: Sequence[int]) -> Sequence[int]:
        """Join or start Ray, and start as many places as it has room for.

        Actors that have nothing to do take another recipe over.
        """
        if spec is not self._recipe:
            self._dismiss(starting=False)
            places = places[: self._prepare(spec, len(places))]
            self._slots = {place: self._adopted() or self._new(spec.run, place) for place in places}
            self._discard_unlent()
            return places
        for place in places:
            if place in self._slots:  # draining, or hung
                before = self._slots.pop(place)
                self._left[place] = before.node
                end(before.actor)
            self._slots[place] = self._new(spec.run, place)
        return places

    def _prepare(self, spec: ChainSpec, places: int) -> int:
        """Send the recipe to the cluster, and return how many of these places it has room for."""
        if not self._has_sent(spec):
            send_by_value(spec, cloudpickle.register_pickle_by_value)
            check_picklable(spec, cloudpickle.dumps)
        self._cluster.join()
        self._options, room = self._cluster.options(spec.config)
        self._device = choose_device(spec.config, self._options["num_gpus"])
        self._capacity = max(1, self._placement.chains_per_actor // spec.config.together)
        self._recipe, self._spec = spec, ray.put(self._cluster.located(spec))
        return min(math.ceil(places / self._capacity), room, self._most)

    def _has_sent(self, spec: ChainSpec) -> bool:
        """Whether all that is the user's in a recipe went to the cluster with the one before."""
        before, functions = self._recipe, spec.config.observables
        return before is not None and (
            before.model is spec.model
            and before.loss is spec.loss
            and before.rows is spec.rows
            and before.sampler is spec.sampler
            and before.config.observables == functions
            and [(p.rows, p.loss) for p in before.probes] == [(p.rows, p.loss) for p in spec.probes]
        )

    def _adopted(self) -> Slot | None:
        """An actor of the stock, if there is one."""
        if not self._stock:
            return None
        actor = self._stock.popleft()
        return Slot(actor, actor.adopt.remote([self._spec], self._capacity))

    def _new(self, run: str, place: int) -> Slot:
        """A new actor, away from nodes that the place was lost on, if another node has room."""
        options, avoided = self._options, {*self._drained, self._left.get(place, "")} - {""}
        if avoided:
            labels = options.get("label_selector", {})
            elsewhere = f"!in({','.join(sorted(avoided))})"
            options = options | {
                "label_selector": {**labels, NODE_LABEL: elsewhere},
                "fallback_strategy": [{"label_selector": labels}],
            }
        actor = new_actor(run, place, options, self._spec, self._device, self._capacity)
        return Slot(actor, actor.info.remote())

    def submit(self, place: int, work: Work) -> None:
        """Send the work to the place's actor."""
        slot, at_anchor = self._slots[place], None
        slot.work, slot.heard = work, time.monotonic()
        if isinstance(work, Advance):
            if self._at_anchor[0] is not work.at_anchor:
                self._at_anchor = (work.at_anchor, ray.put(work.at_anchor))
            at_anchor, work = self._at_anchor[1], replace(work, at_anchor=None)
        slot.call = slot.actor.perform.remote(place, work, at_anchor)

    def wait(self, timeout: float) -> Sequence[PoolEvent]:
        """Collect what has come in, and what has not come in for too long."""
        slots, awaited = self._slots.items(), dict[Any, tuple[Receive, int]]()
        awaited |= {slot.call: (self._collect, place) for place, slot in slots if slot.call}
        awaited |= {slot.probe: (self._answered, place) for place, slot in slots if slot.probe}
        if not awaited:
            time.sleep(timeout)
            return self._draining()
        ready, _ = ray.wait(list(awaited), num_returns=1, timeout=timeout)
        if ready:
            ready, _ = ray.wait(list(awaited), num_returns=len(awaited), timeout=0)
        done = set(ready)
        events = [take(place, ref) for ref, (take, place) in awaited.items() if ref in done]
        known = [event for event in events if event is not None]
        return [*known, *self._overdue(), *self._draining()]

    def where(self, place: int) -> str:
        """Return the line of code that the place's actor was at when it was last asked."""
        return self._slots[place].at if place in self._slots else ""

    def stop(self) -> None:
        """End the actors, and Ray if this pool started it."""
        self._dismiss()
        self._discard_unlent()
        self._recipe, self._spec, self._at_anchor = None, None, (None, None)
        self._cluster.leave()

    def _dismiss(self, starting: bool = True) -> None:
        """End the actors at work, and those that are starting; the others stay in stock."""
        for slot in self._slots.values() if ray.is_initialized() else ():
            idle = slot.ready and not (slot.call or slot.probe)
            if idle or not (starting or slot.ready):
                self._stock.append(slot.actor)
            else:
                end(slot.actor)
        self._slots = {}

    def _discard_unlent(self) -> None:
        """End the actors in stock, unless they go to the next run of a sweep."""
        if not self._lent and ray.is_initialized():
            self.discard(self._stock, 0)

    def inspect_shards(
        self, sources: Sequence[Shard], rows: Sequence[NDArray[np.int64] | None]
    ) -> Sequence[ShardSummary]:
        """Make shards on the cluster, where they stay, and return what is to be known of them.

        Raises:
            ConfigError: if one cannot be made.
        """
        send_values(sources, cloudpickle.register_pickle_by_value)
        self._cluster.join()
        task = ray.remote(inspect_there).options(**self._cluster.task_options())
        home = path_here(), ProcessSettings.here()
        pairs = zip(sources, rows, strict=True)
        calls = [task.remote(*home, [ray.put(source)], wanted) for source, wanted in pairs]
        if ray.wait(calls, num_returns=len(calls), timeout=SAY_FIRST)[1]:
            log.warning("waiting for %d shards to be made; %s", len(calls), self._cluster.free())
        ray.wait(calls, num_returns=len(calls))
        seen, errors = list[ShardSummary](), list[RayError]()
        for call in calls:
            try:
                seen.append(ray.get(call))
            except RayError as error:  # each is taken in: Ray shouts of one that nobody saw
                errors.append(error)
        if errors:
            cause = getattr(errors[0], "cause", None)
            reason = f"{type(cause).__name__}: {cause}" if cause else start_failure(str(errors[0]))
            raise ConfigError(f"a shard cannot be made or read: {reason}")
        return seen

    def metrics(self, run: str) -> Observer:
        """Return what exports the progress of the run of this name as Ray metrics."""
        from distsampler.execution.metrics import Metrics

        return Metrics(Gauge, run).show

    @contextlib.contextmanager
    def joined(self) -> Iterator[Self]:
        """Join or start Ray for several runs: their stops leave it up, the end of this does not."""
        with self._cluster.kept():
            try:
                yield self
            finally:
                self.stop()

    def room(self, config: RunConfig) -> int:
        """Return the number of places that the cluster has now; Ray must have been joined.

        Raises:
            PlacementError: if it has none.
        """
        return self._cluster.options(config)[1]

    def sharing(self, stock: deque[Any], places: int) -> RayPool:
        """Return a pool of at most ``places`` places, for one of several runs on this pool's Ray.

        It takes idle actors from the stock first, and puts its own there when it stops. Data that
        several runs share are sent once.
        """
        other = RayPool(self._placement)
        other._cluster, other._stock, other._most = self._cluster, stock, places
        other._lent = True
        return other

    def discard(self, stock: deque[Any], kept: int) -> None:
        """End actors of a stock until at most ``kept`` are left."""
        while len(stock) > kept:
            end(stock.popleft())

    def _collect(self, place: int, call: Any) -> PoolEvent | None:  # noqa: ANN401 (of Ray)
        """Take in what a call gave."""
        slot = self._slots[place]
        slot.call = None
        try:
            value = ray.get(call)
        except ActorUnavailableError as error:
            # The call may or may not have run. If the actor answers, it is called again.
            log.info("place %d: %s", place, error)
            slot.ask()
            return None
        except RayError as error:
            return self._died(place, error)
        slot.heard, slot.probe = time.monotonic(), None
        if isinstance(value, PlaceLost):
            return self._lose(place, value.reason, value.kind)
        if not slot.ready:
            slot.ready, slot.node = True, value["node"]
            self._left.pop(place, None)
            return PlaceReady(place, value)
        work, slot.work = slot.work, None
        done: WorkDone | WorkFailed = replace(value, work=work)
        return done

    def _answered(self, place: int, probe: Any) -> PoolEvent | None:  # noqa: ANN401 (of Ray)
        """Take in that an actor, which was asked whether it lives, does or does not."""
        slot = self._slots.get(place)
        if slot is None or slot.probe != probe:
            return None  # it has answered a call meanwhile
        slot.probe = None
        try:
            slot.at = ray.get(probe)
        except RayError as error:
            return self._died(place, error)
        if slot.call is None and slot.work is not None:
            self.submit(place, slot.work)
        elif slot.ready:
            slot.heard = time.monotonic()
        elif slot.call is None:
            slot.call = slot.actor.info.remote()
        return None

    def _overdue(self) -> list[PoolEvent]:
        """Ask actors that have long said nothing; give up those that do not answer or start."""
        now, limit = time.monotonic(), self._placement.start_timeout
        starting = [slot for slot in self._slots.values() if not slot.ready]
        since = min((slot.heard for slot in starting), default=now)
        if now - since > SAY_FIRST and now - self._said > SAY_EVERY:
            self._said, free = now, self._cluster.free()
            asked = f"actor{'' if len(starting) == 1 else 's'} to start with {self._options}"
            log.warning("waiting for %d %s: %s", len(starting), asked, free)
        events = list[PoolEvent]()
        for place, slot in list(self._slots.items()):
            silent = now - slot.heard
            if not slot.ready and silent > limit:
                reason = f"an actor must start within start_timeout={limit:g} s, it did not"
                events.append(self._lose(place, reason, "fatal"))
            elif slot.ready and slot.work is not None and silent > SILENCE:
                if slot.probe is None or silent <= SILENCE + self._placement.answer_timeout:
                    slot.ask()
                    continue
                reason = f"the actor has not answered for {silent:.0f} s"
                events.append(self._lose(place, reason, "hung"))
        return events

    def _draining(self) -> list[PoolEvent]:
        """Report places on nodes that will go away, once each."""
        now = time.monotonic()
        if now - self._drain_seen > DRAIN_EVERY:
            self._drain_seen, self._drained = now, draining_nodes()
        events: list[PoolEvent] = []
        for place, slot in self._slots.items():
            if slot.node in self._drained and not slot.draining:
                slot.draining = True
                events.append(PlaceDraining(place, f"node {slot.node} is draining"))
        return events

    def _died(self, place: int, error: RayError) -> PlaceLost:
        """Forget a place whose actor is gone."""
        slot = self._slots[place]
        reason = str(error) if slot.ready else start_failure(str(error))
        return self._lose(place, reason, slot.lost_reason(error, self._drained))

    def _lose(self, place: int, reason: str, kind: LostReason) -> PlaceLost:
        """Forget a place."""
        slot = self._slots.pop(place)
        if slot.node:
            self._left[place] = slot.node
        end(slot.actor)
        return PlaceLost(place, reason.strip(), kind)
