"""Progress for people: a live table on a terminal, a plain line every 30 s elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from distsampler.execution.progress import ChainProgress, Snapshot

PLAIN_SECONDS = 30.0
ROWS = 20  # chains with a row of their own, at most


class Reporter:
    """Shows snapshots until it is left; a context manager.

    Args:
        quiet: show nothing.
        stream: where to; None: standard error.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr)
        self._quiet = quiet
        self._live: Live | None = None
        self._said = -math.inf

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Shows one snapshot, if it is time to."""
        if self._quiet:
            return
        if self._live is not None:
            self._live.update(table(snapshot))
        elif time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            self._console.print(line(snapshot), soft_wrap=True, highlight=False)


def line(snapshot: Snapshot) -> str:
    """The run in one line."""
    if snapshot.anchor:
        made = [f"{done:,} of {of:,} {name}" for name, (done, of) in snapshot.anchor.items()]
        return f"{snapshot.seconds:.0f} s {snapshot.phase}: the loss at w*, {', '.join(made)}"
    return (
        f"{snapshot.seconds:.0f} s {snapshot.phase}: {pace(snapshot.chains)}, "
        f"running LLC {number(snapshot.llc)}, online split R-hat {number(snapshot.r_hat)}"
    )


def pace(chains: Sequence[ChainProgress]) -> str:
    """How many chains there are, how far the slowest one is, and how fast all are together."""
    alive = [chain for chain in chains if not chain.retired]
    done = min((chain.draws for chain in alive), default=0)
    total = chains[0].total if chains else 0
    rate = sum(chain.rate for chain in alive if not math.isnan(chain.rate))
    return (
        f"{len(chains)} chains ({len(chains) - len(alive)} lost), draw {done} of {total}, "
        f"{rate:.0f} draws/s"
    )


def table(snapshot: Snapshot) -> Group:
    """The run as a table: a row a chain, a single row for many."""
    return Group(grid(snapshot.chains), Text(line(snapshot)))


def grid(chains: tuple[ChainProgress, ...]) -> Table:
    """A row a chain; for many, the first ones."""
    grid = Table(box=None, pad_edge=False)
    for heading in ("chain", "draws", "draws/s", "loss", "running LLC", ""):
        grid.add_column(heading, justify="right")
    for chain in chains[:ROWS]:
        grid.add_row(*_row(chain))
    if len(chains) > ROWS:
        grid.add_row("...", f"{len(chains) - ROWS} more")
    return grid


def _row(chain: ChainProgress) -> tuple[str, ...]:
    return (
        str(chain.chain),
        f"{chain.draws}/{chain.total}",
        number(chain.rate),
        number(chain.loss),
        number(chain.llc),
        chain.state if chain.state in ("lost", "restarting") else "",
    )


def number(value: float) -> str:
    """Five digits; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.5g}"
