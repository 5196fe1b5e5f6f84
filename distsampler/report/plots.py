"""Figures of runs (finished or not), calibrations and sweeps, on matplotlib Axes.

Each function draws on ``ax``, or on Axes of a new pyplot figure where that is None, and returns the
Axes. Where a run is wanted, its store will do, and where a sweep is, its store or table. Figures of
chains show the probe, which has no minibatch noise and decides about convergence.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from distsampler.analysis.arviz_bridge import group
from distsampler.analysis.heatmap import Heatmap
from distsampler.analysis.run import Run
from distsampler.draws import ACCEPTANCE, DISTANCE, EXCESS_LOSS, PROBE_LOSS
from distsampler.errors import ConfigError
from distsampler.report.curves import autocorrelation, decayed, settled, thinned
from distsampler.report.subjects import HasHeatmap, Store, heatmap_of, run_of, table_of
from distsampler.sweeps.results import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (6.4, 3.8)  # inches, of a figure of its own
RANK_BINS = 20
PLOTTED_NORMS = ("grad_norm", "noise_norm", "weight_norm")  # of those that samplers can record
NAMED = 8  # chains that a legend names, at most
MARKS = {
    "CONVERGED": ("o", "C0", "converged"),
    "NOT_CONVERGED": ("X", "C3", "not converged"),
    "UNDETERMINED": ("D", "C1", "undetermined"),
}
NO_NUMBER = "no number"


def plot_trace(run: Run | Store, ax: Axes | None = None) -> Axes:
    """Plot the loss on the probe less its value at w*, along each chain; burn-in is shaded.

    Chains that started dispersed are dashed. The right-hand scale is in units of the LLC.

    Example:
        >>> import distsampler as ds
        >>> ds.plot_trace(ds.open("runs/digits")).figure.savefig("trace.png")  # doctest: +SKIP
    """
    run = run_of(run)
    parts = [run.posterior]
    if run.burn_in and "warmup_posterior" in run.inference_data:
        parts.insert(0, group(run.inference_data, "warmup_posterior"))
    values = np.concatenate([part[PROBE_LOSS].values for part in parts], axis=1)
    burn_in = values.shape[1] - run.posterior.sizes["draw"]
    nbeta, start = run.facts["nbeta"], run.facts.get("probe_init_loss", 0.0)
    with _figure(ax, "Loss along the chains", "draw", "probe loss, less that at w*") as ax:
        _plot_chains(ax, run, values - start, first=-burn_in, lw=0.7)
        if burn_in:
            ax.axvspan(-burn_in, 0, color="0.5", alpha=0.2, lw=0, label="burn-in")
        units = (lambda loss: loss * nbeta, lambda llc: llc / nbeta)
        ax.secondary_yaxis("right", functions=units).set_ylabel("in units of the LLC")
    return ax


def plot_running_llc(run: Run | Store, ax: Axes | None = None) -> Axes:
    """Plot the LLC from the draws so far: each chain's, and all chains' with a band.

    The band is two standard errors wide to either side: at the last draw as the estimate says, and
    before it larger by ``sqrt(draws / draws so far)``.
    """
    run = run_of(run)
    estimate = run.llc("ignore")
    running = estimate.nbeta * _running_means(run.posterior[EXCESS_LOSS])
    with _figure(ax, "Running LLC", "draws after burn-in", "running LLC") as ax:
        _plot_chains(ax, run, running, first=1, lw=0.9)
        if running.size:
            at, mean = thinned(running.mean(axis=0), 1)
            ax.plot(at + 1, mean, color="black", lw=2.0, label="all chains")
            reach = 2 * np.nan_to_num(estimate.se) * np.sqrt(running.shape[1] / (at + 1))
            ax.fill_between(at + 1, mean - reach, mean + reach, color="0.5", alpha=0.25, lw=0)
            ax.set_ylim(*settled(running, estimate.se))
            _name_extremes(ax, running[:, -1], estimate.chains)
    return ax


def plot_rank(run: Run | Store, ax: Axes | None = None) -> Axes:
    """Plot ranks of the probe loss among all chains' draws (Vehtari et al. 2021, section 4.4).

    Chains that sample the same law have flat histograms.
    """
    run = run_of(run)
    values = run.posterior[PROBE_LOSS].values
    ranks = np.argsort(np.argsort(values, axis=None)).reshape(values.shape)
    bins = min(RANK_BINS, max(1, values.shape[1] // 5))
    edges = np.linspace(0, max(values.size, 1), bins + 1)
    expected = max(values.shape[1], 1) / bins
    with _figure(ax, "Ranks", "rank of the probe loss", "draws over expected") as ax:
        for line, style in _chains(run, ranks):
            heights, _ = np.histogram(line, edges)
            ax.stairs(heights / expected, edges, baseline=None, lw=1.2, **style)
        ax.axhline(1.0, color="black", lw=0.8, ls=":")
        ax.set_ylim(0, max(2.0, ax.get_ylim()[1]))
    return ax


def plot_autocorrelation(run: Run | Store, ax: Axes | None = None) -> Axes:
    """Plot the autocorrelation of the probe loss within each chain, against the lag in draws."""
    run = run_of(run)
    lags = autocorrelation(np.asarray(run.posterior[PROBE_LOSS].values, np.float64))
    with _figure(ax, "Autocorrelation, probe loss", "lag in draws", "autocorrelation") as ax:
        _plot_chains(ax, run, lags[:, : decayed(lags)])
        ax.axhline(0.0, color="black", lw=0.8, ls=":")
        ax.locator_params(axis="x", integer=True)
    return ax


def plot_acceptance(run: Run | Store, ax: Axes | None = None) -> Axes:
    """Plot the chance that Metropolis would accept the step behind each draw, as running means.

    Args:
        run: a run whose sample_stats hold ``acceptance``: of ``mala``, or with ``save_mala_vars``.
        ax: where to draw; None: new Axes.

    Raises:
        KeyError: if it was not recorded.
    """
    run = run_of(run)
    running = _running_means(group(run.inference_data, "sample_stats")[ACCEPTANCE])
    with _figure(ax, "Acceptance", "draws after burn-in", "running mean") as ax:
        _plot_chains(ax, run, running)
    return ax


def plot_norms(run: Run | Store, ax: Axes | None = None) -> Axes:
    """Plot norms of gradient, noise and weights, and the distance from w*, as far as recorded.

    Lines are the median chain, shades reach from the least to the largest.
    """
    run = run_of(run)
    with _figure(ax, "Norms", "draws after burn-in", "Euclidean norm") as ax:
        for number, (name, values) in enumerate(norms(run)):
            ordered = np.sort(values, axis=0)
            at, middle = thinned(np.median(ordered, axis=0), 10)
            ax.plot(at, middle, color=f"C{number}", lw=0.9, label=name.replace("_", " "))
            low, high = (ordered[row][at] for row in (0, -1))
            ax.fill_between(at, low, high, color=f"C{number}", alpha=0.25, lw=0)
        ax.set_yscale("log")
    return ax


def plot_budget(run: Run | Store, ax: Axes | None = None) -> Axes:
    """Plot the parts of the LLC's error: standard errors to both sides, biases to their own."""
    run = run_of(run)
    parts = reversed(run.llc("ignore").budget.rows())
    bars = [(name, value, text) for name, value, text in parts if value is not None]
    bars = [bar for bar in bars if np.isfinite(bar[1])]
    with _figure(ax, "Error budget", "in units of the LLC") as ax:
        for height, (_, value, text) in enumerate(bars):
            error = text.startswith("standard error")
            ax.barh(height, value, color="C0" if error else "C1")
            if error:
                ax.barh(height, -value, color="C0")
        ax.set_yticks(range(len(bars)), [name.replace(", ", ",\n") for name, _, _ in bars])
        ax.axvline(0.0, color="black", lw=0.8)
    return ax


