"""Reasons to end a run cleanly before it is finished: a signal, or no time left."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

Stopped = Callable[[], str | None]
"""Asked several times a second: why the run must end; None while it may continue."""


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
