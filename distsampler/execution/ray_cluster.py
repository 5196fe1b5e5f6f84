"""The Ray cluster of a pool: joining it, what it has room for, and the data in its object store."""

from __future__ import annotations

import contextlib
import logging
import signal
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
        address, environment = self.placement.address, self.placement.runtime_env or {}
        self._folders = {name: environment[name] for name in FOLDERS if name in environment}
        where: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
        try:
            with _own_sigterm():
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
        return fit(self._asked(), config, ray.nodes())

    def task_options(self) -> dict[str, Any]:
        """Return the options of a task that runs where actors may run."""
        chosen = self._asked().model_dump(
            include={"label_selector", "runtime_env"}, exclude_none=True
        )
        return {"num_cpus": self.placement.cpus_per_chain, "max_retries": 0, **chosen}

    def located(self, spec: ChainSpec) -> ChainSpec:
        """Return the recipe, with its rows, or its shards one by one, in the object store."""
        return replace(spec, rows=spec.rows.located(self.stored))

    def stored(self, rows: Rows) -> StoredRows:
        """Put rows into the object store, once for all runs that share them."""
        if rows not in self._shelf:
            self._shelf[rows] = ray.put(rows)
        return StoredRows(self._shelf[rows])

    def _asked(self) -> PlacementConfig:
        """What is left for actors to ask: Ray takes local folders only from the whole job."""
        environment = self.placement.runtime_env or {}
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
