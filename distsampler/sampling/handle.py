"""Running: a run that goes on in a thread of this process while its owner does other things."""

import threading
from collections.abc import Callable
from concurrent import futures

from distsampler.analysis.run import Run
from distsampler.execution.progress import Observer, Snapshot
from distsampler.sampling.stopping import Stopped

RunJob = Callable[[Observer, Stopped], Run]


class Running:
    """A run under way.

    Args:
        job: runs it to its end; see ``Job.run``.

    Attributes:
        progress: how far it is; None until it has begun.
    """

    def __init__(self, job: RunJob) -> None:
        self.progress: Snapshot | None = None
        self._reason: str | None = None
        self._result = futures.Future[Run]()
        threading.Thread(target=self._run, args=(job,), name="distsampler").start()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._result.done()

    def stop(self) -> None:
        """Ask for a clean end, and do not wait for it.

        Blocks under way are still committed, unless they take longer than 30 seconds.
        """
        self._reason = "stopped by its owner"

    def wait(self, timeout: float | None = None) -> Run:
        """Wait until the run has ended, and return it.

        Raises:
            TimeoutError: if it has not ended after ``timeout`` seconds; it continues.
            DistsamplerError: what ``sample`` would have raised.
        """
        futures.wait([self._result], timeout)
        if not self.done:
            raise TimeoutError(f"the run has not ended after {timeout:g} s; it goes on")
        return self._result.result()

    def _run(self, job: RunJob) -> None:
        try:
            self._result.set_result(job(self._show, lambda: self._reason))
        except BaseException as error:  # raised again by wait
            self._result.set_exception(error)

    def _show(self, snapshot: Snapshot) -> None:
        self.progress = snapshot
