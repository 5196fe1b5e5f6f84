"""Numbers of a run under way, for other programs: Ray's metrics, and a function of the user's.

They are provisional: from the draws so far, on a thinned series, and without a verdict; but for the
worst R-hat and the smallest ESS that the gate found when it last looked.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from distsampler.analysis.verdict import Verdict
from distsampler.execution.progress import Snapshot

Log = Callable[[int, dict[str, float]], object]
EXPORT_SECONDS = 5.0  # between two exports, unless there was a commit
STATES = ("running", "restarting", "lost", "done")
METRICS = {
    "distsampler_draws_committed": "Draws that are durable, of all chains, burn-in included.",
    "distsampler_chains": "Chains by state: running, restarting, lost, done.",
    "distsampler_restarts": "How often a chain had to go on elsewhere.",
    "distsampler_r_hat": "Split R-hat of the probe's loss, the draws so far; no verdict.",
    "distsampler_ess": "Bulk ESS of the probe's loss, the draws so far; no verdict.",
    "distsampler_worst_r_hat": "The worst R-hat of all that the gate reads, at its last look.",
    "distsampler_smallest_ess": "The smallest ESS of all that the gate reads, at its last look.",
    "distsampler_llc_running": "LLC of the draws so far after burn-in; provisional.",
}


def measured(snapshot: Snapshot) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, tags and value of each metric that is known."""
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


class News(NamedTuple):
    """What makes others want to hear of a run again."""

    committed: tuple[int, ...]
    verdict: Verdict | None


class Metrics:
    """Exports a run's metrics.

    Args:
        gauge: makes one: ``gauge(name, description=..., tag_keys=...)``, with ``set(value, tags)``.
        run: its name, a tag of each.
    """

    def __init__(self, gauge: Callable[..., Any], run: str) -> None:
        self._gauge, self._run = gauge, run
        self._gauges: dict[str, Any] = {}
        self._said, self._news = -math.inf, News((), None)

    def show(self, snapshot: Snapshot) -> None:
        """Set all, after a commit or a gate round, or when it is time."""
        now, news = time.monotonic(), News(snapshot.committed, snapshot.verdict)
        if news == self._news and now - self._said < EXPORT_SECONDS:
            return
        self._said, self._news = now, news
        for name, tags, value in measured(snapshot):
            if name not in self._gauges:
                keys = ("run", *tags)
                self._gauges[name] = self._gauge(name, description=METRICS[name], tag_keys=keys)
            self._gauges[name].set(value, {"run": self._run, **tags})


class Logger:
    """Calls a function of the user's at each commit, and when the gate has looked.

    Args:
        log: ``log(step, values)``; what it raises is a warning, once, and never ends the run.
    """

    def __init__(self, log: Log) -> None:
        self._log, self._warned = log, False
        self._news = News((), None)

    def show(self, snapshot: Snapshot) -> None:
        """Called by the driver several times a second."""
        news = News(snapshot.committed, snapshot.verdict)
        if news == self._news or not any(snapshot.committed):
            return
        self._news = news
        try:
            self._log(*logged(snapshot))
        except Exception as error:  # the user's code: anything can come
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the run's log function raised {type(error).__name__}: {error}; the run goes "
                    "on, and this is said once",
                    stacklevel=2,
                )


def logged(snapshot: Snapshot) -> tuple[int, dict[str, float]]:
    """Draws that every chain has, burn-in included, and the numbers that are known."""
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
