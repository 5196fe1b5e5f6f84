"""Figures of runs, calibrations and sweeps, on matplotlib Axes.

Each function draws on the Axes given, or on new ones, and returns them. What belongs to the probe,
which has no minibatch noise, decides about convergence, and is what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from distsampler.analysis.arviz_bridge import group
from distsampler.analysis.heatmap import Heatmap
from distsampler.analysis.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANK_BINS = 20
POINTS = 6_000  # of all lines of a picture; what lies between is drawn as its extremes
LEAST_POINTS = 200  # of a line
NORMS = ("grad_norm", "noise_norm", "weight_norm")
NAMED = 8  # chains that a legend names, at most
MARKS = {
    "CONVERGED": ("o", "C0", "converged"),
    "NOT_CONVERGED": ("X", "C3", "not converged"),
    "UNDETERMINED": ("D", "C1", "undetermined"),
}
NO_NUMBER = "no number"
MEANINGS = {NO_NUMBER, *(meaning for _, _, meaning in MARKS.values())}


def plot_trace(run: Run, ax: Axes | None = None) -> Axes:
    """Loss on the probe less its value at w*, along each chain; burn-in is shaded.

    Chains that started dispersed are dashed. The right-hand scale is in units of the LLC.

    Args:
        run: finished or not.
        ax: to draw on; None: new ones.

    Example:
        >>> import distsampler as ds
        >>> ds.plot_trace(ds.open("runs/digits")).figure.savefig("trace.png")  # doctest: +SKIP
    """
    ax, start = _axes(ax), run.facts.get("probe_init_loss", 0.0)
    parts = [run.posterior]
    if run.burn_in and "warmup_posterior" in run.inference_data:
        parts.insert(0, group(run.inference_data, "warmup_posterior"))
    values = np.concatenate([part["probe_loss"].values for part in parts], axis=1) - start
    burn_in = values.shape[1] - run.posterior.sizes["draw"]
    for chain, label, style, line in _chains(run, values):
        at, drawn = _thinned(line, len(values))
        ax.plot(at - burn_in, drawn, style, color=_color(chain), lw=0.7, alpha=0.8, label=label)
    if burn_in:
        ax.axvspan(-burn_in, 0, color="0.5", alpha=0.2, lw=0, label="burn-in")
    ax.set(xlabel="draw", ylabel="probe loss, less that at w*", title="Loss along the chains")
    nbeta = run.facts["nbeta"]
    units = (lambda loss: loss * nbeta, lambda llc: llc / nbeta)
    ax.secondary_yaxis("right", functions=units).set_ylabel("in units of the LLC")
    _legend(ax)
    return ax


def plot_running_llc(run: Run, ax: Axes | None = None) -> Axes:
    """LLC from the draws so far: each chain's, and all chains' with a band.

    The band is two standard errors wide to either side: at the last draw as the estimate says, and
    before it larger by ``sqrt(draws / draws so far)``.

    Args:
        run: finished or not.
        ax: to draw on; None: new ones.
    """
    ax, estimate = _axes(ax), run.llc("ignore")
    excess = np.asarray(run.posterior["excess_loss"].values, np.float64)
    counts = np.arange(1, excess.shape[1] + 1)
    running = estimate.nbeta * np.cumsum(excess, axis=1) / counts
    for chain, label, style, line in _chains(run, running):
        at, drawn = _thinned(line, len(running))
        ax.plot(at + 1, drawn, style, color=_color(chain), lw=0.9, alpha=0.8, label=label)
    if running.size:
        at, mean = _thinned(running.mean(axis=0), 1)
        ax.plot(at + 1, mean, color="black", lw=2.0, label="all chains")
        reach = 2 * np.nan_to_num(estimate.se) * np.sqrt(len(counts) / (at + 1))
        ax.fill_between(at + 1, mean - reach, mean + reach, color="0.5", alpha=0.25, lw=0)
        ax.set_ylim(*_settled(running, estimate.se))
        _name_extremes(ax, running[:, -1], estimate.chains)
    ax.set(xlabel="draws after burn-in", ylabel="running LLC", title="Running LLC")
    _legend(ax)
    return ax


def plot_rank(run: Run, ax: Axes | None = None) -> Axes:
    """Ranks of the probe loss among all chains' draws (Vehtari et al. 2021, section 4.4).

    Chains that sample the same law have flat histograms.

    Args:
        run: finished or not.
        ax: to draw on; None: new ones.
    """
    ax, values = _axes(ax), run.posterior["probe_loss"].values
    ranks = np.argsort(np.argsort(values, axis=None)).reshape(values.shape)
    bins = min(RANK_BINS, max(1, values.shape[1] // 5))
    edges = np.linspace(0, max(values.size, 1), bins + 1)
    expected = max(values.shape[1], 1) / bins
    for chain, label, style, line in _chains(run, ranks):
        heights, _ = np.histogram(line, edges)
        ax.stairs(
            heights / expected,
            edges,
            baseline=None,
            label=label,
            ls=style,
            color=_color(chain),
            lw=1.2,
        )
    ax.axhline(1.0, color="black", lw=0.8, ls=":")
    ax.set(xlabel="rank of the probe loss", ylabel="draws over expected", title="Ranks")
    ax.set_ylim(0, max(2.0, ax.get_ylim()[1]))
    _legend(ax)
    return ax


def plot_autocorrelation(run: Run, ax: Axes | None = None) -> Axes:
    """Autocorrelation of the probe loss within each chain, against the lag in draws.

    Args:
        run: finished or not.
        ax: to draw on; None: new ones.
    """
    ax = _axes(ax)
    found = _autocorrelation(np.asarray(run.posterior["probe_loss"].values, np.float64))
    shown = found[:, : _fallen(found)]
    for chain, label, style, line in _chains(run, shown):
        at, drawn = _thinned(line, len(shown))
        ax.plot(at, drawn, style, color=_color(chain), lw=1.0, alpha=0.8, label=label)
    ax.axhline(0.0, color="black", lw=0.8, ls=":")
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="lag in draws", ylabel="autocorrelation", title="Autocorrelation, probe loss")
    _legend(ax)
    return ax


def plot_acceptance(run: Run, ax: Axes | None = None) -> Axes:
    """Chance that Metropolis would accept the step behind each draw: running means by chain.

    Args:
        run: whose sample_stats hold ``acceptance``: of ``mala``, or with ``save_mala_vars``.
        ax: to draw on; None: new ones.

    Raises:
        KeyError: if it was not recorded.
    """
    ax = _axes(ax)
    values = np.asarray(group(run.inference_data, "sample_stats")["acceptance"].values, np.float64)
    running = np.cumsum(values, axis=1) / np.arange(1, values.shape[1] + 1)
    for chain, label, style, line in _chains(run, running):
        at, drawn = _thinned(line, len(running))
        ax.plot(at, drawn, style, color=_color(chain), lw=1.0, alpha=0.8, label=label)
    ax.set(xlabel="draws after burn-in", ylabel="running mean", title="Acceptance")
    _legend(ax)
    return ax


def plot_norms(run: Run, ax: Axes | None = None) -> Axes:
    """Norms of gradient, noise and weights, and the distance from w*: median chain and range.

    Args:
        run: finished or not; only what it recorded is drawn.
        ax: to draw on; None: new ones.
    """
    ax = _axes(ax)
    for number, (name, values) in enumerate(norms(run)):
        ordered = np.sort(values, axis=0)
        at, middle = _thinned(np.median(ordered, axis=0), 10)
        ax.plot(at, middle, color=f"C{number}", lw=0.9, label=name.replace("_", " "))
        low, high = (ordered[row][at] for row in (0, -1))
        ax.fill_between(at, low, high, color=f"C{number}", alpha=0.25, lw=0)
    ax.set(xlabel="draws after burn-in", ylabel="Euclidean norm", yscale="log", title="Norms")
    _legend(ax)
    return ax


def plot_budget(run: Run, ax: Axes | None = None) -> Axes:
    """The parts of the LLC's error as bars: standard errors to both sides, biases to theirs.

    Args:
        run: finished or not.
        ax: to draw on; None: new ones.
    """
    ax, budget = _axes(ax), run.llc("ignore").budget
    rows = [row for row in reversed(budget.rows()) if row[1] is not None and np.isfinite(row[1])]
    for height, (_, value, text) in enumerate(rows):
        both = text.startswith("standard error")
        ax.barh(height, value or 0.0, color="C0" if both else "C1")
        if both:
            ax.barh(height, -(value or 0.0), color="C0")
    ax.set_yticks(range(len(rows)), [name.replace(", ", ",\n") for name, _, _ in rows])
    ax.axvline(0.0, color="black", lw=0.8)
    ax.set(xlabel="in units of the LLC", title="Error budget")
    return ax


def plot_heatmap(heatmap: Heatmap, ax: Axes | None = None) -> Axes:
    """LLC over lr and nbeta by colour; in each cell its value, and sd / mean between chains.

    Args:
        heatmap: of a calibration.
        ax: to draw on; None: new ones.
    """
    ax = _axes(ax)
    image = ax.imshow(heatmap.llc, aspect="auto", origin="lower", cmap="viridis")
    middle = np.nanmean(heatmap.llc) if np.isfinite(heatmap.llc).any() else 0.0
    for (i, j), value in np.ndenumerate(heatmap.llc):
        found = np.isfinite(value)
        text = f"{value:.4g}\n{heatmap.spread[i, j]:.1%}" if found else "diverged"
        color = "white" if found and value < middle else "0.05"
        ax.text(j, i, text, ha="center", va="center", fontsize="small", color=color)
    ax.set_xticks(range(len(heatmap.lrs)), [f"{lr:.3g}" for lr in heatmap.lrs])
    ax.set_yticks(range(len(heatmap.nbetas)), [f"{nbeta:.4g}" for nbeta in heatmap.nbetas])
    ax.set(xlabel="lr", ylabel="nbeta", title="LLC, and sd / mean between chains")
    ax.figure.colorbar(image, ax=ax)
    return ax


def plot_llc_curve(dataset: xr.Dataset, ax: Axes | None = None) -> Axes:
    """LLC over the checkpoints of a sweep, with 95 % intervals; what has not converged is marked.

    A cell without a number, which has failed or has yet to run, is a cross on the lower edge. One
    curve for each combination of the other dimensions that have more than one entry.

    Args:
        dataset: what ``Sweep.collect`` gives; checkpoints are drawn at their ``step``, where it is
            known.
        ax: to draw on; None: new ones.
    """
    ax, curves = _axes(ax), list(_curves(dataset))
    ticks, positions = [str(value) for value in dataset["checkpoint"].values], None
    if "step" in dataset.coords:
        positions = dataset["step"].values.astype(np.float64)
    at = np.arange(len(ticks), dtype=np.float64) if positions is None else positions
    for number, (label, curve) in enumerate(curves):
        _draw_curve(ax, at, curve, f"C{number}", label)
    if positions is None:
        every = max(1, len(ticks) // 12)
        ax.set_xticks(at[::every], ticks[::every], rotation=30, ha="right")
    ax.set(
        xlabel="checkpoint" if positions is None else "step",
        ylabel="LLC",
        title="LLC over checkpoints",
    )
    _legend(ax)
    return ax


def _draw_curve(
    ax: Axes, at: NDArray[np.float64], curve: xr.Dataset, color: str, label: str
) -> None:
    llc = curve["llc"].values.astype(np.float64)
    reach = np.abs(
        np.stack([llc - curve["interval_low"].values, curve["interval_high"].values - llc])
    )
    ax.errorbar(
        at, llc, np.nan_to_num(reach), color=color, lw=1.2, elinewidth=1, capsize=2, label=label
    )
    missing = ~np.isfinite(llc)
    if missing.any():
        low, edge = np.zeros(missing.sum()), ax.get_xaxis_transform()
        told = _once(ax, NO_NUMBER)
        ax.plot(at[missing], low, "x", color=color, transform=edge, clip_on=False, label=told)
    verdicts = curve["verdict"].values.astype(str)
    for name, (marker, warning, meaning) in MARKS.items():
        found = np.isfinite(llc) & (verdicts == name)
        if not found.any():
            continue
        open_ = name != "CONVERGED"
        ax.scatter(
            at[found],
            llc[found],
            marker=marker,
            s=52 if open_ else 22,
            facecolors="none" if open_ else color,
            edgecolors=warning if open_ else color,
            label=_once(ax, meaning) if open_ else None,
            zorder=3,
        )


def _once(ax: Axes, text: str) -> str | None:
    """What a mark means, unless it is said already."""
    return None if text in ax.get_legend_handles_labels()[1] else text


def _curves(dataset: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    """Each combination of the dimensions beside the checkpoints, and its label."""
    others = [str(dim) for dim in dataset["llc"].dims if dim != "checkpoint"]
    for index in np.ndindex(*(dataset.sizes[dim] for dim in others)):
        chosen = dict(zip(others, index, strict=True))
        named = [str(dataset[d].values[i]) for d, i in chosen.items() if dataset.sizes[d] > 1]
        yield ", ".join(named), dataset.isel(chosen)


def norms(run: Run) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """What was recorded of the norms and the distance, (chain, draw)."""
    stats = group(run.inference_data, "sample_stats")
    for name, home in (("distance", run.posterior), *((name, stats) for name in NORMS)):
        if name in home and home[name].size and (home[name].values > 0).any():
            yield name, np.asarray(home[name].values, np.float64)


def _chains(run: Run, values: NDArray[Any]) -> Iterator[tuple[int, str, str, NDArray[Any]]]:
    """Chain, label, line style and values of each row; dispersed starts are dashed."""
    dispersed = run.manifest.config.init == "dispersed"
    for chain, line in zip(run.posterior["chain"].values.tolist(), values, strict=True):
        yield chain, f"chain {chain}", "--" if dispersed and chain % 2 else "-", line


def _color(chain: int) -> str:
    return f"C{chain % 10}"


def _thinned(line: NDArray[Any], lines: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Positions and values: all, or of each bin its least and its largest in their order."""
    size = max(LEAST_POINTS, POINTS // max(lines, 1) // 2 * 2)
    if len(line) <= size:
        return np.arange(len(line)), np.asarray(line, np.float64)
    edges = np.linspace(0, len(line), size // 2 + 1).astype(int)
    picked = [
        start + extreme
        for start, stop in pairwise(edges)
        for extreme in sorted({int(np.argmin(line[start:stop])), int(np.argmax(line[start:stop]))})
    ]
    at = np.unique([0, *picked, len(line) - 1])
    return at, np.asarray(line, np.float64)[at]


def _name_extremes(ax: Axes, last: NDArray[np.float64], chains: tuple[int, ...]) -> None:
    """The chains that end highest and lowest, by number, where a legend would be too long."""
    if len(last) < NAMED:
        return
    for row, side in ((int(np.argmax(last)), "bottom"), (int(np.argmin(last)), "top")):
        end = ax.get_xlim()[1], float(last[row])
        text = f"chain {chains[row]}"
        ax.annotate(text, end, ha="right", va=side, fontsize="small", color="black")


def _settled(running: NDArray[np.float64], se: float) -> tuple[float, float]:
    """Bounds for the eye, without the wild first tenth."""
    late = running[:, running.shape[1] // 10 :]
    mean = float(running[:, -1].mean())
    reach = 3 * se if np.isfinite(se) else 0.0
    low, high = min(late.min(), mean - reach), max(late.max(), mean + reach)
    margin = 0.1 * max(float(high - low), 1e-12)
    return float(low - margin), float(high + margin)


def _autocorrelation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each chain, (chain, lag), by FFT; zeros where nothing varies."""
    draws = values.shape[1]
    if not values.size:
        return np.zeros_like(values)
    moved = values - values.mean(axis=1, keepdims=True)
    power = np.abs(np.fft.rfft(moved, n=2 * draws, axis=1)) ** 2
    covariance = np.fft.irfft(power, axis=1)[:, :draws]
    first = covariance[:, :1]
    return np.asarray(covariance / np.where(first > 0, first, 1.0))


def _fallen(found: NDArray[np.float64]) -> int:
    """Lags to show: three times as far as the slowest chain's falls to a tenth; at least 20."""
    draws = found.shape[1]
    low = found < 0.1
    slowest = max((int(np.argmax(row)) if row.any() else draws for row in low), default=draws)
    return int(min(draws, max(20, 3 * slowest)))


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    axes: Axes = Figure(figsize=(6.4, 3.8), layout="constrained").subplots()
    return axes


def _legend(ax: Axes) -> None:
    """A legend for a few lines; for many it would cover the picture."""
    handles, labels = ax.get_legend_handles_labels()
    if ax.containers:  # curves before what their marks mean
        pairs = sorted(zip(handles, labels, strict=True), key=lambda pair: pair[1] in MEANINGS)
        handles, labels = [h for h, _ in pairs], [label for _, label in pairs]
    if 0 < len(handles) <= NAMED:
        ax.legend(handles, labels, fontsize="small", framealpha=0.6, ncols=2)
