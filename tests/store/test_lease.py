"""One driver a run, whatever the clocks say."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from distsampler.errors import StoreError
from distsampler.store import lease as module
from distsampler.store.files import Files, StoreFault
from distsampler.store.lease import NAME, Desk, Lease


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "EXPIRY_SECONDS", 2.0)
    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)


def record(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((path / NAME).read_text())
    return found


def test_a_second_driver_is_refused_with_host_pid_and_age(tmp_path: Path) -> None:
    files = Files(tmp_path)
    with Lease(files) as first:
        with pytest.raises(StoreError) as caught:
            Lease(Files(tmp_path))
        for part in (f"pid {os.getpid()}", str(record(tmp_path)["host"]), "heartbeat is 0 s old"):
            assert part in str(caught.value)
        first.check(fresh=True)
        files.write("run.json", b"{}")
    with Lease(files) as second:
        assert second.epoch == 2, "what was released is free at once"


def hold(path: Path) -> None:
    with Lease(Files(path)):
        time.sleep(60)


def held_by_another(path: Path) -> multiprocessing.Process:
    other = multiprocessing.get_context("fork").Process(target=hold, args=(path,))
    other.start()
    deadline = time.monotonic() + 30
    while not (path / NAME).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return other


def test_the_lease_of_a_dead_process_is_free_at_once(tmp_path: Path) -> None:
    other = held_by_another(tmp_path)
    with pytest.raises(StoreError, match=f"pid {other.pid}"):
        Lease(Files(tmp_path))
    assert other.pid
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    began = time.monotonic()
    with Lease(Files(tmp_path)) as lease:
        assert time.monotonic() - began < module.EXPIRY_SECONDS
        assert lease.epoch == 2


def test_a_zombie_that_wakes_is_refused(tmp_path: Path) -> None:
    files = Files(tmp_path)
    zombie = Lease(files)  # its heart never beats: the process was stopped
    files.guard = zombie.check
    files.write("a", b"1")
    with Lease(Files(tmp_path)) as heir:
        assert heir.epoch == 2
        for write in (lambda: files.write("a", b"2"), lambda: zombie.check(fresh=True)):
            with pytest.raises(StoreFault, match=r"epoch 1\) was silent .* taken over"):
                write()
    assert files.read("a") == b"1"


def test_a_clock_that_jumps_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(Files(tmp_path)):
        for jump in (-1e6, 1e6):
            now = time.time()
            monkeypatch.setattr(module.time, "time", lambda now=now, jump=jump: now + jump)
            with pytest.raises(StoreError, match="belongs to the driver"):
                Lease(Files(tmp_path))


def test_a_live_holder_in_another_container_is_no_dead_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers may share a hostname, and not their numbers of processes."""
    with Lease(Files(tmp_path)):
        monkeypatch.setattr(module, "_process", lambda pid: "")
        monkeypatch.setattr(module, "_pids", lambda: "of another container", raising=False)
        with pytest.raises(StoreError, match="belongs to the driver"):
            Lease(Files(tmp_path))


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()], ids=["elsewhere", "here"])
def test_a_holder_on_another_machine_or_in_an_unknown_container_is_waited_for(
    tmp_path: Path, host: str
) -> None:
    (tmp_path / NAME).write_text(
        json.dumps(
            {
                "epoch": 7,
                "host": host,
                "pid": 1,
                "process": "x",
                "nonce": "n",
                "beat": 3,
                "time": time.time(),
                "released": False,
            }
        )
    )
    began = time.monotonic()
    with Lease(Files(tmp_path)) as lease:
        assert time.monotonic() - began >= module.EXPIRY_SECONDS
        assert lease.epoch == 8


