"""What a figure is of: a run, a sweep's table or a heatmap, from what the user has in hand.

A path is opened. What cannot be drawn is named, with what can.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import xarray as xr

from distsampler.analysis.heatmap import Heatmap
from distsampler.analysis.run import Run
from distsampler.errors import ConfigError
from distsampler.sweeps.results import Sweep, open_sweep

Store = str | Path


class HasHeatmap(Protocol):
    """A calibration, which may have sampled the LLC over lr and nbeta."""

    @property
    def heatmap(self) -> Heatmap | None: ...  # noqa: D102 (the class says it)


def run_of(subject: Run | Store) -> Run:
    """Return the run to draw: as it is, or opened from its store."""
    if isinstance(subject, Run):
        return subject
    if isinstance(subject, str | Path):
        return Run(subject)
    if isinstance(subject, Sweep):
        cells = [cell.name for cell in subject.cells]
        raise ConfigError(
            f"this figure is of one run, and {subject!r} holds one in each cell: give a cell's, "
            f"sweep.run({cells[0]!r}), or draw all with plot_llc_curve(sweep)"
        )
    raise ConfigError(f"this figure is of a run, or of its store: got {type(subject).__name__}")


def table_of(subject: Sweep | xr.Dataset | Store) -> xr.Dataset:
    """Return the table of a sweep to draw: as it is, collected, or opened from its store."""
    if isinstance(subject, xr.Dataset) and {"llc", "verdict"} <= set(subject.data_vars):
        return subject
    if isinstance(subject, Sweep):
        return subject.collect()
    if isinstance(subject, str | Path):
        return open_sweep(subject).collect()
    hint = "; plot_running_llc draws the LLC along a run" if isinstance(subject, Run) else ""
    raise ConfigError(
        "this figure is of a sweep, of its store, or of the table that sweep.collect() gives: got "
        f"{type(subject).__name__}{hint}"
    )


def heatmap_of(subject: Heatmap | HasHeatmap | Sweep | xr.Dataset | Store) -> Heatmap:
    """Return the heatmap to draw: as it is, of a calibration, or of a sweep over lr and nbeta."""
    heatmap = getattr(subject, "heatmap", subject)
    if isinstance(heatmap, Heatmap):
        return heatmap
    if heatmap is None:
        raise ConfigError("this calibration sampled no heatmap: ask for it, with heatmap=True")
    if not isinstance(subject, Sweep | xr.Dataset | str | Path):
        raise ConfigError(
            "this figure is of a calibration, or of a sweep over lr and nbeta: got "
            f"{type(subject).__name__}"
        )
    table = table_of(subject)
    grids = dict(heatmaps(table))
    if len(grids) == 1:
        return next(iter(grids.values()))
    if grids:
        raise ConfigError(
            f"this figure is of one heatmap, and the sweep has {len(grids)}: {', '.join(grids)}; "
            "choose one: sweep.collect().sel(checkpoint=...)"
        )
    settings = ", ".join(str(name) for name in np.atleast_1d(table["setting"].values))
    raise ConfigError(
        "a heatmap needs a sweep whose settings are a grid of lr and nbeta, each lr with each "
        f"nbeta: the settings here are {settings}"
    )


def heatmaps(dataset: xr.Dataset) -> Iterator[tuple[str, Heatmap]]:
    """Yield the LLC over lr and nbeta at every checkpoint whose settings are such a grid."""
    if "setting" not in dataset["llc"].dims:
        return
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
