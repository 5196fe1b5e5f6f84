"""Figures are pyplot's, as a notebook needs them; what cannot be drawn is named."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

import distsampler as ds
from distsampler.errors import ConfigError, StoreError
from distsampler.report import run_report
from distsampler.report.subjects import heatmap_of, run_of, table_of
from tests.problems import config, regression, squared_error
from tests.stores import autoregressive, make_run


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def run() -> ds.Run:
    return make_run(autoregressive(2, 220, 0.5), burn_in=20)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> ds.Sweep:
    """Two step sizes at two temperatures."""
    grid = {
        f"{lr}-{b}": {"sampler.lr": lr, "sampler.nbeta": b}
        for lr in (1e-3, 2e-3)
        for b in (20.0, 40.0)
    }
    return ds.sweep(
        *regression(), squared_error, config(draws=6, burn_in=2, thin=1), settings=grid,
        store=tmp_path_factory.mktemp("grid") / "s", pool=ds.SerialPool(), quiet=True,
    )  # fmt: skip


def test_a_figure_without_axes_is_the_one_that_pyplot_shows_and_saves(
    run: ds.Run, tmp_path: Path
) -> None:
    ax = ds.plot_trace(run)
    assert plt.gcf() is ax.figure
    assert len(plt.get_fignums()) == 1
    plt.savefig(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 5_000, "an empty figure has less"
    given = plt.figure().subplots()
    assert ds.plot_rank(run, given) is given
    assert len(plt.get_fignums()) == 2


def test_what_cannot_be_drawn_leaves_no_half_figure(run: ds.Run) -> None:
    with pytest.raises(KeyError, match="acceptance"):
        ds.plot_acceptance(run)
    assert plt.get_fignums() == []


def test_a_report_leaves_no_figure_in_pyplot(run: ds.Run) -> None:
    run_report.render(run)
    assert plt.get_fignums() == []


def test_a_thread_draws_without_pyplot(run: ds.Run) -> None:
    drawn: list[Any] = []
    thread = threading.Thread(target=lambda: drawn.append(ds.plot_trace(run)))
    thread.start()
    thread.join()
    assert drawn[0].lines
    assert plt.get_fignums() == []


def test_a_sweep_is_drawn_as_it_is_by_its_table_or_by_its_store(sweep: ds.Sweep) -> None:
    table = sweep.collect()
    assert table_of(table) is table
    for subject in (sweep, Path(sweep.store)):
        ax = ds.plot_llc_curve(subject)
        assert len([line for line in ax.lines if line.get_label()[0] != "_"]) >= 1
        assert (
            ds.plot_heatmap(subject)
            .texts[0]
            .get_text()
            .startswith(f"{float(table['llc'].sel(setting='0.001-20.0').squeeze()):.4g}")
        )
        plt.close("all")


def test_a_store_is_drawn_where_a_run_is(run: ds.Run) -> None:
    lines = [ds.plot_running_llc(each).lines[0].get_ydata() for each in (run, run.store)]
    assert (lines[0] == lines[1]).all()


@pytest.mark.parametrize(
    ("take", "kind", "sentence"),
    [
        (run_of, "sweep", r"holds one in each cell: give a cell's, sweep\.run\('.+'\), or draw"),
        (run_of, "number", "is of a run, or of its store: got int"),
        (table_of, "run", r"sweep\.collect\(\) gives: got Run; plot_running_llc draws"),
        (heatmap_of, "run", "is of a calibration, or of a sweep over lr and nbeta: got Run"),
        (heatmap_of, "row", "settings are a grid of lr and nbeta, .* settings here are 0.001-20.0"),
        (heatmap_of, "calibration", "ask for it, with heatmap=True"),
    ],
)
def test_what_a_figure_is_not_of_is_named(
    take: Callable[[Any], Any], kind: str, sentence: str, run: ds.Run, sweep: ds.Sweep
) -> None:
    class Calibration:
        heatmap = None

    subjects = {
        "sweep": sweep,
        "run": run,
        "number": 3,
        "row": sweep.collect().isel(setting=[0]),
        "calibration": Calibration(),
    }
    with pytest.raises(ConfigError, match=sentence):
        take(subjects[kind])


def test_opening_a_sweep_as_a_run_names_what_opens_it_and_the_other_way_round(
    run: ds.Run, sweep: ds.Sweep
) -> None:
    with pytest.raises(StoreError, match=r"that of a sweep: read it with distsampler\.open_sweep"):
        ds.open(sweep.store)
    with pytest.raises(StoreError, match=r"that of a run: read it with distsampler\.open\("):
        ds.open_sweep(run.store)
    with pytest.raises(StoreError, match=r"holds no run\.json: give the store of a run"):
        ds.open(Path(run.store).parent)
