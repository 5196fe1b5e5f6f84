"""One HTML file about a sweep: its LLCs over the checkpoints, and every cell in a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from distsampler.analysis.estimators import plus_minus
from distsampler.analysis.heatmap import Heatmap
from distsampler.report import plots
from distsampler.report.html import Cell, Html, Page, figure, figures, paragraph, table
from distsampler.report.run_report import put
from distsampler.sweeps.results import Sweep

CURVE = (
    "Bars: 95 % intervals. Filled circles have converged; a cross has not, and a diamond could not "
    "be judged: their numbers are not to be relied on."
)
GRID = "Where the LLC does not depend on lr and nbeta, neither decides it."
INTERVAL = ("interval_low", "interval_high")
SIZE = (5.6, 3.8)  # inches


def write(sweep: Sweep, path: str | Path | None = None) -> str:
    """Writes the report of a sweep.

    Args:
        sweep: finished or not.
        path: of the HTML file; None: report.html in its directory.

    Returns:
        The path.
    """
    return put(html(sweep.files.name, sweep.collect()), sweep.files, path)


def html(title: str, dataset: xr.Dataset) -> str:
    """The report as text.

    Args:
        title: of the sweep.
        dataset: what ``Sweep.collect`` gives; settings that are a grid of lr and nbeta give
            heatmaps too.
    """
    page = Page(f"distsampler: {title}", _header(dataset))
    drawn = figure(lambda ax: plots.plot_llc_curve(dataset, ax), _alt(dataset), CURVE, SIZE)
    page.section("LLC over checkpoints", figures(drawn, wide=True))
    grids = [_grid(name, found) for name, found in heatmaps(dataset)]
    page.section("lr x nbeta", *([figures(*grids)] if grids else []))
    page.section("Cells", table(_headings(dataset), _rows(dataset), text=_texts(dataset)))
    return page.text()


def heatmaps(dataset: xr.Dataset) -> Iterator[tuple[str, Heatmap]]:
    """The LLC over lr and nbeta, of every checkpoint whose settings are such a grid."""
    others = [dim for dim in dataset["llc"].dims if dim != "setting"]
    for index in np.ndindex(*(dataset.sizes[dim] for dim in others)):
        chosen = dataset.isel(dict(zip(others, index, strict=True)))
        lrs, nbetas = (np.unique(chosen[name].values).tolist() for name in ("lr", "nbeta"))
        if chosen.sizes["setting"] == len(lrs) * len(nbetas) > 1:
            name = ", ".join(str(chosen[dim].item()) for dim in others if dataset.sizes[dim] > 1)
            yield name or "all", _heatmap(chosen, lrs, nbetas)


def _heatmap(chosen: xr.Dataset, lrs: list[float], nbetas: list[float]) -> Heatmap:
    llc, spread = (np.full((len(nbetas), len(lrs)), np.nan) for _ in range(2))
    for number, (lr, nbeta) in enumerate(
        zip(chosen["lr"].values, chosen["nbeta"].values, strict=True)
    ):
        place = nbetas.index(nbeta), lrs.index(lr)
        llc[place], spread[place] = chosen["llc"].values[number], chosen["spread"].values[number]
    return Heatmap(tuple(lrs), tuple(nbetas), llc, spread, 0)


def _grid(name: str, heatmap: Heatmap) -> Html:
    alt = f"Heatmap of the LLC over lr and nbeta: {name}. {heatmap}"
    return figure(lambda ax: plots.plot_heatmap(heatmap, ax), alt, f"{name}: {GRID}")


def _header(dataset: xr.Dataset) -> Html:
    verdicts = Counter(str(each) or "no verdict" for each in dataset["verdict"].values.flat)
    states = Counter(str(each) for each in dataset["status"].values.flat)
    good = verdicts["CONVERGED"]
    kind = "CONVERGED" if good == dataset["llc"].size else "NOT_CONVERGED"
    lines = (
        Html(f'<p class="big">{good} of {dataset["llc"].size} cells converged</p>'),
        paragraph("Verdicts: " + _counted(verdicts)),
        paragraph("Cells: " + _counted(states), "faint"),
    )
    return Html(f'<header class="{kind}">{"".join(line.text for line in lines)}</header>')


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.most_common())


def _alt(dataset: xr.Dataset) -> str:
    llc = np.asarray(dataset["llc"].values, np.float64)
    found = llc[np.isfinite(llc)]
    span = f"from {found.min():.4g} to {found.max():.4g}" if found.size else "none known"
    return f"LLC over {dataset.sizes['checkpoint']} checkpoints, {span}. {CURVE}"


def _headings(dataset: xr.Dataset) -> list[str]:
    reason = ["reason"] if "reason" in dataset else []
    return [*_named(dataset), "LLC", "95 % interval", "verdict", "status", *reason]


def _texts(dataset: xr.Dataset) -> tuple[int, ...]:
    """Columns of the table that hold sentences."""
    return (len(_named(dataset)) + 4,) if "reason" in dataset else ()


def _named(dataset: xr.Dataset) -> list[str]:
    """The dimensions by which cells differ; the checkpoint always."""
    dims = [str(dim) for dim in dataset["llc"].dims]
    return [dim for dim in dims if dim == "checkpoint" or dataset.sizes[dim] > 1]


def _rows(dataset: xr.Dataset) -> Iterator[list[Cell]]:
    dims = dataset["llc"].dims
    for index in np.ndindex(*dataset["llc"].shape):
        cell = dataset.isel(dict(zip(dims, index, strict=True)))
        where: list[Cell] = [str(cell[dim].item()) for dim in _named(dataset)]
        numbers = {name: float(cell[name]) for name in ("llc", "se", *INTERVAL)}
        known = math.isfinite(numbers["llc"])
        llc = plus_minus(numbers["llc"], numbers["se"]) if known else "none"
        low, high = (numbers[name] for name in INTERVAL)
        span = f"{low:.5g} .. {high:.5g}" if known else ""
        rest = [_text(cell, name) for name in ("status", "reason") if name in cell]
        yield [*where, llc, span, _verdict(_text(cell, "verdict")), *rest]


def _text(cell: xr.Dataset, name: str) -> str:
    value: Any = cell[name].item()
    return str(value)


def _verdict(text: str) -> Cell:
    kind = "good" if text == "CONVERGED" else "bad"
    return Html(f'<b class="{kind}">{text}</b>') if text.isidentifier() else text
