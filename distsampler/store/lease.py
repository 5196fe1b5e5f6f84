"""One driver a run: a lease with a heartbeat and an epoch.

Whether another driver is alive is judged by watching for a new heartbeat on the own monotonic
clock: clocks of different machines, and clocks that jump, decide nothing.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from distsampler.errors import StoreError
from distsampler.store.files import Files, StoreFault

NAME = "lease.json"
BEAT_SECONDS = 2.0
EXPIRY_SECONDS = 30.0  # without a heartbeat, after which another driver may take over
FRESH_SECONDS = 0.2  # how long the guard trusts what it has read


class Lease:
    """The right to write to a run directory: within, every write checks that it is still held.

    Raises:
        StoreError: if another driver has it (it says where that runs, and how old its heartbeat
            is), or the store cannot be written.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        before = _read(files)
        if before is not None and not before["released"]:
            _wait_for_the_end(files, before)
            before = _read(files) or before
        self._record: dict[str, Any] = {
            "epoch": 1 if before is None else before["epoch"] + 1,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "pids": _pids(),
            "nonce": uuid.uuid4().hex,
            "beat": 0,
            "time": time.time(),
            "released": False,
        }
        self._lock, self._over = threading.Lock(), threading.Event()
        self._read_at = -1.0
        try:
            self._write()
        except OSError as error:
            raise StoreError(f"the store {files} cannot be written: {error}") from error
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")

    @property
    def epoch(self) -> int:
        """The number of drivers that the run has had."""
        return int(self._record["epoch"])

    def __enter__(self) -> Self:
        self._thread.start()
        self._files.guard = self.check
        return self

    def __exit__(self, *error: object) -> None:
        self._files.guard = lambda: None
        self._over.set()
        self._thread.join()
        with suppress(StoreFault, OSError):  # the run itself has raised it before
            self.check(fresh=True)
            self._record["released"] = True
            self._write()

    def check(self, fresh: bool = False) -> None:
        """Check that the run is still this driver's.

        Raises:
            StoreFault: if another has taken over, or the store is gone.
        """
        if not fresh and time.monotonic() - self._read_at < FRESH_SECONDS:
            return
        with self._lock:
            record = _read(self._files)
        if record is None:
            raise StoreFault(f"the store {self._files} was deleted, or its {NAME}, while in use")
        if record["nonce"] != self._record["nonce"]:
            raise StoreFault(
                f"this driver (epoch {self.epoch}) was silent so long that {_holder(record)} has "
                f"taken over {self._files} (epoch {record['epoch']}): nothing is lost, that one "
                "continues"
            )
        self._read_at = time.monotonic()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(StoreFault, OSError):  # the guard raises it too, where it is heard
                self.check(fresh=True)
                self._record.update(beat=self._record["beat"] + 1, time=time.time())
                self._write()

    def _write(self) -> None:
        """Write past the guard, which reads this very file."""
        unguarded = Files(self._files.root)
        with self._lock:
            unguarded.write(NAME, json.dumps(self._record).encode())


def heartbeat(files: Files) -> float | None:
    """Return the age of the last heartbeat in seconds; None where nobody drives the run."""
    record = _read(files)
    if record is None or record["released"]:
        return None
    return max(0.0, time.time() - float(record.get("time", 0.0)))


def ago(seconds: float | None) -> str:
    """Return an age in the largest unit that fits."""
    if seconds is None:
        return "-"
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _wait_for_the_end(files: Files, first: dict[str, Any]) -> None:
    """Return once the holder is known to be gone; raise StoreError as soon as its heart beats."""
    here = first["host"] == socket.gethostname() and first.get("pids") == _pids()
    if here and _process(first["pid"]) != first["process"]:
        return
    began = time.monotonic()
    while time.monotonic() - began < EXPIRY_SECONDS:
        record = _read(files)
        if record is None or record["released"]:
            return
        if (record["nonce"], record["beat"]) != (first["nonce"], first["beat"]):
            raise StoreError(
                f"the run in {files} belongs to {_holder(record)}: wait for it, stop it, or give "
                "another store"
            )
        time.sleep(min(0.2, BEAT_SECONDS / 4))


def _holder(record: dict[str, Any]) -> str:
    age = time.time() - record["time"]
    return (
        f"the driver with pid {record['pid']} on host {record['host']}, whose last heartbeat is "
        f"{age:.0f} s old"
    )


def _process(pid: int) -> str:
    """A text that tells a process from a later one of the same pid; empty if there is none."""
    with suppress(OSError):
        boot = _boot()
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if stat[0] in "ZX" else f"{boot} {stat[19]}"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        return "alive"
    return "alive" if not Path("/proc/self").exists() else ""


def _pids() -> str:
    """A text that is equal where pids mean the same: for one boot and one container."""
    with suppress(OSError):
        return f"{_boot()} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _read(files: Files) -> dict[str, Any] | None:
    """The lease on record; a damaged one has no holder."""
    try:
        record: dict[str, Any] = json.loads(files.read(NAME))
        return record if {"nonce", "epoch", "released", "process"} <= set(record) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreFault(f"{files.path(NAME)} cannot be read: {error}") from error
    except (ValueError, TypeError):
        return None
