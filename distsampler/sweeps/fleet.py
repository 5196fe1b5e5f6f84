"""Fleet: the places that the cells of a sweep share, and which cell has how many of them.

A cell has its places to itself while it runs: one, as long as there are more cells than places, so
that no place waits for the others of its cell at an anchor pass, a gate round or the end; more,
when the cells become fewer. A place that a cell leaves is free for the next at once, and on Ray its
actor goes with it: to start one takes seconds (a process that imports torch), to give it another
model milliseconds.
"""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from distsampler.config import RunConfig
from distsampler.errors import PlacementError
from distsampler.execution.pool import ChainPool, LendsPlaces

MOST_CELLS = 64  # cells at a time: each has a thread in this process


class Fleet(Protocol):
    """What lends places to cells."""

    def lend(self, cells: int) -> ChainPool | None:
        """Return places for one more cell; None: there is no room now.

        Args:
            cells: number of cells that have not ended, this one included.
        """
        ...

    def take_back(self, pool: ChainPool) -> None:
        """Take back the places of a cell that has ended."""
        ...


class OneByOne:
    """A fleet that is one pool: a cell at a time."""

    def __init__(self, pool: ChainPool) -> None:
        self._pool, self._lent = pool, False

    def lend(self, cells: int) -> ChainPool | None:
        """Return the pool, unless a cell has it."""
        if self._lent:
            return None
        self._lent = True
        return self._pool

    def take_back(self, pool: ChainPool) -> None:
        """Take the pool back."""
        self._lent = False


class ActorFleet:
    """A fleet of a cluster's actors, which go from cell to cell.

    Args:
        cluster: a pool that has joined it.
        config: the sweep's: what an actor asks of the cluster.

    Raises:
        PlacementError: if the cluster has no place at all.
    """

    def __init__(self, cluster: LendsPlaces, config: RunConfig) -> None:
        self._cluster, self._config = cluster, config
        self._idle: deque[Any] = deque()  # actors; those of a cell are in a deque of its own
        self._lent: dict[int, tuple[int, deque[Any]]] = {}  # pool -> places, actors
        cluster.room(config)

    def lend(self, cells: int) -> ChainPool | None:
        """Return a pool with the cell's share of the places, if one is free."""
        slots = self._slots(cells)
        free = slots - sum(places for places, _ in self._lent.values())
        self._cluster.discard(self._idle, max(0, free))  # of nodes that are gone: others have more
        if free < 1 or len(self._lent) >= MOST_CELLS:
            return None
        places = min(free, math.ceil(slots / min(cells, MOST_CELLS)), self._config.chains)
        actors = deque(self._idle.popleft() for _ in range(min(places, len(self._idle))))
        pool = self._cluster.sharing(actors, places)
        self._lent[id(pool)] = places, actors
        return pool

    def take_back(self, pool: ChainPool) -> None:
        """Free the places of a cell; their actors may serve others."""
        _, actors = self._lent.pop(id(pool))
        self._idle.extend(actors)

    def dismiss(self) -> None:
        """End the actors that no cell has."""
        self._cluster.discard(self._idle, 0)

    def _slots(self, cells: int) -> int:
        """Places that there are; in a cluster that grows, as many as could be used."""
        try:
            room = self._cluster.room(self._config)
        except PlacementError:
            if not self._lent:
                raise
            return 0  # its nodes are gone for now; the cells that run will notice
        return room * cells if self._config.placement.autoscale else room


@contextmanager
def fleet_of(pool: ChainPool | None, config: RunConfig) -> Iterator[Fleet]:
    """Give a fleet until the sweep ends: one pool, or Ray actors by the config's placement."""
    if pool is not None:
        yield OneByOne(pool)
        return
    from distsampler.execution.ray_pool import RayPool  # it takes a second: a pool may be given

    with RayPool(config.placement).joined() as cluster:
        fleet = ActorFleet(cluster, config)
        try:
            yield fleet
        finally:
            fleet.dismiss()
