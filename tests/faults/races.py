"""What two drivers of one directory can do to each other: every race ends as if one had been alone.

Run as a program, as ``crash_points`` is. Drivers are stopped in the middle of a write and woken
when another has finished their run; directories are exchanged, or deleted and made again by another
run, under the hands of the driver that writes to them; and several drivers start at once.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

import distsampler as ds
from distsampler.analysis import arviz_bridge
from distsampler.errors import StoreError
from distsampler.sampling.fingerprint import versions
from distsampler.store import lease
from distsampler.store.files import StoreFault
from tests.assertions import digest
from tests.faults.crash_points import in_a_fork, sample, undisturbed

HOW = "all"  # a file of every kind is written, with every kind of step
AT_ONCE = 5


class Races:
    """The races of one kind of run, and what came of them.

    Args:
        folder: for the runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.points, self.digest = undisturbed(folder, HOW)
        self.wrong: list[str] = []
        self.happened = {"woken": 0, "exchanged": 0, "made again": 0, "started at once": 0}

    def woken(self, step: int) -> None:
        """Stop a driver at a step, let another take over and finish, and wake the first."""
        store, name = self._folder / f"woken-{step}", f"woken at {self.points[step]}"
        first = os.fork()
        if first == 0:
            _leave(lambda: sample(store, _at(step, _stop), HOW))
        _, status = os.waitpid(first, os.WUNTRACED)
        self._check(os.WIFSTOPPED(status), f"{name}: it did not stop")
        code, text = in_a_fork(lambda: digest(sample(store, lambda point: None, HOW)))
        self._check((code, text) == (0, self.digest), f"{name}: the other ended with {code} {text}")
        before = contents(store)
        os.kill(first, signal.SIGCONT)
        code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        self._check(code == REFUSED, f"{name}: it ended with {code}")
        self._check(contents(store) == before, f"{name}: it has written to the finished run")
        self._finish(store, name, "woken")

    def exchanged(self, step: int, again: bool) -> None:
        """Put another run at the path of a driver, whose directory is moved, or deleted."""
        kind = "made again" if again else "exchanged"
        store, moved, other = (self._folder / f"{part}-{step}-{again}" for part in "abc")
        shutil.copytree(self._folder / "undisturbed", other)
        before, name = contents(other), f"{kind} at {self.points[step]}"

        def exchange() -> None:
            shutil.rmtree(store) if again else store.rename(moved)
            other.rename(store)

        child = os.fork()
        if child == 0:
            _leave(lambda: sample(store, _at(step, exchange), HOW))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self._check(not other.exists(), f"{name}: it did not happen")
        self._check(code == REFUSED, f"{name}: it ended with {code}")
        self._check(contents(store) == before, f"{name}: it has written to another run")
        self._finish(store if again else moved, name, kind)

    def started_at_once(self, number: int) -> None:
        """Start several drivers of one new run."""
        store, name = self._folder / f"started-{number}", f"start {number}"
        read, write = os.pipe()
        children = []
        for _ in range(AT_ONCE):
            child = os.fork()
            if child == 0:
                os.close(write)
                os.read(read, 1)  # until all are there
                _leave(lambda: sample(store, lambda point: None, HOW, "never"))
            children.append(child)
        os.close(write)
        os.close(read)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        self._check(codes == [0] + [UNSTARTED] * (AT_ONCE - 1), f"{name}: they ended with {codes}")
        self._finish(store, name, "started at once")

    def _finish(self, store: Path, name: str, kind: str) -> None:
        """Continue the run that was raced for: it must be the undisturbed one to the last bit."""
        code, text = in_a_fork(lambda: digest(sample(store, lambda point: None, HOW)))
        self._check((code, text) == (0, self.digest), f"{name}: continued to {code} {text}")
        self.happened[kind] += 1
        shutil.rmtree(store)

    def _check(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what)


REFUSED, UNSTARTED = 7, 8  # exit codes: of a driver that lost its run, and of one that got none


def _leave(work: Callable[[], ds.Run]) -> None:
    """Do a child's work, and end it with what came of that."""
    try:
        work()
        os._exit(0)
    except StoreFault:
        os._exit(REFUSED)
    except StoreError:
        os._exit(UNSTARTED)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)


def _at(step: int, do: Callable[[], None]) -> Callable[[str], None]:
    """What does something at one step of all writes, counted from 0."""
    seen = [0]

    def at(point: str) -> None:
        seen[0] += 1
        if seen[0] == step + 1:
            do()

    return at


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def contents(folder: Path) -> dict[str, bytes]:
    """All names and bytes in a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def chosen(points: list[str], count: int) -> list[int]:
    """So many steps, spread over the run, of every kind of step and file that there is."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for number, point in enumerate(points):
        name, _, step = point.rpartition(": ")
        kinds.setdefault((name.split("/")[0], step), []).append(number)
    queues = [steps[len(steps) // 2 :] + steps[: len(steps) // 2] for steps in kinds.values()]
    turns = [queue[k] for k in range(max(map(len, queues))) for queue in queues if k < len(queue)]
    return sorted(turns[:count])


def main(woken: int, exchanged: int, started: int) -> None:
    """Prints one JSON object: what happened how often, and what went wrong.

    Args:
        woken: drivers to stop and wake, each at another step.
        exchanged: directories to exchange, and to delete and make again.
        started: times that several drivers start at once.
    """
    torch.set_num_threads(1)
    lease.BEAT_SECONDS, lease.EXPIRY_SECONDS = 0.1, 1.0
    arviz_bridge.load()
    versions()
    import_module("torch.fx.experimental.symbolic_shapes")
    with tempfile.TemporaryDirectory() as name:
        races = Races(Path(name))
        for step in chosen(races.points[:-1], woken):  # after the last there is nothing to refuse
            races.woken(step)
        for step in chosen(races.points[:-1], exchanged):
            for again in (False, True):
                races.exchanged(step, again)
        for number in range(started):
            races.started_at_once(number)
        sys.stdout.write(json.dumps({"happened": races.happened, "wrong": races.wrong}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
