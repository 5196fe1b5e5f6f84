"""A run under fire: whatever dies or hangs, the trace is that of a run that nobody disturbed."""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import distsampler as ds
from tests.assertions import digest
from tests.faults import fuzz, job
from tests.faults.job import DriverProcess
from tests.faults.nodes import Nodes
from tests.processes import actors, committed, end, until

STEP_SECONDS, THIN = 0.1, 2  # a step is slow on purpose, so that there is something to kill
CALM_SECONDS = 20.0  # at the start, to see how fast the run is when nobody disturbs it
PAUSE = (1.0, 5.0)  # seconds between two deaths
PATIENCE = 20.0  # and at most so many more, until the run has recovered from the last
VICTIMS = {"actor": 6, "node": 2, "driver": 1, "hang": 2}  # how often, in proportion


class Chaos:
    """A run, its driver, and who kills them.

    Args:
        folder: for the run.
        nodes: the cluster.
        draws: of a chain, after burn-in.
        seed: of who dies and when.
    """

    def __init__(self, folder: Path, nodes: Nodes, draws: int, seed: int) -> None:
        self.store, self._held, self._nodes = folder / "run", folder / "held", nodes
        self._settings = {"draws": draws, "thin": THIN, "seconds": STEP_SECONDS}
        self._settings |= {"commit_seconds": 1.0}
        self._chance = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.given_up = list[str]()
        self._held.touch()
        self._driver = self._start()

    def pace(self) -> float:
        """Draws a second, undisturbed, from a commit to a commit."""
        until(lambda: len(actors(self.store)) == job.CHAINS and committed(self.store), 300)
        before, began = self._next_commit()
        until(lambda: time.monotonic() - began > CALM_SECONDS)
        after, ended = self._next_commit()
        return (after - before) / (ended - began)

    def rage(self, seconds: float) -> float:
        """Kills; the draws a second that the run makes none the less."""
        before, began = committed(self.store), time.monotonic()
        while time.monotonic() - began < seconds:
            time.sleep(self._chance.uniform(*PAUSE))
            self._wait_for_life()
            self._kill(self._chance.choices(list(VICTIMS), list(VICTIMS.values()))[0])
        return (committed(self.store) - before) / (time.monotonic() - began)

    def finish(self) -> None:
        """Lets the run end, fast now."""
        self._held.unlink()
        while self._driver.process.wait():
            self._revive()
        self._driver.close()

    def stop(self) -> None:
        """Leaves no driver behind."""
        self._driver.kill()

    def _next_commit(self) -> tuple[int, float]:
        """Draws after it, and its time."""
        before = committed(self.store)
        until(lambda: committed(self.store) > before)
        return committed(self.store), time.monotonic()

    def _wait_for_life(self) -> None:
        """Gives a run that was hit a moment to commit again; where it is slow, not for ever."""
        before, deadline = committed(self.store), time.monotonic() + PATIENCE
        until(lambda: committed(self.store) > before or time.monotonic() > deadline)

    def _kill(self, victim: str) -> None:
        if self._driver.process.poll() is not None:
            self._revive()
        elif victim == "actor" and (alive := actors(self.store)):
            end(self._chance.choice(alive), signal.SIGKILL)
            self.killed[victim] += 1
        elif victim == "node":
            self._nodes.kill(self._chance.choice(self._nodes.ids))
            self.killed[victim] += 1
            self._nodes.restore()
        elif victim == "driver":
            self.killed[victim] += self._driver.kill()
            self._driver = self._start()
        elif victim == "hang":  # a step that takes the file away does not return
            hang = self._held.with_name("hang")
            hang.touch()
            until(lambda: not hang.exists() or self._driver.process.poll() is not None)
            self.killed[victim] += 1

    def _revive(self) -> None:
        """Start a driver that gave up again; it is a fault of its own, and reported."""
        self.given_up.append(self._driver.said())
        self._driver = self._start()

    def _start(self) -> DriverProcess:
        # A block takes a second, and an actor that hangs is known by it after some twenty.
        placement = {"address": self._nodes.address, "answer_timeout": 5.0}
        return DriverProcess(
            self.store, self._held, resume="auto", placement=placement, **self._settings
        )


def undisturbed(folder: Path, draws: int) -> ds.Run:
    """The same run in this process."""
    return job.sample(
        folder / "serial", folder / "never", pool=ds.SerialPool(), draws=draws, thin=THIN
    )


