"""The jobs behind the table of bars: which targets, how they are sampled, how often."""

import functools
import json
import math
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import distsampler as ds
from distsampler.sampling.calibration import BIAS
from distsampler.truth import certify, networks, targets
from distsampler.truth.cases import Case, Course
from distsampler.truth.targets import Known, Target
from scripts.benchmarks.data import pids

SEEDS, NETS, LARGE_NETS = 10, 30, 10
SHARES = (0.1, 0.2, 0.4, 0.8)  # of 1 / kappa_max: the step sizes of the quadratic grid
SHORT_RUNS, COVERAGE_SEEDS = 200, 84  # coverage: five targets, so that 400 of 420 can converge
RESCALED = (0.1, 0.3, 1.0, 3.0, 10.0)
FAR = (30.0, 100.0, 1e3, 1e4)
BATCH, STEPS, MOST_STEPS, CHAINS, THIN = 500, 10_000, 100_000, 4, 10  # of benchmark nets
COOLER: dict[str, Any] = {"batch_size": 4 * BATCH, "bias": BIAS / 2}
PUBLISHED = Course(lr=5e-7, burn_in=900, draws=100, thin=10, batch_size=BATCH, chains=CHAINS)
PUBLISHED_10K = replace(PUBLISHED, lr=1e-7)

Rows = list[dict[str, Any]]


class Truths:
    """Exact values that take long, kept in a folder.

    Args:
        folder: where.
        write: of a JSON file.
    """

    def __init__(self, folder: Path, write: Callable[[Path, object], None]) -> None:
        self._folder, self._write = folder, write

    def of(self, target: Target) -> Target:
        """The target, its exact value known."""
        path = self._folder / f"{slug(target.name)}-gamma={target.localization:g}.json"
        if not path.exists():
            self._write(path, target.exact._asdict())
        return target.known(Known(**json.loads(path.read_text())))


@dataclass(frozen=True)
class Job:
    """Rows that are made and kept together.

    Args:
        bar: to which they belong.
        name: of the file.
        cost: seconds on one quiet core, about.
        make: the rows.
    """

    bar: str
    name: str
    cost: float
    make: Callable[[Truths], Rows]


def jobs() -> Iterator[Job]:
    """All of the table."""
    yield from quadratics()
    yield from crossings()
    yield from reduced_rank()
    yield from rescaling()
    yield from dead_weights()
    yield from pools()
    yield from short_runs()
    yield from long_runs()
    yield from nets("1K", networks.deep_linear_1k, NETS, PUBLISHED)
    yield from nets("10K", networks.deep_linear_10k, LARGE_NETS, PUBLISHED_10K)


