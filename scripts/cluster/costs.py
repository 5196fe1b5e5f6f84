"""What a driver's deeds cost on this machine, measured with the library; and real runs to check by.

Seconds of the driver are those that a processor worked for it, so that a busy machine changes them
little; what actors take is wall-clock time.
"""

import contextlib
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import ray
import torch
from torch import nn

import distsampler as ds
from distsampler.chains import anchor_pass
from distsampler.chains.worker import Advance, AnchorPass, Worker
from distsampler.draws import DrawBlock
from distsampler.execution.pool import PlaceReady, WorkDone
from distsampler.execution.progress import Progress
from distsampler.execution.ray_pool import RayPool
from distsampler.models.replica import ChainSpec
from distsampler.sampling.prepare import prepare
from distsampler.store.trace import Trace
from scripts.benchmarks.scale_worker import block, empty
from scripts.cluster.simulation import Cluster, Costs, simulate

CALLS, STEP, BATCH = 30, 0.02, 16
SIZES = (50, 400)  # chains of the commits, snapshots and calls that are compared


def measure() -> Costs:
    """All of them."""
    with local_ray(2):
        start, submit, collect, latency = calls()
        wait = polls()
    fixed, each, chain = commits()
    return Costs(start, latency, submit, collect, wait, fixed, each, chain, snapshots())


