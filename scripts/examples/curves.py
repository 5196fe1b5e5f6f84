"""What the examples draw beside the LLC over training: the losses, and one legend for both."""

from collections.abc import Mapping
from typing import Any

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure


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
