"""What durability costs: a run on the disk against the same run in memory; 200 chains that commit.

The runs take turns in one sitting, the order rotating; ratios are of one round. They run in one
process, where the chains wait for every commit: with chains in actors the cost is hidden besides.
The goal is judged by run time against memory. On a busy machine these scatter; the share of a
run's time that is spent in its trace's writing calls, shown beside, does not.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import distsampler as ds
from distsampler.chains.observables import variables
from distsampler.draws import DrawBlock, Variable
from distsampler.sampling.prepare import prepare
from distsampler.store.files import Files
from distsampler.store.manifest import Manifest
from distsampler.store.trace import Trace
from scripts.benchmarks.machine import heading, log, machine
from scripts.benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]
STORES = {"memory": "in memory", "disk": "on the disk", "fsync": "on the disk, fsync=True"}
WORKLOAD, CHAINS, BLOCK_SECONDS = WORKLOADS["mlp"], 2, 2.0
GOAL = 0.03  # of run time, at most
MANY, STATE_BYTES, COMMIT_SECONDS = 200, 24_000, 5.0
QUARTILES = [0.25, 0.5, 0.75]
BLOCK = 25  # draws that each of the many chains brings to a commit


def config(**fields: Any) -> ds.RunConfig:
    sampler = ds.SamplerConfig(lr=WORKLOAD.lr, localization=WORKLOAD.localization)
    settings = {"chains": CHAINS, "burn_in": 0, "batch_size": WORKLOAD.batch_size, "device": "cpu"}
    return ds.RunConfig(**{"sampler": sampler, **settings, **fields})


class Watch:
    """Counts the seconds spent in the calls that write."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("commit", "log", "seal", "record_facts"):
            setattr(Trace, name, self._timed(getattr(Trace, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def run(store: str, settings: ds.RunConfig, watch: Watch) -> tuple[float, float]:
    """Seconds that a run takes, and those of them spent writing."""
    began, watch.seconds = time.perf_counter(), 0.0
    ds.sample(
        WORKLOAD.model(), WORKLOAD.rows(), WORKLOAD.loss, settings, store=store,
        pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip
    return time.perf_counter() - began, watch.seconds


def sized(seconds: float, watch: Watch) -> ds.RunConfig:
    """A run of about so many seconds, in blocks of at least two."""
    short, long = (run(f"memory://sized-{n}", config(draws=n), watch)[0] for n in (20, 120))
    draw = (long - short) / (100 * CHAINS)
    block = math.ceil(BLOCK_SECONDS / draw)
    blocks = max(2, round(seconds / (CHAINS * BLOCK_SECONDS)))
    return config(draws=blocks * block, placement=ds.PlacementConfig(block=block))


def race(folder: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """Every store in turn; the extra time of each, as a share of the run in memory."""
    watch = Watch()
    settings = sized(seconds, watch)
    times: dict[str, list[float]] = {name: [] for name in STORES}
    shares: dict[str, list[float]] = {name: [] for name in STORES}
    for turn in range(rounds):
        order = list(STORES)
        for name in order[turn % 3 :] + order[: turn % 3]:
            store = f"memory://{turn}" if name == "memory" else str(folder / f"{name}-{turn}")
            changed = settings.replaced(fsync=name == "fsync")
            whole, writing = run(store, changed, watch)
            times[name].append(whole)
            shares[name].append(writing / whole)
        log(f"durability: round {turn + 1} of {rounds}")
    medians = {
        name: {
            "seconds": float(np.median(times[name])),
            "extra": np.quantile(np.divide(times[name], times["memory"]) - 1, QUARTILES).tolist(),
            "writing": np.quantile(shares[name], QUARTILES).tolist(),
        }
        for name in STORES
    }
    return {"draws": settings.draws, "block": settings.placement.block, "stores": medians}


def group_commits(store: Path, commits: int) -> dict[str, Any]:
    """Seconds of every commit that carries a block of each of many chains."""
    spec = prepare(WORKLOAD.model(), WORKLOAD.rows(), WORKLOAD.loss, config(chains=MANY))
    recorded = variables(spec)
    manifest = Manifest(
        config=spec.config, fingerprint={}, variables=recorded, versions={}, n_committed=(0,) * MANY
    )
    trace, generator = Trace.create(Files(store), manifest), np.random.default_rng(0)
    seconds = []
    for number in range(commits):
        blocks = [_block(chain, number * BLOCK, recorded, generator) for chain in range(MANY)]
        began = time.perf_counter()
        trace.commit(blocks)
        seconds.append(time.perf_counter() - began)
    assert trace.committed == (commits * BLOCK,) * MANY
    return {"seconds": np.quantile(seconds, QUARTILES).tolist(), "longest": max(seconds)}


def _block(
    chain: int, first: int, recorded: tuple[Variable, ...], generator: np.random.Generator
) -> DrawBlock:
    values = {
        v.name: generator.random((BLOCK, *v.shape)).astype(v.dtype)
        if np.dtype(v.dtype).kind == "f"
        else np.ones((BLOCK, *v.shape), v.dtype)
        for v in recorded
    }
    return DrawBlock(chain, first, values, generator.bytes(STATE_BYTES))


def table(results: dict[str, Any]) -> str:
    """All as text."""
    raced, many = results["run"], results["commits"]
    lines = [f"\n{CHAINS} chains of {raced['draws']} draws, {WORKLOAD.title}, "
             f"blocks of {raced['block']} draws (2 s)",
             f"{'':28}{'run':>8}   {'more than in memory':28}writing, of the run"]  # fmt: skip
    for name, row in raced["stores"].items():
        extra, writing = (quartiles(row[key]) for key in ("extra", "writing"))
        lines.append(f"  {STORES[name]:26}{row['seconds']:6.1f} s   {extra:28}{writing}")
    extra = raced["stores"]["disk"]["extra"][1]
    lines.append(
        f"goal: under {GOAL:.0%} more than in memory: {'met' if extra < GOAL else 'MISSED'}"
    )
    low, median, high = many["seconds"]
    lines += [
        f"\n{MANY} chains, a commit of {BLOCK} draws and {STATE_BYTES:,} bytes of state each",
        f"  a commit takes {median:.2f} s ({low:.2f}-{high:.2f}, longest {many['longest']:.2f})",
        f"  commits per second: reached {1 / median:.2f}, needed {1 / COMMIT_SECONDS:.2f}",
        f"goal: the driver is not the bottleneck: {'met' if median < COMMIT_SECONDS else 'MISSED'}",
    ]
    return "\n".join(lines)


def quartiles(shares: list[float]) -> str:
    low, median, high = shares
    return f"{median:.2%} ({low:.2%} to {high:.2%})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench durability", description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0, help="of a run")
    parser.add_argument("--rounds", type=int, default=6, help="runs on every store")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    results = {"machine": machine(), "seconds": options.seconds, "rounds": options.rounds}
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as folder:
        results["commits"] = group_commits(Path(folder) / "many", 10)
        results["run"] = race(Path(folder), options.seconds, options.rounds)
    if options.json:
        print(json.dumps(results))
        return
    print(heading(results["machine"]))
    print(f"1 thread; {options.rounds} rounds; medians (quartiles)")
    print(table(results))


if __name__ == "__main__":
    main()