def plot_heatmap(
    heatmap: Heatmap | HasHeatmap | Sweep | xr.Dataset | Store, ax: Axes | None = None
) -> Axes:
    """Plot the LLC over lr and nbeta by colour, with sd / mean between chains as text.

    Args:
        heatmap: a calibration with a heatmap, or that heatmap; or a sweep whose settings are a grid
            of lr and nbeta, its store, or a part of its table.
        ax: where to draw; None: new Axes.
    """
    heatmap = heatmap_of(heatmap)
    middle = np.nanmean(heatmap.llc) if np.isfinite(heatmap.llc).any() else 0.0
    with _figure(ax, "LLC, and sd / mean between chains", "lr", "nbeta") as ax:
        image = ax.imshow(heatmap.llc, aspect="auto", origin="lower", cmap="viridis")
        for (i, j), value in np.ndenumerate(heatmap.llc):
            known = np.isfinite(value)
            text = f"{value:.4g}\n{heatmap.spread[i, j]:.1%}" if known else "diverged"
            color = "white" if known and value < middle else "0.05"
            ax.text(j, i, text, ha="center", va="center", fontsize="small", color=color)
        ax.set_xticks(range(len(heatmap.lrs)), [f"{lr:.3g}" for lr in heatmap.lrs])
        ax.set_yticks(range(len(heatmap.nbetas)), [f"{nbeta:.4g}" for nbeta in heatmap.nbetas])
        ax.figure.colorbar(image, ax=ax)
    return ax