def compare(run: ds.Run, other: ds.Run) -> dict[str, Any]:
    """What is lost, repeated or different."""
    steps, expected = _steps(run), _steps(other)
    there = [set(made) & set(wanted) for made, wanted in zip(steps, expected, strict=True)]
    return {
        "draws": sum(map(len, expected)),
        "lost": sum(map(len, expected)) - sum(map(len, there)),
        "repeated": sum(map(len, steps)) - sum(len(set(made)) for made in steps),
        "digests": (digest(run), digest(other)),
        "llc": (run.llc("ignore").mean, other.llc("ignore").mean),
    }


def _steps(run: ds.Run) -> list[list[int]]:
    """The step of every draw of every chain, warm-up included."""
    parts = [run._trace.read(f"{group}sample_stats", "step") for group in ("warmup_", "")]
    steps: list[list[int]] = np.concatenate(parts, 1).tolist()
    return steps


def damage(seed: int, share: float) -> int:
    """Print what comes of damaged files; 1 if anything but right numbers and StoreErrors."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        print(f"{'damaged':24} {'times':>6} {'right':>7} {'StoreError':>10} {'other':>6} seconds")
        wrong = list[str]()
        for name, times, outcome in fuzz.fuzz(Path(folder), seed, share):
            counts = f"{times:6} {outcome.right:7} {outcome.named:10} {len(outcome.wrong):6}"
            print(f"{name:24} {counts} {outcome.seconds:7.1f}", flush=True)
            wrong += outcome.wrong
    for each in wrong[:40]:
        print(each[:500])
    return 1 if wrong else 0


def race(woken: int = 20, exchanged: int = 10, started: int = 5) -> int:
    """Race drivers for one directory, in a process of its own; the exit code."""
    counts = map(str, (woken, exchanged, started))
    command = [sys.executable, "-m", "tests.faults.races", *counts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-4000:])
        return 1
    report = json.loads(done.stdout)
    happened = ", ".join(f"{count} {kind}" for kind, count in report["happened"].items())
    print(f"races           {happened}")
    print(f"races lost      {len(report['wrong'])}: 0 lost, 0 repeated, 0 foreign bytes touched in "
          f"all others", flush=True)  # fmt: skip
    for each in report["wrong"]:
        print(each)
    return 1 if report["wrong"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of killing")
    parser.add_argument("--seed", type=int, default=0, help="of who dies and when")
    parser.add_argument("--fuzz", action="store_true", help="damage files instead of killing")
    parser.add_argument("--share", type=float, default=1.0, help="of all damages, for --fuzz")
    parser.add_argument("--races", action="store_true", help="race drivers instead of killing")
    options = parser.parse_args()
    if options.fuzz:
        return damage(options.seed, options.share)
    raced = race()
    if options.races:
        return raced
    seconds = 60 * options.minutes
    draws = int(1.5 * (seconds + CALM_SECONDS + 60) / (STEP_SECONDS * THIN))
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, Nodes() as nodes:
        other = undisturbed(Path(folder), draws)
        chaos = Chaos(Path(folder), nodes, draws, options.seed)
        try:
            calm = chaos.pace()
            print(f"undisturbed for {CALM_SECONDS:.0f} s; now killing for {seconds:.0f} s "
                  f"on 3 nodes of 2 CPUs", flush=True)  # fmt: skip
            raged = chaos.rage(seconds)
            chaos.finish()
        finally:
            chaos.stop()
        outcome = compare(ds.open(chaos.store), other)
    say(outcome, chaos, calm, raged, seconds)
    same = outcome["digests"][0] == outcome["digests"][1] and outcome["llc"][0] == outcome["llc"][1]
    return (
        0 if same and not outcome["lost"] and not outcome["repeated"] and not chaos.given_up else 1
    ) or raced


def say(outcome: dict[str, Any], chaos: Chaos, calm: float, raged: float, seconds: float) -> None:
    ours, theirs = outcome["digests"]
    deaths = chaos.killed.total()
    kinds = ", ".join(f"{chaos.killed[kind]} {kind}s" for kind in VICTIMS)
    print(f"faults          {kinds}: one every {seconds / max(deaths, 1):.1f} s")
    print(f"draws           {outcome['draws']:,} of {job.CHAINS} chains")
    print(f"draws lost      {outcome['lost']}")
    print(f"draws repeated  {outcome['repeated']}")
    print(f"trace digest    {ours[:16]}, undisturbed {theirs[:16]}: "
          f"{'equal' if ours == theirs else 'DIFFERENT'}")  # fmt: skip
    print("LLC             {!r}, undisturbed {!r}".format(*outcome["llc"]))
    print(f"time overhead   {calm / max(raged, 1e-9) - 1:.0%} "
          f"({calm:.1f} draws/s undisturbed, {raged:.1f} under fire)")  # fmt: skip
    for words in chaos.given_up:
        print(f"A DRIVER GAVE UP:\n{words}")


if __name__ == "__main__":
    sys.exit(main())
