"""The one door to the disk: whole or not at all, tried again, guarded."""

import errno
import pickle
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distsampler.errors import StoreError
from distsampler.store import folders as module
from distsampler.store.files import Files, StoreFault


class Folders(MemoryFileSystem):  # type: ignore[misc]
    """A memory file system that wants a folder to be made before a file in it, as sftp does."""

    protocol = "folders"
    store: ClassVar[dict[str, Any]] = {}
    made: ClassVar[set[str]] = set()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.made.add(path)

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        if path.rpartition("/")[0] not in self.made:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        super().pipe_file(path, value, **kwargs)


@pytest.fixture(params=["local", "file", "memory", "folders"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    if request.param == "local":
        return Files(tmp_path / "run")
    if request.param == "file":
        return Files(f"file://{tmp_path}/run")
    if request.param == "folders":
        fsspec.register_implementation("folders", Folders, clobber=True)
        Folders.store.clear()
        Folders.made.clear()
        return Files("folders://runs/one")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return Files("memory://runs/one")


def test_what_is_written_is_read_listed_and_removed(files: Files) -> None:
    files.write("a/b.bin", b"first")
    files.write("a/b.bin", b"second")
    files.write("c.json", b"{}")
    assert files.read("a/b.bin") == b"second"
    assert sorted(files.names()) == ["a/b.bin", "c.json"]
    assert list(files.names("a")) == ["a/b.bin"]
    assert list(files.names("nowhere")) == []
    assert files.exists("c.json")
    assert not files.exists("a")
    files.remove("c.json")
    files.remove("c.json")
    assert not files.exists("c.json")
    with pytest.raises(FileNotFoundError):
        files.read("c.json")


def test_a_url_of_the_local_file_system_is_a_path(tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}", Path(f"file://{tmp_path}"), f"local://{tmp_path}"):
        assert Files(url).root == str(tmp_path)
    assert Files("file.d/run").root == "file.d/run"


def test_lines_are_added(files: Files) -> None:
    files.write("run.json", b"{}")
    files.append("log", "new")
    files.append("log", "newer")
    assert files.read("log") == b"new\nnewer\n"


def test_a_line_after_a_torn_one_stands_alone(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write("log", b'{"whole": 1}\n{"to')
    files.append("log", "new")
    assert files.read("log").splitlines() == [b'{"whole": 1}', b'{"to', b"new"]


def test_they_travel_without_their_guard(files: Files) -> None:
    files.write("a", b"1")
    files.guard = lambda: pytest.fail("the guard must stay at home")
    there: Files = pickle.loads(pickle.dumps(files))
    assert there.read("a") == b"1"
    there.write("b", b"2")


def test_nothing_is_written_past_the_guard(files: Files) -> None:
    def refuse() -> None:
        raise StoreFault("not yours")

    files.write("a", b"1")
    files.guard = refuse
    for attempt in (
        lambda: files.write("a", b"2"),
        lambda: files.append("a", "2"),
        lambda: files.remove("a"),
    ):
        with pytest.raises(StoreFault):
            attempt()
    assert files.read("a") == b"1"


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(tmp_path)
    files.write("a", b"old")

    def full(*names: object, **folders: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write("a", b"new")
    assert files.read("a") == b"old"
    assert list(files.names()) == ["a"]


def test_what_a_dead_process_left_is_swept(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write("a", b"1")
    (tmp_path / ".a.4711.tmp").write_bytes(b"half")
    files.sweep()
    assert list(files.names()) == ["a"]


def test_fsync_is_asked_for_file_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(module.os, "fsync", synced.append)
    Files(tmp_path).write("a", b"1")
    assert not synced
    Files(tmp_path, fsync=True).write("a", b"1")
    assert len(synced) == 2
    Files(tmp_path).write("a", b"1", fsync=True)
    assert len(synced) == 4


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """A memory file system that fails now and then, as a network does."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures = 0
    seen = 0

    def _fail(self) -> None:
        if Flaky.failures > 0:
            Flaky.failures -= 1
            Flaky.seen += 1
            raise OSError(errno.ECONNRESET, "Connection reset by peer")

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        self._fail()
        super().pipe_file(path, value, **kwargs)

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        self._fail()
        return bytes(super().cat_file(path, **kwargs))


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Files:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    Flaky.store.clear()
    Flaky.failures = Flaky.seen = 0
    return Files("flaky://runs/one")


def test_a_remote_store_is_tried_again(flaky: Files) -> None:
    Flaky.failures = 3
    flaky.write("a", b"1")
    assert Flaky.seen == 3
    Flaky.failures = 2
    assert flaky.read("a") == b"1"
    assert Flaky.seen == 5


def test_but_not_for_ever(flaky: Files) -> None:
    Flaky.failures = 99
    with pytest.raises(OSError, match="Connection reset"):
        flaky.write("a", b"1")
    assert Flaky.seen == 4
    Flaky.failures = 0
    with pytest.raises(FileNotFoundError):
        flaky.read("never written")


def test_a_file_system_that_nobody_knows_is_refused() -> None:
    with pytest.raises(StoreError, match=r"nosuch://x needs a file system that fsspec knows"):
        Files("nosuch://x")
