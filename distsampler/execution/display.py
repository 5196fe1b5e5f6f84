"""Progress for people, of a run here or one that is followed: a table on a terminal, else lines."""

import math
import sys
import time
from collections.abc import Iterator
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from distsampler.execution.progress import ChainProgress, Snapshot, StoreStatus
from distsampler.store.events import losses_named
from distsampler.store.integrity import printable
from distsampler.store.lease import ago

PLAIN_SECONDS = 30.0  # between two lines where there is no terminal
ROWS = 20  # chains with a row of their own, at most
WAITING = 3  # places that are waited for, named at most


class Reporter:
    """Shows snapshots until it is left; a context manager.

    Args:
        quiet: show nothing.
        stream: where to; None: standard error.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._quiet = quiet
        self._live: Live | None = None
        self._said = -math.inf

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, snapshot: Snapshot, last: bool = False) -> None:
        """Show one snapshot; where lines are printed, if it is time to or it is the last."""
        if self._quiet:
            return
        if self._live is not None:
            self._live.update(table(snapshot))
        elif last or time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            self._console.print(_line(snapshot), soft_wrap=True)

    def say(self, line: str) -> None:
        """Print a line, above the table where there is one."""
        if not self._quiet:
            self._console.print(line, soft_wrap=True, markup=False)

    def print(self, snapshot: Snapshot) -> None:
        """Print one snapshot as a table."""
        self._console.print(table(snapshot), soft_wrap=True)


def say(line: str) -> None:
    """Print a line for people, on standard error."""
    Console(file=sys.stderr).print(line, soft_wrap=True, markup=False, highlight=False)


def table(snapshot: Snapshot) -> Group:
    """Return the run as a table: a row a chain for the first ones, and the line."""
    grid = Table(box=None, pad_edge=False)
    for heading in ("chain", "draws", "draws/s", "loss", "running LLC", ""):
        grid.add_column(heading, justify="right")
    for chain in snapshot.chains[:ROWS]:
        grid.add_row(*_row(chain))
    if len(snapshot.chains) > ROWS:
        grid.add_row("...", f"{len(snapshot.chains) - ROWS} more")
    return Group(grid, _line(snapshot))


def _line(snapshot: Snapshot) -> Text:
    return Text(printable(line(snapshot)))


def line(snapshot: Snapshot) -> str:
    """Return the run in one line."""
    if snapshot.stored is not None:
        return ", ".join(_followed(snapshot, snapshot.stored))
    if snapshot.anchor:
        made = [f"{done:,} of {of:,} {name}" for name, (done, of) in snapshot.anchor.items()]
        parts = ["the loss at w*", *made]
    else:
        numbers = _number(snapshot.llc), _number(snapshot.r_hat)
        parts = [_pace(snapshot), "running LLC {}, online split R-hat {}".format(*numbers)]
    if snapshot.losses:
        parts.append(losses_named(snapshot.losses))
    parts += snapshot.waiting[:WAITING]
    return f"{snapshot.seconds:.0f} s {snapshot.phase}: {', '.join(parts)}"


def _followed(snapshot: Snapshot, stored: StoreStatus) -> Iterator[str]:
    """What the line of a followed run says."""
    yield f"{stored.name} {snapshot.phase}{f' ({stored.reason})' if stored.reason else ''}"
    yield f"{snapshot.seconds:.0f} s"
    yield _pace(snapshot)
    yield f"{'' if snapshot.over else 'provisional '}LLC {_number(snapshot.llc)}"
    yield f"worst R-hat {_number(stored.r_hat)}, smallest ESS {_number(stored.ess)}"
    yield losses_named(snapshot.losses)
    yield f"verdict: {stored.verdict or 'none yet'}"
    if not snapshot.over:
        alive = stored.heartbeat is not None
        yield f"last heartbeat {ago(stored.heartbeat)} ago" if alive else "no driver"


def _pace(snapshot: Snapshot) -> str:
    """How many chains there are, how far the slowest is, and how fast all are together."""
    chains = snapshot.chains
    alive = [chain for chain in chains if not chain.retired]
    done = min((chain.draws for chain in alive), default=0)
    total = chains[0].total if chains else 0
    rate = sum(chain.rate for chain in alive if not math.isnan(chain.rate))
    retired = len(chains) - len(alive)
    return f"{len(chains)} chains ({retired} retired), draw {done} of {total}, {rate:.0f} draws/s"


def _row(chain: ChainProgress) -> tuple[str, ...]:
    return (
        str(chain.chain),
        f"{chain.draws}/{chain.total}",
        _number(chain.rate),
        _number(chain.loss),
        _number(chain.llc),
        "retired" if chain.retired else "restarting" if chain.restarting else "",
    )


def _number(value: float) -> str:
    """Five digits; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.5g}"
