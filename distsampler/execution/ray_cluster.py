"""The Ray cluster of a pool: joining it, what it has room for, and the data in its object store."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import ray

from distsampler.config import PlacementConfig, RunConfig
from distsampler.data.rows import Rows
from distsampler.errors import PlacementError
from distsampler.execution.placement import fit, local_folders
from distsampler.models.replica import ChainSpec
from distsampler.redaction import missing

ANSWER_SECONDS = 4.0  # in which a cluster must answer, and answer again
# What a client of HTTP/2 says first, and an empty frame of settings; a server answers with its own.
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
FOLDERS = ("working_dir", "py_modules", "excludes")  # of a runtime environment


class RayCluster:
    """Ray, as one pool or several that share it have joined it.

    Args:
        placement: where the cluster is, and what an actor asks of it.
    """

    def __init__(self, placement: PlacementConfig) -> None:
        self.placement = placement
        self._owned = False  # whether Ray was started here, and is to be ended here
        self._folders: dict[str, Any] = {}  # folders that the whole job has
        self._shelf: WeakKeyDictionary[Rows, Any] = WeakKeyDictionary()  # rows in the object store

    def join(self) -> None:
        """Join the Ray that is meant; start one on this machine if there is none.

        Raises:
            PlacementError: if no cluster answers at the address.
        """
        if ray.is_initialized():
            return
        address, environment = self.placement.address, self._environment()
        self._folders = {name: environment[name] for name in FOLDERS if name in environment}
        try:
            where: dict[str, Any] = {"address": address or meant_by_ray()}
            alone = where["address"] in (None, "local")
            if alone:
                where = {"address": "local", "include_dashboard": False}
            else:
                check_answers(where["address"])
            with _own_sigterm(), _loopback_only() if alone else contextlib.nullcontext():
                ray.init(
                    **where,
                    runtime_env=self._folders,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PlacementError(
                f"a Ray cluster must answer at address={address!r}, it does not: {error}"
            ) from None
        self._owned = True

    def leave(self) -> None:
        """End Ray if it was started here; a Ray that is gone takes what lay in its store along."""
        up = ray.is_initialized()
        if self._owned or not up:
            self._shelf.clear()
        if self._owned and up:
            ray.shutdown()
        self._owned = False

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Join Ray for several runs: their ``leave`` leaves it up, the end of this does not."""
        self.join()
        owned, self._owned = self._owned, False
        try:
            yield
        finally:
            self._owned = owned
            self.leave()

    def options(self, config: RunConfig) -> tuple[dict[str, Any], int]:
        """Return an actor's options, as Ray takes them, and how many actors there is room for.

        Raises:
            PlacementError: if there is room for none.
        """
        nodes, held = ray.nodes(), held_here()
        for node in nodes:
            if held and node["NodeID"] == ray.get_runtime_context().get_node_id():
                have = node["Resources"]
                node["Resources"] = {k: have[k] - held.get(k, 0.0) for k in have}
        try:
            return fit(self._asked(), config, nodes)
        except PlacementError as error:
            if not held:
                raise
            raise PlacementError(
                f"{error}; the actor that calls this holds {held} of it all the while: start it "
                "with num_cpus=0"
            ) from None

    def free(self) -> str:
        """Return what of the cluster nobody holds, as in a sentence."""
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        return f"the cluster has {free or 'nothing'} free"

    def task_options(self) -> dict[str, Any]:
        """Return the options of a task that runs where actors may run."""
        asked = self._asked()
        chosen = {"label_selector": asked.label_selector, "runtime_env": asked.runtime_env}
        return {
            "num_cpus": self.placement.cpus_per_chain,
            "max_retries": 0,
            **{name: value for name, value in chosen.items() if value is not None},
        }

    def located(self, spec: ChainSpec) -> ChainSpec:
        """Return the recipe, with its rows, or its shards one by one, in the object store."""
        return replace(spec, rows=spec.rows.located(self.stored))

    def stored(self, rows: Rows) -> StoredRows:
        """Put rows into the object store, once for all runs that share them."""
        if rows not in self._shelf:
            self._shelf[rows] = ray.put(rows)
        return StoredRows(self._shelf[rows])

    def _environment(self) -> dict[str, Any]:
        """The runtime environment; what a store kept no secret of is read from this process'."""
        environment = dict(self.placement.runtime_env or {})
        if variables := environment.get("env_vars"):
            here = {name: os.environ[name] for name in missing(variables) if name in os.environ}
            environment["env_vars"] = {**variables, **here}
        if lost := [f"placement.runtime_env.{path}" for path in missing(environment)]:
            again = " ".join(f"--set {path}=..." for path in lost)
            raise PlacementError(
                f"{', '.join(lost)} must be given again, for secrets are not kept: set an "
                "environment variable of the same name, give the run's config again from Python or "
                f"its file, with resume='must', or say 'distsampler resume DIR {again}'"
            )
        return environment

    def _asked(self) -> PlacementConfig:
        """What is left for actors to ask: Ray takes local folders only from the whole job."""
        environment = self._environment()
        rest = {name: value for name, value in environment.items() if name not in self._folders}
        if folders := local_folders(rest):
            raise PlacementError(
                "placement.runtime_env can send local folders only when Ray is joined, and this "
                f"process had joined it before: give {folders} to its ray.init(runtime_env=...)"
            )
        return self.placement.replaced(runtime_env=rest)


@dataclass(frozen=True)
class StoredRows:
    """Rows in the object store: shared memory on their node, fetched elsewhere."""

    reference: Any  # Ray's reference to the rows

    def __call__(self) -> Rows:
        """Return the rows."""
        rows: Rows = ray.get(self.reference)
        return rows


def meant_by_ray() -> str | None:
    """Return the address of the cluster that ``ray.init()`` would join; None: of none."""
    address = os.environ.get("RAY_ADDRESS") or None
    if address in (None, "auto"):
        from ray._private.services import canonicalize_bootstrap_address  # no public call has it

        address = canonicalize_bootstrap_address(address)
    return address


def check_answers(address: str) -> None:
    """Check that somebody who speaks gRPC answers at an address: Ray itself tries for minutes.

    Raises:
        PlacementError: if nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto", or another scheme
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as line:
            if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
                line.sendall(HTTP2)
                if not line.recv(1):
                    raise ConnectionError("it hangs up")
    except OSError as error:
        raise PlacementError(
            f"a Ray cluster must answer at {address!r}, which placement.address, RAY_ADDRESS or "
            f"the last `ray start` of this machine names, and none does ({error}): start it, name "
            "another, or use placement.address='local' for a Ray of this run's own"
        ) from None


def held_here() -> dict[str, float]:
    """Return what this process holds of the cluster for good: it may be an actor itself."""
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE or context.get_actor_id() is None:
        return {}  # a task's CPU is free while it waits
    return dict(context.get_assigned_resources())


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Let the Ray that is started meanwhile listen on this machine only.

    Ray does so where it cannot be a cluster, on macOS and Windows, and has no option for it.
    """
    from ray._private import ray_constants

    name, before = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER
    inherited = os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[name] = "0"  # for its processes
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[name]
        if inherited is not None:
            os.environ[name] = inherited


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """ray.init() replaces the driver's handler of SIGTERM by its own, which exits at once."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def draining_nodes() -> dict[str, int]:
    """Return the nodes that will go away, and when. Ray has no public call for that."""
    with contextlib.suppress(Exception):  # a private call: another version may not have it
        from ray._private.state import state

        return dict(state.get_draining_nodes())
    return {}
