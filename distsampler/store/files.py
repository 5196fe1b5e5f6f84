"""Files of a run directory: written whole or not at all, on a local disk or behind an fsspec URL.

All that a run writes goes through one object: there is one place that renames, syncs, tries again,
and asks whether this process may still write.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from distsampler.errors import StoreError

RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0)  # a remote store may fail so often in a row
TEMPORARY = ".tmp"
T = TypeVar("T")


class StoreFault(StoreError):
    """A store that failed while it was in use; what was committed stays readable."""


def refused(files: Files, error: Exception) -> StoreFault:
    """What to raise when a write has failed."""
    return StoreFault(
        f"{files} can no longer be written: {error}; what was committed stays readable: make room "
        "or restore access, then continue with resume='auto'"
    )


def _nothing(point: str) -> None:
    """Called at every step of a write, so that a test can end the process there."""


class Files:
    """The files under one root.

    Args:
        root: a local path, or an fsspec URL such as ``s3://bucket/run``; ``file://`` is a path.
        fsync: wait until what is written would survive a power loss.
        at: called with the name of every step of every write.
    """

    def __init__(
        self, root: str | Path, *, fsync: bool = False, at: Callable[[str], None] = _nothing
    ) -> None:
        self.root = _local(str(root))
        self.fsync, self._at = fsync, at
        self.guard: Callable[[], None] = lambda: None
        self._remote = _remote(self.root)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to actors as its address, whatever folder they work in; guard and steps stay."""
        root = self.root if self._remote is not None else str(Path(self.root).absolute())
        return _rebuilt, (root, self.fsync)

    def __str__(self) -> str:
        return self.root

    @property
    def name(self) -> str:
        """The last part of the root, by which people call what is in it."""
        whole = self.root if self._remote is not None else str(Path(self.root).absolute())
        return whole.rstrip("/").rpartition("/")[2]

    def path(self, name: str) -> str:
        """Where a file is, for people."""
        return f"{self.root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: if there is none.
            OSError: if it cannot be read.
        """
        if self._remote is None:
            return Path(self.root, name).read_bytes()
        fs, base = self._remote
        return bytes(_patiently(lambda: fs.cat_file(f"{base}/{name}")))

    def write(self, name: str, data: bytes, *, fsync: bool = False) -> None:
        """Puts bytes in the place of a file, whole or not at all.

        Args:
            name: relative to the root.
            data: all of them.
            fsync: as the constructor's, for this file.

        Raises:
            OSError: if it cannot be written.
        """
        self.guard()
        self._at(f"{name}: begun")
        if self._remote is not None:
            self._put(name, data)
        else:
            self._replace(Path(self.root, name), name, data, fsync or self.fsync)
        self._at(f"{name}: done")

    def append(self, name: str, line: str) -> None:
        """Adds a line to a text file; one that was torn before it stays a line of its own."""
        self.guard()
        self._at(f"{name}: begun")
        before = self.read(name) if self._remote is not None and self.exists(name) else b""
        if self._remote is not None:
            self._put(name, before + line.encode() + b"\n")
        else:
            with Path(self.root, name).open("ab+") as file:
                torn = file.tell() and not _ends_with_newline(file)
                file.write((b"\n" if torn else b"") + line.encode() + b"\n")
                if self.fsync:
                    file.flush()
                    os.fsync(file.fileno())
        self._at(f"{name}: done")

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        self.guard()
        self._at(f"{name}: to be removed")
        with contextlib.suppress(FileNotFoundError):
            if self._remote is None:
                Path(self.root, name).unlink()
            else:
                fs, base = self._remote
                _patiently(lambda: fs.rm_file(f"{base}/{name}"))

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        if self._remote is None:
            return Path(self.root, name).is_file()
        fs, base = self._remote
        return bool(_patiently(lambda: fs.isfile(f"{base}/{name}")))

    def names(self, under: str = "") -> Iterator[str]:
        """Names of all files below a folder, half-written ones too."""
        if self._remote is None:
            top = Path(self.root, under)
            for folder, _, files in os.walk(top):
                for file in files:
                    yield (Path(folder) / file).relative_to(self.root).as_posix()
            return
        fs, base = self._remote
        fs.invalidate_cache()
        for path in _patiently(lambda: fs.find(f"{base}/{under}".rstrip("/"))):
            yield path.removeprefix(fs._strip_protocol(base)).lstrip("/")

    def check_writable(self) -> None:
        """Sees that a new folder can be made at the root, making nothing.

        Raises:
            StoreError: if not.
        """
        if self._remote is not None:
            return
        path = Path(self.root)
        parent = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise StoreError(
                f"the store {path} must be writable, but {parent} is not: give another one"
            )

    def sweep(self) -> None:
        """Removes what interrupted writes have left."""
        for name in list(self.names()):
            if name.endswith(TEMPORARY):
                self.remove(name)

    def _put(self, name: str, data: bytes) -> None:
        """Writes a remote file, whose folder is made where the file system wants one."""
        assert self._remote is not None
        fs, base = self._remote
        path = f"{base}/{name}"
        try:
            _patiently(lambda: fs.pipe_file(path, data))
        except FileNotFoundError:
            _patiently(lambda: fs.makedirs(path.rpartition("/")[0], exist_ok=True))
            _patiently(lambda: fs.pipe_file(path, data))

    def _replace(self, path: Path, name: str, data: bytes, fsync: bool) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                self._at(f"{name}: written")
                if fsync:
                    file.flush()
                    os.fsync(file.fileno())
                    self._at(f"{name}: synced")
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if fsync:
            self._at(f"{name}: renamed")
            _sync_folder(path.parent)


def _rebuilt(root: str, fsync: bool) -> Files:
    return Files(root, fsync=fsync)


def _local(root: str) -> str:
    """The path that a URL of the local file system names; any other root as it is."""
    return re.sub(r"^(file|local):(//)?", "", root) if is_url(root) else root


def is_url(root: str | Path) -> bool:
    """Whether a store is named by an fsspec URL, not by a local path."""
    return re.match(r"\w{2,}:/", str(root)) is not None


def _remote(root: str) -> tuple[Any, str] | None:
    if not is_url(root):
        return None
    try:
        import fsspec

        fs, base = fsspec.core.url_to_fs(re.sub(r"^(\w+):/(?!/)", r"\1://", root))
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"the store {root} needs a file system that fsspec knows: {error}; install "
            "distsampler[remote], or give a local path"
        ) from error
    return fs, base.rstrip("/")


def _patiently(call: Callable[[], T]) -> T:
    """Calls again where a remote store fails; a file that is not there is an answer."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError:
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")


def _ends_with_newline(file: Any) -> bool:  # noqa: ANN401 (a binary file)
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _sync_folder(path: Path) -> None:
    """Makes a rename durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
