"""Where the files of a run lie: in a folder of this machine, or behind an fsspec URL.

A local file is replaced by one rename of a temporary file, relative to a handle of the folder and
through no link. The temporaries of a driver lie on its **desk**, a folder in the run directory that
the next driver takes away before it reads anything. So a write of a driver that was only thought
dead finds nothing to rename, and neither does one whose path has come to name another directory:
the file system decides, and nothing can happen between a check and a write.

A remote store has no such rename: there a check right before each request is the best there is.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from distsampler.errors import StoreError

RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0)  # pauses before a remote call that failed is made again
TEMPORARY = ".tmp"
FOLDER = os.O_RDONLY | os.O_DIRECTORY
T = TypeVar("T")
OnStep = Callable[[str], None]  # called with the name of every step of a write


class FencedError(OSError):
    """A write of a driver whose desk is gone: the folder is no longer its own."""


class LocalFolder:
    """A folder of this machine.

    Args:
        root: its path.
        desk: name of the folder in it for the temporaries of the driver that writes; empty: it
            writes without a lease.
    """

    def __init__(self, root: str | Path, desk: str = "") -> None:
        self.root, self.desk = Path(root).absolute(), desk
        self.handle: int | None = None
        self._close: Callable[[], object] = lambda: None

    def hold(self) -> int:
        """Return a handle, through which all is read and written from now on."""
        self.handle = os.open(self.root, FOLDER)
        self._close = weakref.finalize(self, os.close, self.handle)
        return self.handle

    def let_go(self) -> None:
        """Close the handle: the path counts again."""
        self.handle, self.desk = None, ""
        self._close()

    def moved(self) -> bool:
        """Return whether the path names another directory than the handle, or none."""
        if self.handle is None:
            return False
        try:
            return not os.path.samestat(os.stat(self.root), os.fstat(self.handle))
        except (FileNotFoundError, NotADirectoryError):
            return True

    def read(self, name: str, most: int) -> bytes:
        """Return the bytes of a file that is one, and no link, pipe or device."""
        *folders, last = parts(name)
        with self._opened() as root, _inside(root, folders) as parent:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would wait for a writer
            with os.fdopen(os.open(last, flags, dir_fd=parent), "rb") as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode):
                    raise OSError(errno.EINVAL, "it is no regular file")
                if about.st_size > most:
                    raise OSError(errno.EFBIG, f"it has {about.st_size} bytes, more than {most}")
                return file.read()

    def write(self, name: str, data: bytes, fsync: bool, step: OnStep) -> None:
        """Replace a file."""
        *folders, last = parts(name)
        temporary = self._temporary()
        with self._fenced(), self._opened(make=not self.desk) as root:
            try:
                create(root, temporary, data, fsync, step)
                with _inside(root, folders, make=True) as parent:
                    os.replace(temporary, last, src_dir_fd=root, dst_dir_fd=parent)
                    if fsync:
                        step("renamed")
                        os.fsync(parent)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=root)
                raise

    def remove(self, name: str) -> None:
        """Remove a file; or a folder with all that is in it, at once for whoever looks."""
        *folders, last = parts(name)
        with self._fenced(), self._opened() as root, _inside(root, folders) as parent:
            if not self.desk:
                discard(last, parent)
                return
            gone = self._temporary()
            os.rename(last, gone, src_dir_fd=parent, dst_dir_fd=root)
            discard(gone, root)

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        path, at = self._place(name)
        try:
            return stat.S_ISREG(os.stat(path, dir_fd=at, follow_symlinks=False).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def names(self, under: str) -> Iterator[str]:
        """Yield the names of all files below a folder, half-written ones too; not the desk's."""
        top, start = (".", "./") if self.handle is not None else (str(self.root), f"{self.root}/")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for folder, _, files, _ in os.fwalk(os.path.join(top, under), dir_fd=self.handle):
                inside = f"{folder.rstrip('/')}/".removeprefix(start)
                for file in files if inside.rstrip("/") != self.desk or not self.desk else ():
                    yield f"{inside}{file}"

    def owner(self, name: str) -> int:
        """Return the user that a file belongs to."""
        path, at = self._place(name)
        return os.stat(path, dir_fd=at, follow_symlinks=False).st_uid

    def _place(self, name: str) -> tuple[str, int | None]:
        """A path, and the handle that it is relative to."""
        return (f"{self.root}/{name}", None) if self.handle is None else (name, self.handle)

    def _temporary(self) -> str:
        """A new name, from the root."""
        unique = f"{uuid.uuid4().hex}{TEMPORARY}"
        return f"{self.desk}/{unique}" if self.desk else f".{unique}"

    @contextlib.contextmanager
    def _opened(self, make: bool = False) -> Iterator[int]:
        """The handle that is held, or one for a moment."""
        if self.handle is not None:
            yield self.handle
            return
        if make:
            self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root, FOLDER)
        try:
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _fenced(self) -> Iterator[None]:
        """Tell a desk that is gone from anything else that is missing within."""
        try:
            yield
        except FileNotFoundError as error:
            path, at = self._place(self.desk)
            try:
                os.stat(path, dir_fd=at)
            except OSError:
                raise FencedError(error.errno, "it is no longer this driver's") from error
            raise


