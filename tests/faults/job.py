"""A run in a process of its own, which may be killed, and what can be seen of it from outside.

Its steps take their time while a file exists: as long as a test wants to kill, and not longer.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import nn

import distsampler as ds
from tests.conftest import RAY_ENVIRONMENT
from tests.problems import config, regression, squared_error

ROOT = Path(__file__).parents[2]
CHAINS = 4
T = TypeVar("T")


class Held:
    """A loss that takes its time while a file exists; its values are always the same.

    Args:
        held: the file.
        seconds: a call takes.
        memory: bytes that a call holds meanwhile, on the device of the batch.
    """

    def __init__(self, held: Path, seconds: float, memory: int = 0) -> None:
        self.held, self.seconds, self.memory = held, seconds, memory

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if self.held.exists():
            size = self.memory if len(batch[0]) == 16 else 0  # a step, not the anchor
            eaten = torch.ones(size, dtype=torch.uint8, device=batch[0].device)
            time.sleep(self.seconds)
            del eaten
        return squared_error(model, batch)


def sample(
    store: Path, held: Path, seconds: float = 0.1, memory: int = 0, pool: Any = None,
    resume: Any = "never", **fields: Any,
) -> ds.Run:  # fmt: skip
    """The run; what is given here changes none of its bits, but for draws."""
    model, data = regression()
    defaults = {"chains": CHAINS, "draws": 600, "burn_in": 100, "thin": 2, "commit_seconds": 0.2}
    placement = ds.PlacementConfig(**{"block": 5, **fields.pop("placement", {})})
    settings = config(**{**defaults, **fields, "placement": placement})
    loss = Held(Path(held), seconds, memory)
    return ds.sample(model, data, loss, settings, store=store, pool=pool, resume=resume, quiet=True)


def main() -> None:
    """What the driver's process does."""
    logging.basicConfig(level=logging.INFO)
    sample(**json.loads(sys.argv[1]))


class DriverProcess:
    """``sample`` in a process of its own; a context manager that leaves none behind.

    Args:
        store: the run directory.
        environment: variables to set.
        **fields: as of ``sample``.
    """

    def __init__(
        self, store: Path, held: Path, environment: dict[str, str] | None = None, **fields: Any
    ) -> None:
        self._log = store.with_suffix(".log").open("ab+")
        arguments = {"store": str(store), "held": str(held), **fields}
        code = "from tests.faults.job import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(arguments)],
            cwd=ROOT,
            env={**os.environ, **RAY_ENVIRONMENT, "PYTHONPATH": str(ROOT), **(environment or {})},
            stdout=self._log,
            stderr=self._log,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self.close()
        if error is not None:
            error.add_note(self.said())

    def kill(self) -> bool:
        """Ends it on the spot; whether it was alive."""
        alive = self.process.poll() is None
        self.process.kill()
        self.process.wait()
        return alive

    def close(self) -> None:
        """Lets go of what it printed."""
        self._log.close()

    def finish(self, timeout: float = 240) -> None:
        """Waits for a good end."""
        code = self.process.wait(timeout)
        assert code == 0, f"the driver ended with {code}"

    def until(self, condition: Callable[[], T], timeout: float = 120) -> T:
        """What the condition gives as soon as it is true, while the driver lives."""
        return until(lambda: self._alive() and condition(), timeout)

    def said(self) -> str:
        """The end of what it printed."""
        return Path(self._log.name).read_text()[-4000:]

    def _alive(self) -> bool:
        code = self.process.poll()
        assert code is None, f"the driver has ended with {code}"
        return True


def until(condition: Callable[[], T], timeout: float = 120) -> T:
    """What a condition gives, as soon as it is true."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not true within {timeout:g} s")


def events(store: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind, while the run goes on."""
    try:
        lines = (store / "events.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in whole if event["event"] == kind]


def committed(store: Path) -> int:
    """Draws that exist, of all chains."""
    try:
        return sum(json.loads((store / "run.json").read_text())["n_committed"])
    except FileNotFoundError:
        return 0


def actors(store: Path) -> list[int]:
    """Processes of the run's actors that live."""
    return [pid for event in events(store, "started") if _is_actor(pid := int(event["pid"]))]


def end(pid: int, number: int = signal.SIGKILL) -> None:
    """Sends an actor a signal."""
    assert _is_actor(pid)
    os.kill(pid, number)


def _is_actor(pid: int) -> bool:
    try:
        return b"ChainActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
