"""One driver a run: a lease with a heartbeat and an epoch.

Whether another driver is alive is judged by watching for a new heartbeat on the own monotonic
clock: clocks of different machines, and clocks that jump, decide nothing.

On a local disk an epoch is a folder of the run directory, ``.epoch-0003``, with the lease and the
driver's desk (see ``folders``) in it. It is put there by one rename, so that of several drivers
that start at the same instant one alone has the epoch; and the next takes it away, with all that
the one before had begun to write. At a URL, ``check`` right before each request has to do.
"""

import errno
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from pydantic import ConfigDict, Field

from distsampler.errors import StoreError
from distsampler.frozen import Frozen
from distsampler.store.files import Files, StoreFault
from distsampler.store.folders import LocalFolder, create, discard

NAME = "lease.json"
BEAT_SECONDS = 2.0
EXPIRY_SECONDS = 30.0  # without a heartbeat, after which another driver may take over
FRESH_SECONDS = 0.2  # how long the guard trusts what it has read of a local store
TRIES = 20  # at an epoch that others claim at the same instant
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR)  # by another, or away
PLANTED = (errno.ELOOP, errno.EINVAL, errno.EFBIG)  # a link, a pipe, too large
LARGEST = 2**16  # bytes of a lease
CLAIM = ".claim-"  # a folder that is to become an epoch's, or was one
EPOCH = re.compile(r"\.epoch-(\d{4,9})")


class Record(Frozen):
    """Who drives a run: what ``lease.json`` holds."""

    model_config = ConfigDict(extra="ignore")

    epoch: int = Field(ge=1, lt=10**9)
    host: str
    pid: int
    process: str
    pids: str = ""
    nonce: str
    beat: int = 0
    time: float = Field(0.0, allow_inf_nan=False)
    released: bool = False

    @property
    def holder(self) -> str:
        """The driver, for people."""
        return (
            f"the driver with pid {self.pid} on host {self.host}, whose last heartbeat is "
            f"{time.time() - self.time:.0f} s old"
        )


