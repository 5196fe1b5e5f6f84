"""distsampler beside devinterp 2.0.1 on tiny language models: LLC, bf16, speed, memory.

Both sample the same trained weights and rows of text with the same step, nbeta, gamma, batch size,
steps and chains, each by its own public call, with its own defaults otherwise, in a process of its
own on one thread. LLCs are sampled side by side, speeds in turns. devinterp's number is rebuilt
from our trace: burn-in averaged in, the loss at w* read from the rows that devinterp reads it from.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from scripts.benchmarks import beside_models
from scripts.benchmarks.beside_models import MODELS, Settings
from scripts.benchmarks.machine import heading, log, machine
from scripts.benchmarks.race import Contestant, peer_python, rotated

PEER = "devinterp==2.0.1"
NOT_MEASURED = "NOT MEASURED"
FAST = Settings(
    lr=1e-3, nbeta=30.0, localization=300.0, chains=4, burn_in=64, steps=416, thin=4, batch_size=16
)
"""Published for 3 million parameters and for Pythia-14M: the localization relaxes in 7 steps."""
SLOW = replace(FAST, lr=1e-5, burn_in=160, steps=400)
"""The step published for Pythia-2.8B: the localization relaxes in 667 steps."""
PULL = replace(SLOW, nbeta=1e-9, chains=1, burn_in=0, steps=16_000, batch_size=2, distances=True)
"""Hardly any gradient: what is left has an exact law at every step."""
TURN = replace(FAST, chains=1, burn_in=4, steps=240)
LOOKS = (1 / 16, 1 / 4, 1 / 2, 1.0)  # of the pull's steps, where its variance is read
TRAINING = 1000  # steps
BF16_WEIGHTS = (
    "distsampler ran fp32 master weights under bf16 autocast; a row with bf16 weights will be "
    "added when it samples them without a master."
)

ERRORS = (
    "±: one standard error; of the last three columns from the spread of the chains, which is too "
    "small for devinterp's, whose chains share their minibatches."
)


@dataclass(frozen=True)
class AsTheirs:
    """What devinterp would make of our draws, and why it is not our LLC.

    Args:
        value: nbeta times (mean loss of all steps - loss at w* of other rows).
        se: its standard error, from the spread of the chains.
        burn_in: what averaging the burn-in changes.
        rows: what reading the loss at w* from other rows changes.
    """

    value: float
    se: float
    burn_in: float
    rows: float


def as_theirs(
    excess: ArrayLike, burn_in: int, nbeta: float, init_loss: float, init_loss_of_their_rows: float
) -> AsTheirs:
    """Return devinterp's estimate from our trace.

    Args:
        excess: excess loss of every draw, (chain, draw), burn-in included.
        burn_in: number of its draws.
        nbeta: inverse temperature times n.
        init_loss: L_n(w*) over all data.
        init_loss_of_their_rows: that of the rows which devinterp subtracts.
    """
    every = nbeta * np.asarray(excess)
    rows = nbeta * (init_loss - init_loss_of_their_rows)
    value, se = mean_of_chains(every.mean(1))
    return AsTheirs(value + rows, se, value - float(every[:, burn_in:].mean()), rows)


def mean_of_chains(per_chain: ArrayLike) -> tuple[float, float]:
    """Return the mean over chains and its standard error."""
    values = np.asarray(per_chain, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def pull_variance(lr: float, gamma: float, steps: int) -> float:
    """Return the exact variance of a weight after some steps of SGLD from w* without a gradient.

    ``w - w* <- (1 - lr gamma/2) (w - w*) + sqrt(lr) N(0, 1)``; in the limit of many steps it is
    ``1 / (gamma (1 - lr gamma/4))``.
    """
    keep = (1 - lr * gamma / 2) ** 2
    return lr * (1 - keep**steps) / (1 - keep)


def variance_ratios(distance: ArrayLike, steps: list[int], parameters: int) -> list[float]:
    """Return measured over exact variance of a weight, from |w - w*| after so many steps."""
    variances = np.square(np.asarray(distance)) / parameters
    exact = [pull_variance(PULL.lr, PULL.localization, step) for step in steps]
    return [float(ratio) for ratio in variances / exact]


@dataclass(frozen=True)
class Plan:
    """What is run, and how long."""

    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    quick: bool
    rounds: int

    def shortened(self, run: Settings) -> Settings:
        """Return a run, of an eighth of its steps where it is to be quick."""
        if not self.quick:
            return run
        return replace(run, burn_in=run.burn_in // 8, steps=run.steps // 8)

    def llc_runs(self, model: str) -> list[Settings]:
        """Return the runs whose LLC is printed: the slow step for the first model only."""
        runs = [FAST, SLOW] if model == self.models[0] else [FAST]
        return [self.shortened(run) for run in runs]


Pair = dict[str, Contestant]


@contextmanager
def pair(pythons: dict[str, str], model: str, dtype: str, weights: Path) -> Iterator[Pair]:
    """Both contestants of a model and dtype, ready; they start side by side."""

    def start(name: str) -> Contestant:
        return Contestant(pythons[name], "beside_worker", f"{model},{dtype},{weights}", name)

    with ThreadPoolExecutor() as threads:
        workers = dict(zip(pythons, threads.map(start, pythons), strict=True))
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def ask(worker: Contestant, run: Settings) -> dict[str, Any]:
    """Have a run made; return what was measured."""
    return worker.ask(json.dumps(asdict(run)))


def ask_both(workers: Pair, run: Settings) -> dict[str, dict[str, Any]]:
    """Have a run made by both, side by side: nothing of it is a speed."""
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda worker: ask(worker, run), workers.values()))
    return dict(zip(workers, answers, strict=True))


def llc_row(workers: Pair, run: Settings) -> dict[str, Any]:
    """The LLC by both, and by theirs from our trace."""
    answers = ask_both(workers, run)
    ours = answers["ours"]
    row: dict[str, Any] = {
        "settings": asdict(run),
        "ours": {"llc": ours["llc"], "se": ours["se"], "verdict": ours["verdict"]},
        "as_theirs": asdict(
            as_theirs(
                ours["excess"],
                run.burn_in // run.thin,
                run.nbeta,
                ours["init_loss"],
                ours["init_loss_of_their_rows"],
            )
        ),
        "theirs": None,
        "peak_mb": {name: answer["peak_mb"] for name, answer in answers.items()},
    }
    if "theirs" in answers:
        theirs = answers["theirs"]
        check_fair(ours["init_loss_of_their_rows"], theirs["init_loss"])
        llc, se = mean_of_chains(theirs["per_chain"])
        row["theirs"] = {"llc": llc, "se": se, "init_loss": theirs["init_loss"]}
        row["theirs"]["our_init_loss_of_their_rows"] = ours["init_loss_of_their_rows"]
    return row


def check_fair(ours: float, theirs: float) -> None:
    """Both must have read the same loss at w* from the same rows, bf16 to its three digits."""
    if not math.isclose(ours, theirs, rel_tol=1e-2):
        raise SystemExit(f"the comparison is not fair: loss at w* {ours} here, {theirs} there")


def pull_row(workers: Pair, run: Settings) -> dict[str, Any]:
    """Measured over exact variance of w - w* along the chain, by both."""
    draws = [round(share * run.steps / run.thin) - 1 for share in LOOKS]
    steps = [(draw + 1) * run.thin - 1 for draw in draws]
    row: dict[str, Any] = {"settings": asdict(run), "steps": steps, "ratios": {}}
    for name, answer in ask_both(workers, run).items():
        distance = answer["distance"][0]
        read = [distance[at] for at in (draws if name == "ours" else steps)]
        row["ratios"][name] = variance_ratios(read, steps, workers[name].hello["parameters"])
    return row


def speed_row(workers: Pair, rounds: int, turn: Settings) -> dict[str, Any]:
    """Chain-steps per second of short runs in turns; ratios of one round."""
    runs = {"ours": turn, "ours without watch": replace(turn, watch=False)}
    runs |= {"theirs": turn} if "theirs" in workers else {}
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in rotated(list(runs), number):
            answer = ask(workers[name.split()[0]], replace(runs[name], seed=100 + number))
            speeds[name].append(turn.made / answer["seconds"])
    row: dict[str, Any] = {"speeds": {name: float(np.median(x)) for name, x in speeds.items()}}
    if "theirs" in runs:
        ratios = np.divide(speeds["ours without watch"], speeds["theirs"])
        row["ratio"] = [float(f(ratios)) for f in (np.min, np.median, np.max)]
    return row


def measure(plan: Plan, pythons: dict[str, str], folder: Path) -> dict[str, Any]:
    """Everything of the tables."""
    rows: dict[str, Any] = {"llc": [], "pull": [], "speed": [], "versions": {}}
    for model in plan.models:
        weights = folder / f"{model}.pt"
        beside_models.train(model, TRAINING // (8 if plan.quick else 1), weights)
        for dtype in plan.dtypes:
            about = {"model": model, "dtype": dtype}
            with pair(pythons, model, dtype, weights) as workers:
                for worker in workers.values():
                    rows["versions"] |= worker.hello["versions"]
                about["parameters"] = workers["ours"].hello["parameters"]
                about["init_loss"] = workers["ours"].hello["loss"]
                llcs = [llc_row(workers, run) for run in plan.llc_runs(model)]
                rows["llc"] += [about | row for row in llcs]
                speed = speed_row(workers, plan.rounds, plan.shortened(TURN))
                rows["speed"].append(about | speed | {"peak_mb": llcs[0]["peak_mb"]})
                if model == plan.models[0]:
                    rows["pull"].append(about | pull_row(workers, plan.shortened(PULL)))
            log(f"{model} {dtype}: done")
    return rows


def tables(rows: dict[str, Any], missing: str) -> str:
    """The tables as Markdown."""
    parts = [models_line(rows["llc"]), llc_table(rows["llc"]), ERRORS, pull_table(rows["pull"])]
    parts += [BF16_WEIGHTS, speed_table(rows["speed"])] + ([missing] if missing else [])
    return "\n\n".join(parts)


def models_line(rows: list[dict[str, Any]]) -> str:
    """The models, once each."""
    about = {row["model"]: row for row in reversed(rows)}
    parts = [f"{m} {r['parameters']:,}, {r['init_loss']:.3f}" for m, r in reversed(about.items())]
    return f"model, parameters, loss at w* (nats per byte): {'; '.join(parts)}"


def llc_table(rows: list[dict[str, Any]]) -> str:
    """LLCs: ours, theirs, and theirs from our trace."""
    lines = ["model", "lr", "ours", "verdict", "+ burn-in", "+ their rows", "as theirs computes it"]
    out = [line([*lines, "theirs", "theirs less that"]), rule(len(lines) + 2)]
    for row in rows:
        mine, rebuilt, theirs = row["ours"], row["as_theirs"], row["theirs"]
        cells = [
            f"{row['model']} {row['dtype']}",
            f"{row['settings']['lr']:g}",
            number(mine["llc"], mine["se"]),
            mine["verdict"],
            f"{rebuilt['burn_in']:+.2f}",
            f"{rebuilt['rows']:+.2f}",
            number(rebuilt["value"], rebuilt["se"]),
        ]
        if theirs is None:
            cells += [NOT_MEASURED, NOT_MEASURED]
        else:
            error = math.hypot(theirs["se"], rebuilt["se"])
            cells += [number(theirs["llc"], theirs["se"])]
            cells += [number(theirs["llc"] - rebuilt["value"], error)]
        out.append(line(cells))
    return "\n".join(out)


def pull_table(rows: list[dict[str, Any]]) -> str:
    """Variances without a gradient, over their exact values."""
    out = [line(["variance of w - w*, of the exact", "after steps", "ours", "theirs"]), rule(4)]
    for row in rows:
        for place, step in enumerate(row["steps"]):
            theirs = row["ratios"].get("theirs")
            out.append(line([
                f"{row['model']} {row['dtype']}", f"{step + 1:,}",
                f"{row['ratios']['ours'][place]:.3f}",
                f"{theirs[place]:.3f}" if theirs else NOT_MEASURED,
            ]))  # fmt: skip
    return "\n".join(out)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Speeds and memory."""
    names = ["chain-steps/s", "ours", "ours, no watch", "theirs", "ours, no watch / theirs"]
    out = [line([*names, "peak MB, ours", "theirs"]), rule(7)]
    for row in rows:
        cells = [f"{row['model']} {row['dtype']}"]
        for name in ("ours", "ours without watch", "theirs"):
            cells.append(measured(row["speeds"].get(name)))
        ratio = row.get("ratio")
        cells.append("{1:.2f} ({0:.2f}-{2:.2f})".format(*ratio) if ratio else NOT_MEASURED)
        cells += [measured(row["peak_mb"].get(name)) for name in ("ours", "theirs")]
        out.append(line(cells))
    return "\n".join(out)