def slug(name: str) -> str:
    """A file's name."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "-", name).strip("-")


def rows_of(cases: list[Case], truths: Truths, **tags: Any) -> Rows:
    """What comes of some cases."""
    rows = []
    for case in cases:
        known = replace(case, target=truths.of(case.target))
        made = certify.row(known)
        rows.append({**made.as_dict(), "covered": made.covered, **tags})
    return rows


def quadratics() -> Iterator[Job]:
    """Each sampler at four step sizes, heat corrected or not: 160 runs."""
    target = targets.quadratic(np.logspace(-1, 1, 100), variance=1.0)
    for sampler in ("sgld", "lmsgld"):
        for corrected in (False, True):
            for share in SHARES:
                lr = share / float(target.kappa.max())
                slow = 2 / (lr * float(target.kappa.min()))  # steps
                thin = max(2, round(slow / 40))
                course = Course(
                    lr=lr / (3.0 if sampler == "lmsgld" else 1.0), burn_in=200, draws=400,
                    thin=thin, batch_size=64, probe=4096,
                )  # fmt: skip
                configs = [
                    course.config(target, sampler, seed=seed, correct_heat=corrected)
                    for seed in range(SEEDS)
                ]
                name = f"{sampler}{'+' * corrected}-{share:g}"
                cases = [Case(target, config) for config in configs]
                make = functools.partial(rows_of, cases, share=share)
                cost = SEEDS * 4 * 600 * thin * 1.2e-4
                yield Job("quadratic", name, cost, make)


def crossings() -> Iterator[Job]:
    """Those of the table, at gamma = 1."""
    one = Course(lr=1.3e-4, burn_in=100, draws=200, thin=50, batch_size=1, chains=2)
    two = Course(lr=1e-4, burn_in=150, draws=200, thin=160, batch_size=1, chains=2)
    for halves, anchor, course in (
        ((2,), None, one), ((3,), None, one), ((1, 1), None, two), ((1, 1), (1.0, 0.0), two),
        ((2, 2), None, two),
    ):  # fmt: skip
        for t in (579.0, 1e4) if len(halves) == 1 else (579.0,):
            slower = replace(course, lr=course.lr * (579 / t) ** 0.5)
            target = targets.normal_crossing(halves, anchor=anchor, t=t, copies=1_000)
            yield from seeds("crossing", target, slower, cost=1e-4)


def reduced_rank() -> Iterator[Job]:
    """Each of the four cases, its widths and rank summing up to an odd number and an even one.

    The largest curvature at w* is 4 t.
    """
    shapes = {
        "C1 odd": ((3, 2, 3), 1), "C1 even": ((4, 3, 4), 1),
        "C2 odd": ((1, 2, 5), 1), "C2 even": ((1, 2, 6), 1),
        "C3 odd": ((5, 2, 1), 1), "C3 even": ((6, 2, 1), 1),
        "C4 odd": ((2, 5, 2), 0), "C4 even": ((2, 6, 2), 0),
    }  # fmt: skip
    for name, (sizes, rank) in shapes.items():
        target = networks.unit_network(sizes, rank, t=1e3, copies=40, n=64)
        target = replace(target, name=f"{name} {target.name}")
        coefficient = math.nan if target.coefficient is None else target.coefficient.value
        for seed in range(SEEDS):
            case = Case(target, with_momentum(target, 4e3, thin=20, seed=seed))
            make = functools.partial(rows_of, [case], coefficient=coefficient)
            yield Job("reduced rank", f"{slug(target.name)}-{seed}", 2 * 500 * 20 * 5.5e-4, make)


def with_momentum(target: Target, kappa: float, *, thin: int, seed: int) -> ds.RunConfig:
    """A run that spreads fast over slow directions, on all of the target's 64 examples.

    Args:
        target: what is sampled.
        kappa: its largest curvature at w*; elsewhere it is larger, hence the 0.15.
        thin: steps a draw.
        seed: of the run.
    """
    sampler = ds.SamplerConfig(
        name="sgnht", scheme="badodab", diffusion_factor=0.03, lr=0.15 / kappa,
        nbeta=target.nbeta, localization=target.localization,
    )  # fmt: skip
    return ds.RunConfig(
        sampler=sampler, chains=2, pack=2, burn_in=200, draws=300, thin=thin, seed=seed,
        batch_size=64, batches="epoch", probe=64, device="cpu",
    )  # fmt: skip


def rescaling() -> Iterator[Job]:
    """A [5,3,5] net of rank 3, its layers rescaled: the step follows the largest curvature.

    The curvatures spread by c^4, so that a chain without momentum would not relax.
    """
    net = networks.unit_network((5, 3, 5), 3, t=1e3, copies=100, n=64)
    for factor in (*RESCALED, *FAR):
        target = networks.rescaled(net, factor)
        kappa = 2e3 * (factor**2 + factor**-2)
        for seed in range(1 if factor in FAR else SEEDS):
            case = Case(target, with_momentum(target, kappa, thin=40, seed=seed))
            make = functools.partial(rows_of, [case], factor=factor)
            yield Job("rescaling", f"c={factor:g}-{seed}", 2 * 500 * 40 * 7e-4, make)


def dead_weights() -> Iterator[Job]:
    """A net that converges, with and without 1,000 weights that do nothing."""
    net, course = fast()["deep linear net"]
    for seed in range(SEEDS):
        both = [net, networks.with_dead_weights(net, 1_000)]
        cases = [Case(target, course.config(target, "lmsgld", seed=seed)) for target in both]
        make = functools.partial(rows_of, cases)
        yield Job("dead weights", str(seed), 2 * steps(course) * 1.2e-4, make)


def fast() -> dict[str, tuple[Target, Course]]:
    """Targets of exactly known LLC whose chains relax within seconds, by name."""
    course = Course(lr=3e-5, burn_in=200, draws=800, thin=20, batch_size=64)
    return {
        "quadratic": (
            targets.quadratic(np.logspace(-1, 1, 50), variance=0.25, n=1024, localization=300.0),
            replace(course, lr=4e-5, probe=1024),
        ),
        "w^2": (targets.normal_crossing((2,), copies=200), replace(course, lr=1.3e-4)),
        "w1 w2": (
            targets.normal_crossing((1, 1), localization=5.0, copies=200),
            replace(course, lr=1e-4),
        ),
        "reduced rank": (networks.unit_network((3, 2, 3), 1, localization=20.0, copies=5), course),
        "deep linear net": (
            networks.unit_network((2, 2, 2, 2), 1, localization=20.0, copies=5),
            course,
        ),
    }


def short_runs() -> Iterator[Job]:
    """Runs that stop too soon, by much or by little, burn-in and all."""
    lengths = (5, 20, 80, 300)  # steps of burn-in; ten times as many after it
    each = SHORT_RUNS // (len(fast()) * len(lengths))
    for name, (target, course) in fast().items():
        for length in lengths:
            thin = max(1, length // 20)
            short = replace(course, burn_in=length // thin, draws=10 * length // thin, thin=thin)
            short = replace(short, draws=max(100, short.draws))
            for seed in range(each):
                case = Case(target, short.config(target, "lmsgld", seed=1_000 + seed))
                make = functools.partial(rows_of, [case], length=length)
                cost = steps(short) * 3e-4 + 0.5
                yield Job("honesty", f"{slug(name)}-{length}-{seed}", cost, make)


def long_runs() -> Iterator[Job]:
    """Long ones of the same, for false alarms and for the intervals' coverage."""
    for name, (target, course) in fast().items():
        for seed in range(COVERAGE_SEEDS):
            case = Case(target, course.config(target, "lmsgld", seed=seed))
            make = functools.partial(rows_of, [case])
            yield Job("coverage", f"{slug(name)}-{seed}", steps(course) * 9e-5, make)


