"""Pools: where chains run. What a pool must do and may do, and the pool of one process.

A pool has places, numbered from 0. A place does one work at a time and reports how it went. The
incarnation of an event, which start of the place it is about, is filled in by the driver.
``SerialPool`` has one place, in this process; ``ray_pool`` has one for each Ray actor.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from distsampler.chains.worker import ALONE, Result, Work, Worker
from distsampler.config import RunConfig
from distsampler.data.shards import Shard, ShardSummary
from distsampler.errors import ConfigError, DistsamplerError, RunFailed
from distsampler.execution.placement import CUBLAS
from distsampler.models.replica import ChainSpec

if TYPE_CHECKING:  # it imports xarray, which takes a second and no actor needs
    from distsampler.execution.progress import Observer

LostReason = Literal["infrastructure", "preempted", "memory", "start", "hung", "fatal"]


@dataclass(frozen=True)
class PlaceReady:
    """A place is up; its info says where: host, process, device."""

    place: int
    info: Mapping[str, str]
    incarnation: int = 1


@dataclass(frozen=True)
class WorkDone:
    """A place has done its work."""

    place: int
    work: Work
    result: Result = field(repr=False)
    seconds: float = 0.0
    incarnation: int = 1


@dataclass(frozen=True)
class WorkFailed:
    """The work's mathematics or the user's code raised; the place lives."""

    place: int
    work: Work
    error: DistsamplerError
    incarnation: int = 1


@dataclass(frozen=True)
class PlaceLost:
    """A place is gone, and its work with it; a fatal loss would only repeat itself."""

    place: int
    reason: str
    kind: LostReason = "infrastructure"
    incarnation: int = 1


@dataclass(frozen=True)
class PlaceDraining:
    """A place's node will go away: its work may end, new work would be lost."""

    place: int
    reason: str
    incarnation: int = 1


PoolEvent = PlaceReady | WorkDone | WorkFailed | PlaceLost | PlaceDraining


class ChainPool(Protocol):
    """Where work is done."""

    def start(self, spec: ChainSpec, places: Sequence[int]) -> Sequence[int]:
        """Begin to start places, or to start them again; return those there is room for.

        Once a place is started again, nothing more is reported of what it was before.
        """

    def submit(self, place: int, work: Work) -> None:
        """Give a ready place its next work."""

    def wait(self, timeout: float) -> Sequence[PoolEvent]:
        """Return what has happened since the last call, after at most timeout seconds."""

    def stop(self) -> None:
        """End every place, and what this pool itself started."""


@runtime_checkable
class KnowsPlaces(Protocol):
    """A pool that knows before its start how many places it will have."""

    def place_count(self) -> int:
        """Return the number of places."""


@runtime_checkable
class AnswersAtOnce(Protocol):
    """A pool whose place is this process, which needs no start to do a work."""

    def answer(self, spec: ChainSpec, work: Work) -> Result:
        """Do one work, and return what came of it."""


@runtime_checkable
class InspectsShards(Protocol):
    """A pool that can inspect shards of data where its chains will run."""

    def inspect_shards(
        self, sources: Sequence[Shard], rows: Sequence[NDArray[np.int64] | None]
    ) -> Sequence[ShardSummary]:
        """Return the size, and the digest or the examples of some rows, of each shard."""


@runtime_checkable
class LocatesWork(Protocol):
    """A pool that can tell where the code of a place is."""

    def where(self, place: int) -> str:
        """Return file, line and function that the place was at when last asked; "": unknown."""


@runtime_checkable
class ExportsMetrics(Protocol):
    """A pool that has a monitoring system to which the progress of a run can go."""

    def metrics(self, run: str) -> Observer:
        """Return what passes the progress of the run of this name on."""


class LendsPlaces(Protocol):
    """A pool on a cluster that several runs share, each with a pool of its own.

    Idle actors go from run to run in a stock, which its owner keeps and only the pools look into.
    """

    def room(self, config: RunConfig) -> int:
        """Return the number of places that the cluster has now."""

    def sharing(self, stock: deque[Any], places: int) -> ChainPool:
        """Return a pool of at most ``places`` places, which takes idle actors from the stock."""

    def discard(self, stock: deque[Any], kept: int) -> None:
        """End actors of the stock until at most ``kept`` are left."""


class SerialPool:
    """One place in this process, where all chains take turns: for debugging and small problems."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._events: deque[PoolEvent] = deque()
        self._queue: deque[tuple[int, Work]] = deque()

    def place_count(self) -> int:
        """Return 1."""
        return 1

    def start(self, spec: ChainSpec, places: Sequence[int]) -> Sequence[int]:
        """Start the first of the places.

        Raises:
            ConfigError: if the config wants a GPU and there is none.
        """
        device = _device(spec.config)
        self._worker = Worker(spec, device, capacity=spec.config.chains)
        self._events.append(PlaceReady(places[0], place_info(device)))
        return places[:1]

    def answer(self, spec: ChainSpec, work: Work) -> Result:
        """Do one work, and return what came of it.

        Raises:
            DistsamplerError: if the work failed.
        """
        with ALONE:
            done = perform(Worker(spec, _device(spec.config)), 0, work)
        match done:
            case WorkDone():
                return done.result
            case WorkFailed():
                raise done.error
            case PlaceLost():
                raise RunFailed(f"no place could begin: {done.reason}")

    def submit(self, place: int, work: Work) -> None:
        """Keep the work until the next wait."""
        self._queue.append((place, work))

    def wait(self, timeout: float) -> Sequence[PoolEvent]:
        """Do one work, if there is any, and return what has happened."""
        if self._queue and self._worker is not None:
            place, work = self._queue.popleft()
            with ALONE:  # other runs of this process take turns
                self._events.append(perform(self._worker, place, work))
        elif not self._events:
            time.sleep(timeout)
        events = list(self._events)
        self._events.clear()
        return events

    def stop(self) -> None:
        """Drop the worker and its work."""
        self._worker = None
        self._queue.clear()


def _device(config: RunConfig) -> torch.device:
    """The device of a run in this process."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' needs a GPU that torch sees, and here is none: use cpu")
    device = torch.device("cuda" if config.device == "cuda" else "cpu")
    if device.type == "cuda" and config.deterministic:
        os.environ.setdefault(*CUBLAS)
    return device


def perform(worker: Worker, place: int, work: Work) -> WorkDone | WorkFailed | PlaceLost:
    """Do the work and report how it went; a device without memory is a place that is lost."""
    began = time.perf_counter()
    try:
        result = worker.perform(work)
    except DistsamplerError as error:
        return WorkFailed(place, work, error)
    except torch.OutOfMemoryError as error:
        return PlaceLost(place, str(error), "memory")
    return WorkDone(place, work, result, time.perf_counter() - began)


def place_info(device: torch.device) -> dict[str, str]:
    """Return what people may want to know of a place in this process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "device": f"{device} ({name})" if name != "cpu" else "cpu",
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
