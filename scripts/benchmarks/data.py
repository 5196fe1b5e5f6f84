"""Memory of actors that share their data: private megabytes of each, above an actor without data.

Four actors run on a local Ray. What counts is the memory that is theirs alone (private clean and
dirty pages of /proc/PID/smaps_rollup): pages of the object store, which all of a node share, are
not in it. The base is the same run on almost no data. A data set that torch pickles, and so copies
into every actor, is measured beside it: the copy must be seen, or the measurement is blind.
"""

import argparse
import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import distsampler as ds
from scripts.benchmarks.machine import heading, log, machine

ACTORS, WIDTH, GOAL = 4, 256, 30.0  # MB above base, at most
SHARDS = 10


class Copied(Dataset[Tensor]):
    """Rows that travel as a torch tensor: every process that unpickles them has its own."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [self.rows[index] for index in indices]


KINDS: dict[str, tuple[str, Callable[[Tensor], Any], dict[str, Any]]] = {
    "replicate": ("tensors, replicated: one copy a node", lambda rows: rows, {}),
    "hop": (
        f"tensors in {SHARDS} shards, chains that hop",
        lambda rows: rows,
        {"data_mode": "hop", "shards": SHARDS, "hop_every": 50},
    ),
    "copied": ("a Dataset of torch tensors: a copy an actor", Copied, {}),
}
"""Title, what sample() is given, and fields of the config; a row of the table each."""


def squares(model: nn.Module, batch: Any) -> Tensor:
    return torch.as_tensor(model(batch).square().mean(1))


def private(pid: int) -> float:
    """MB that are a process's own."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_(?:Clean|Dirty): +(\d+)", text, re.M))) / 1024


def measure(data: Any, seconds: float, fields: dict[str, Any]) -> list[float]:
    """Most private memory of each actor, while a run goes on for some seconds."""
    torch.manual_seed(0)
    config = ds.RunConfig(
        chains=ACTORS, draws=10**7, burn_in=0, device="cpu", watch=False,
        sampler=ds.SamplerConfig(lr=1e-7, localization=1.0),
        placement=ds.PlacementConfig(gpus_per_chain=0), **fields,
    )  # fmt: skip
    most: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        running = ds.start(nn.Linear(WIDTH, 8), data, squares, config, store=Path(folder) / "run")
        until = time.monotonic() + 240.0
        while time.monotonic() < until and not running.done:
            time.sleep(0.2)
            seen = running.progress
            if seen is not None and all(chain.draws for chain in seen.chains):
                until = min(until, time.monotonic() + seconds)
            for pid in pids(Path(folder) / "run"):
                most[pid] = max(most.get(pid, 0.0), private(pid))
        running.stop()
        running.wait()
    return sorted(most.values())


def pids(store: Path) -> list[int]:
    """Of the actors that have started."""
    path = store / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [int(event["pid"]) for event in events if event["event"] == "started"]


def compare(megabytes: int, seconds: float, kinds: list[str]) -> dict[str, Any]:
    """Each kind of data above the base."""
    base = statistics.median(measure(torch.randn(2_048, WIDTH), seconds, {}))
    log(f"data: an actor without data: {base:.0f} MB")
    rows = torch.randn(megabytes * 2**20 // (4 * WIDTH), WIDTH)
    results: dict[str, Any] = {"megabytes": megabytes, "base_mb": base, "kinds": {}}
    for name in kinds:
        _, made, fields = KINDS[name]
        above = [each - base for each in measure(made(rows), seconds, fields)]
        results["kinds"][name] = {"above_mb": above, "most_mb": max(above), "actors": len(above)}
        log(f"data: {name}: above base {', '.join(f'{each:.0f}' for each in above)} MB")
    return results


def table(results: dict[str, Any]) -> str:
    """All as text."""
    lines = [
        f"\n{results['megabytes']} MB of data, {ACTORS} actors; one without data: "
        f"{results['base_mb']:.0f} MB of its own",
        f"{'':48}{'MB above that, the most':>24}{'least':>8}",
    ]
    for name, row in results["kinds"].items():
        lines.append(f"  {KINDS[name][0]:46}{row['most_mb']:24.0f}{min(row['above_mb']):8.0f}")
    if "replicate" in results["kinds"]:
        met = "met" if results["kinds"]["replicate"]["most_mb"] <= GOAL else "MISSED"
        lines.append(f"goal: replicated, at most {GOAL:g} MB above base each: {met}")
    if "hop" in results["kinds"]:
        shard = results["megabytes"] / SHARDS
        met = "met" if results["kinds"]["hop"]["most_mb"] <= shard else "MISSED"
        lines.append(f"goal: hopping, at most a shard of {shard:g} MB each: {met}")
    return "\n".join(lines)


def join_ray(megabytes: int) -> None:
    import ray

    ray.init(
        num_cpus=ACTORS, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR, object_store_memory=(2 * megabytes + 200) * 2**20,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench data", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500, help="of data")
    parser.add_argument("--seconds", type=float, default=5.0, help="that memory is watched")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=KINDS)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    join_ray(options.megabytes)
    results = {"machine": machine()}
    results |= compare(options.megabytes, options.seconds, options.kinds)
    if options.json:
        print(json.dumps(results))
        return
    print(heading(results["machine"]))
    print(table(results))


if __name__ == "__main__":
    main()
