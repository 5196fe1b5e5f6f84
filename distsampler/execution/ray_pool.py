"""RayPool: places are Ray actors. The only file that imports ray.

Ray never restarts an actor or repeats a call here: it would do so with the chain's state gone and
without an error. The driver brings a place up again, from what is committed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import cloudpickle
from ray.exceptions import (
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from ray.util.metrics import Gauge

from distsampler.chains.worker import Advance, Work, Worker
from distsampler.config import PlacementConfig, RunConfig
from distsampler.data.rows import Rows
from distsampler.data.shards import Seen, ShardedRows, Source, see
from distsampler.draws import AtAnchor
from distsampler.errors import ConfigError, PlacementError
from distsampler.execution.pickling import check_picklable, send_by_value, send_values
from distsampler.execution.placement import (
    check_versions,
    choose_device,
    fit,
    local_folders,
    start_failure,
    versions_here,
)
from distsampler.execution.pool import (
    LostReason,
    PlaceDraining,
    PlaceLost,
    PlaceReady,
    PoolEvent,
    WorkDone,
    WorkFailed,
    perform,
    place_info,
)
from distsampler.models.replica import ChainSpec

if TYPE_CHECKING:  # they bring in xarray, which takes a second and no actor needs
    from distsampler.execution.metrics import Metrics
    from distsampler.execution.progress import Snapshot

log = logging.getLogger(__name__)
SAY_EVERY = 20.0
SILENCE = 5.0  # seconds of a call before its actor is asked whether it lives
NODE_LABEL = "ray.io/node-id"
FOLDERS = ("working_dir", "py_modules", "excludes")  # of a runtime environment
_NAMED: Counter[str] = Counter()  # actors that this process has given a name
DRAIN_EVERY = 2.0  # seconds between two looks at which nodes go away


class _Name:
    """A ``__repr__`` that is no method in Ray's eyes.

    Ray has a method raise where the class cannot be imported, and calls ``__repr__`` while it tells
    so: the worker would die before it has named its node and the module it lacks.
    """

    def __get__(self, actor: ChainActor | None, owner: type) -> Any:  # noqa: ANN401 (of two kinds)
        return self if actor is None else lambda: f"ChainActor({actor._name})"


class ChainActor:
    """A worker in a process of its own.

    Args:
        versions: the driver's.
        spec: the recipe, from the object store: its data are shared memory. It comes in a list,
            so that it is unpacked only after the versions were compared.
        device: "cpu" or "cuda".
        capacity: packs of chains that stay in memory.
        name: "run=digits, place=3": who it is, in Ray's dashboard and logs.
    """

    def __init__(
        self, versions: dict[str, str], spec: list[Any], device: str, capacity: int, name: str
    ) -> None:
        self._name = name
        check_versions(versions, ray.util.get_node_ip_address())
        self._device = torch.device(device)
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "this actor was given a GPU, but torch sees none: install a CUDA build"
            )
        self._worker = Worker(ray.get(spec[0]), self._device, capacity)

    def adopt(self, spec: list[Any], capacity: int) -> dict[str, str]:
        """Works for another run from now on; says where it is."""
        del self._worker  # its memory, before the other needs some
        self._worker = Worker(ray.get(spec[0]), self._device, capacity)
        return self.info()

    __repr__ = _Name()

    def info(self) -> dict[str, str]:
        """Where it is."""
        node = ray.get_runtime_context().get_node_id()
        return {**place_info(self._device), "node": node}

    @ray.method(concurrency_group="probe")  # type: ignore[untyped-decorator]
    def ping(self) -> None:
        """Answers, in a thread of its own, while work is done."""

    def perform(
        self, place: int, work: Work, at_anchor: AtAnchor | None
    ) -> WorkDone | WorkFailed | PlaceLost:
        """Does the work; the losses at w* come beside it, so that it is shared memory too."""
        if isinstance(work, Advance):
            work = replace(work, at_anchor=at_anchor)
        return perform(self._worker, place, work)


@dataclass
class _Slot:
    """One place: its actor, the call it is waited for, and the probe whether it lives."""

    actor: Any
    incarnation: int
    call: Any
    began: float
    ready: bool = False
    node: str = ""
    work: Work | None = None
    probe: Any = None
    heard: float = 0.0
    draining: bool = False
    resident: OrderedDict[int, int] = field(default_factory=OrderedDict)  # pack -> its draw


class RayPool:
    """Places on a Ray cluster, one actor each.

    Args:
        placement: all of it; None: the fields given.
        **fields: of PlacementConfig: ``gpus_per_chain``, ``cpus_per_chain``, ``address`` ...

    Raises:
        PlacementError: at the start of a run, if no node can ever hold an actor.

    Example:
        >>> pool = RayPool(cpus_per_chain=0.5)
    """

    def __init__(self, placement: PlacementConfig | None = None, **fields: object) -> None:
        self._placement = placement or PlacementConfig.model_validate(fields)
        self._slots: dict[int, _Slot] = {}
        self._starts: Counter[int] = Counter()
        self._left: dict[int, str] = {}  # place -> the node it was lost on
        self._drained: dict[str, int] = {}
        self._drain_seen = 0.0
        self._spec: Any = None
        self._shelf: WeakKeyDictionary[Rows, Any] = WeakKeyDictionary()  # rows in the object store
        self._at_anchors: tuple[Any, Any] = (None, None)
        self._metrics: Metrics | None = None
        self._owns_ray = False
        self._folders: dict[str, Any] = {}  # folders that the whole job has
        self._stock: deque[Any] | None = None  # actors between two runs
        self._most = sys.maxsize  # places, however many the cluster has room for
        self._said = 0.0

    def start(self, spec: ChainSpec, places: Sequence[int]) -> Sequence[int]:
        """Joins or starts Ray, and brings up as many places as it has room for."""
        if self._spec is None:
            send_by_value(spec, cloudpickle.register_pickle_by_value)
            check_picklable(spec, cloudpickle.dumps)
            self._join()
            self._options, slots = fit(self._of_actors(), spec.config, ray.nodes())
            self._together = spec.config.together
            self._capacity = max(1, self._placement.chains_per_actor // self._together)
            wanted = math.ceil(len(places) / self._capacity)
            places = places[: min(wanted, slots, self._most)]
            from distsampler.execution.metrics import Metrics

            self._metrics = Metrics(Gauge, spec.run)
            self._spec = ray.put(self._located(spec))
            self._device = choose_device(spec.config, self._options["num_gpus"])
        for place in places:
            if place in self._slots:
                self._end(self._slots.pop(place))
            self._starts[place] += 1
            actor, call = self._actor(place, spec.run)
            self._slots[place] = _Slot(actor, self._starts[place], call, time.monotonic())
        return places

    def look(
        self, sources: Sequence[Source], rows: Sequence[NDArray[np.int64] | None]
    ) -> Sequence[Seen]:
        """Looks at shards on the cluster, where they are made; the shards stay there.

        Raises:
            ConfigError: if one cannot be made.
        """
        send_values(sources, cloudpickle.register_pickle_by_value)
        self._join()
        options: dict[str, Any] = {"num_cpus": self._placement.cpus_per_chain, "max_retries": 0}
        options |= self._of_actors().model_dump(
            include={"label_selector", "runtime_env"}, exclude_none=True
        )
        task = ray.remote(see).options(**options)
        calls = [task.remote(*pair) for pair in zip(sources, rows, strict=True)]
        ray.wait(calls, num_returns=len(calls))
        found, errors = list[Seen](), list[RayError]()
        for call in calls:
            try:
                found.append(ray.get(call))
            except RayError as error:  # each is taken in: Ray shouts of one that nobody saw
                errors.append(error)
        if errors:
            cause = getattr(errors[0], "cause", None)
            told = f"{type(cause).__name__}: {cause}" if cause else start_failure(str(errors[0]))
            raise ConfigError(f"a shard cannot be made or read: {told}")
        return found

    def _actor(self, place: int, run: str) -> tuple[Any, Any]:
        """An actor, and the call that says it is up: one of the stock, at a place's first start."""
        if self._stock and self._starts[place] == 1:
            actor = self._stock.popleft()
            return actor, actor.adopt.remote([self._spec], self._capacity)
        actor = self._new_actor(place, run)
        return actor, actor.info.remote()

    def _new_actor(self, place: int, run: str) -> Any:  # noqa: ANN401 (of Ray)
        """An actor with a name of its own, as long as nobody else's in the namespace has it."""
        actor_class = ray.remote(concurrency_groups={"probe": 1})(ChainActor)
        options = self._options | self._elsewhere(place)
        who = f"run={run}, place={place}"
        given = (versions_here(), [self._spec], self._device, self._capacity, who)
        name = f"distsampler:{run}:place-{place}"
        _NAMED[name] += 1  # a name is free again only some time after its actor was killed
        if _NAMED[name] > 1:
            name += f":{_NAMED[name]}"
        try:
            return actor_class.options(name=name, **options).remote(*given)
        except ValueError:
            return actor_class.options(**options).remote(*given)

    def show(self, snapshot: Snapshot) -> None:
        """Exports how the run goes as Ray metrics; see ``metrics``."""
        if self._metrics is not None:
            self._metrics.export(snapshot)

    def submit(self, place: int, work: Work) -> None:
        """Sends the work; the state only where the actor does not hold the chain already."""
        slot, at_anchor = self._slots[place], None
        slot.work, slot.heard = work, time.monotonic()
        if isinstance(work, Advance):
            if self._at_anchors[0] is not work.at_anchor:
                self._at_anchors = (work.at_anchor, ray.put(work.at_anchor))
            at_anchor = self._at_anchors[1]
            resident = self._make_resident(slot, work)
            work = replace(work, at_anchor=None, states=() if resident else work.states)
        slot.call = slot.actor.perform.remote(place, work, at_anchor)

    def wait(self, timeout: float) -> Sequence[PoolEvent]:
        """Collects what has come in."""
        calls = {slot.call: place for place, slot in self._slots.items() if slot.call is not None}
        probes = {slot.probe: place for place, slot in self._slots.items() if slot.probe}
        both = [*calls, *probes]
        if not both:
            time.sleep(timeout)
            return self._draining()
        ready, _ = ray.wait(both, num_returns=1, timeout=timeout)
        if ready:
            ready, _ = ray.wait(both, num_returns=len(both), timeout=0)
        events = [self._collect(calls[call]) for call in ready if call in calls]
        events += [self._answered(probes[call], call) for call in ready if call in probes]
        found = [event for event in events if event is not None]
        return [*found, *self._overdue(), *self._silent(), *self._draining()]

    def stop(self) -> None:
        """Ends the actors, and Ray if this pool started it."""
        up = ray.is_initialized()
        for slot in self._slots.values() if up else ():
            if self._stock is not None and slot.ready and not (slot.call or slot.probe):
                self._stock.append(slot.actor)
            else:
                self._end(slot)
        self._slots.clear()
        self._starts.clear()
        self._spec, self._at_anchors = None, (None, None)
        if self._owns_ray or not up:
            self._shelf.clear()  # what lies in the object store goes with it
        if self._owns_ray and up:
            ray.shutdown()
        self._owns_ray = False

    def sharing(self, stock: deque[Any], places: int) -> RayPool:
        """A pool for one of several runs on the Ray that this one has joined; data are sent once.

        Args:
            stock: its actors come from there, as far as there are any, and go back when it stops.
            places: that it takes at most.
        """
        other = RayPool(self._placement)
        other._folders, other._stock, other._most = self._folders, stock, places
        other._shelf = self._shelf
        return other

    def room(self, config: RunConfig) -> int:
        """Places that the cluster has now; Ray must have been joined.

        Raises:
            PlacementError: if it has none.
        """
        return fit(self._of_actors(), config, ray.nodes())[1]

    def discard(self, stock: deque[Any], kept: int) -> None:
        """Ends actors of a stock until so many are left."""
        while len(stock) > kept:
            with contextlib.suppress(Exception):  # it may be gone already
                ray.kill(stock.popleft())

    @contextlib.contextmanager
    def joined(self) -> Iterator[Self]:
        """Joins or starts Ray for several runs: their stops leave it up, this ends it."""
        self._join()
        owned, self._owns_ray = self._owns_ray, False
        try:
            yield self
        finally:
            self.stop()
            if owned:
                ray.shutdown()

    def _collect(self, place: int) -> PoolEvent | None:
        slot = self._slots[place]
        call, slot.call = slot.call, None
        try:
            value = ray.get(call)
        except ActorUnavailableError as error:
            # The call may or may not have run. If the actor answers, it is asked again.
            log.info("place %d: %s", place, error)
            slot.probe = slot.probe or slot.actor.ping.remote()
            slot.resident.clear()
            return None
        except RayError as error:
            reason = str(error) if slot.ready else start_failure(str(error))
            return self._lose(place, reason, self._kind(slot, error))
        slot.heard, slot.probe = time.monotonic(), None
        if isinstance(value, PlaceLost):
            return self._lose(place, value.reason, value.kind)
        if not slot.ready:
            slot.ready, slot.node = True, value["node"]
            self._left.pop(place, None)
            return PlaceReady(place, value, slot.incarnation)
        work, slot.work = slot.work, None
        done: WorkDone | WorkFailed = replace(value, work=work, incarnation=slot.incarnation)
        return done

    def _answered(self, place: int, probe: Any) -> PlaceLost | None:  # noqa: ANN401 (of Ray)
        """An actor that was asked whether it lives has said so, or is gone."""
        slot = self._slots.get(place)
        if slot is None or slot.probe != probe:
            return None  # it has said so otherwise
        slot.probe = None
        try:
            ray.get(probe)
        except RayError as error:
            return self._lose(place, str(error), self._kind(slot, error))
        slot.heard = time.monotonic()
        if slot.call is None and slot.work is not None:
            self.submit(place, slot.work)
        elif slot.call is None and not slot.ready:
            slot.call = slot.actor.info.remote()
        return None

    def _silent(self) -> list[PoolEvent]:
        """Asks actors that have long said nothing; gives up those that do not answer."""
        now, events = time.monotonic(), list[PoolEvent]()
        for place, slot in list(self._slots.items()):
            if not slot.ready or slot.work is None:
                continue
            silent = now - slot.heard
            if slot.probe is None and silent > SILENCE:
                slot.probe = slot.actor.ping.remote()
            elif silent > SILENCE + self._placement.answer_timeout:
                reason = f"the actor has not answered for {silent:.0f} s"
                events.append(self._lose(place, reason, "infrastructure"))
        return events

    def _draining(self) -> list[PoolEvent]:
        """Places on nodes that are about to go away."""
        now = time.monotonic()
        if now - self._drain_seen > DRAIN_EVERY:
            self._drain_seen, self._drained = now, _draining_nodes()
        events: list[PoolEvent] = []
        for place, slot in self._slots.items():
            if slot.node in self._drained and not slot.draining:
                slot.draining = True
                reason = f"node {slot.node} is draining"
                events.append(PlaceDraining(place, reason, slot.incarnation))
        return events

    def _kind(self, slot: _Slot, error: Exception) -> LostReason:
        """Whose fault a loss was."""
        if isinstance(error, OutOfMemoryError):
            return "memory"
        if isinstance(error, RayTaskError | RuntimeEnvSetupError):
            return "fatal"
        if isinstance(error, RayActorError) and error.actor_init_failed:
            return "fatal"  # what a constructor raised it will raise again
        if slot.node in self._drained or getattr(error, "preempted", False):
            return "preempted"
        return "infrastructure" if slot.ready else "start"

    def _elsewhere(self, place: int) -> dict[str, Any]:
        """Keeps a place away from nodes that it was lost on or go away, if another has room."""
        avoided = {*self._drained, self._left.get(place, "")} - {""}
        if not avoided:
            return {}
        labels = self._options.get("label_selector", {})
        return {
            "label_selector": {**labels, NODE_LABEL: f"!in({','.join(sorted(avoided))})"},
            "fallback_strategy": [{"label_selector": labels}],
        }

    def _end(self, slot: _Slot) -> None:
        with contextlib.suppress(Exception):  # it may be gone already
            ray.kill(slot.actor)

    def _make_resident(self, slot: _Slot, work: Advance) -> bool:
        """Whether the actor holds the pack there; keeps account of what its worker keeps."""
        pack = work.chains[0] // self._together
        held = slot.resident.pop(pack, None)
        slot.resident[pack] = work.first_draw + work.draws
        while len(slot.resident) > self._capacity:
            slot.resident.popitem(last=False)
        return held == work.first_draw

    def _lose(self, place: int, reason: str, kind: LostReason) -> PlaceLost:
        """Forgets a place."""
        slot = self._slots.pop(place)
        if slot.node:
            self._left[place] = slot.node
        self._end(slot)
        return PlaceLost(place, reason.strip(), kind, slot.incarnation)

    def _overdue(self) -> list[PoolEvent]:
        """Places that have not come up in time; says which are waited for."""
        now, waiting = time.monotonic(), [p for p, s in self._slots.items() if not s.ready]
        if waiting and now - max(self._said, self._slots[waiting[0]].began) > SAY_EVERY:
            self._said = now
            log.warning("waiting for %d actors to start: %s", len(waiting), self._options)
        limit = self._placement.start_timeout
        late = [p for p in waiting if now - self._slots[p].began > limit]
        reason = f"an actor must start within start_timeout={limit:g} s, it did not"
        return [self._lose(place, reason, "fatal") for place in late]

    def _join(self) -> None:
        """Joins the Ray that is meant; starts one on this machine if there is none."""
        if ray.is_initialized():
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        address, environment = self._placement.address, self._placement.runtime_env or {}
        self._folders = {name: environment[name] for name in FOLDERS if name in environment}
        quiet["runtime_env"] = self._folders
        try:
            with _own_sigterm():
                ray.init(address=address, **quiet) if address else ray.init(
                    include_dashboard=False, **quiet
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PlacementError(
                f"a Ray cluster must answer at address={address!r}, it does not: {error}"
            ) from None
        self._owns_ray = True

    def _located(self, spec: ChainSpec) -> ChainSpec:
        """The recipe, with its rows, or its shards one by one, in the object store."""
        if isinstance(spec.rows, ShardedRows):
            return replace(spec, rows=spec.rows.located(self._stored))
        rows: Any = _Sent(self._stored(spec.rows))
        return replace(spec, rows=rows)

    def _stored(self, rows: Rows) -> _Stored:
        """Rows in the object store, where runs that share them find them."""
        if rows not in self._shelf:
            self._shelf[rows] = ray.put(rows)
        return _Stored(self._shelf[rows])

    def _of_actors(self) -> PlacementConfig:
        """What is left for actors to ask: Ray takes local folders only from the whole job."""
        environment = self._placement.runtime_env or {}
        rest = {name: value for name, value in environment.items() if name not in self._folders}
        if folders := local_folders(rest):
            raise PlacementError(
                "placement.runtime_env can send local folders only when Ray is joined, and this "
                f"process had joined it before: give {folders} to its ray.init(runtime_env=...)"
            )
        return self._placement.model_copy(update={"runtime_env": rest})


@dataclass(frozen=True)
class _Stored:
    """Rows in the object store: on their node they are shared memory, elsewhere they are fetched.

    Args:
        reference: to them.
    """

    reference: Any

    def __call__(self) -> Rows:
        """The rows."""
        rows: Rows = ray.get(self.reference)
        return rows


class _Sent:
    """Stands for rows in the object store, and is unpickled as these.

    Args:
        stored: where they are.
    """

    def __init__(self, stored: _Stored) -> None:
        self._stored = stored

    def __reduce__(self) -> tuple[_Stored, tuple[()]]:
        return self._stored, ()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """ray.init() puts its handler of SIGTERM, which exits at once, in place of the driver's."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _draining_nodes() -> dict[str, int]:
    """Nodes that will go away, and when. Ray has no public call for that."""
    with contextlib.suppress(Exception):  # a private call: it may be gone in another version
        from ray._private.state import state

        return dict(state.get_draining_nodes())
    return {}