def measured(value: float | None) -> str:
    """A whole number, or that there is none."""
    return NOT_MEASURED if value is None else f"{value:.0f}"


def number(value: float, error: float) -> str:
    """A number and its error."""
    return f"{value:.2f} ± {error:.2f}"


def line(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rule(columns: int) -> str:
    """The rule below a table's head."""
    return "|" + "---|" * columns


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench beside", description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--quick", action="store_true", help="an eighth of all steps, one round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the speeds")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    plan = Plan(tuple(options.models), tuple(options.dtypes), options.quick, rounds)
    pythons, missing = {"ours": sys.executable}, ""
    try:
        pythons["theirs"] = peer_python(PEER, ".venv-bench-devinterp2")
    except (subprocess.CalledProcessError, OSError) as error:
        missing = f"{PEER} could not be installed: {error}"
        log(missing)
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(plan, pythons, Path(folder))
    about["versions"] |= rows.pop("versions")
    if options.json:
        print(json.dumps({"machine": about, "missing": missing or None, **rows}))
        return
    print(heading(about))
    print("1 thread;", ", ".join(f"{name} {number}" for name, number in about["versions"].items()))
    print(f"nbeta {FAST.nbeta:g}, gamma {FAST.localization:g}, {FAST.chains} chains\n")
    print(tables(rows, missing))


if __name__ == "__main__":
    main()
