"""Where, when and with what a benchmark was run."""

import datetime
import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Return date, processor, load and versions."""
    model = platform.machine()
    with suppress(OSError):
        info = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in info if x.startswith("model name")), model)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": 1,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("distsampler", "torch", "numpy")},
    }


def heading(about: dict[str, Any]) -> str:
    """Return the machine as the first line of a table."""
    return f"{about['date']}  {about['cpu']}, {about['cores']} cores, load {about['load']:.1f}"


def log(text: str) -> None:
    """Print to standard error, so that standard output holds the result alone."""
    print(text, file=sys.stderr, flush=True)
