"""Processes that tests start, and what can be seen of a run from outside of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # loopback only
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
CODE = Path(__file__).parent / "user_code.py"
CONFIG: dict[str, Any] = {
    "model": f"{CODE}:model",
    "data": f"{CODE}:data",
    "loss": f"{CODE}:loss",
    "sampler": {"name": "sgld", "lr": 5e-3, "localization": 5.0},
    "chains": 2,
    "draws": 900,
    "burn_in": 100,
    "thin": 5,
    "batch_size": 100,
    "device": "cpu",
    "placement": {"cpus_per_chain": 0.5, "chains_per_actor": 2},
}


def command(
    *words: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from distsampler.cli import main; main()", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **RAY_ENVIRONMENT, **environment},
        timeout=120,
    )


def written(path: Path, **changes: object) -> Path:
    file = path / "config.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return file


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