def test_it_is_noticed_when_the_store_is_gone(tmp_path: Path) -> None:
    with Lease(Files(tmp_path)) as lease:
        (tmp_path / NAME).unlink()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and (tmp_path / NAME).exists():
            time.sleep(0.01)
        with pytest.raises(StoreFault, match="was deleted"):
            lease.check(fresh=True)
    assert not (tmp_path / NAME).exists(), "a heartbeat must not bring a deleted store back"


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\0\0\0"])
def test_a_damaged_lease_has_no_holder(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with Lease(Files(tmp_path)) as lease:
        assert lease.epoch == 1


def test_its_heart_beats_while_the_driver_works(tmp_path: Path) -> None:
    with Lease(Files(tmp_path)):
        before = record(tmp_path)["beat"]
        threading.Event().wait(1.0)
        assert record(tmp_path)["beat"] != before


def left_in(path: Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


def test_a_lease_that_leaves_nothing_but_itself_leaves_nothing(tmp_path: Path) -> None:
    with Lease(Files(tmp_path / "new")):
        assert (tmp_path / "new" / NAME).exists()
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with Lease(Files(tmp_path / "empty")):
        pass
    assert left_in(tmp_path / "empty") == []
    with Lease(Files(tmp_path / "used")) as lease:
        lease._files.write("a", b"1")
    assert left_in(tmp_path / "used") == ["a", NAME]
    assert record(tmp_path / "used")["released"]


WRITES = {
    "written": lambda files: files.write("a", b"late"),
    "added": lambda files: files.append("a", "late"),
    "removed": lambda files: files.remove("a"),
    "removed with all in it": lambda files: files.remove("c"),
}
MOMENTS = [
    *[(how, step) for how in ("written", "added") for step in ("begun", "written", "synced")],
    *[(how, "to be removed") for how in ("removed", "removed with all in it")],
]


@pytest.mark.parametrize(("how", "step"), MOMENTS)
@pytest.mark.parametrize("actor", [False, True], ids=["driver", "actor"])
def test_a_write_that_was_begun_before_a_takeover_never_lands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, step: str, actor: bool
) -> None:
    """Whoever wakes up at that step, the file system refuses what would come next."""
    monkeypatch.setattr(module, "EXPIRY_SECONDS", 0.0)
    heirs = list[Lease]()
    files = Files(tmp_path, fsync=True)
    first = Lease(files)
    for name in ("a", "c/d"):
        files.write(name, b"1")
    writer = pickle.loads(pickle.dumps(files)) if actor else files
    writer.guard = writer.guard if actor else first.check
    writer._at = lambda at: heirs.append(Lease(Files(tmp_path))) if at.endswith(step) else None
    with pytest.raises(StoreFault, match="taken over"):
        WRITES[how](writer)
    (heir,) = heirs
    assert heir.epoch == 2
    own = [".epoch-0002", f".epoch-0002/{heir._record.nonce}", f".epoch-0002/{NAME}"]
    assert left_in(tmp_path) == [*own, "a", "c", "c/d", NAME]
    assert (tmp_path / "a").read_bytes() == b"1"
    assert record(tmp_path)["epoch"] == 2


@pytest.mark.parametrize(("how", "step"), [*MOMENTS, *((how, "") for how in WRITES)])
@pytest.mark.parametrize("actor", [False, True], ids=["driver", "actor"])
def test_a_directory_that_comes_to_lie_at_the_path_is_not_touched(
    tmp_path: Path, how: str, step: str, actor: bool
) -> None:
    run, moved, other = (tmp_path / name for name in ("run", "moved", "other"))

    def exchange() -> None:
        if other.exists():
            run.rename(moved)
            other.rename(run)

    for store in (other, run):
        files = Files(store, fsync=True)
        lease = Lease(files)
        for name in ("a", "c/d"):
            files.write(name, store.name.encode())
    writer = pickle.loads(pickle.dumps(files)) if actor else files
    writer.guard = writer.guard if actor else lease.check
    writer._at = lambda at: exchange() if step and at.endswith(step) else None
    if not step:
        exchange()
    with suppress(StoreFault):  # between check and rename it lands where it belongs
        WRITES[how](writer)
    assert moved.is_dir()
    with pytest.raises(StoreFault, match="moved, exchanged or deleted while in use"):
        WRITES[how](writer)
    assert {(run / name).read_bytes() for name in ("a", "c/d")} == {b"other"}
    assert [name for name in left_in(run) if name.endswith(".tmp")] == []
    lease.__enter__().__exit__()
    assert not record(run)["released"]
    assert record(moved)["released"], "it gives back its own, where that is now"


@pytest.mark.parametrize("made", [False, True])
def test_a_directory_that_was_deleted_is_not_brought_back(tmp_path: Path, made: bool) -> None:
    files = Files(tmp_path / "run")
    with Lease(files):
        shutil.rmtree(tmp_path / "run")
        if made:
            (tmp_path / "run").mkdir()
        with pytest.raises(StoreFault, match="moved, exchanged or deleted while in use"):
            files.write("a", b"1")
    assert left_in(tmp_path) == (["run"] if made else [])


@pytest.mark.parametrize("attempt", range(3))
def test_of_several_that_start_at_once_one_has_the_run(tmp_path: Path, attempt: int) -> None:
    barrier, won, refused = threading.Barrier(5), list[Lease](), list[str]()

    def start() -> None:
        barrier.wait()
        try:
            won.append(Lease(Files(tmp_path / "run")).__enter__())
        except StoreError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lease,) = won
    assert len(refused) == 4
    assert all(f"belongs to the driver with pid {os.getpid()}" in text for text in refused)
    lease.check(fresh=True)
    lease.__exit__()


