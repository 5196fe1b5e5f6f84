"""Running: a run that goes on in a thread of this process while its owner does other things."""

from __future__ import annotations

import threading
from collections.abc import Callable

from distsampler.analysis.run import Run
from distsampler.execution.progress import Observer, Snapshot


class Running:
    """A run under way.

    Args:
        job: runs it; takes an observer and a function that gives a reason to stop.
    """

    def __init__(self, job: Callable[[Observer, Callable[[], str | None]], Run]) -> None:
        self._progress: Snapshot | None = None
        self._reason: str | None = None
        self._result: Run | None = None
        self._error: BaseException | None = None
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
        """Asks for a clean end: what is in flight is collected and committed. Does not wait."""
        self._reason = "stopped by its owner"

    def wait(self, timeout: float | None = None) -> Run:
        """The run, when it has ended.

        Raises:
            TimeoutError: if it has not after ``timeout`` seconds; it goes on.
            DistsamplerError: what ``sample`` would have raised.
        """
        self._thread.join(timeout)
        if not self.done:
            raise TimeoutError(f"the run has not ended after {timeout:g} s; it goes on")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def show(self, snapshot: Snapshot) -> None:
        """Called by the driver several times a second."""
        self._progress = snapshot

    def _run(self, job: Callable[[Observer, Callable[[], str | None]], Run]) -> None:
        try:
            self._result = job(self, lambda: self._reason)
        except BaseException as error:  # raised again by wait
            self._error = error
