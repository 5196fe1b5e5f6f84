"""Chain-steps per second on one thread: distsampler, bare forward+backward, devinterp.

All contestants take turns in one sitting, the order rotating, and only one runs at a time. On a
shared machine the speeds drift; what holds are the ratios of one round, of which the median and
the quartiles are printed.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bench_workloads import WORKLOADS

ROOT = Path(__file__).parents[1]
OURS = {
    "pack16": "16 chains packed, thin=10",
    "pack4": "4 chains packed, thin=10",
    "thin10": "one chain, thin=10",
    "thin1": "one chain, thin=1",
    "bare": "forward+backward alone",
}
PEER = "devinterp==1.3.2"
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


class Worker:
    """A contestant's process: it runs when told to, and else waits."""

    def __init__(
        self, python: str, workload: str, contestant: str, script: str = "bench_worker.py"
    ) -> None:
        self._process = subprocess.Popen(
            [python, str(ROOT / "scripts" / script), workload, contestant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self.name = f"{workload}/{contestant}"
        self.hello = self._answer()

    def go(self, seconds: float) -> dict[str, Any]:
        """The steps made in about so many seconds, and the seconds they took."""
        assert self._process.stdin is not None
        print(f"go {seconds}", file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"contestant {self.name} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def peer_python() -> str:
    """The interpreter of the peer's environment, made on first use.

    Raises:
        CalledProcessError: if it cannot be made.
    """
    home = ROOT / ".venv-bench-devinterp"
    python, stamp = str(home / "bin/python"), home / "installed"
    constraints = ROOT / "scripts/constraints.txt"
    wanted = f"{PEER}\n{constraints.read_text()}"
    if not stamp.exists() or stamp.read_text() != wanted:
        log(f"installing {PEER} into {home.name} (once)")
        torch = next(x for x in constraints.read_text().split() if x.startswith("torch=="))
        pip = [python, "-m", "pip", "install", "-q", "-c", str(constraints)]
        for command in ([sys.executable, "-m", "venv", str(home)], [*pip, torch], [*pip, PEER]):
            subprocess.run(command, check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return python


def race(workload: str, pythons: dict[str, str], seconds: float, rounds: int) -> dict[str, Any]:
    """All contestants of one workload, `rounds` turns each."""
    with contextlib.ExitStack() as stack:
        workers = {name: Worker(python, workload, name) for name, python in pythons.items()}
        for worker in workers.values():
            stack.callback(worker.close)
        hellos = {name: worker.hello for name, worker in workers.items()}
        check_fair({name: hello["first_loss"] for name, hello in hellos.items()})
        speeds: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(rounds):
            order = list(workers)
            cut = turn % len(order)
            for name in order[cut:] + order[:cut]:
                answer = workers[name].go(seconds)
                speeds[name].append(answer["steps"] / answer["seconds"])
            log(f"{workload}: round {turn + 1} of {rounds}")
    found = {name: summary(name, speeds) for name in speeds}
    return {
        "title": WORKLOADS[workload].title,
        "parameters": hellos["bare"]["parameters"],
        "goals": GOALS[workload],
        "first_loss": hellos["bare"]["first_loss"],
        "contestants": found,
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


def machine() -> dict[str, Any]:
    """Where and when, and with what."""
    with contextlib.suppress(OSError):
        info = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in info if x.startswith("model name")), "")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": 1,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("distsampler", "torch", "numpy")},
    }


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
        ratios = "".join(f"{ratio(row['ratios'].get(to)):21}" for to in REFERENCES)
        lines.append(f"{title:37}{row['steps_per_second']:8.0f}  {ratios}".rstrip())
    for name, goals in result["goals"].items():
        for to, goal in goals.items():
            found = result["contestants"][name]["ratios"].get(to)
            verdict = "not measured" if found is None else "met" if found[1] >= goal else "MISSED"
            lines.append(f"goal: {OURS[name]}, at least {goal:g} x {(OURS | PEERS)[to]}: {verdict}")
    return "\n".join(lines)


def ratio(quartiles: list[float] | None) -> str:
    if quartiles is None:
        return "-"
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    found = {"machine": machine(), "seconds": options.seconds, "rounds": options.rounds}
    found["missing"] = missing or None
    found["workloads"] = {
        name: race(name, pythons, options.seconds, options.rounds) for name in options.workloads
    }
    if options.json:
        print(json.dumps(found))
        return
    about = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    print(f"{about['date']}  {about['cpu']}, {about['cores']} cores, load {about['load']:.1f}")
    print(f"1 thread; {versions}; {options.rounds} rounds of {options.seconds:g} s; "
          "ratios: median (quartiles) over the rounds")  # fmt: skip
    for result in found["workloads"].values():
        print(table(result, missing))


if __name__ == "__main__":
    main()