class RemoteFolder:
    """A folder behind an fsspec URL.

    Raises:
        StoreError: if fsspec does not know the file system.
    """

    def __init__(self, url: str) -> None:
        try:
            import fsspec

            self._fs, base = fsspec.core.url_to_fs(re.sub(r"^(\w+):/(?!/)", r"\1://", url))
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"the store {url} needs a file system that fsspec knows: {error}; install "
                "distsampler[remote], or give a local path"
            ) from error
        self._base = base.rstrip("/")

    def read(self, name: str, most: int) -> bytes:
        """Return the bytes of a file."""
        data = bytes(retried(lambda: self._fs.cat_file(f"{self._base}/{name}", end=most + 1)))
        if len(data) > most:
            raise OSError(errno.EFBIG, f"it has more than {most} bytes")
        return data

    def write(self, name: str, data: bytes, fsync: bool, step: OnStep) -> None:
        """Replace a file; make its folder where the file system wants one."""
        path = f"{self._base}/{name}"
        try:
            retried(lambda: self._fs.pipe_file(path, data))
        except FileNotFoundError:
            retried(lambda: self._fs.makedirs(path.rpartition("/")[0], exist_ok=True))
            retried(lambda: self._fs.pipe_file(path, data))

    def remove(self, name: str) -> None:
        """Remove a file, or all that is below a folder."""
        if self.exists(name):
            retried(lambda: self._fs.rm_file(f"{self._base}/{name}"))
            return
        for inside in list(self.names(name)):
            self.remove(inside)

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        return bool(retried(lambda: self._fs.isfile(f"{self._base}/{name}")))

    def names(self, under: str) -> Iterator[str]:
        """Yield the names of all files below a folder."""
        self._fs.invalidate_cache()
        base = self._fs._strip_protocol(self._base)
        for path in retried(lambda: self._fs.find(f"{self._base}/{under}".rstrip("/"))):
            yield path.removeprefix(base).lstrip("/")


def parts(name: str) -> list[str]:
    """Return the steps from a store to one of its files.

    Raises:
        ValueError: if it would lie outside.
    """
    steps = [step for step in name.split("/") if step not in ("", ".")]
    if ".." in steps or not steps:
        raise ValueError(f"a name in a store must lie inside it, got {name!r}")
    return steps


def _unwatched(step: str) -> None:
    """Let a step pass."""


def create(
    root: int, name: str, data: bytes, fsync: bool = False, step: OnStep = _unwatched
) -> None:
    """Write a new file; what is there already, a link too, is an error."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(name, flags, 0o666, dir_fd=root), "wb") as file:
        file.write(data)
        step("written")
        if fsync:
            file.flush()
            os.fsync(file.fileno())
            step("synced")


def discard(name: str, root: int) -> None:
    """Remove a file or link, or a folder with all that is in it; no link is followed."""
    if stat.S_ISDIR(os.stat(name, dir_fd=root, follow_symlinks=False).st_mode):
        shutil.rmtree(name, ignore_errors=True, dir_fd=root)
    else:
        os.unlink(name, dir_fd=root)


@contextlib.contextmanager
def _inside(root: int, folders: Sequence[str], make: bool = False) -> Iterator[int]:
    """A handle of a folder in a folder, reached through folders alone, and no link."""
    handle = os.dup(root)
    try:
        for folder in folders:
            outer, handle = handle, _entered(handle, folder, make)
            os.close(outer)
        yield handle
    finally:
        os.close(handle)


def _entered(handle: int, folder: str, make: bool) -> int:
    try:
        return os.open(folder, FOLDER | os.O_NOFOLLOW, dir_fd=handle)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, dir_fd=handle)
    return os.open(folder, FOLDER | os.O_NOFOLLOW, dir_fd=handle)


def retried(call: Callable[[], T]) -> T:
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
