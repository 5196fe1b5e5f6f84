"""Reports: one file each, that says all, and looks right at any width, by day and by night."""

import dataclasses
import re
import struct
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import distsampler as ds
from distsampler import recipe
from distsampler.execution.display import Reporter
from distsampler.report import curves, html, run_report, sweep_report
from distsampler.sampling.job import Job
from distsampler.sampling.prepare import prepare
from distsampler.store.events import Lost, Retired, Started
from distsampler.store.trace import Trace
from tests.processes import written
from tests.report import browser
from tests.stores import autoregressive, make_run

VOID = {"meta", "br", "img", "path", "use", "rect", "image", "stop"}
OPTIONAL = {"tr", "td", "tbody"}  # HTML lets their ends be left out


class Outline(HTMLParser):
    """Whether a page is well-formed, and what it is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, ...]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tuple(self.open))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tuple(self.open))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] != tag and self.open[-1] in OPTIONAL:
            self.open.pop()
        assert self.open, f"</{tag}> ends nothing"
        assert self.open.pop() == tag, tag


@pytest.fixture(scope="module")
def run() -> ds.Run:
    """A run that has lost a chain and an actor."""
    found = make_run(autoregressive(4, 1220, 0.5), noise=0.05, burn_in=200)
    trace = Trace(found.store)
    trace.log(Started(0, {"host": "node-a", "device": "cpu"}))
    trace.log(Started(1, {"host": "node-b", "device": "cpu"}))
    trace.log(Lost(1, "preempted", [1], 1, "node-b is <draining>"))
    trace.log(Started(1, {"host": "node-c", "device": "cpu"}))
    trace.log(Retired(3, "chain 3 diverged at step 77"))
    trace.retire(3, "chain 3 diverged at step 77: lower sampler.lr\nand more")
    return ds.open(found.store)


@pytest.fixture(scope="module")
def text(run: ds.Run) -> str:
    return Path(run_report.write(run)).read_text()


def sweep(checkpoints: int = 12, **dims: int) -> xr.Dataset:
    """LLCs that grow; the last has not converged, the one before has failed."""
    names = {"restriction": 2, "setting": 1, "data": 1, **dims}
    shape = (checkpoints, *names.values())
    rng = np.random.default_rng(0)
    llc = np.linspace(2, 9, checkpoints).reshape(-1, 1, 1, 1) + rng.random(shape)
    verdict = np.full(shape, "CONVERGED", object)
    status = np.full(shape, "finished", object)
    verdict[-1], verdict[-2], status[-2] = "NOT_CONVERGED", "", "failed"
    verdict[0, 0] = "UNDETERMINED"
    llc[-2] = np.nan
    values = {"llc": llc, "se": llc / 20, "spread": llc / 10, "lr": 0 * llc, "nbeta": 0 * llc}
    values |= {"interval_low": llc * 0.9, "interval_high": llc * 1.15}
    coords: dict[str, Any] = {"checkpoint": [f"step-{100 * i:05}" for i in range(checkpoints)]}
    coords |= {name: [f"{name} {i}" for i in range(size)] for name, size in names.items()}
    reason = np.full(shape, "", object)
    every = {**values, "verdict": verdict, "status": status, "reason": reason}
    dims_ = ("checkpoint", *names)
    return xr.Dataset({name: (dims_, each) for name, each in every.items()}, coords)


def heated() -> xr.Dataset:
    """A sweep over four settings of lr and nbeta."""
    found = sweep(3, restriction=1, setting=4).isel(checkpoint=[0, 2])
    like = xr.ones_like(found["llc"])
    grid = {"lr": [1e-3, 1e-4, 1e-3, 1e-4], "nbeta": [10.0, 10.0, 90.0, 90.0]}
    return found.assign({k: like * xr.DataArray(v, dims="setting") for k, v in grid.items()})


def test_each_thing_a_researcher_looks_for_is_in_the_report(run: ds.Run, text: str) -> None:
    for part in (
        str(run.llc("ignore")),
        escape(run.verdict.reason),
        "R-hat",
        "probe_loss",
        "Error budget",
        "nothing was measured",
        "Retired chains: 1; 1 actor lost (1 preempted).",
        "chain 3 diverged at step 77: lower sampler.lr",
        "node-b is &lt;draining&gt;",
        "node-c",
        "commit_seconds",
        "&#x27;seed&#x27;: 0",
        str(Path(run.store).absolute()),
    ):
        assert part in text, part
    assert "started</td><td" in text
    assert "node-b, device" not in text, "a start without a fault is told"
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert re.findall(r'<a href="#.*?">(.*?)</a>', text) == headings
    assert {"Chains", "Convergence", "Retired chains and lost actors", "How to reproduce"} <= {
        *headings
    }


def test_a_page_is_whole_and_asks_for_nothing(text: str) -> None:
    for made in (text, sweep_report.render("sweep", heated())):
        outline = Outline(made)
        assert outline.open == []
        assert "://" not in made, "the page asks the net for something"
        kinds = [tag for tag, _ in outline.tags]
        assert not {"script", "link", "iframe", "object"} & {*kinds}
        pictures = [attrs for tag, attrs in outline.tags if tag == "svg"]
        assert len(pictures) >= 3
        assert all(a["role"] == "img" and len(a["aria-label"] or "") > 40 for a in pictures)
        assert all("width" not in attrs and "viewbox" in attrs for attrs in pictures)
        boxes = zip(outline.tags, outline.inside, strict=True)
        assert all("div" in inside for (tag, _), inside in boxes if tag == "table")
        ids = [str(attrs["id"]) for _, attrs in outline.tags if "id" in attrs]
        linked = re.findall(r'href="#([^"]+)"', made)
        assert {*linked} <= {*ids}


def test_two_reports_of_a_run_are_equal(run: ds.Run, text: str) -> None:
    assert run_report.render(run) == text


def test_size_is_bounded_whatever_the_run(text: str) -> None:
    assert len(text) < 500_000
    long = run_report.render(make_run(autoregressive(24, 1220, 0.5)))
    assert len(long) < 1_500_000


def test_a_run_that_has_just_begun_has_a_report() -> None:
    begun = make_run(autoregressive(2, 21, 0.5))
    changes = {"kept": 0, "status": "running"}
    begun._trace.manifest = begun.manifest.replaced(**changes)
    found = run_report.render(begun)
    assert "UNDETERMINED" in found
    assert found.count("<svg") == 1, "burn-in is drawn"


def test_the_lines_to_reproduce_give_the_config_back_with_every_option_that_counted(
    run: ds.Run, text: str
) -> None:
    (lines,) = re.findall(r"(config = ds\.RunConfig\(.*?\)\n)run =", unescape(text), re.DOTALL)
    names: dict[str, Any] = {"ds": ds}
    exec(lines, names)
    config = names["config"]
    assert config.replaced(sampler=run.manifest.config.sampler) == run.manifest.config
    on = {key: value for key, value in run.sampler.items() if value not in (None, False, "sgld")}
    assert {"nbeta", "localization"} <= on.keys()
    assert config.sampler.options == on
    assert config.sampler.name == "sgld"


def test_the_file_to_reproduce_a_calibrated_run_can_be_read(tmp_path: Path) -> None:
    wanted = recipe.load(written(tmp_path))
    record = {**wanted.record, recipe.CALIBRATION: {"reasons": {}}}
    short = wanted.config.replaced(draws=3)
    spec = prepare(wanted.model, wanted.data, wanted.loss, short)
    given = dataclasses.replace(wanted, record=record)
    job = Job(spec, tmp_path / "run", ds.SerialPool(), "never", given)
    done = job.run(Reporter(quiet=True).show, lambda: None)
    found = unescape(Path(run_report.write(done, tmp_path / "page.html")).read_text())
    (lines,) = re.findall(r"<pre[^>]*>([^<]*^model: [^<]*)</pre>", found, re.MULTILINE)
    (tmp_path / "again.yaml").write_text(lines)
    assert recipe.load(tmp_path / "again.yaml").config.draws == 3


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in ds.__all__
        if n.startswith("plot_") and n not in ("plot_heatmap", "plot_llc_curve", "plot_acceptance")
    ],
)
def test_every_figure_is_there_for_users_too(run: ds.Run, name: str) -> None:
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert getattr(ds, name)(run, ax) is ax
    assert ax.get_title()
    assert ax.get_xlabel()
    assert getattr(ds, name)(run).has_data()


def test_what_was_not_recorded_is_not_drawn(run: ds.Run) -> None:
    with pytest.raises(KeyError, match="acceptance"):
        ds.plot_acceptance(run)


def test_the_autocorrelation_is_that_of_the_process(run: ds.Run) -> None:
    long = autoregressive(4, 20_000, 0.8)
    found = curves.autocorrelation(long).mean(axis=0)
    assert found[:10] == pytest.approx(0.8 ** np.arange(10), abs=0.05)
    exact = [np.corrcoef(row[:-3], row[3:])[0, 1] for row in long]
    assert curves.autocorrelation(long)[:, 3] == pytest.approx(exact, abs=1e-3)
    assert not curves.autocorrelation(np.ones((2, 50)))[:, 1:].any()


def test_of_many_chains_the_outermost_are_named() -> None:
    slow = autoregressive(12, 220, 0.2)
    slow[7] += 2
    slow[4] -= 2
    names = [text.get_text() for text in ds.plot_running_llc(make_run(slow)).texts]
    assert names == ["chain 7", "chain 4"]


def test_a_thinned_line_keeps_its_extremes() -> None:
    line = np.random.default_rng(0).standard_normal(100_000)
    at, values = curves.thinned(line, 4)
    assert len(at) <= curves.MOST_POINTS // 4 + 2
    assert (values.min(), values.max()) == (line.min(), line.max())
    assert (at[0], at[-1]) == (0, len(line) - 1)
    assert (np.diff(at) > 0).all()


def test_dispersed_chains_are_dashed() -> None:
    config = {"init": "dispersed"}
    found = make_run(autoregressive(4, 220, 0.5))
    manifest = found.manifest.replaced(config=found.manifest.config.replaced(**config))
    found._trace.manifest = manifest
    lines = ds.plot_autocorrelation(found).get_lines()
    assert [line.get_linestyle() for line in lines[:4]] == ["-", "--", "-", "--"]


def test_a_curve_marks_what_has_not_converged() -> None:
    ax = ds.plot_llc_curve(sweep())
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    curves, marks = ["restriction 0", "restriction 1"], ["no number", "not converged"]
    assert sorted(words) == sorted([*curves, *marks, "undetermined"])
    assert words[:2] == curves
    marks = {c.get_label(): len(c.get_offsets()) for c in ax.collections if c.get_label()[0] != "_"}
    assert marks["not converged"] == 1
    assert marks["undetermined"] == 1
    points = sum(len(c.get_offsets()) for c in ax.collections if hasattr(c, "get_sizes"))
    assert points == 2 * 11
    crosses = [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "x"]
    assert crosses == [[10], [10]]


def test_a_curve_over_steps_has_them_to_scale() -> None:
    found = sweep(3).assign_coords(step=("checkpoint", [0, 10, 1000]))
    ax = ds.plot_llc_curve(found)
    assert ax.get_lines()[0].get_xdata().tolist() == [0, 10, 1000]


def test_a_sweep_names_every_cell() -> None:
    found = sweep_report.render("grokking", sweep())
    assert "grokking" in found
    assert "20 of 24 cells converged" not in found
    assert "19 of 24 cells converged" in found
    assert found.count("<tr>") == 1 + 24
    for part in ("step-00300", "NOT_CONVERGED", "failed", "2 failed"):
        assert part in found
    assert "lr x nbeta" not in found


def test_settings_that_are_a_grid_are_heatmaps() -> None:
    (name, first), _ = sweep_report.heatmaps(heated())
    assert name == "step-00000"
    assert (first.lrs, first.nbetas) == ((1e-4, 1e-3), (10.0, 90.0))
    assert first.llc[0, 1] == float(heated()["llc"][0, 0, 0, 0])
    assert "lr x nbeta" in sweep_report.render("sweep", heated())


def check_layout(found: list[dict[str, Any]], pictures: int) -> None:
    assert [each["width"] for each in found] == list(browser.WIDTHS)
    for each in found:
        assert each["scroll"] <= each["width"], "the page is wider than its window"
        assert each["contrast"] > 7
        assert len(each["pictures"]) == pictures
        for picture in each["pictures"]:
            assert picture["width"] > 250
            assert picture["height"] > 150
            assert 0 <= picture["left"] < picture["right"] <= each["width"]
            assert picture["drawn"] > 10
            assert picture["smallest"] > 8, "text too small to read"
            assert picture["contrast"] > 4.5, "text too faint to read"


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", browser.SCHEMES)
@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_in_a_browser_nothing_overflows_and_every_picture_is_drawn(
    text: str, tmp_path: Path, scheme: str, kind: str
) -> None:
    """The screenshots lie in pytest's folder of the test: --basetemp says where."""
    made = text if kind == "run" else sweep_report.render("sweep", sweep())
    found = browser.measured(made, scheme, tmp_path)
    check_layout(found, made.count("<svg"))
    for each in found:
        name = tmp_path / f"{kind}-{each['width']}-{scheme}.png"
        picture = browser.pictured(made, scheme, each["width"], each["height"], name)
        width, height = struct.unpack(">II", picture.read_bytes()[16:24])
        assert (width, height) == (max(each["width"], 500), each["height"])


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(
    "broken",
    [
        '<div style="width: 900px">wide</div>',
        '<img alt="" src="data:image/png;base64,AAAA" width="300" height="200">',
        '<div style="width: 120px"><svg viewBox="0 0 1 1"></svg></div>',
    ],
    ids=["too wide", "not drawn", "too small"],
)
def test_what_is_wrong_with_a_page_is_found(text: str, tmp_path: Path, broken: str) -> None:
    made = text.replace("</main>", f"{broken}</main>")
    found = browser.measured(made, "light", tmp_path)
    with pytest.raises(AssertionError):
        check_layout(found, made.count("<svg") + made.count("<img"))


def test_figures_take_the_colours_of_the_page() -> None:
    drawn = html.figure(lambda ax: ax, "nothing at all", "caption").text
    assert html.INK not in drawn
    assert html.PAPER not in drawn
    assert "currentColor" in drawn
    assert "#000000" not in drawn
