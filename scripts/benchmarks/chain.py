"""Chain-steps per second on one thread: distsampler, bare forward+backward, devinterp.

All contestants take turns in one sitting, the order rotating, and only one runs at a time. On a
shared machine the speeds drift; what holds are the ratios of one round, of which the median and
the quartiles are printed.
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np

from scripts.benchmarks.machine import heading, log, machine
from scripts.benchmarks.race import PEER, Contestant, peer_python, quartiles, rotated
from scripts.benchmarks.workloads import WORKLOADS

OURS = {
    "pack16": "16 chains packed, thin=10",
    "pack4": "4 chains packed, thin=10",
    "thin10": "one chain, thin=10",
    "thin1": "one chain, thin=1",
    "bare": "forward+backward alone",
}
PEERS = {
    "sgmcmc": "devinterp 1.3.2 SGMCMC.sgld",
    "sgld": "devinterp 1.3.2 SGLD (deprecated)",
    "sampled": "devinterp 1.3.2 sample(), DataLoader",
}
REFERENCES = ("bare", "sgmcmc", "sampled")
GOALS = {
    "mlp": {"thin10": {"bare": 0.80, "sampled": 1.8}, "pack4": {"sampled": 1.8, "sgmcmc": 1.8}},
    "linear": {"thin10": {"bare": 0.80}, "pack16": {"sampled": 11.0, "sgmcmc": 11.0}},
    "transformer": {"thin10": {"bare": 0.90, "sampled": 1.0, "sgmcmc": 1.0}},
}
"""What a contestant should be, in multiples of another's speed.

The goals over devinterp are read as of its own loop, which alone has draws; its optimizer in a
plain loop, which records nothing and indexes its batches in memory, is a reference of its own.
"""


def race(workload: str, pythons: dict[str, str], seconds: float, rounds: int) -> dict[str, Any]:
    """All contestants of one workload, `rounds` turns each."""
    with contextlib.ExitStack() as stack:
        workers = {
            name: Contestant(python, "chain_worker", workload, name)
            for name, python in pythons.items()
        }
        for worker in workers.values():
            stack.callback(worker.close)
        hellos = {name: worker.hello for name, worker in workers.items()}
        check_fair({name: hello["first_loss"] for name, hello in hellos.items()})
        speeds: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(rounds):
            for name in rotated(list(workers), turn):
                answer = workers[name].go(seconds)
                speeds[name].append(answer["steps"] / answer["seconds"])
            log(f"{workload}: round {turn + 1} of {rounds}")
    return {
        "title": WORKLOADS[workload].title,
        "parameters": hellos["bare"]["parameters"],
        "goals": GOALS[workload],
        "first_loss": hellos["bare"]["first_loss"],
        "contestants": {name: summary(name, speeds) for name in speeds},
    }


def check_fair(losses: dict[str, float]) -> None:
    """Everybody must have computed the same loss on the first batch."""
    if not all(math.isclose(loss, losses["bare"], rel_tol=1e-5) for loss in losses.values()):
        raise SystemExit(f"the race is not fair: first losses differ: {losses}")


def summary(name: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Median speed, and the quartiles of its ratios to others in the same round."""
    ratios = {
        other: np.quantile(np.divide(speeds[name], speeds[other]), [0.25, 0.5, 0.75]).tolist()
        for other in REFERENCES
        if other in speeds
    }
    return {"steps_per_second": float(np.median(speeds[name])), "ratios": ratios}


def table(result: dict[str, Any], missing: str) -> str:
    """One workload as text."""
    lines = [
        f"\n{result['title']}, {result['parameters']:,} parameters, batch 256",
        f"{'':37}{'steps/s':>8}  {'of forward+backward':21}{'of SGMCMC.sgld':21}of sample()",
    ]
    for name, title in (OURS | PEERS).items():
        if name not in result["contestants"]:
            lines.append(f"{title:37}  NOT MEASURED: {missing}")
            continue
        row = result["contestants"][name]
        ratios = "".join(f"{quartiles(row['ratios'].get(to)):21}" for to in REFERENCES)
        lines.append(f"{title:37}{row['steps_per_second']:8.0f}  {ratios}".rstrip())
    for name, goals in result["goals"].items():
        for to, goal in goals.items():
            reached = result["contestants"][name]["ratios"].get(to)
            verdict = (
                "not measured" if reached is None else "met" if reached[1] >= goal else "MISSED"
            )
            lines.append(f"goal: {OURS[name]}, at least {goal:g} x {(OURS | PEERS)[to]}: {verdict}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench chain", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a turn")
    parser.add_argument("--rounds", type=int, default=10, help="turns of every contestant")
    parser.add_argument("--workloads", nargs="+", default=[*WORKLOADS], choices=WORKLOADS)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    pythons, missing = dict.fromkeys(OURS, sys.executable), ""
    try:
        pythons |= dict.fromkeys(PEERS, peer_python())
    except (subprocess.CalledProcessError, OSError) as error:
        missing = f"{PEER} could not be installed: {error}"
        log(missing)
    results = {"machine": machine(), "seconds": options.seconds, "rounds": options.rounds}
    results["missing"] = missing or None
    results["workloads"] = {
        name: race(name, pythons, options.seconds, options.rounds) for name in options.workloads
    }
    if options.json:
        print(json.dumps(results))
        return
    about = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    print(heading(about))
    print(f"1 thread; {versions}; {options.rounds} rounds of {options.seconds:g} s; "
          "ratios: median (quartiles) over the rounds")  # fmt: skip
    for result in results["workloads"].values():
        print(table(result, missing))


if __name__ == "__main__":
    main()
