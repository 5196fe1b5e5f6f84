"""Four chains on two cores: whole runs against devinterp's pool, actors against plain processes.

Contestants take turns in one sitting, the order rotating, and only one runs at a time: ratios are
of one round, of which the median and the quartiles are printed. Whole runs count everything from
the call to the result: actors (or processes) that start, the anchor pass, commits, the verdict. The
pace of two chains counts from their first reports to their last, on one actor, on two, and in two
plain processes without Ray. The first draw is there when the driver has received it; its commit
follows within commit_seconds.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from typing import Any

import numpy as np

from scripts.benchmarks.machine import heading, log, machine
from scripts.benchmarks.race import PEER, Contestant, peer_python, quartiles, rotated
from scripts.benchmarks.workloads import WORKLOADS

WHOLE = {
    "packed": "2 actors, 2 chains packed in each",
    "unpacked": "2 actors, 2 chains in turn in each",
    "devinterp": "devinterp 1.3.2, sample(cores=2)",
}
PACE = {"two": "2 actors", "one": "1 actor", "plain": "2 plain processes, no Ray"}
GOALS = {"mlp": 2.2, "linear": 10.0}
"""Best of our whole runs over devinterp's."""
GOALS_OF_TWO = {"one": 1.85, "plain": 0.93}
FIRST_DRAW = 3.0  # seconds, at most
PHASES = {
    "checked": "recipe checked",
    "starting": "actors asked for",
    "anchoring": "first actor up",
    "sampling": "anchor pass done",
    "seconds": "first draw received",
}
QUARTILES = [0.25, 0.5, 0.75]


def turns(workload: str, pythons: dict[str, str], seconds: float, rounds: int) -> dict[str, Any]:
    """What every contestant answers in each round."""
    said: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, python in pythons.items():
            workers[name] = Contestant(python, "pool_worker", workload, name)
            stack.callback(workers[name].close)
        for turn in range(rounds):
            for name in rotated([*workers], turn):
                said[name].append(workers[name].go(seconds))
            log(f"{workload}: {', '.join(pythons)}: round {turn + 1} of {rounds}")
        return {"parameters": workers[next(iter(workers))].hello["parameters"], "rounds": said}


def speeds(answers: list[dict[str, float]]) -> list[float]:
    return [each.get("steps_per_second") or each["steps"] / each["seconds"] for each in answers]


def compared(answers: dict[str, list[dict[str, float]]], to: str) -> dict[str, Any]:
    """Speed of each, and the quartiles of its ratio to one of them."""
    return {
        name: {
            "steps_per_second": float(np.median(speeds(own))),
            "ratio": np.quantile(
                np.divide(speeds(own), speeds(answers[to])), QUARTILES
            ).tolist() if to in answers else None,
        }
        for name, own in answers.items()
    }  # fmt: skip


def raced(workload: str, peer: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """Whole runs, and the pace of two chains."""
    pythons = dict.fromkeys(WHOLE, sys.executable)
    pythons = {**pythons, "devinterp": peer} if peer else dict(list(pythons.items())[:2])
    whole = turns(workload, pythons, options.seconds, options.rounds)
    pace = turns(workload, dict.fromkeys(PACE, sys.executable), options.pace, options.rounds)
    pair = pace["rounds"]
    ratios = {
        other: np.quantile(np.divide(speeds(pair["two"]), speeds(pair[other])), QUARTILES).tolist()
        for other in GOALS_OF_TWO
    }
    return {
        "title": WORKLOADS[workload].title,
        "parameters": whole["parameters"],
        "whole": compared(whole["rounds"], "devinterp"),
        "pace": {name: float(np.median(speeds(answers))) for name, answers in pair.items()},
        "two_over": ratios,
    }


def first_draw(rounds: int) -> dict[str, Any]:
    """Seconds from the call to the first draw, and to what comes before it."""
    answers = turns("mlp", {"first": sys.executable}, 0.0, rounds)["rounds"]["first"]
    return {
        name: np.quantile([each[name] for each in answers if name in each], QUARTILES).tolist()
        for name in PHASES
        if any(name in each for each in answers)
    }


def table(result: dict[str, Any], missing: str, goal: float) -> str:
    """One workload as text."""
    lines = [
        f"\n{result['title']}, {result['parameters']:,} parameters, batch 256, thin=10",
        f"{'4 chains, a whole run':37}{'steps/s':>8}  of devinterp's pool",
    ]
    for name, title in WHOLE.items():
        row = result["whole"].get(name)
        lines.append(
            f"{title:37}{row['steps_per_second']:8.0f}  {quartiles(row['ratio'])}" if row
            else f"{title:37}  NOT MEASURED: {missing}"
        )  # fmt: skip
    ours = [result["whole"][name]["ratio"] for name in ("packed", "unpacked")]
    verdict = "not measured" if None in ours else met_or_missed(max(r[1] for r in ours) >= goal)
    lines.append(f"goal: the better of ours at least {goal:g} x devinterp's: {verdict}")
    lines.append(f"{'2 chains, their pace':37}{'steps/s':>8}  2 actors are of it")
    for name, title in PACE.items():
        line = f"{title:37}{result['pace'][name]:8.0f}"
        lines.append(line + f"  {quartiles(result['two_over'].get(name))}" * (name != "two"))
    for name, least in GOALS_OF_TWO.items():
        met = met_or_missed(result["two_over"][name][1] >= least)
        lines.append(f"goal: 2 actors at least {least:g} x {PACE[name]}: {met}")
    return "\n".join(lines)


def met_or_missed(met: bool) -> str:
    return "met" if met else "MISSED"


def first_table(phases: dict[str, Any]) -> str:
    """The way to the first draw as text."""
    lines = ["\nMLP, 2 chains on 2 actors of a local Ray that runs: seconds from the call"]
    lines += [f"  {PHASES[name]:22}{quartiles(row)}" for name, row in phases.items()]
    met = met_or_missed(phases["seconds"][1] <= FIRST_DRAW)
    return "\n".join([*lines, f"goal: first draw within {FIRST_DRAW:g} s: {met}"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench pool", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a whole run")
    parser.add_argument("--pace", type=float, default=15.0, help="seconds of a pace")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contestant")
    parser.add_argument("--workloads", nargs="+", default=[*GOALS], choices=GOALS)
    parser.add_argument("--no-peer", action="store_true", help="leave devinterp out")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    peer, missing = None, "left out"
    if not options.no_peer:
        try:
            peer = peer_python()
        except (subprocess.CalledProcessError, OSError) as error:
            missing = f"{PEER} could not be installed: {error}"
    results = {"machine": machine(), "seconds": options.seconds, "rounds": options.rounds}
    results["missing"] = None if peer else missing
    results["first_draw"] = first_draw(max(3, options.rounds))
    results["workloads"] = {}
    for name in options.workloads:
        results["workloads"][name] = raced(name, peer, options)
        log(table(results["workloads"][name], missing, GOALS[name]))  # as soon as it is known
    if options.json:
        print(json.dumps(results))
        return
    print(heading(results["machine"]))
    print(f"1 thread a process; {options.rounds} rounds: whole runs of {options.seconds:g} s, "
          f"paces of {options.pace:g} s; medians (quartiles)")  # fmt: skip
    for name, result in results["workloads"].items():
        print(table(result, missing, GOALS[name]))
    print(first_table(results["first_draw"]))


if __name__ == "__main__":
    main()