class Lease:
    """The right to write to a run directory: within, every write checks that it is still held.

    One that leaves nothing but itself in the directory leaves nothing at all.

    Raises:
        StoreError: if another driver has it (it says where that runs, and how old its heartbeat
            is), or the store cannot be written.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._own = Files(files.root)  # past the guard, which reads what is written here
        self._own.folder = files.folder
        self._lock, self._over = threading.Lock(), threading.Event()
        self._read_at = -math.inf
        folder = files.folder
        self._desk = Desk(files, folder) if isinstance(folder, LocalFolder) else None
        try:
            self._record = self._claimed()
        except OSError as error:
            raise StoreError(f"the store {files} cannot be written: {error}") from error
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")

    @property
    def epoch(self) -> int:
        """The number of drivers that the run has had."""
        return self._record.epoch

    def __enter__(self) -> Self:
        self._thread.start()
        self._files.guard = self.check
        return self

    def __exit__(self, *error: object) -> None:
        self._files.guard = lambda: None
        self._over.set()
        self._thread.join()
        with suppress(StoreFault, OSError):  # the run itself has raised it before
            self._release()
        if self._desk is not None:
            self._desk.leave()

    def check(self, fresh: bool = False) -> None:
        """Check that the run is still this driver's.

        Raises:
            StoreFault: if another has taken over, or the store is gone.
        """
        if self._desk is not None:
            if self._desk.folder.moved():
                raise StoreFault(
                    f"the directory {self._files} was moved, exchanged or deleted while in use: "
                    "nothing was written to what is there now; where it was moved to, the run can "
                    "be continued with resume='auto'"
                )
            if not fresh and time.monotonic() - self._read_at < FRESH_SECONDS:
                return
        with self._lock:
            record = _read(self._files)
        if record is None:
            raise StoreFault(f"the store {self._files} was deleted, or its {NAME}, while in use")
        if record.nonce != self._record.nonce:
            raise StoreFault(
                f"this driver (epoch {self.epoch}) was silent so long that {record.holder} has "
                f"taken over {self._files} (epoch {record.epoch}): nothing is lost, that one "
                "continues"
            )
        self._read_at = time.monotonic()

    def _claimed(self) -> Record:
        """Take over from a driver that is gone, and make sure that it writes no more."""
        for _ in range(TRIES):
            epochs = claims(self._files)  # looked at once: what comes later is another's
            before = _newest(self._files, epochs)
            if before is not None and not before.released:
                _wait_for_the_end(self._files, before)
            record = _record(max([before.epoch if before else 0, *epochs]) + 1)
            if self._desk is None or self._desk.claim(record):
                self._write(record)
                if self._desk is not None:
                    self._desk.clear_others()
                return record
        raise StoreError(f"the store {self._files} cannot be claimed: others start there too")

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(StoreFault, OSError):  # the guard raises it too, where it is heard
                self.check(fresh=True)
                beat = self._record.beat + 1
                self._record = self._record.replaced(beat=beat, time=time.time())
                self._write(self._record)

    def _release(self) -> None:
        record = _read(self._own)
        if record is None or record.nonce != self._record.nonce:
            return
        if all(name == NAME or EPOCH.match(name) for name in self._own.names()):
            self._own.remove(NAME)
        else:
            self._write(self._record.replaced(released=True))

    def _write(self, record: Record) -> None:
        with self._lock:
            self._own.write(NAME, record.model_dump_json().encode())


class Desk:
    """An epoch of a local run directory: its driver's place for temporaries, and nobody else's."""

    def __init__(self, files: Files, folder: LocalFolder) -> None:
        self._files, self.folder = files, folder
        self._made: list[Path] = []  # the folder and those around it, the innermost first

    def claim(self, record: Record) -> bool:
        """Put the epoch's folder there, whole, by one rename; return False if another was faster.

        Args:
            record: who claims the epoch.
        """
        folder, private = self.folder, f"{CLAIM}{record.nonce}"
        paths = (folder.root, *folder.root.parents)
        self._made = self._made or [path for path in paths if not path.exists()]
        folder.root.mkdir(parents=True, exist_ok=True)
        handle = folder.hold()
        try:
            os.mkdir(private, dir_fd=handle)
            os.mkdir(f"{private}/{record.nonce}", dir_fd=handle)
            create(handle, f"{private}/{NAME}", record.model_dump_json().encode())
            os.rename(private, _folder(record.epoch), src_dir_fd=handle, dst_dir_fd=handle)
        except OSError as error:
            with suppress(OSError):
                discard(private, handle)
            folder.let_go()
            if error.errno in TAKEN:
                return False
            raise
        folder.desk = f"{_folder(record.epoch)}/{record.nonce}"
        if self._is_newest(record):
            return True
        self.leave()
        return False

    def clear_others(self) -> None:
        """Take away the desks of all other drivers: what they had begun to write never lands."""
        for name in os.listdir(self.folder.handle):
            if name != self._epoch and (EPOCH.fullmatch(name) or name.startswith(CLAIM)):
                with suppress(FileNotFoundError):
                    self.folder.remove(name)

    def leave(self) -> None:
        """Take the own desk away, and the directory, if nothing was put into the one it made."""
        folder, handle = self.folder, self.folder.handle
        if handle is None:
            return
        with suppress(OSError):  # what another driver has taken away is not there
            gone = f"{CLAIM}{uuid.uuid4().hex}"
            os.rename(folder.desk, gone, src_dir_fd=handle, dst_dir_fd=handle)
            discard(gone, handle)
            discard(self._epoch, handle)
            for path in self._made if not folder.moved() else ():
                path.rmdir()
        folder.let_go()

    @property
    def _epoch(self) -> str:
        return self.folder.desk.partition("/")[0]

    def _is_newest(self, record: Record) -> bool:
        """Whether no other driver has come, or come and gone, since the epoch was thought of."""
        written = _read(self._files)
        passed = written is not None and written.epoch >= record.epoch
        return not passed and claims(self._files)[-1] == record.epoch


def heartbeat(files: Files) -> float | None:
    """Return the age of the last heartbeat in seconds; None where nobody drives the run."""
    record = _read(files)
    return None if record is None or record.released else max(0.0, time.time() - record.time)


def ago(seconds: float | None) -> str:
    """Return an age in the largest unit that fits."""
    if seconds is None:
        return "-"
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def claims(files: Files) -> list[int]:
    """Return the epochs of which a folder is there, the newest last."""
    folder = files.folder
    if not isinstance(folder, LocalFolder):
        return []
    try:
        names = os.listdir(folder.root if folder.handle is None else folder.handle)
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = map(EPOCH.fullmatch, names)
    return sorted(int(match[1]) for match in matches if match)


def _newest(files: Files, epochs: Sequence[int]) -> Record | None:
    """The lease of the newest driver, also of one that has claimed the run and not yet said so."""
    record = _read(files)
    if epochs and (record is None or record.epoch < epochs[-1]):
        return _read(files, f"{_folder(epochs[-1])}/{NAME}") or record
    return record


def _record(epoch: int) -> Record:
    return Record(
        epoch=epoch,
        host=socket.gethostname(),
        pid=os.getpid(),
        process=_process(os.getpid()),
        pids=_pids(),
        nonce=uuid.uuid4().hex,
        time=time.time(),
    )


def _folder(epoch: int) -> str:
    return f".epoch-{epoch:04d}"


def _wait_for_the_end(files: Files, first: Record) -> None:
    """Return once the holder is known to be gone; raise StoreError as soon as its heart beats."""
    here = first.host == socket.gethostname() and first.pids == _pids()
    if here and _process(first.pid) != first.process:
        return
    began = time.monotonic()
    while time.monotonic() - began < EXPIRY_SECONDS:
        record = _newest(files, claims(files))
        if record is None or record.released:
            return
        if (record.nonce, record.beat) != (first.nonce, first.beat):
            raise StoreError(
                f"the run in {files} belongs to {record.holder}: wait for it, stop it, or give "
                "another store"
            )
        time.sleep(min(0.2, BEAT_SECONDS / 4))


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


def _read(files: Files, name: str = NAME) -> Record | None:
    """The lease on record; one that is damaged, or was never written by a driver, has no holder."""
    try:
        return Record.model_validate_json(files.read(name, LARGEST))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    except OSError as error:
        if error.errno in PLANTED:
            return None
        raise StoreFault(f"{files.path(name)} cannot be read: {error}") from error
