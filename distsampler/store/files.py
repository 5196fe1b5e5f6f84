"""Files of a run directory: written whole or not at all, on a local disk or behind an fsspec URL.

All that a run writes goes through one object, so that one place asks whether this process may still
write; ``folders`` knows how.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distsampler.errors import StoreError
from distsampler.redaction import redacted
from distsampler.store.folders import TEMPORARY, FencedError, LocalFolder, RemoteFolder

LARGEST = 2**30  # bytes of a file, but for the states of chains
AGAIN = (
    "restore it from a copy; or continue the run with resume='must', which computes again what is "
    "missing, to the same bits; or delete the store and sample again"
)


class StoreFault(StoreError):
    """A store that failed while it was in use; what was committed stays readable."""


def damaged(where: str, why: object) -> StoreError:
    """Return the error to raise where a part of a run directory is missing or damaged."""
    kind = f"{type(why).__name__}: " if isinstance(why, Exception) else ""
    return StoreError(f"{where} is missing or damaged: {kind}{why}; {AGAIN}")


@contextlib.contextmanager
def writing(files: Files) -> Iterator[None]:
    """Turn an error of the file system within into a StoreFault."""
    try:
        yield
    except OSError as error:
        raise StoreFault(
            f"{files} can no longer be written: {error}; what was committed stays readable: make "
            "room or restore access, then continue with resume='auto'"
        ) from error


def as_files(store: str | Path | Files) -> Files:
    """Return the files of a store that is given as a path, a URL or its files."""
    return store if isinstance(store, Files) else Files(store)


class Files:
    """The files under one root.

    Args:
        root: a local path, or an fsspec URL such as ``s3://bucket/run``; ``file://`` is a path.
        fsync: whether a write waits until it would survive a power loss.
        at: function called with the name of every step of every write, for tests that die there.

    Attributes:
        folder: where they lie.
        guard: called before every change; it raises StoreFault where none may be made.
    """

    def __init__(
        self, root: str | Path, *, fsync: bool = False, at: Callable[[str], None] | None = None
    ) -> None:
        self.root = _local(str(root))
        self.fsync, self._at = fsync, at or (lambda point: None)
        self.guard: Callable[[], None] = lambda: None
        remote = is_url(self.root)
        self.folder = RemoteFolder(self.root) if remote else LocalFolder(self.root)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the address, which holds in any working folder, and the desk; all else stays."""
        desk = self.folder.desk if isinstance(self.folder, LocalFolder) else ""
        return _arrived, (self.address, self.fsync, desk)

    def __str__(self) -> str:
        return self.root

    @property
    def address(self) -> str:
        """The root, valid in any working folder."""
        return str(self.folder.root) if isinstance(self.folder, LocalFolder) else self.root

    @property
    def name(self) -> str:
        """The last part of the root: the name of the run for people."""
        return redacted(self.address).rstrip("/").rpartition("/")[2]

    def path(self, name: str) -> str:
        """Return where a file is, for people."""
        return f"{self.root.rstrip('/')}/{name}"

    def read(self, name: str, most: int = LARGEST) -> bytes:
        """Return the bytes of a file, at most so many.

        Raises:
            OSError: if it cannot be read, is larger, or is no regular file but a link, pipe or
                device; FileNotFoundError, if there is none.
        """
        return self.folder.read(name, most)

    def write(self, name: str, data: bytes, *, fsync: bool = False) -> None:
        """Write a file, whole or not at all; with ``fsync`` to survive a power loss.

        Raises:
            OSError: if it cannot be written.
            StoreFault: if the directory is no longer this driver's; nothing is written then.
        """
        self.guard()
        self._at(f"{name}: begun")
        with self._ours():
            step = lambda step: self._at(f"{name}: {step}")  # noqa: E731
            self.folder.write(name, data, fsync or self.fsync, step)
        self._at(f"{name}: done")

    def append(self, name: str, line: str) -> None:
        """Add a line to a text file; a torn line before it stays a line of its own."""
        before = self.read(name) if self.exists(name) else b""
        torn = b"\n" if before and not before.endswith(b"\n") else b""
        self.write(name, before + torn + line.encode() + b"\n")

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there.

        Raises:
            StoreFault: if the directory is no longer this driver's; nothing is removed then.
        """
        self.guard()
        self._at(f"{name}: to be removed")
        with contextlib.suppress(FileNotFoundError), self._ours():
            self.folder.remove(name)

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        return self.folder.exists(name)

    def names(self, under: str = "") -> Iterator[str]:
        """Yield the names of all files below a folder, half-written ones too."""
        yield from self.folder.names(under)

    def own(self, name: str) -> bool:
        """Return whether a file is this user's; behind a URL nobody knows."""
        return isinstance(self.folder, LocalFolder) and self.folder.owner(name) == os.getuid()

    def check_writable(self) -> None:
        """Check that a new folder can be made at the root, without making it.

        Raises:
            StoreError: if not.
        """
        if isinstance(self.folder, RemoteFolder):
            return
        path = self.folder.root
        parent = next(p for p in (path, *path.parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise StoreError(
                f"the store {self} must be writable, but {parent} is not: give another one"
            )

    def sweep(self) -> None:
        """Remove what interrupted writes have left."""
        for name in list(self.names()):
            if name.endswith(TEMPORARY):
                self.remove(name)

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        """Say why a write was fenced off."""
        try:
            yield
        except FencedError as error:
            self.guard()  # of a driver, which knows more
            raise StoreFault(
                f"{self} is no longer the directory of this driver: another has taken over, or it "
                "was moved, exchanged or deleted while in use; nothing was written to what is there"
            ) from error


def _arrived(address: str, fsync: bool, desk: str) -> Files:
    """Files that have travelled: what they write must find the desk of their driver."""
    files = Files(address, fsync=fsync)
    if isinstance(files.folder, LocalFolder):
        files.folder.desk = desk
    return files


def _local(root: str) -> str:
    """The path of a URL of the local file system; any other root as it is."""
    return re.sub(r"^(file|local):(//)?", "", root) if is_url(root) else root


def is_url(root: str | Path) -> bool:
    """Return whether a store is named by an fsspec URL, not by a local path."""
    return re.match(r"\w{2,}:/", str(root)) is not None
