"""Numbers of a run under way, for other programs: metrics, and a function of the user's.

They are provisional, from the draws so far; but for the worst R-hat and the smallest ESS, which are
those of the last gate round.
"""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from distsampler.execution.progress import Snapshot

Log = Callable[[int, dict[str, float]], object]
EXPORT_SECONDS = 5.0  # between two exports, unless there was a commit or a gate round
STATES = ("running", "restarting", "lost", "done")
METRICS = {
    "distsampler_draws_committed": "Draws that are durable, of all chains, burn-in included.",
    "distsampler_chains": "Chains by state: running, restarting, lost, done.",
    "distsampler_restarts": "How often a chain had to continue elsewhere.",
    "distsampler_r_hat": "Split R-hat of the probe's loss, the draws so far; no verdict.",
    "distsampler_ess": "Bulk ESS of the probe's loss, the draws so far; no verdict.",
    "distsampler_worst_r_hat": "The worst R-hat of all that the gate reads, at its last round.",
    "distsampler_smallest_ess": "The smallest ESS of all that the gate reads, at its last round.",
    "distsampler_llc_running": "LLC of the draws so far after burn-in; provisional.",
}


def measured(snapshot: Snapshot) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield the name, tags and value of each metric that is known."""
    states = Counter(chain.state for chain in snapshot.chains)
    yield "distsampler_draws_committed", {}, float(sum(snapshot.committed))
    for state in STATES:
        yield "distsampler_chains", {"state": state}, float(states[state])
    yield "distsampler_restarts", {}, float(sum(chain.restarts for chain in snapshot.chains))
    numbers = {"r_hat": snapshot.r_hat, "ess": snapshot.ess, "llc_running": snapshot.llc}
    if snapshot.verdict is not None:
        numbers["worst_r_hat"] = snapshot.verdict.r_hat
        numbers["smallest_ess"] = snapshot.verdict.ess
    for name, value in numbers.items():
        if math.isfinite(value):
            yield f"distsampler_{name}", {}, value


class Metrics:
    """Exports the progress of a run as metrics; ``show`` is an observer.

    Args:
        gauge: makes a metric: ``gauge(name, description=..., tag_keys=...)``, with a method
            ``set(value, tags)``, as Ray's.
        run: name of the run, a tag of each metric.
    """

    def __init__(self, gauge: Callable[..., Any], run: str) -> None:
        self._gauge, self._run = gauge, run
        self._gauges: dict[str, Any] = {}
        self._exported = -math.inf
        self._last: tuple[object, ...] = ()

    def show(self, snapshot: Snapshot) -> None:
        """Set all metrics, after a commit or a gate round, or when it is time."""
        now, news = time.monotonic(), snapshot.news
        if news == self._last and now - self._exported < EXPORT_SECONDS:
            return
        self._exported, self._last = now, news
        for name, tags, value in measured(snapshot):
            if name not in self._gauges:
                keys = ("run", *tags)
                self._gauges[name] = self._gauge(name, description=METRICS[name], tag_keys=keys)
            self._gauges[name].set(value, {"run": self._run, **tags})


class Logger:
    """Calls a function of the user's after each commit and gate round; ``show`` is an observer.

    Args:
        log: ``log(step, values)``; what it raises is a warning, once, and never ends the run.
    """

    def __init__(self, log: Log) -> None:
        self._log, self._warned = log, False
        self._last: tuple[object, ...] = ()

    def show(self, snapshot: Snapshot) -> None:
        """Call the function, if there are new draws or a new verdict."""
        if snapshot.news == self._last or not any(snapshot.committed):
            return
        self._last = snapshot.news
        try:
            self._log(*logged(snapshot))
        except Exception as error:  # the user's code: anything can come
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the run's log function raised {type(error).__name__}: {error}; the run "
                    "continues, and this is said once",
                    stacklevel=2,
                )


def logged(snapshot: Snapshot) -> tuple[int, dict[str, float]]:
    """Return the draws that every chain has, burn-in included, and the numbers that are known."""
    chains = zip(snapshot.chains, snapshot.committed, strict=True)
    draws = [committed for chain, committed in chains if not chain.retired]
    numbers = {
        "draws": float(sum(snapshot.committed)),
        "lost_chains": float(sum(chain.retired for chain in snapshot.chains)),
        "provisional/llc": snapshot.llc,
        "provisional/r_hat": snapshot.r_hat,
        "provisional/ess": snapshot.ess,
    }
    if snapshot.verdict is not None:
        numbers |= {"gate/r_hat": snapshot.verdict.r_hat, "gate/ess": snapshot.verdict.ess}
    return min(draws, default=0), {k: v for k, v in numbers.items() if math.isfinite(v)}
