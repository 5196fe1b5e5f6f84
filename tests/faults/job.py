"""A run in a process of its own, which may be killed, and what can be seen of it from outside.

Its steps take their time while a file exists: as long as a test wants to kill, and not longer.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import distsampler as ds
from tests.problems import Held, config, regression
from tests.processes import RAY_ENVIRONMENT, until

ROOT = Path(__file__).parents[2]
CHAINS = 4
T = TypeVar("T")


def sample(
    store: Path, held: Path, seconds: float = 0.1, memory: int = 0, pool: Any = None,
    resume: Any = "never", **fields: Any,
) -> ds.Run:  # fmt: skip
    """The run; what these arguments say changes none of its bits, but for draws."""
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
