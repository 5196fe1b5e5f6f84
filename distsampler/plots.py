"""Figures of a run, on matplotlib Axes: loss traces, the running LLC, ranks.

Each function draws on the Axes given, or on new ones, and returns them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from distsampler.budget import ErrorBudget
from distsampler.heatmap import Heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANK_BINS = 20


def plot_trace(
    posterior: xr.Dataset, warmup: xr.Dataset | None = None, ax: Axes | None = None
) -> Axes:
    """Probe loss of each chain against the draw, burn-in shaded.

    Args:
        posterior: with ``probe_loss`` (chain, draw).
        warmup: the same before, if any.
        ax: to draw on.
    """
    ax = _axes(ax)
    burn_in = 0 if warmup is None else warmup.sizes["draw"]
    parts = ([] if warmup is None else [warmup]) + [posterior]
    for chain in posterior["chain"].values:
        values = np.concatenate([part["probe_loss"].sel(chain=chain).values for part in parts])
        ax.plot(np.arange(len(values)) - burn_in, values, lw=0.5, alpha=0.7)
    if burn_in:
        ax.axvspan(-burn_in, 0, color="0.5", alpha=0.2, lw=0, label="burn-in")
    ax.set(xlabel="draw", ylabel="loss on the probe", title="Loss along the chains")
    _legend(ax)
    return ax


def plot_running_llc(
    posterior: xr.Dataset, nbeta: float, ax: Axes | None = None, se: float | None = None
) -> Axes:
    """LLC from the draws so far: each chain, and all of them.

    Args:
        posterior: with ``excess_loss`` (chain, draw).
        nbeta: inverse temperature times n.
        ax: to draw on.
        se: standard error of the final estimate, drawn as a band of two.
    """
    ax = _axes(ax)
    excess = posterior["excess_loss"].values
    counts = np.arange(1, excess.shape[1] + 1)
    running = nbeta * np.cumsum(excess, axis=1) / counts
    for chain, values in zip(posterior["chain"].values, running, strict=True):
        ax.plot(counts, values, lw=0.9, label=f"chain {chain}")
    mean = running.mean(axis=0)
    ax.plot(counts, mean, color="black", lw=1.8, label="all chains")
    if se is not None and len(mean):
        ax.axhspan(mean[-1] - 2 * se, mean[-1] + 2 * se, color="0.5", alpha=0.2, lw=0)
    ax.set(xlabel="draws after burn-in", ylabel="running LLC", title="Running LLC")
    if len(mean):
        settled = running[:, len(counts) // 10 :]
        span = max(float(np.ptp(settled)), 4 * (se or 0.0), 1e-12)
        ax.set_ylim(settled.min() - 0.2 * span, settled.max() + 0.2 * span)
    _legend(ax)
    return ax


def plot_rank(posterior: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Ranks of the probe loss among all chains' draws (Vehtari et al. 2021, section 4.4).

    Chains that sample the same law have flat histograms.

    Args:
        posterior: with ``probe_loss`` (chain, draw).
        ax: to draw on.
    """
    ax = _axes(ax)
    values = posterior["probe_loss"].values
    ranks = np.argsort(np.argsort(values, axis=None)).reshape(values.shape)
    bins = min(RANK_BINS, max(1, values.shape[1] // 5))
    edges = np.linspace(0, values.size, bins + 1)
    expected = values.shape[1] / bins
    for number, chain in enumerate(posterior["chain"].values):
        heights, _ = np.histogram(ranks[number], edges)
        ax.stairs(heights / expected, edges, baseline=None, label=f"chain {chain}", lw=1.2)
    ax.axhline(1.0, color="black", lw=0.8, ls="--")
    ax.set(
        xlabel="rank of the probe loss", ylabel="draws over expected", title="Ranks", ylim=(0, 2)
    )
    _legend(ax)
    return ax


def plot_heatmap(heatmap: Heatmap, ax: Axes | None = None) -> Axes:
    """LLC over lr and nbeta by colour; in each cell its value, and sd / mean between chains.

    Args:
        heatmap: of a calibration.
        ax: to draw on.
    """
    ax = _axes(ax)
    image = ax.imshow(heatmap.llc, aspect="auto", origin="lower", cmap="viridis")
    middle = np.nanmean(heatmap.llc) if np.isfinite(heatmap.llc).any() else 0.0
    for (i, j), value in np.ndenumerate(heatmap.llc):
        found = np.isfinite(value)
        text = f"{value:.4g}\n{heatmap.spread[i, j]:.1%}" if found else "diverged"
        color = "white" if found and value < middle else "black"
        ax.text(j, i, text, ha="center", va="center", fontsize="small", color=color)
    ax.set_xticks(range(len(heatmap.lrs)), [f"{lr:.3g}" for lr in heatmap.lrs])
    ax.set_yticks(range(len(heatmap.nbetas)), [f"{nbeta:.4g}" for nbeta in heatmap.nbetas])
    ax.set(xlabel="lr", ylabel="nbeta", title="LLC, and sd / mean between chains")
    ax.figure.colorbar(image, ax=ax)
    return ax


def plot_budget(budget: ErrorBudget, ax: Axes | None = None) -> Axes:
    """The parts of an LLC's error as bars: standard errors to both sides, biases to theirs.

    Args:
        budget: of an estimate.
        ax: to draw on.
    """
    ax = _axes(ax)
    rows = [(name, value, text) for name, value, text in budget.rows() if value is not None]
    for height, (_, value, text) in enumerate(reversed(rows)):
        both = text.startswith("standard error")
        ax.barh(height, value, color="C0" if both else "C1")
        if both:
            ax.barh(height, -value, color="C0")
    ax.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
    ax.axvline(0.0, color="black", lw=0.8)
    ax.set(xlabel="in units of the LLC", title="Error budget")
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    axes: Axes = Figure(figsize=(6.4, 3.6), layout="constrained").subplots()
    return axes


def _legend(ax: Axes) -> None:
    """A legend for a few chains; for many it would cover the picture."""
    handles, labels = ax.get_legend_handles_labels()
    if 0 < len(handles) <= 8:
        ax.legend(handles, labels, fontsize="small", framealpha=0.8, ncols=2)