def nets(
    kind: str, make: Callable[[int], networks.Network], count: int, published: Course
) -> Iterator[Job]:
    """Benchmark nets: calibrated, likewise with less heat, as published, and until converged."""
    cost = {"1K": 5e-4, "10K": 7.5e-4}[kind] * CHAINS * STEPS
    for seed in range(count):
        for how, length in (
            ("calibrated", 1.3), ("cooler", 2.0), ("published", 1.0), ("auto", 6.0)
        ):  # fmt: skip
            work = functools.partial(_net, kind, make, seed, how, published)
            yield Job(f"nets {kind}", f"{how}-{seed}", cost * length, work)


def _net(
    kind: str,
    make: Callable[[int], networks.Network],
    seed: int,
    how: str,
    published: Course,
    truths: Truths,
) -> Rows:
    net = make(seed)
    target = truths.of(averaged(net) if how == "published" else net)
    tags: dict[str, Any] = {"how": how, "widths": net.widths, "rank": net.rank}
    tags["codimension"] = target.codimension
    if target.coefficient is not None:
        tags["coefficient"] = target.coefficient.value
    if how == "published":
        config = published.config(target, "sgld", seed=seed)
    else:
        less = COOLER if how == "cooler" else {}
        config, tags["pilot_steps"], tags["chosen"] = calibrated(target, seed, **less)
        config = until_converged(config) if how == "auto" else config
    return rows_of([Case(target, config)], truths, **tags)


