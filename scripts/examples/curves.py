"""What the examples draw: losses beside the LLC over training, series with their verdicts, legends.

A mark says what the verdict on its cell is, as in the figures of the package.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike


def sheet(columns: int = 1) -> tuple[Figure, Any]:
    """A figure and its axes."""
    made = Figure(figsize=(6 * columns, 3.6), layout="constrained")
    return made, made.subplots(1, columns)


def losses(named: Mapping[str, xr.DataArray], ax: Axes, scale: str = "log") -> None:
    """Losses (step,) on a second axis, at the right."""
    right = ax.twinx()
    for style, (name, values) in zip(("--", ":"), named.items(), strict=False):
        right.plot(values.step, values, style, color="0.5", lw=1, label=name)
    right.set(ylabel="loss", yscale=scale)
    legend(ax, right)


def legend(*axes: Axes) -> None:
    """One legend for what all of them hold, below the first."""
    pairs = [pair for each in axes for pair in zip(*each.get_legend_handles_labels(), strict=True)]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 5}
    axes[0].legend(*zip(*pairs, strict=True), frameon=False, fontsize=8, **below)


class AsWritten(argparse.RawDescriptionHelpFormatter):
    """Shows a script's docstring as it is written."""


def panels(
    count: int, columns: int = 3, width: float = 3.9, height: float = 2.6, sharex: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels in rows, each of this size in inches, and their axes."""
    rows = -(-count // columns)
    made = Figure(figsize=(width * columns, height * rows + 0.9), layout="constrained")
    grid = made.subplots(rows, columns, squeeze=False, sharex=sharex).ravel().tolist()
    for spare in grid[count:]:
        spare.set_visible(False)
    return made, grid[:count]


def series(ax: Axes, at: ArrayLike, cells: xr.Dataset, color: str, **line: Any) -> None:
    """LLCs of cells with bars of 95 %, and a mark per verdict: full circles have converged."""
    values, verdicts = cells.llc.values, cells.verdict.values.astype(str)
    bars = 1.96 * cells.se.values
    ax.errorbar(at, values, bars, color=color, elinewidth=1, capsize=2, **{"lw": 1.2, **line})
    for verdict in np.unique(verdicts):
        x, y = (np.asarray(each)[verdicts == verdict] for each in (at, values))
        if verdict == "CONVERGED":
            ax.scatter(x, y, 20, color, zorder=3)
        else:
            ax.scatter(x, y, 52, "none", marker="X", edgecolors="C3", zorder=4)


def key(made: Figure, lines: Mapping[str, str]) -> None:
    """One legend below all panels: colours by name, and what the marks mean."""
    handles = [Line2D([], [], color=color, label=name) for name, color in lines.items()]
    marks = {"label": "converged", "marker": "o", "color": "0.35", "lw": 0, "ms": 5}
    handles.append(Line2D([], [], **marks))
    open_cross = {"marker": "X", "mfc": "none", "mec": "C3", "ms": 7, "label": "not converged"}
    handles.append(Line2D([], [], **{**marks, **open_cross}))
    made.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
