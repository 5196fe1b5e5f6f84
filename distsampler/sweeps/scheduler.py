"""Scheduler: runs cells on a fleet, each in a thread, and begins the next where places are free."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from distsampler.analysis.run import Run
from distsampler.execution.pool import ChainPool
from distsampler.execution.progress import Observer
from distsampler.sampling.handle import Running
from distsampler.sweeps.cells import Cell
from distsampler.sweeps.fleet import Fleet

PAUSE, LOOK = 0.02, 1.0  # seconds between two looks at the threads, and at the cluster's nodes

Stopped = Callable[[], str | None]
Outcome = Run | Exception


class Scheduler:
    """Runs cells until all have ended, or it is stopped.

    Args:
        fleet: lends them places.
        run: runs one, in a thread of its own.
        ready: whether one may begin.
        ended: told how each has ended, in this thread.
        stopped: a reason to stop: what runs is then ended cleanly, and nothing more begins.
    """

    def __init__(
        self,
        fleet: Fleet,
        run: Callable[[Cell, ChainPool, Observer, Stopped], Run],
        ready: Callable[[Cell], bool],
        ended: Callable[[Cell, Outcome], None],
        stopped: Stopped,
    ) -> None:
        self._fleet, self._run, self._ready = fleet, run, ready
        self._ended, self._stopped = ended, stopped
        self._running: dict[Cell, tuple[Running, ChainPool]] = {}
        self._looked = -LOOK

    def run(self, cells: Sequence[Cell]) -> None:
        """Runs the cells, in their order as far as they are ready."""
        todo = list(cells)
        try:
            while todo or self._running:
                if self._stopped() is not None:
                    todo.clear()
                    self._stop()
                self._begin(todo)
                time.sleep(PAUSE)
                self._collect()
        finally:
            self._stop()
            for running, _ in self._running.values():
                _outcome(running)

    def _begin(self, todo: list[Cell]) -> None:
        """Begins as many cells as there are places for."""
        while todo and time.monotonic() - self._looked > LOOK:
            cell = next(filter(self._ready, todo), None)
            left = len(todo) + len(self._running)
            pool = None if cell is None else self._fleet.lend(left)
            if cell is None or pool is None:
                self._looked = time.monotonic()
                return
            todo.remove(cell)
            self._running[cell] = self._thread(cell, pool), pool

    def _thread(self, cell: Cell, pool: ChainPool) -> Running:
        return Running(lambda observer, stopped: self._run(cell, pool, observer, stopped))

    def _collect(self) -> None:
        for cell, (running, pool) in list(self._running.items()):
            if running.done:
                del self._running[cell]
                self._fleet.take_back(pool)
                self._looked = -LOOK
                self._ended(cell, _outcome(running))

    def _stop(self) -> None:
        for running, _ in self._running.values():
            running.stop()


def _outcome(running: Running) -> Outcome:
    try:
        return running.wait()
    except Exception as error:  # the user's code too: whatever came is the cell's own
        return error
