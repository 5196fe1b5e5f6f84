"""Reasons to end a run cleanly before it is finished: a signal, or no time left.

In Python, Ctrl-C has to end what called ``sample`` too: a KeyboardInterrupt goes on once all is
committed. After SIGTERM the run that was cut short is returned.
"""

import contextlib
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from distsampler.analysis.run import Run
from distsampler.errors import RunFailed
from distsampler.execution.display import say

T = TypeVar("T")
Stopped = Callable[[], str | None]
"""Asked several times a second: why the run must end; None while it may continue."""


class Interrupted(Exception):
    """Ctrl-C, after a clean end; users see a KeyboardInterrupt.

    Attributes:
        run: what was committed: a ``Run``, of a sweep a ``Sweep``; None: pilots were under way, and
            nothing was written.
    """

    def __init__(self, message: str, run: object = None) -> None:
        super().__init__(message)
        self.run: Any = run


class PilotsStopped(RunFailed):
    """Pilots were ended before they could choose anything."""


def interruptible(work: Callable[[Stopped], T]) -> T:
    """Return what work gives, which SIGINT and SIGTERM end early and cleanly.

    Raises:
        Interrupted: with what the work gave, if SIGINT came.
    """
    with stop_on_signals() as stopped:
        try:
            result = work(stopped)
        except PilotsStopped as error:
            if stopped() == signal.SIGINT.name:
                raise Interrupted(f"{error}; no draw was made, nothing was written") from None
            raise
    if stopped() == signal.SIGINT.name:
        raise Interrupted("interrupted by Ctrl-C; what was made is committed", result)
    return result


@contextlib.contextmanager
def keyboard_interrupt(how: Callable[[Any], str]) -> Iterator[None]:
    """Raise KeyboardInterrupt for Interrupted, its ``run`` attached.

    Not of a type of our own: of that, Python's exit status would not say SIGINT, and the loop of a
    shell around it would continue.

    Args:
        how: from what was committed to the words that say how to continue it, which are printed.
    """
    try:
        yield
    except Interrupted as error:
        if error.run is not None:
            say(f"{error}; {how(error.run)}")
        interrupt = KeyboardInterrupt(str(error))
        interrupt.run = error.run  # type: ignore[attr-defined]
        raise interrupt from None


def continuation(run: Run) -> str:
    """Return the call, and the command where there is one, that continues a run."""
    call = f"distsampler.resume({run.store!r}, model, data, loss)"
    if run.manifest.status == "finished":
        return f"the run had finished: distsampler.open({run.store!r})"
    if run.manifest.recipe is None:
        return f"continue with {call}"
    return f"continue with {call}, or the command: distsampler resume {shlex.quote(run.store)}"


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stopped]:
    """Let SIGINT or SIGTERM stop a run cleanly; the second signal ends the process at once."""
    caught = list[str]()

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            os._exit(130)
        caught.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # Python gives signals to the main thread only
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_after(seconds: float | None, stopped: Stopped) -> Stopped:
    """Add to other reasons that ``max_seconds`` are over, counted from now."""
    began = time.monotonic()

    def reason() -> str | None:
        if seconds is not None and time.monotonic() - began > seconds:
            return f"max_seconds={seconds:g} is over"
        return stopped()

    return reason
