"""ChainPool: places that do work, and what they report. SerialPool is this process."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch

from distsampler.chains.worker import ALONE, Result, Work, Worker
from distsampler.errors import ConfigError, DistsamplerError
from distsampler.execution.placement import CUBLAS
from distsampler.models.replica import ChainSpec

LostReason = Literal["infrastructure", "preempted", "memory", "start", "fatal"]


@dataclass(frozen=True)
class PlaceReady:
    """A place is up. Incarnation: how often the place was started, here and below."""

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
    """A place is gone, and the work it had with it.

    Args:
        place: number.
        reason: for people.
        kind: whose fault it was; a fatal loss would only repeat itself.
        incarnation: of the place.
    """

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
    """Where work is done. A place does one work at a time."""

    def start(self, spec: ChainSpec, places: Sequence[int]) -> Sequence[int]:
        """Begins to bring up places, or to bring them up again; returns those there is room for."""
        ...

    def submit(self, place: int, work: Work) -> None:
        """Gives a ready place its next work."""
        ...

    def wait(self, timeout: float) -> Sequence[PoolEvent]:
        """What has happened since; waits for something up to timeout seconds."""
        ...

    def stop(self) -> None:
        """Ends every place, and what this pool itself started."""
        ...


class SerialPool:
    """One place, in this process: for debugging, and for small problems; several take turns."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._starts = 0
        self._events: deque[PoolEvent] = deque()
        self._todo: deque[tuple[int, Work]] = deque()

    def start(self, spec: ChainSpec, places: Sequence[int]) -> Sequence[int]:
        """Accepts one place."""
        config = spec.config
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "device 'cuda' needs a GPU that torch sees, and here is none: use cpu"
            )
        device = torch.device("cuda" if config.device == "cuda" else "cpu")
        if device.type == "cuda" and config.deterministic:
            os.environ.setdefault(*CUBLAS)
        self._worker = Worker(spec, device, capacity=config.chains)
        self._starts += 1
        self._events.append(PlaceReady(places[0], place_info(device), self._starts))
        return places[:1]

    def submit(self, place: int, work: Work) -> None:
        """Keeps the work until the next wait."""
        self._todo.append((place, work))

    def wait(self, timeout: float) -> Sequence[PoolEvent]:
        """Does one work, or returns what is known."""
        if self._todo and self._worker is not None:
            place, work = self._todo.popleft()
            with ALONE:  # other runs of this process take turns
                done = perform(self._worker, place, work)
            self._events.append(replace(done, incarnation=self._starts))
        elif not self._events:
            time.sleep(timeout)
        events = list(self._events)
        self._events.clear()
        return events

    def stop(self) -> None:
        """Drops the worker and its work."""
        self._worker = None
        self._starts = 0
        self._todo.clear()


def perform(worker: Worker, place: int, work: Work) -> WorkDone | WorkFailed | PlaceLost:
    """Does the work and reports how it went; a device without memory is a place that is lost."""
    began = time.perf_counter()
    try:
        result = worker.perform(work)
    except DistsamplerError as error:
        return WorkFailed(place, work, error)
    except torch.OutOfMemoryError as error:
        return PlaceLost(place, str(error), "memory")
    return WorkDone(place, work, result, time.perf_counter() - began)


def place_info(device: torch.device) -> dict[str, str]:
    """What a place says of itself when it is up."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "device": f"{device} ({name})" if name != "cpu" else "cpu",
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