def check_format(path: Path) -> None:
    """Check that matplotlib knows the format of a figure's file.

    Raises:
        ConfigError: if not.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ConfigError(f"--heatmap must end in one of .{', .'.join(sorted(known))}: got {path}")


def save_heatmap(heatmap: Heatmap, path: Path) -> None:
    """Plot a heatmap into a file, without pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    plot_heatmap(heatmap, figure.subplots())
    figure.savefig(path)


def plot_llc_curve(dataset: Sweep | xr.Dataset | Store, ax: Axes | None = None) -> Axes:
    """Plot the LLC over the checkpoints of a sweep, with 95 % intervals and a mark per verdict.

    A cell without a number, which has failed or has yet to run, is a cross on the lower edge. Each
    combination of the other dimensions that have more than one entry has a curve.

    Args:
        dataset: a sweep, its store, or what ``Sweep.collect`` gives; checkpoints are drawn at their
            ``step``, where it is known.
        ax: where to draw; None: new Axes.
    """
    dataset = table_of(dataset)
    steps = dataset["step"].values.astype(np.float64) if "step" in dataset.coords else None
    at = np.arange(dataset.sizes["checkpoint"], dtype=np.float64) if steps is None else steps
    xlabel = "checkpoint" if steps is None else "step"
    with _figure(ax, "LLC over checkpoints", xlabel, "LLC") as ax:
        curves = list(_curves(dataset))
        for number, (label, curve) in enumerate(curves):
            _plot_curve(ax, at, curve, f"C{number}", label)
        for number, (_, curve) in enumerate(curves):
            _plot_marks(ax, at, curve, f"C{number}")
        if steps is None:
            names, every = [str(name) for name in dataset["checkpoint"].values], len(at) // 12
            shown = slice(None, None, max(1, every))
            ax.set_xticks(at[shown], names[shown], rotation=30, ha="right")
    return ax


