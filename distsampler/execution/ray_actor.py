"""One Ray actor: what runs in its process, and what its driver knows of it.

Ray never restarts an actor or repeats a call here: it would do so with the chain's state gone and
without an error. The driver starts a place again, from what is committed.
"""

from __future__ import annotations

import contextlib
import sys
import sysconfig
import threading
import time
import traceback
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, RuntimeEnvSetupError

from distsampler.chains.worker import Advance, Work, Worker
from distsampler.data.shards import ShardSummary, inspect_shard
from distsampler.draws import AtAnchor
from distsampler.errors import ConfigError
from distsampler.execution.placement import check_versions, versions_here
from distsampler.execution.pool import (
    LostReason,
    PlaceLost,
    WorkDone,
    WorkFailed,
    perform,
    place_info,
)
from distsampler.models.numerics import ProcessSettings
from distsampler.references import follow_path, path_here

Handle = Any  # Ray's, of an actor: it has no type
_NAMED: Counter[str] = Counter()  # how often this process has given an actor a name


class _Name:
    """A ``__repr__`` that Ray does not take for a method.

    Where an actor's class cannot be imported, Ray makes every method raise, and calls ``__repr__``
    while it reports that: the worker would die before it has named its node and what it lacks.
    """

    def __get__(self, actor: ChainActor | None, owner: type) -> Any:  # noqa: ANN401 (of two kinds)
        return self if actor is None else lambda: f"ChainActor({actor._name})"


class ChainActor:
    """A worker in a process of its own.

    Args:
        versions: those of the driver.
        path: folders from which the driver imports.
        spec: the recipe, in the object store: its data are shared memory. It comes in a list, so
            that it is unpacked only after the versions were compared.
        device: "cpu" or "cuda".
        capacity: number of packs of chains that stay in memory.
        name: the actor's name in Ray's dashboard and logs: "run=digits, place=3".
    """

    def __init__(
        self,
        versions: dict[str, str],
        path: list[str],
        spec: list[Any],
        device: str,
        capacity: int,
        name: str,
    ) -> None:
        self._name, self._thread = name, 0
        check_versions(versions, ray.util.get_node_ip_address())
        import_as_driver(path)
        self._device = torch.device(device)
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "this actor was given a GPU, but torch sees none: install a CUDA build"
            )
        self._worker = Worker(ray.get(spec[0]), self._device, capacity)

    def adopt(self, spec: list[Any], capacity: int) -> dict[str, str]:
        """Work for another run from now on; return ``info``."""
        del self._worker  # its memory, before the other needs some
        self._worker = Worker(ray.get(spec[0]), self._device, capacity)
        return self.info()

    __repr__ = _Name()

    def info(self) -> dict[str, str]:
        """Return where the actor is."""
        node = ray.get_runtime_context().get_node_id()
        return {**place_info(self._device), "node": node}

    @ray.method(concurrency_group="probe")  # type: ignore[untyped-decorator]
    def ping(self) -> str:
        """Answer, in a thread of its own, while work is done; return the line that work is at."""
        return line_of(self._thread)

    def perform(
        self, place: int, work: Work, at_anchor: AtAnchor | None
    ) -> WorkDone | WorkFailed | PlaceLost:
        """Do the work; what was measured at w* comes beside it, as shared memory, and stays."""
        self._thread = threading.get_ident()
        if not isinstance(work, Advance):
            return perform(self._worker, place, work)
        done = perform(self._worker, place, replace(work, at_anchor=at_anchor))
        return done if isinstance(done, PlaceLost) else replace(done, work=replace(work, states=()))


def line_of(thread: int) -> str:
    """Return the line that a thread is at, outside of the standard library; "" if there is none."""
    frame, own = sys._current_frames().get(thread), sysconfig.get_path("stdlib")
    lines = traceback.extract_stack(frame) if frame else []
    for line in reversed(lines):
        if not line.filename.startswith(own) or "site-packages" in line.filename:
            return f"{line.filename}:{line.lineno}, in {line.name}"
    return ""


@dataclass
class Slot:
    """What the driver knows of the actor of one place."""

    actor: Handle
    call: Any  # that is awaited, if there is one
    ready: bool = False  # whether it has ever answered
    node: str = ""  # unknown until it is ready
    work: Work | None = None  # until the answer is here
    probe: Any = None  # an awaited call that only asks whether it lives
    at: str = ""  # line of code that it was at when it last answered that
    heard: float = field(default_factory=time.monotonic)  # from it, or of it for the first time
    draining: bool = False  # whether it was reported that its node will go away

    def ask(self) -> None:
        """Ask the actor whether it lives, unless it was asked."""
        self.probe = self.probe or self.actor.ping.remote()

    def lost_reason(self, error: Exception, drained: Container[str]) -> LostReason:
        """Return whose fault it was, by what Ray raised and the nodes that were to go away."""
        if isinstance(error, OutOfMemoryError):
            return "memory"
        if isinstance(error, RayTaskError | RuntimeEnvSetupError):
            return "fatal"
        if isinstance(error, RayActorError) and error.actor_init_failed:
            return "fatal"  # what a constructor raised it will raise again
        if self.node in drained or getattr(error, "preempted", False):
            return "preempted"
        return "infrastructure" if self.ready else "start"


def new_actor(
    run: str, place: int, options: dict[str, Any], spec: object, device: str, capacity: int
) -> Handle:
    """Start an actor, with a name of its own unless somebody else's in the namespace has it."""
    actor_class = ray.remote(concurrency_groups={"probe": 1})(ChainActor)
    arguments = (
        versions_here(),
        path_here(),
        [spec],
        device,
        capacity,
        f"run={run}, place={place}",
    )
    name = f"distsampler:{run}:place-{place}"
    _NAMED[name] += 1  # a name is free again only some time after its actor was killed
    if _NAMED[name] > 1:
        name += f":{_NAMED[name]}"
    try:
        return actor_class.options(name=name, **options).remote(*arguments)
    except ValueError:
        return actor_class.options(**options).remote(*arguments)


def import_as_driver(path: list[str]) -> None:
    """Let this process of a cluster import from the driver's folders too."""
    sent = ray.get_runtime_context().runtime_env
    follow_path(path, code_was_sent=any(sent.get(name) for name in ("working_dir", "py_modules")))


def inspect_there(
    path: list[str],
    settings: ProcessSettings,
    source: list[Any],
    rows: NDArray[np.int64] | None,
) -> ShardSummary:
    """Inspect a shard on a cluster, with the driver's folders and settings; it comes in a list."""
    import_as_driver(path)
    with settings.applied():
        return inspect_shard(ray.get(source[0]), rows)


def end(actor: Handle) -> None:
    """End an actor, if it is not gone already."""
    with contextlib.suppress(Exception):
        ray.kill(actor)
