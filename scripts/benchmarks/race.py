"""Contestants of a race: each in a process of its own, of which one runs at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.benchmarks.machine import log

ROOT = Path(__file__).parents[2]
PEER = "devinterp==1.3.2"


class Contestant:
    """The process of a contestant: it runs when asked to, and waits otherwise.

    Args:
        python: interpreter of its environment.
        module: file of this folder that it runs, such as "chain_worker".
        workload: name in ``workloads``.
        name: name in the worker's own list.
    """

    def __init__(self, python: str, module: str, workload: str, name: str) -> None:
        self._process = subprocess.Popen(
            [python, "-m", f"scripts.benchmarks.{module}", workload, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self.name = f"{workload}/{name}"
        self.hello = self._answer()

    def go(self, seconds: float) -> dict[str, Any]:
        """Run for about this long; return the steps made and the seconds they took."""
        return self.ask(f"go {seconds}")

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line to the worker and return its answer."""
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"contestant {self.name} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def rotated(names: list[str], turn: int) -> Iterator[str]:
    """Yield the names in the order of a turn: each turn begins with another one."""
    cut = turn % len(names)
    yield from names[cut:] + names[:cut]


def peer_python(peer: str = PEER, home: str = ".venv-bench-devinterp") -> str:
    """Return the interpreter of a peer's environment, made on first use.

    Args:
        peer: what pip installs.
        home: name of the environment's folder.

    Raises:
        CalledProcessError: the environment cannot be made.
    """
    folder = ROOT / home
    python, stamp = str(folder / "bin/python"), folder / "installed"
    constraints = ROOT / "scripts/constraints.txt"
    wanted = f"{peer}\n{constraints.read_text()}"
    if not stamp.exists() or stamp.read_text() != wanted:
        log(f"installing {peer} into {home} (once)")
        torch = next(x for x in constraints.read_text().split() if x.startswith("torch=="))
        pip = [python, "-m", "pip", "install", "-q", "-c", str(constraints)]
        for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, torch], [*pip, peer]):
            subprocess.run(command, check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return python


def quartiles(ratios: list[float] | None) -> str:
    """Return a median with its quartiles, as text."""
    if ratios is None:
        return "-"
    low, median, high = ratios
    return f"{median:.2f} ({low:.2f}-{high:.2f})"
