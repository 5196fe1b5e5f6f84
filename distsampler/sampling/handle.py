"""Running: a run that goes on in a thread of this process while its owner does other things."""

from __future__ import annotations

import threading
from collections.abc import Callable

from distsampler.analysis.run import Run
from distsampler.execution.progress import Observer, Snapshot
from distsampler.sampling.stopping import Stopped

RunJob = Callable[[Observer, Stopped], Run]


class Running:
    """A run under way.

    Args:
        job: runs it to its end; see ``Job.run``.
    """

    def __init__(self, job: RunJob) -> None:
        self._progress: Snapshot | None = None
        self._reason: str | None = None
        self._outcome: Run | BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(job,), name="distsampler")
        self._thread.start()

    @property
    def progress(self) -> Snapshot | None:
        """How far it is; None until it has begun."""
        return self._progress

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Ask for a clean end, and do not wait for it: blocks under way are still committed."""
        self._reason = "stopped by its owner"

    def wait(self, timeout: float | None = None) -> Run:
        """Wait until the run has ended, and return it.

        Raises:
            TimeoutError: if it has not ended after ``timeout`` seconds; it continues.
            DistsamplerError: what ``sample`` would have raised.
        """
        self._thread.join(timeout)
        if not self.done:
            raise TimeoutError(f"the run has not ended after {timeout:g} s; it goes on")
        if isinstance(self._outcome, Run):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome

    def _show(self, snapshot: Snapshot) -> None:
        self._progress = snapshot

    def _run(self, job: RunJob) -> None:
        try:
            self._outcome = job(self._show, lambda: self._reason)
        except BaseException as error:  # raised again by wait
            self._outcome = error
