"""One driver a run, whatever the clocks say."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from distsampler.errors import StoreError
from distsampler.store import lease as module
from distsampler.store.files import Files, StoreFault
from distsampler.store.lease import NAME, Lease


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
