"""Files of a run directory: written whole or not at all, on a local disk or behind an fsspec URL.

All that a run writes goes through one object, so that one place renames, syncs, tries again, and
asks whether this process may still write.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from distsampler.errors import StoreError

RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0)  # pauses before a remote call that failed is made again
TEMPORARY = ".tmp"
AGAIN = (
    "restore it from a copy; or continue the run with resume='must', which computes again what is "
    "missing, to the same bits; or delete the store and sample again"
)
T = TypeVar("T")


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
    """

    def __init__(
        self, root: str | Path, *, fsync: bool = False, at: Callable[[str], None] | None = None
    ) -> None:
        self.root = _local(str(root))
        self.fsync, self._at = fsync, at or (lambda point: None)
        self.guard: Callable[[], None] = lambda: None
        self._remote = _remote(self.root)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the address alone, which holds in any working folder; guard and ``at`` stay."""
        return functools.partial(Files, fsync=self.fsync), (self.address,)

    def __str__(self) -> str:
        return self.root

    @property
    def address(self) -> str:
        """The root, valid in any working folder."""
        return self.root if self._remote is not None else str(Path(self.root).absolute())

    @property
    def name(self) -> str:
        """The last part of the root: the name of the run for people."""
        return self.address.rstrip("/").rpartition("/")[2]

    def path(self, name: str) -> str:
        """Return where a file is, for people."""
        return f"{self.root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            OSError: if it cannot be read; FileNotFoundError, if there is none.
        """
        if self._remote is None:
            return Path(self.root, name).read_bytes()
        fs, base = self._remote
        return bytes(_retried(lambda: fs.cat_file(f"{base}/{name}")))

    def write(self, name: str, data: bytes, *, fsync: bool = False) -> None:
        """Write a file, whole or not at all; with ``fsync`` to survive a power loss.

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
        """Add a line to a text file; a torn line before it stays a line of its own."""
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
        """Remove a file, if it is there."""
        self.guard()
        self._at(f"{name}: to be removed")
        with contextlib.suppress(FileNotFoundError):
            if self._remote is None:
                Path(self.root, name).unlink()
            else:
                fs, base = self._remote
                _retried(lambda: fs.rm_file(f"{base}/{name}"))

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        if self._remote is None:
            return Path(self.root, name).is_file()
        fs, base = self._remote
        return bool(_retried(lambda: fs.isfile(f"{base}/{name}")))

    def names(self, under: str = "") -> Iterator[str]:
        """Yield the names of all files below a folder, half-written ones too."""
        if self._remote is None:
            top = Path(self.root, under)
            for folder, _, files in os.walk(top):
                for file in files:
                    yield (Path(folder) / file).relative_to(self.root).as_posix()
            return
        fs, base = self._remote
        fs.invalidate_cache()
        for path in _retried(lambda: fs.find(f"{base}/{under}".rstrip("/"))):
            yield path.removeprefix(fs._strip_protocol(base)).lstrip("/")

    def check_writable(self) -> None:
        """Check that a new folder can be made at the root, without making it.

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
        """Remove what interrupted writes have left."""
        for name in list(self.names()):
            if name.endswith(TEMPORARY):
                self.remove(name)

    def _put(self, name: str, data: bytes) -> None:
        """Write a remote file, and its folder where the file system wants one."""
        assert self._remote is not None
        fs, base = self._remote
        path = f"{base}/{name}"
        try:
            _retried(lambda: fs.pipe_file(path, data))
        except FileNotFoundError:
            _retried(lambda: fs.makedirs(path.rpartition("/")[0], exist_ok=True))
            _retried(lambda: fs.pipe_file(path, data))

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


def _local(root: str) -> str:
    """The path of a URL of the local file system; any other root as it is."""
    return re.sub(r"^(file|local):(//)?", "", root) if is_url(root) else root


def is_url(root: str | Path) -> bool:
    """Return whether a store is named by an fsspec URL, not by a local path."""
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


def _retried(call: Callable[[], T]) -> T:
    """Call again where a remote store fails; a file that is not there is an answer."""
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
    """Make a rename durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