def norms(run: Run) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield name and values, (chain, draw), of the distance and the norms that were recorded."""
    stats = group(run.inference_data, "sample_stats")
    for name, home in ((DISTANCE, run.posterior), *((name, stats) for name in PLOTTED_NORMS)):
        if name in home and home[name].size and (home[name].values > 0).any():
            yield name, np.asarray(home[name].values, np.float64)


@contextmanager
def _figure(ax: Axes | None, title: str, xlabel: str, ylabel: str = "") -> Iterator[Axes]:
    """Axes to draw on, labelled when all is drawn, with a legend where a few lines are named."""
    with _new_axes() if ax is None else nullcontext(ax) as ax:
        yield ax
        _label(ax, title, xlabel, ylabel)


@contextmanager
def _new_axes() -> Iterator[Axes]:
    """Axes of a figure that pyplot knows, and so a notebook shows; in a thread, of a bare one."""
    if threading.current_thread() is not threading.main_thread():
        from matplotlib.figure import Figure  # windows belong to the main thread

        yield Figure(figsize=SIZE, layout="constrained").subplots()
        return
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=SIZE, layout="constrained")
    try:
        yield ax
    except BaseException:
        pyplot.close(figure)  # half a figure would be shown
        raise


def _label(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    handles, labels = ax.get_legend_handles_labels()
    if 0 < len(handles) <= NAMED:  # for many it would cover the picture
        ax.legend(handles, labels, fontsize="small", framealpha=0.6, ncols=2)


def _plot_chains(ax: Axes, run: Run, values: NDArray[Any], first: int = 0, lw: float = 1.0) -> None:
    """A line per chain."""
    for line, style in _chains(run, values):
        at, drawn = thinned(line, len(values))
        ax.plot(at + first, drawn, lw=lw, alpha=0.8, **style)


def _chains(run: Run, values: NDArray[Any]) -> Iterator[tuple[NDArray[Any], dict[str, Any]]]:
    """Values and style of each chain; dispersed starts are dashed."""
    dispersed = run.manifest.config.init == "dispersed"
    for chain, line in zip(run.posterior["chain"].values.tolist(), values, strict=True):
        dashes = "--" if dispersed and chain % 2 else "-"
        yield line, {"label": f"chain {chain}", "linestyle": dashes, "color": f"C{chain % 10}"}


def _running_means(values: xr.DataArray) -> NDArray[np.float64]:
    """Mean of each chain's draws so far, (chain, draw)."""
    draws = np.asarray(values.values, np.float64)
    means: NDArray[np.float64] = np.cumsum(draws, axis=1) / np.arange(1, draws.shape[1] + 1)
    return means


def _plot_curve(
    ax: Axes, at: NDArray[np.float64], curve: xr.Dataset, color: str, label: str
) -> None:
    llc = curve["llc"].values.astype(np.float64)
    ends = np.stack([llc - curve["interval_low"].values, curve["interval_high"].values - llc])
    reach = np.nan_to_num(np.abs(ends))
    line = ax.errorbar(at, llc, reach, color=color, lw=1.2, elinewidth=1, capsize=2)[0]
    line.set_label(label)


def _plot_marks(ax: Axes, at: NDArray[np.float64], curve: xr.Dataset, color: str) -> None:
    """A mark at each checkpoint, by verdict; one without a number on the lower edge."""
    llc, verdicts = curve["llc"].values.astype(np.float64), curve["verdict"].values.astype(str)
    known = np.isfinite(llc)
    if not known.all():
        low, edge = np.zeros((~known).sum()), ax.get_xaxis_transform()
        label = _once(ax, NO_NUMBER)
        ax.plot(at[~known], low, "x", color=color, transform=edge, clip_on=False, label=label)
    for verdict, (marker, warning, meaning) in MARKS.items():
        shown = known & (verdicts == verdict)
        if not shown.any():
            continue
        x, y = at[shown], llc[shown]
        if verdict == "CONVERGED":
            ax.scatter(x, y, 22, color, marker=marker, zorder=3)
        else:
            label = _once(ax, meaning)
            ax.scatter(x, y, 52, "none", marker=marker, edgecolors=warning, label=label, zorder=3)


def _once(ax: Axes, text: str) -> str:
    """A label for the legend, unless the legend has it already."""
    return "_nolegend_" if text in ax.get_legend_handles_labels()[1] else text


def _curves(dataset: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    """Label and values of each combination of the dimensions beside the checkpoints."""
    others = [str(dim) for dim in dataset["llc"].dims if dim != "checkpoint"]
    for index in np.ndindex(*(dataset.sizes[dim] for dim in others)):
        chosen = dict(zip(others, index, strict=True))
        named = [str(dataset[d].values[i]) for d, i in chosen.items() if dataset.sizes[d] > 1]
        yield ", ".join(named), dataset.isel(chosen)


def _name_extremes(ax: Axes, last: NDArray[np.float64], chains: tuple[int, ...]) -> None:
    """The chains that end highest and lowest, by number, where a legend would be too long."""
    if len(last) < NAMED:
        return
    for row, side in ((int(np.argmax(last)), "bottom"), (int(np.argmin(last)), "top")):
        end = ax.get_xlim()[1], float(last[row])
        text = f"chain {chains[row]}"
        ax.annotate(text, end, ha="right", va=side, fontsize="small", color="black")