@contextlib.contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    ray.init(
        num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    yield
    ray.shutdown()


def asleep(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss whose minibatches take their time, and need no processor for it."""
    if len(batch) == BATCH:
        time.sleep(STEP)
    return torch.as_tensor(model(batch).square().mean(1))


def sleeper(chains: int, **fields: Any) -> tuple[nn.Module, torch.Tensor, ds.RunConfig]:
    """A small model, its data, and a config of a draw a step."""
    torch.manual_seed(0)
    config = ds.RunConfig(
        chains=chains, burn_in=0, thin=1, batch_size=BATCH, device="cpu", watch=False,
        sampler=ds.SamplerConfig(lr=1e-6, localization=1.0),
        placement=ds.PlacementConfig(gpus_per_chain=0), **fields,
    )  # fmt: skip
    return nn.Linear(10, 10), torch.randn(512, 10), config


def calls() -> tuple[float, float, float, float]:
    """An actor's start; submitting a block, taking in its reply, and the time both lose beside."""
    model, rows, config = sleeper(2, draws=10**6)
    spec, pool = prepare(model, rows, asleep, config), RayPool(config.placement)
    began = time.perf_counter()
    pool.start(spec, [0])
    one(pool, PlaceReady)
    start, parts = time.perf_counter() - began, list[Any]()
    for part in anchor_pass.parts_of(spec, 1):
        pool.submit(0, AnchorPass(part))
        parts.append(one(pool, WorkDone).result)
    submits, collects, latencies = list[float](), list[float](), list[float]()
    known = anchor_pass.reduce(parts, spec)
    for number in range(CALLS):
        work = Advance((0,), 5 * number, 5, known)
        began, thread = time.perf_counter(), time.thread_time()
        pool.submit(0, work)
        submits.append(time.thread_time() - thread)
        thread = time.thread_time()  # to wait costs this thread nothing
        done = one(pool, WorkDone)
        collects.append(time.thread_time() - thread)
        latencies.append(time.perf_counter() - began - done.seconds)
    pool.stop()
    return start, median(submits), median(collects), median(latencies)


def one(pool: RayPool, kind: type[Any]) -> Any:
    """The next event, which must be of a kind."""
    while True:
        for event in pool.wait(1.0):
            if not isinstance(event, kind):
                raise SystemExit(f"expected {kind.__name__}, got {event}")
            return event


def polls() -> float:
    """Return seconds of a poll for replies per call under way: calls that wait for one actor."""

    class Slow:
        def nap(self) -> None:
            time.sleep(60)

    actor = ray.remote(Slow).options(num_cpus=0).remote()
    medians = []
    for size in SIZES:
        refs = [actor.nap.remote() for _ in range(size)]
        taken = list[float]()
        for _ in range(CALLS):
            thread = time.thread_time()
            ray.wait(refs, num_returns=1, timeout=0)
            ray.wait(refs, num_returns=size, timeout=0)
            taken.append(time.thread_time() - thread)
        medians.append(median(taken))
    ray.kill(actor)
    return each(medians)


def commits() -> tuple[float, float, float]:
    """Of a commit: what it costs in any case, for each block, and for each chain of the run."""
    generator, measured = np.random.default_rng(0), list[tuple[float, float, float, float]]()
    for chains in SIZES:
        for share in (10, 1):  # every tenth chain brings a block, then all do
            with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
                trace, variables = empty(Path(folder) / "run", chains, 2_000)
                seconds = list[float]()
                for turn in range(4):
                    who = range(0, chains, share)
                    blocks = [block(c, 40 * turn, 40, variables, generator) for c in who]
                    began = time.process_time()  # the codecs have threads of their own
                    trace.commit(blocks)
                    seconds.append(time.process_time() - began)
                measured.append((1.0, float(len(blocks)), float(chains), median(seconds)))
    table = np.array(measured)
    weights = 1 / table[:, 3]
    numbers = np.linalg.lstsq(table[:, :3] * weights[:, None], np.ones(len(table)), rcond=None)[0]
    fixed, each, chain = np.maximum(numbers, 0.0).tolist()
    return fixed, each, chain


def snapshots() -> float:
    """Seconds of a snapshot of the progress, for each chain."""
    measured = []
    for chains in SIZES:
        progress = Progress((0,) * chains, 0, 10**6, 1.0)
        at = np.random.default_rng(0).standard_normal(600)
        values = dict.fromkeys(("loss", "excess_loss", "probe_loss"), at)
        for chain in range(chains):
            progress.add(DrawBlock(chain, 0, values, b""))
        shown = progress.snapshot("sampling", ()).r_hat  # ArviZ is loaded now
        thread = time.thread_time()
        for _ in range(3):
            shown = progress.snapshot("sampling", ()).r_hat  # as the display asks for
        assert math.isfinite(shown)
        measured.append((time.thread_time() - thread) / 3)
    return each(measured)


def each(seconds: list[float]) -> float:
    """Seconds for each of the things that were counted in SIZES."""
    return max(0.0, (seconds[1] - seconds[0]) / (SIZES[1] - SIZES[0]))


def check(sizes: list[int], costs: Costs, seconds: float) -> list[dict[str, Any]]:
    """Real runs of a fixed duration a draw, and the simulation of the same."""
    rows, draw = list[dict[str, Any]](), pace()
    for actors in sizes:
        with local_ray(actors):
            measured = real(actors, seconds)
        cluster = Cluster(actors, measured["elapsed"], 0.0, draw, spread=0.0)
        simulated = simulate(cluster, replace(costs, start=0.0))  # both count from the first draws
        rows.append({"actors": actors, "draw": draw, "real": measured, "simulated": simulated})
    return rows


def pace() -> float:
    """Seconds of a draw, in this process."""
    model, rows, config = sleeper(2, draws=100)
    spec: ChainSpec = prepare(model, rows, asleep, config)
    worker = Worker(spec, torch.device("cpu"), 2)
    parts = [worker.perform(AnchorPass(part)) for part in anchor_pass.parts_of(spec, 1)]
    known = anchor_pass.reduce(parts, spec)  # type: ignore[arg-type]
    worker.perform(Advance((0,), 0, 10, known))
    began = time.perf_counter()
    worker.perform(Advance((0,), 10, 100, known))
    return (time.perf_counter() - began) / 100


def real(actors: int, seconds: float) -> dict[str, Any]:
    """A run of so many actors, stopped after some seconds: draws a second, and commits."""
    model, rows, config = sleeper(actors, draws=10**6, min_chains=1)
    commit, counted, seen = Trace.commit, list[int](), list[tuple[float, int, int]]()

    def counting(trace: Trace, blocks: Any) -> None:
        counted.append(len(blocks))
        commit(trace, blocks)

    with mock.patch.object(Trace, "commit", counting):
        running = ds.start(model, rows, asleep, config)
        while not running.done and not (seen and seen[-1][0] - seen[0][0] > seconds):
            time.sleep(0.01)
            chains = running.progress.chains if running.progress else ()
            if chains and all(chain.draws for chain in chains):
                made = sum(chain.draws for chain in chains)
                if not seen or made > seen[-1][1]:
                    seen.append((time.perf_counter(), made, len(counted)))
        running.stop()
        running.wait()
    (began, first, before), (ended, last, after) = seen[0], seen[-1]
    elapsed = ended - began
    pace = (last - first) / elapsed
    return {"draws_per_second": pace, "commits": after - before, "elapsed": elapsed}
