"""One measurement of scripts/bench scale in a process of its own: `NAME NUMBERS...`, JSON out.

A process of its own, so that its memory is its own: what it held at most, above what it held when
all was imported.
"""

import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import distsampler as ds
from distsampler.analysis import arviz_bridge
from distsampler.analysis.run import Run
from distsampler.chains.observables import variables
from distsampler.draws import AtAnchor, DrawBlock, Variable
from distsampler.facts import Facts, Posterior
from distsampler.sampling.prepare import prepare
from distsampler.store.files import Files
from distsampler.store.manifest import Manifest
from distsampler.store.trace import Trace
from scripts.benchmarks.durability import Watch
from scripts.benchmarks.workloads import EXAMPLES, SEED, WORKLOADS

LINEAR, WIDTH = WORKLOADS["linear"], 1_000
STATE_BYTES, BLOCK = 24_000, 1_024


def sampled(chains: int, draws: int, pack: int, runs: int = 1) -> dict[str, float]:
    """Runs of the deep linear net in this process: driver, worker and store in one."""
    watch = Watch()
    config, pool = settings(chains, draws, thin=1, pack=pack), ds.SerialPool()
    began = time.perf_counter()
    for _ in range(runs):
        ds.sample(LINEAR.model(), LINEAR.rows(), LINEAR.loss, config, pool=pool, quiet=True)
    seconds = time.perf_counter() - began
    steps = runs * chains * draws
    return {
        "steps": steps,
        "seconds": seconds,
        "microseconds_per_step": 1e6 * seconds / steps,
        "writing": watch.seconds / seconds,
    }


def driven(chains: int, draws: int, pack: int) -> dict[str, float]:
    """The same on two actors of a local Ray: this process is the driver, and nothing else."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    config, pool = settings(chains, draws, thin=1, pack=pack), ds.RayPool(
        gpus_per_chain=0, chains_per_actor=-(-chains // 2)
    )  # fmt: skip
    began = time.perf_counter()
    ds.sample(LINEAR.model(), LINEAR.rows(), LINEAR.loss, config, pool=pool, quiet=True)
    return {"steps": chains * draws, "seconds": time.perf_counter() - began}


def parameters(width: int, steps: int) -> dict[str, float]:
    """Two chains of a net of one wide layer, unpacked, a draw every ten steps.

    What a step costs is the difference of a run and one three times as long, after one that warms
    up: what a run costs to begin and to end is not divided by its few steps. The watch of the
    curvature looks early, and is left out for the same reason, of the memory too.
    """
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width // 10 or 1))
    rows = torch.randn(512, 10)
    seconds = list[float]()
    for length in (10, steps, 3 * steps):
        config = settings(2, length // 10, thin=10)
        config = config.replaced(batch_size=16, watch=False)
        began = time.perf_counter()
        ds.sample(model, rows, energy, config, pool=ds.SerialPool(), quiet=True)
        seconds.append(time.perf_counter() - began)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": sum(seconds),
        "microseconds_per_step": 1e6 * (seconds[2] - seconds[1]) / (2 * 2 * steps),
    }


def energy(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(model(batch).square().mean(1))


def committed(chains: int, draws: int) -> dict[str, float]:
    """Commits of a block of every chain until all draws are there; the last ones' seconds."""
    trace, recorded = empty(Path(sys.argv[-1]), chains, draws)
    generator, seconds = np.random.default_rng(SEED), list[float]()
    for first in range(0, draws, BLOCK):
        size = min(BLOCK, draws - first)
        blocks = [block(chain, first, size, recorded, generator) for chain in range(chains)]
        began = time.perf_counter()
        trace.commit(blocks)
        seconds.append(time.perf_counter() - began)
    return {"commit": float(np.median(seconds[-5:])), "commits": len(seconds)}


def diagnosed() -> dict[str, float]:
    """The verdict on a stored run, from opening it."""
    run = Run(sys.argv[-1])
    began = time.perf_counter()
    diagnosis = run.diagnosis
    return {"seconds": time.perf_counter() - began, "stride": diagnosis.stride}


def written(chains: int, draws: int) -> dict[str, float]:
    """A finished run of made-up draws, written as a driver writes them."""
    numbers = committed(chains, draws)
    trace = Trace(sys.argv[-1])
    at_anchor = AtAnchor(None, init_loss=1.0, probe_init_loss=1.0, probe_losses=np.ones(8))
    trace.record_facts(Facts(EXAMPLES, Posterior(LINEAR.nbeta)), at_anchor)
    trace.seal("finished", "", draws, 0.0)
    return numbers


def settings(chains: int, draws: int, thin: int, pack: int = 1) -> ds.RunConfig:
    sampler = ds.SamplerConfig(lr=LINEAR.lr, localization=LINEAR.localization)
    return ds.RunConfig(
        sampler=sampler, chains=chains, draws=draws, burn_in=0, thin=thin, pack=pack,
        batch_size=LINEAR.batch_size, device="cpu",
    )  # fmt: skip


def empty(store: Path, chains: int, draws: int) -> tuple[Trace, tuple[Variable, ...]]:
    """A run directory without draws, and what a draw of it holds."""
    spec = prepare(LINEAR.model(), LINEAR.rows(), LINEAR.loss, settings(chains, draws, thin=1))
    recorded = variables(spec)
    manifest = Manifest(
        config=spec.config,
        fingerprint={},
        variables=recorded,
        versions={},
        n_committed=(0,) * chains,
    )
    return Trace.create(Files(store), manifest), recorded


def block(
    chain: int,
    first: int,
    size: int,
    recorded: tuple[Variable, ...],
    generator: np.random.Generator,
) -> DrawBlock:
    """Made-up draws: noise, as large as it may be."""
    values = {
        v.name: generator.standard_normal((size, *v.shape)).astype(v.dtype)
        if np.dtype(v.dtype).kind == "f"
        else np.ones((size, *v.shape), v.dtype)
        for v in recorded
    }
    return DrawBlock(chain, first, values, generator.bytes(STATE_BYTES))


def memory(name: str) -> float:
    """MB of memory of this process: VmRSS now, VmHWM at most."""
    line = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(line[1]) / 1024 if line else float("nan")


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "sampled": sampled,
    "driven": driven,
    "parameters": parameters,
    "committed": committed,
    "written": written,
    "diagnosed": diagnosed,
}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arviz_bridge.load()
    before = memory("VmRSS")
    numbers = [int(text) for text in sys.argv[2:] if text.isdecimal()]
    measured: dict[str, Any] = MEASURES[sys.argv[1]](*numbers)
    peak = memory("VmHWM")
    print(json.dumps({**measured, "peak_mb": peak, "above_mb": max(0.0, peak - before)}))


if __name__ == "__main__":
    main()
