"""One contestant of scripts/bench chain in a process of its own: `WORKLOAD CONTESTANT`.

It says hello with its first loss, then answers every line `go SECONDS` with a line of JSON: the
steps it made, and how long they took. It ends when its input does. Other packages are imported by
their contestant only, so that a peer's environment need not hold ours.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from scripts.benchmarks.workloads import SEED, WORKLOADS, Workload

WARM_UP = 200  # steps; a multiple of every thin

Steps = Callable[[int], int]
"""Makes about this many steps, of all chains together; returns how many."""


def chain(workload: Workload, thin: int, pack: int = 1) -> tuple[float, Steps]:
    """Chains that advance together, with everything that a draw records by default."""
    import distsampler as ds
    from distsampler.chains import anchor_pass
    from distsampler.chains.pack import Pack
    from distsampler.models.numerics import numerics
    from distsampler.models.replica import ChainSpec, Replica
    from distsampler.sampling.prepare import prepare

    sampler = ds.SamplerConfig(
        lr=workload.lr, localization=workload.localization, nbeta=workload.nbeta
    )

    def made(thin: int) -> tuple[Pack, ChainSpec]:
        config = ds.RunConfig(
            sampler=sampler, thin=thin, batch_size=workload.batch_size, seed=SEED, device="cpu",
            chains=max(2, pack), pack=pack,
        )  # fmt: skip
        spec = prepare(workload.model(), workload.rows(), workload.loss, config)
        replica = Replica(spec, torch.device("cpu"))
        parts = [anchor_pass.measure(replica, spec, part) for part in anchor_pass.parts_of(spec, 1)]
        return Pack(spec, range(pack), anchor_pass.reduce(parts, spec), replica), spec

    walkers, spec = made(thin)

    def run(steps: int) -> int:
        draws = max(1, steps // (thin * pack))
        with numerics(spec):
            walkers.advance(draws)
        return draws * thin * pack

    return float(made(1)[0].advance(1).blocks[0].values["loss"][0]), run


def loop(workload: Workload, make: Callable[..., Any] | None = None) -> tuple[float, Steps]:
    """A plain training loop: forward, backward, and the optimizer's step where there is one."""
    model, batches, loss = workload.model(), workload.batches(), workload.loss
    options = {"localization": workload.localization, "nbeta": workload.nbeta}
    optimizer = make(model.parameters(), lr=workload.lr, **options) if make else None

    def run(steps: int) -> int:
        for _ in range(steps):
            model.zero_grad()
            loss(model, next(batches)).mean().backward()  # type: ignore[no-untyped-call]
            if optimizer is not None:
                optimizer.step()
        return steps

    return loss(model, next(workload.batches())).mean().item(), run


def sgmcmc(workload: Workload) -> tuple[float, Steps]:
    """The optimizer that devinterp 1.3 recommends."""
    from devinterp.optim.sgmcmc import SGMCMC

    return loop(workload, SGMCMC.sgld)


def sgld(workload: Workload) -> tuple[float, Steps]:
    """The class that devinterp 1.3 keeps for old code."""
    from devinterp.optim.sgld import SGLD

    return loop(workload, SGLD)


def sampled(workload: Workload) -> tuple[float, Steps]:
    """A chain as devinterp itself runs it: batches from a DataLoader, a draw every ten steps.

    No callback reads the draws, which is generous.
    """
    from devinterp.backends.default.slt.sampler import sample_single_chain
    from devinterp.optim.sgmcmc import SGMCMC
    from torch.utils.data import DataLoader, TensorDataset

    model, options = workload.model(), {"lr": workload.lr, "localization": workload.localization}
    rows = TensorDataset(*workload.rows())

    def run(steps: int) -> int:
        sample_single_chain(
            model,
            DataLoader(rows, batch_size=workload.batch_size, shuffle=True),
            lambda model, batch: workload.loss(model, batch).mean(),
            {**options, "nbeta": workload.nbeta},
            num_draws=steps // 10,
            num_steps_bw_draws=10,
            sampling_method=SGMCMC.sgld,
            verbose=False,
        )
        return steps // 10 * 10

    return workload.loss(model, next(workload.batches())).mean().item(), run


CONTESTANTS: dict[str, Callable[[Workload], tuple[float, Steps]]] = {
    "pack16": lambda workload: chain(workload, 10, pack=16),
    "pack4": lambda workload: chain(workload, 10, pack=4),
    "thin10": lambda workload: chain(workload, 10),
    "thin1": lambda workload: chain(workload, 1),
    "bare": loop,
    "sgmcmc": sgmcmc,
    "sgld": sgld,
    "sampled": sampled,
}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    workload = WORKLOADS[sys.argv[1]]
    first_loss, run = CONTESTANTS[sys.argv[2]](workload)
    run(WARM_UP)
    began = time.perf_counter()
    rate = run(WARM_UP) / (time.perf_counter() - began)
    parameters = sum(p.numel() for p in workload.model().parameters())
    hello = {"first_loss": first_loss, "parameters": parameters, "torch": version("torch")}
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        wanted = max(10, round(rate * float(line.removeprefix("go ")) / 10) * 10)
        began = time.perf_counter()
        steps = run(wanted)
        seconds = time.perf_counter() - began
        rate = steps / seconds
        print(json.dumps({"steps": steps, "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
