"""What the examples draw: the LLC over training, with what has not converged marked as such."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CONVERGED = "CONVERGED"


def sheet(columns: int = 1) -> tuple[Figure, Any]:
    """A figure and its axes."""
    made = Figure(figsize=(6 * columns, 3.6), layout="constrained")
    return made, made.subplots(1, columns)


def llc(table: xr.Dataset, ax: Axes, label: str = "LLC", color: str = "C0") -> None:
    """The LLC (checkpoint,) with its 95 % interval; hollow where the chains have not converged, a
    cross at the bottom where a cell has failed or has yet to run."""
    there = np.isfinite(table.llc.values)
    missing, table = table.step.values[~there], table.isel(checkpoint=there)
    steps, values = table.step.values, table.llc.values
    low, high = values - table.interval_low.values, table.interval_high.values - values
    ax.errorbar(steps, values, (low, high), fmt="none", ecolor=color, elinewidth=1, capsize=2)
    ax.plot(steps, values, color=color, lw=1, label=label)
    good = table.verdict.values == CONVERGED
    ax.plot(steps[good], values[good], "o", color=color, ms=5)
    hollow = dict(color=color, mfc="white", ms=5, ls="none")
    ax.plot(steps[~good], values[~good], "o", **hollow)
    if len(missing):
        low_down = [0.03] * len(missing)
        ax.plot(missing, low_down, "x", color=color, transform=ax.get_xaxis_transform())
    ax.set_ylabel("LLC")
    if not good.all() and "not converged" not in ax.get_legend_handles_labels()[1]:
        ax.plot([], [], "o", **{**hollow, "color": "0.3"}, label="not converged")
    _legend(ax)


def losses(named: Mapping[str, xr.DataArray], ax: Axes, scale: str = "log") -> None:
    """Losses (step,) on a second axis, at the right."""
    right = ax.twinx()
    for style, (name, values) in zip(("--", ":"), named.items(), strict=False):
        right.plot(values.step, values, style, color="0.5", lw=1, label=name)
    right.set(ylabel="loss", yscale=scale)
    _legend(ax, right)


def _legend(*axes: Axes) -> None:
    """One legend for what all of them hold, below the first."""
    found = [pair for each in axes for pair in zip(*each.get_legend_handles_labels(), strict=True)]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 5}
    axes[0].legend(*zip(*found, strict=True), frameon=False, fontsize=8, **below)
