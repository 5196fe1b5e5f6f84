"""Scheduler: runs cells on a fleet, each in a thread, and begins the next where places are free."""

import time
from collections.abc import Sequence
from typing import Protocol

from distsampler.analysis.run import Run
from distsampler.execution.pool import ChainPool
from distsampler.execution.progress import Observer
from distsampler.sampling.handle import Running
from distsampler.sampling.stopping import Stopped
from distsampler.sweeps.cells import Cell
from distsampler.sweeps.fleet import Fleet

POLL_EVERY, LEND_EVERY = 0.02, 1.0  # seconds between two looks at threads, at free places

Outcome = Run | Exception


class CellWork(Protocol):
    """What is done for each cell."""

    def ready(self, cell: Cell) -> bool:
        """Return whether a cell may begin."""
        ...

    def run(self, cell: Cell, pool: ChainPool, observer: Observer, stopped: Stopped) -> Run:
        """Run a cell; called in a thread of its own."""
        ...

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        """Take note of how a cell has ended; called in the scheduler's thread."""
        ...


class Scheduler:
    """Runs cells until all have ended, or it is stopped.

    Args:
        fleet: lends places to the cells.
        work: runs the cells, and takes note of how each ends.
        stopped: gives a reason to stop: running cells are then ended cleanly, and no other begins.
    """

    def __init__(self, fleet: Fleet, work: CellWork, stopped: Stopped) -> None:
        self._fleet, self._work, self._stopped = fleet, work, stopped
        self._running: dict[Cell, tuple[Running, ChainPool]] = {}
        self._asked = -LEND_EVERY

    def run(self, cells: Sequence[Cell]) -> None:
        """Run the cells, in their order as far as they are ready."""
        todo = list(cells)
        try:
            while todo or self._running:
                if self._stopped() is not None:
                    todo.clear()
                    self._stop()
                self._begin(todo)
                time.sleep(POLL_EVERY)
                self._collect()
        finally:
            self._stop()
            for running, _ in self._running.values():
                _outcome(running)

    def _begin(self, todo: list[Cell]) -> None:
        """Begin as many cells as there are places for."""
        while todo and time.monotonic() - self._asked > LEND_EVERY:
            cell = next(filter(self._work.ready, todo), None)
            left = len(todo) + len(self._running)
            pool = None if cell is None else self._fleet.lend(left)
            if cell is None or pool is None:
                self._asked = time.monotonic()
                return
            todo.remove(cell)
            self._running[cell] = self._thread(cell, pool), pool

    def _thread(self, cell: Cell, pool: ChainPool) -> Running:
        return Running(lambda observer, stopped: self._work.run(cell, pool, observer, stopped))

    def _collect(self) -> None:
        for cell, (running, pool) in list(self._running.items()):
            if running.done:
                del self._running[cell]
                self._fleet.take_back(pool)
                self._asked = -LEND_EVERY
                self._work.ended(cell, _outcome(running))

    def _stop(self) -> None:
        for running, _ in self._running.values():
            running.stop()


def _outcome(running: Running) -> Outcome:
    try:
        return running.wait()
    except Exception as error:  # the user's code too: whatever came is the cell's own
        return error
