"""Progress: what is counted, and how it is shown."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest

from distsampler.execution.display import Reporter, line, table
from distsampler.execution.progress import Progress, Snapshot
from distsampler.store.events import Lost
from tests.stores import rising


def snapshot(chains: int = 2, retired: tuple[int, ...] = ()) -> Snapshot:
    progress = Progress((0,) * chains, burn_in=10, draws=90, nbeta=50.0)
    for first in range(0, 60, 20):
        for chain in range(chains):
            progress.add(rising(chain, first, 20))
    return progress.snapshot("sampling", retired)


def test_running_numbers_leave_burn_in_out() -> None:
    shown = snapshot()
    assert shown.llc == pytest.approx(5.0)
    assert shown.chains[1].draws == 60
    assert shown.chains[1].total == 100
    assert shown.chains[1].loss == pytest.approx(np.arange(40, 60).mean())
    assert math.isnan(Progress((0, 0), 10, 90, 1.0).snapshot("starting", ()).llc)


def test_the_online_r_hat_is_that_of_the_split_formula() -> None:
    import arviz

    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 500)) + np.array([[0], [0], [0], [0.5]])
    shown = Snapshot("sampling", 1.0, (), 0.0, series=values.tolist())
    assert shown.r_hat == pytest.approx(float(arviz.rhat(values, method="split")))
    assert shown.r_hat > 1.01
    for too_few in (values[:1], values[:, :7]):
        assert math.isnan(replace(shown, series=too_few.tolist()).r_hat)


def test_a_long_series_is_thinned_not_kept() -> None:
    progress = Progress((0,), burn_in=0, draws=10**6, nbeta=1.0)
    for first in range(0, 20_000, 500):
        progress.add(rising(0, first, 500))
    running = progress._chains[0]
    assert 500 <= len(running.series) < 1024
    assert running.series.tolist() == np.sin(np.arange(0, 20_000, running.stride)).tolist()


def test_actors_are_counted_as_what_they_were_lost_by_and_the_silent_are_named() -> None:
    progress = Progress((0, 0), burn_in=10, draws=90, nbeta=50.0)
    assert "lost" not in line(progress.snapshot("sampling", ()))
    for place, fault, chains in ((0, "hung", [1]), (1, "preempted", [0]), (1, "preempted", None)):
        progress.lost(Lost(place, fault, chains, 1, "for a reason"))
    shown = progress.snapshot("sampling", (), waiting=("chain 1's actor has not answered",))
    assert line(shown).endswith(
        "3 actors lost (1 hung, 2 preempted), chain 1's actor has not answered"
    )
    assert [(chain.state, chain.restarts) for chain in shown.chains] == [("restarting", 1)] * 2


def test_off_a_terminal_there_is_one_plain_line_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from distsampler.execution import display

    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Reporter(stream=out) as reporter:
        for _ in range(4):
            reporter.show(snapshot(retired=(1,)))
            now[0] += 20.0
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    for part in ("2 chains (1 retired)", "draw 60 of 100", "running LLC 5", "online split R-hat"):
        assert part in lines[0]


def test_quiet_is_silent() -> None:
    out = io.StringIO()
    with Reporter(quiet=True, stream=out) as reporter:
        reporter.show(snapshot())
    assert out.getvalue() == ""


def test_a_terminal_shows_a_row_a_chain() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    console.print(table(snapshot(3, retired=(2,))))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("60/100") == 3
    assert "retired" in text
    assert "online split R-hat" in text
    console.print(table(snapshot(30)))
    assert "10 more" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_line_has_no_nan_in_it() -> None:
    assert "nan" not in line(Progress((0, 0), 10, 90, 1.0).snapshot("starting", ()))


def test_a_retired_chain_does_not_hold_the_line_back() -> None:
    shown = line(Progress((12, 80, 90), 10, 90, 1.0).snapshot("sampling", {0}))
    assert "3 chains (1 retired), draw 80 of 100" in shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_table_is_live() -> None:
    out = Terminal()
    with Reporter(stream=out) as reporter:
        reporter.show(snapshot())
    assert "running LLC" in out.getvalue()


def test_while_the_anchor_pass_is_made_the_line_says_how_far_it_is() -> None:
    from rich.console import Console

    progress = Progress((0, 0), 10, 90, 1.0)
    shown = progress.snapshot("anchoring", (), anchor={"rows": (2048, 10_000)})
    assert "anchoring: the loss at w*, 2,048 of 10,000 rows" in line(shown)
    console = Console(file=io.StringIO(), width=100)
    console.print(table(shown))
    assert "2,048 of 10,000 rows" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "rows" not in line(progress.snapshot("sampling", ()))
