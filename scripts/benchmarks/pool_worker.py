"""One contestant of scripts/bench pool in a process of its own: `WORKLOAD CONTESTANT`.

It says hello, then answers every line `go SECONDS` with a line of JSON. It ends when its input
does. Other packages are imported by their contestant only, so that a peer's environment need not
hold ours.
"""

import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from typing import Any

import torch

from scripts.benchmarks.workloads import SEED, WORKLOADS, Workload

THIN, CHAINS, CORES = 10, 4, 2
POLL = 0.005  # seconds between two looks at a run's progress
GLANCE = 0.05  # likewise of a pace: looking costs the driver processor time
REPORTS = 4  # of a chain, at least, that tell its pace
ENOUGH = 4.0  # seconds of steps that tell what one takes
Answer = dict[str, float]


# Whole runs of four chains: from the call to the result


def whole(run: Callable[[int], None]) -> Callable[[float], Answer]:
    """Runs of about so many seconds: what a step takes is known from one that is long enough."""

    def timed(steps: int) -> float:
        began = time.perf_counter()
        run(steps)
        return time.perf_counter() - began

    timed(THIN)  # what is done once a process
    start, steps = timed(THIN), 1_000
    while (took := timed(steps)) < start + ENOUGH:
        steps *= 4
    step = (took - start) / steps

    def go(wanted: float) -> Answer:
        each = max(1, round(wanted / step / THIN)) * THIN
        return {"steps": CHAINS * each, "seconds": timed(each), "start": start}

    return go


