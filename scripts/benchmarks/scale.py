"""How time and memory grow: chains, draws, parameters; 1,000 chains packed; their diagnosis.

Every number is of a process of its own, so that its memory is its own. Runs are in one process
(SerialPool: driver, worker and store together), thin=1, so that the recording is a large part of
them. Commits and the diagnosed trace are made up: noise in all that a draw records, written as a
driver writes it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarks.machine import heading, log, machine

ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "scripts/figures/growth.png"
PACK, FEW, MANY = 16, 16, 1_000
FEW_RUNS = 4  # one after another, so that 16 chains take long enough
GOALS = {"driver_mb": 600.0, "cost": 1.15, "seconds": 15.0, "diagnosis_mb": 1_536.0}
COLUMNS = {
    "microseconds_per_step": "us a chain-step",
    "commit": "s a commit",
    "above_mb": "MB above base",
    "peak_mb": "MB at most",
}


def measure(name: str, *numbers: int | str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "scripts.benchmarks.scale_worker", name]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, numbers)], check=True, stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    log(f"scale: {name} {numbers}: {done.stdout.splitlines()[-1]}")
    return measured


def growth(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """A row for every size of every axis."""
    rows: dict[str, list[dict[str, Any]]] = {"chains": [], "draws": [], "parameters": []}
    for chains in options.chains:
        draws = max(20, options.steps // chains)
        rows["chains"].append({"size": chains, **measure("sampled", chains, draws, PACK)})
        with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as folder:
            rows["chains"][-1]["commit"] = measure("committed", chains, 3_000, f"{folder}/x")[
                "commit"
            ]
    for draws in options.draws:
        rows["draws"].append({"size": draws, **measure("sampled", 2, draws, 2)})
        with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as folder:
            row = measure("committed", 4, draws, f"{folder}/x")
            rows["draws"][-1]["commit"] = row["commit"]
    for wanted in options.parameters:
        steps = int(min(2_000, max(20, 4e7 / wanted)))
        row = measure("parameters", width_of(wanted), steps)
        rows["parameters"].append({"size": row["parameters"], **row})
    return rows


def width_of(parameters: int) -> int:
    """Of a net of about so many parameters: w (w / 10 + 11) and a little."""
    return round((-11 + (121 + 0.4 * parameters) ** 0.5) / 0.2)


def exponent(rows: list[dict[str, Any]], column: str) -> float:
    """b of ``column ~ size^b`` over the larger half of the sizes: 0 is constant, 1 is linear."""
    rows = [row for row in rows if row.get(column, 0) > 0][-3:]
    if len(rows) < 2:
        return float("nan")
    size, value = ([float(np.log(row[key])) for row in rows] for key in ("size", column))
    return float(np.polyfit(size, value, 1)[0])


def thousand(options: argparse.Namespace) -> dict[str, Any]:
    """1,000 chains of the deep linear net, packed, and 16 as long in turns: cost and memory.

    As long, because a chain looks at its curvature early rather than late.
    """
    draws, pairs = options.goal_draws, list[tuple[dict[str, Any], dict[str, Any]]]()
    for _ in range(options.rounds):
        few = measure("sampled", FEW, draws, PACK, FEW_RUNS)
        pairs.append((few, measure("sampled", MANY, draws, PACK)))
    costs = [b["microseconds_per_step"] / a["microseconds_per_step"] for a, b in pairs]
    driver = measure("driven", MANY, options.driver_draws or draws, PACK)
    return {"draws": draws, "few": pairs[-1][0], "many": pairs[-1][1], "driver": driver,
            "cost": np.quantile(costs, [0.25, 0.5, 0.75]).tolist()}  # fmt: skip


def diagnosis(draws: int, rounds: int) -> dict[str, Any]:
    """The verdict on 1,000 chains, read from a store."""
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as folder:
        measure("written", MANY, draws, f"{folder}/run")
        measured = [measure("diagnosed", f"{folder}/run") for _ in range(rounds)]
    seconds = np.quantile([each["seconds"] for each in measured], [0.25, 0.5, 0.75]).tolist()
    return {**measured[-1], "draws": draws, "seconds": seconds}


def table(results: dict[str, Any]) -> str:
    """All as text."""
    lines = list[str]()
    for axis, rows in results["growth"].items():
        columns = [name for name in COLUMNS if any(name in row for row in rows)]
        lines.append(f"\n{axis:>12}" + "".join(f"{COLUMNS[name]:>17}" for name in columns))
        for row in rows:
            cells = [f"{row[name]:17.4g}" if name in row else " " * 17 for name in columns]
            lines.append(f"{row['size']:12,}{''.join(cells)}")
        powers = [f"{exponent(rows, name):17.2f}" for name in columns]
        lines.append(f"{'~ size^':>12}{''.join(powers)}")
    many, verdicts = results.get("thousand"), list[str]()
    if many:
        low, cost, high = many["cost"]
        peak, step = many["driver"]["peak_mb"], many["many"]["microseconds_per_step"]
        lines.append(f"\n{MANY:,} chains x {many['draws']:,} draws of the deep linear net, pack "
                     f"{PACK}: {step:.0f} us a chain-step, {cost:.2f} ({low:.2f}-{high:.2f}) of "
                     f"{FEW} chains'; {many['many']['peak_mb']:.0f} MB at most, worker and all; "
                     f"the driver of two actors {peak:.0f} MB")  # fmt: skip
        verdicts += [_goal("cost of a chain-step within 15 %", cost <= GOALS["cost"]),
                     _goal("driver under 600 MB", peak <= GOALS["driver_mb"])]  # fmt: skip
    if read := results.get("diagnosis"):
        low, median, high = read["seconds"]
        lines.append(f"\ndiagnosis of {MANY:,} chains x {read['draws']:,} draws: {median:.1f} s "
                     f"({low:.1f}-{high:.1f}), {read['peak_mb']:.0f} MB at most; one draw in "
                     f"{read['stride']}")  # fmt: skip
        met = median <= GOALS["seconds"] and read["peak_mb"] <= GOALS["diagnosis_mb"]
        verdicts.append(_goal("diagnosis within 15 s and 1.5 GB", met))
    return "\n".join([*lines, *verdicts])


def _goal(text: str, met: bool) -> str:
    return f"goal: {text}: {'met' if met else 'MISSED'}"


def draw(by_axis: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The growth as a figure: cost and memory over each axis, and what linear would be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5.5), sharex="col")
    for column, (axis, rows) in enumerate(by_axis.items()):
        sizes = np.array([row["size"] for row in rows], float)
        whole = [row["microseconds_per_step"] * (row.get("steps") or 1e6) / 1e6 for row in rows]
        if axis == "parameters":
            whole = [row["microseconds_per_step"] / 1e3 for row in rows]
        names = (
            "ms a chain-step" if axis == "parameters" else "seconds of the run",
            "MB above base",
        )
        for place, values, name in zip(axes[:, column], (whole, [r["above_mb"] for r in rows]),
                                       names, strict=True):  # fmt: skip
            place.loglog(sizes, values, "o-", label="measured")
            if (axis, name) != ("chains", "seconds of the run"):  # all do the same steps
                line = values[-1] * sizes / sizes[-1]
                place.loglog(sizes, line, ":", color="grey", label="linear")
            place.set_title(name, fontsize=9)
            place.grid(alpha=0.3)
        axes[1, column].set_xlabel("chains, as many steps in all" if axis == "chains" else axis)
    axes[1, 0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench scale", description=__doc__)
    parser.add_argument("--chains", type=int, nargs="*", default=[4, 64, 1_000])
    parser.add_argument("--draws", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument(
        "--parameters", type=int, nargs="*", default=[10**4, 10**5, 10**6, 10**7, 5 * 10**7]
    )
    parser.add_argument("--steps", type=int, default=50_000, help="of all chains, axis of chains")
    parser.add_argument("--goal-draws", type=int, default=1_000, help="of the 1,000; 0: none")
    parser.add_argument("--driver-draws", type=int, default=0, help="likewise, of the driver's run")
    parser.add_argument("--diagnosed", type=int, default=10_000, help="draws of them; 0: none")
    parser.add_argument("--rounds", type=int, default=1, help="of the goals' measurements")
    parser.add_argument("--figure", type=Path, default=None, help=f"as {FIGURE.name}")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "growth": growth(options)}
    if options.goal_draws:
        results["thousand"] = thousand(options)
    if options.diagnosed:
        results["diagnosis"] = diagnosis(options.diagnosed, options.rounds)
    if options.figure:
        draw(results["growth"], options.figure)
    if options.json:
        print(json.dumps(results))
        return
    print(heading(results["machine"]))
    print(table(results))


if __name__ == "__main__":
    main()