def averaged(net: networks.Network) -> networks.Network:
    """The net under the loss of the published study, the mean over outputs in place of their sum.

    Its LLC is that of the sum at nbeta / H_L, and so is its posterior.
    """
    nbeta = net.nbeta / net.widths[-1]
    inputs = net.data[0]
    return networks.network(
        f"{net.name} averaged", net.layers, inputs, nbeta=nbeta, localization=net.localization
    )


def calibrated(
    target: Target, seed: int, batch_size: int = BATCH, bias: float = BIAS
) -> tuple[ds.RunConfig, int, str]:
    """What calibration proposes at the target's nbeta and gamma; its pilots' steps; its sampler."""
    sampler = ds.SamplerConfig(nbeta=target.nbeta, localization=target.localization)
    asked = ds.RunConfig(
        sampler=sampler, chains=CHAINS, pack=CHAINS, batch_size=batch_size, seed=seed, device="cpu",
        thin=THIN, burn_in=STEPS * 8 // 10 // THIN, draws=STEPS * 2 // 10 // THIN,
    )  # fmt: skip
    proposal = ds.calibrate(
        target.model, target.data, target.loss, asked, pool=ds.SerialPool(), bias=bias
    )
    return proposal.config, proposal.pilot_steps, str(proposal.config.sampler)


def until_converged(config: ds.RunConfig) -> ds.RunConfig:
    """The same run, as long as it takes."""
    fields = {name: getattr(config, name) for name in config.model_fields_set - {"gate"}}
    fields |= {"draws": "auto", "burn_in": "auto", "max_draws": MOST_STEPS // config.thin}
    return ds.RunConfig(**fields)


def pools() -> Iterator[Job]:
    """Cases that are run again on Ray, where an actor is killed."""
    for name in ("quadratic", "w1 w2", "reduced rank"):
        yield Job("pools", slug(name), 60, functools.partial(_on_both, name))


def _on_both(name: str, truths: Truths) -> Rows:
    target, course = fast()[name]
    target = truths.of(target)
    placement = ds.PlacementConfig(chains_per_actor=2, block=20)
    config = course.config(target, "lmsgld")
    config = config.replaced(placement=placement, commit_seconds=0.2)
    case = Case(target, config)
    with tempfile.TemporaryDirectory(prefix="certify-") as folder:
        serial = certify.row(case, store=f"{folder}/serial")
        store = Path(folder) / "ray"
        killer = Killer(store)
        killer.start()
        ray = certify.row(case, ds.RayPool(placement), str(store))
        killer.join()
        lost = [event for event in ds.open(store).events if event["event"] == "lost"]
        one, other = (ds.open(f"{folder}/{which}").posterior for which in ("serial", "ray"))
        same = bool(one.equals(other)) and serial.estimate == ray.estimate
    tags = {"same": same, "killed": killer.killed, "lost": len(lost), "ray": ray.estimate}
    return [{**serial.as_dict(), **tags}]


class Killer(threading.Thread):
    """Kills one actor of a run once there are draws."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self._store, self.killed = store, 0

    def run(self) -> None:
        deadline = time.monotonic() + 600
        while not self._has_draws() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pids(self._store)[0], signal.SIGKILL)
        self.killed += 1

    def _has_draws(self) -> bool:
        manifest = self._store / "run.json"
        return manifest.exists() and any(json.loads(manifest.read_text())["n_committed"])


def seeds(bar: str, target: Target, course: Course, cost: float) -> Iterator[Job]:
    """A target with ten seeds."""
    coefficient = target.coefficient.value if target.coefficient else math.nan
    for seed in range(SEEDS):
        case = Case(target, course.config(target, "lmsgld", seed=seed))
        make = functools.partial(rows_of, [case], coefficient=coefficient)
        yield Job(bar, f"{slug(target.name)}-{seed}", steps(course) * cost, make)


def steps(course: Course) -> int:
    """Of all chains."""
    return course.chains * course.thin * (course.burn_in + course.draws)