def test_a_driver_that_died_before_it_said_that_it_has_the_run_blocks_nobody(
    tmp_path: Path,
) -> None:
    files = Files(tmp_path)
    assert Desk(files, files.folder).claim(gone(3))
    (tmp_path / ".claim-half").mkdir()
    with Lease(Files(tmp_path)) as lease:
        assert lease.epoch == 4
        assert left_in(tmp_path)[0] == ".epoch-0004"


def gone(epoch: int) -> module.Record:
    """The lease of a process that has ended."""
    return module._record(epoch).replaced(process="another")


def test_who_wakes_up_with_an_epoch_that_has_passed_does_not_get_it(tmp_path: Path) -> None:
    files = Files(tmp_path)
    for epoch in (1, 2):
        with Lease(Files(tmp_path)) as lease:
            assert lease.epoch == epoch
            lease._files.write("a", b"1")
    assert not Desk(files, files.folder).claim(gone(2)), "it was read before that one came"
    assert left_in(tmp_path) == ["a", NAME]
    assert files.folder.handle is None


def test_what_was_planted_is_neither_followed_nor_in_the_way(tmp_path: Path) -> None:
    store, outside = tmp_path / "run", tmp_path / "outside"
    store.mkdir()
    outside.mkdir()
    (outside / "file").write_bytes(b"theirs")
    (store / NAME).symlink_to(outside / "file")
    (store / "run.json").symlink_to(outside / "file")
    (store / "checkpoints").symlink_to(outside)
    (store / ".epoch-0001").symlink_to(outside)
    (store / ".epoch-0002").write_text("")
    (store / ".claim-x").symlink_to(outside)
    files = Files(store)
    with Lease(files) as lease:
        assert lease.epoch == 3
        files.write("run.json", b"{}")
        with pytest.raises(OSError, match="checkpoints"):
            files.write("checkpoints/a", b"1")
        with pytest.raises(OSError, match="checkpoints"):
            files.remove("checkpoints/file")
        assert list(files.names("checkpoints")) == []
        with pytest.raises(ValueError, match="must lie inside"):
            files.write("../outside/file", b"1")
    assert left_in(outside) == ["file"]
    assert (outside / "file").read_bytes() == b"theirs"
    assert left_in(store) == ["checkpoints", NAME, "run.json"]
