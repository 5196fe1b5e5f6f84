"""One HTML file about a sweep: its LLCs over the checkpoints, and every cell in a table."""

from collections import Counter
from pathlib import Path

import numpy as np
import xarray as xr

from distsampler.analysis.heatmap import Heatmap
from distsampler.report import plots
from distsampler.report.html import Html, Page, figure, figures, header, paragraph, table
from distsampler.report.run_report import put
from distsampler.report.subjects import heatmaps
from distsampler.report.summary import estimates
from distsampler.sweeps.results import Sweep

CURVE = (
    "Bars: 95 % intervals. Filled circles have converged; a cross has not, and a diamond could not "
    "be judged: their numbers are not to be relied on."
)
GRID_NOTE = "Where the LLC does not depend on lr and nbeta, neither decides it."
SIZE = (5.6, 3.8)  # inches


def write(sweep: Sweep, path: str | Path | None = None) -> str:
    """Write the report of a sweep to a file, else as report.html into its store; return where."""
    return put(render(sweep.files.name, sweep.collect()), sweep.files, path)


def render(title: str, dataset: xr.Dataset) -> str:
    """Return the report as text.

    Args:
        title: name of the sweep.
        dataset: what ``Sweep.collect`` gives; settings that are a grid of lr and nbeta give
            heatmaps too.
    """
    page = Page(f"distsampler: {title}", _header(dataset))
    drawn = figure(lambda ax: plots.plot_llc_curve(dataset, ax), _alt(dataset), CURVE, SIZE)
    page.section("LLC over checkpoints", figures(drawn, wide=True))
    grids = [_grid(name, heatmap) for name, heatmap in heatmaps(dataset)]
    page.section("lr x nbeta", *([figures(*grids)] if grids else []))
    page.section("Cells", table(estimates(dataset)))
    return page.text()


def _grid(name: str, heatmap: Heatmap) -> Html:
    alt = f"Heatmap of the LLC over lr and nbeta: {name}. {heatmap}"
    return figure(lambda ax: plots.plot_heatmap(heatmap, ax), alt, f"{name}: {GRID_NOTE}")


def _header(dataset: xr.Dataset) -> Html:
    verdicts = Counter(str(each) or "no verdict" for each in dataset["verdict"].values.flat)
    states = Counter(str(each) for each in dataset["status"].values.flat)
    good = verdicts["CONVERGED"]
    kind = "CONVERGED" if good == dataset["llc"].size else "NOT_CONVERGED"
    headline = f"{good} of {dataset['llc'].size} cells converged"
    states_line = paragraph("Cells: " + _counted(states), "faint")
    return header(kind, headline, paragraph("Verdicts: " + _counted(verdicts)), states_line)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.most_common())


def _alt(dataset: xr.Dataset) -> str:
    llc = np.asarray(dataset["llc"].values, np.float64)
    known = llc[np.isfinite(llc)]
    span = f"from {known.min():.4g} to {known.max():.4g}" if known.size else "none known"
    return f"LLC over {dataset.sizes['checkpoint']} checkpoints, {span}. {CURVE}"