def ours(workload: Workload, pack: int) -> Callable[[float], Answer]:
    """sample() on a local Ray that runs already: two actors of two chains."""
    import distsampler as ds

    join_ray()

    def run(steps: int) -> None:
        config = settings(workload, CHAINS, steps // THIN, pack, chains_per_actor=2)
        ds.sample(workload.model(), workload.rows(), workload.loss, config, quiet=True)

    return whole(run)


def devinterp(workload: Workload) -> Callable[[float], Answer]:
    """sample() of devinterp 1.3.2 on its pool of two processes, with its LLC estimator."""
    from devinterp.backends.default.slt.sampler import sample
    from devinterp.optim.sgmcmc import SGMCMC
    from devinterp.slt.llc import LLCEstimator
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(
        TensorDataset(*workload.rows()), batch_size=workload.batch_size, shuffle=True
    )
    options = {"lr": workload.lr, "localization": workload.localization, "nbeta": workload.nbeta}
    loss = workload.loss

    def run(steps: int) -> None:
        estimator = LLCEstimator(CHAINS, steps // THIN, init_loss=None, nbeta=workload.nbeta)
        sample(
            workload.model(), loader, [estimator], lambda model, batch: loss(model, batch).mean(),
            sampling_method=SGMCMC.sgld, optimizer_kwargs=dict(options),
            num_draws=steps // THIN, num_chains=CHAINS, num_steps_bw_draws=THIN, cores=CORES,
            verbose=False,
        )  # fmt: skip

    return whole(run)


# The pace of two chains, once they run


def paced(workload: Workload, actors: int) -> Callable[[float], Answer]:
    """Two chains on one actor or two: from each chain's first report to its last."""
    import distsampler as ds

    join_ray()

    def go(seconds: float) -> Answer:
        config = settings(workload, CORES, 10**7, chains_per_actor=CORES // actors)
        running = ds.start(workload.model(), workload.rows(), workload.loss, config)
        seen: dict[int, list[tuple[float, int]]] = {chain: [] for chain in range(CORES)}
        while not running.done:
            time.sleep(GLANCE)
            for chain in running.progress.chains if running.progress else ():
                reports = seen[chain.chain]
                if chain.draws and (not reports or reports[-1][1] != chain.draws):
                    reports.append((time.perf_counter(), chain.draws))
            if all(len(kept := late(r)) >= REPORTS and kept[-1][0] - r[0][0] >= seconds
                   for r in seen.values()):  # fmt: skip
                running.stop()
        running.wait()
        return {"steps_per_second": sum(map(pace, seen.values()))}

    return go


def late(reports: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Those behind a chain's first second, in which blocks find their length."""
    return [report for report in reports if report[0] - reports[0][0] >= 1.0]


def pace(reports: list[tuple[float, int]]) -> float:
    """Steps a second of a chain, between its reports."""
    (began, first), *_, (ended, last) = late(reports)
    return THIN * (last - first) / (ended - began)


def plain(workload: Workload) -> Callable[[float], Answer]:
    """The same chain in each of two processes, without Ray, store or driver."""

    def go(seconds: float) -> Answer:
        context = multiprocessing.get_context("spawn")
        barrier, queue = context.Barrier(CORES), context.Queue()
        arguments = [(workload.name, chain, seconds, barrier, queue) for chain in range(CORES)]
        processes = [context.Process(target=alone, args=each) for each in arguments]
        for process in processes:
            process.start()
        rates = [queue.get() for _ in processes]
        for process in processes:
            process.join()
        return {"steps_per_second": sum(rates)}

    return go


def alone(name: str, chain: int, seconds: float, barrier: Barrier, queue: Any) -> None:
    """One chain in this process, from when the other is ready too."""
    from distsampler.chains import anchor_pass
    from distsampler.chains.pack import Pack
    from distsampler.models.numerics import numerics
    from distsampler.models.replica import Replica
    from distsampler.sampling.prepare import prepare

    workload = WORKLOADS[name]
    config = settings(workload, CORES, 100)
    spec = prepare(workload.model(), workload.rows(), workload.loss, config)
    replica = Replica(spec, torch.device("cpu"))
    parts = [anchor_pass.measure(replica, spec, part) for part in anchor_pass.parts_of(spec, 1)]
    walker = Pack(spec, [chain], anchor_pass.reduce(parts, spec), replica)
    with numerics(spec):
        walker.advance(20)
        barrier.wait()
        began, made = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            walker.advance(10)
            made += 10
        queue.put(THIN * made / (time.perf_counter() - began))


# From the call to the first draw


def first(workload: Workload) -> Callable[[float], Answer]:
    """Seconds from the call until each phase, and until the driver has received a draw."""
    import distsampler as ds

    join_ray()

    def go(seconds: float) -> Answer:
        config, phases = settings(workload, CORES, 10**7), dict[str, float]()
        began = time.perf_counter()
        running = ds.start(workload.model(), workload.rows(), workload.loss, config)
        phases["checked"] = time.perf_counter() - began
        while "seconds" not in phases and not running.done:
            time.sleep(POLL)
            if (progress := running.progress) is not None:
                now = time.perf_counter() - began
                phases.setdefault(progress.phase, now)
                if any(chain.draws for chain in progress.chains):
                    phases["seconds"] = now
        running.stop()
        running.wait()
        return phases

    return go


def join_ray() -> None:
    """A local Ray of two CPUs, which is up before anything is timed."""
    import ray

    ray.init(
        num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )


def settings(
    workload: Workload, chains: int, draws: int, pack: int = 1, chains_per_actor: int = 1
) -> Any:
    """The config of a run of this benchmark."""
    import distsampler as ds

    sampler = ds.SamplerConfig(
        lr=workload.lr, localization=workload.localization, nbeta=workload.nbeta
    )
    return ds.RunConfig(
        sampler=sampler, chains=chains, draws=draws, burn_in=0, thin=THIN, seed=SEED, pack=pack,
        batch_size=workload.batch_size, device="cpu",
        placement=ds.PlacementConfig(gpus_per_chain=0, chains_per_actor=chains_per_actor),
    )  # fmt: skip


CONTESTANTS: dict[str, Callable[[Workload], Callable[[float], Answer]]] = {
    "packed": lambda workload: ours(workload, pack=2),
    "unpacked": lambda workload: ours(workload, pack=1),
    "devinterp": devinterp,
    "two": lambda workload: paced(workload, 2),
    "one": lambda workload: paced(workload, 1),
    "plain": plain,
    "first": first,
}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    workload = WORKLOADS[sys.argv[1]]
    parameters = sum(p.numel() for p in workload.model().parameters())
    go = CONTESTANTS[sys.argv[2]](workload)
    print(json.dumps({"parameters": parameters}), file=answers, flush=True)
    for line in sys.stdin:
        answer = go(float(line.removeprefix("go ")))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
