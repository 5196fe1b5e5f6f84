"""Trace -> InferenceData: the one place that knows ArviZ's two data models.

ArviZ 0.23 has ``InferenceData``; 1.x uses ``xarray.DataTree``. Both are made from the same xarray
Datasets, so that nothing above this file can tell them apart.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
import xarray as xr

from distsampler.arrays import GROUPS, WARMUP, missing_in
from distsampler.errors import StoreError
from distsampler.trace import AGAIN, CONSTANTS, Trace

if TYPE_CHECKING:
    import arviz

InferenceData: TypeAlias = Union["arviz.InferenceData", xr.DataTree]


def arviz_module() -> Any:  # noqa: ANN401 (an untyped module)
    """ArviZ, imported late for its weight, and without the news that 0.23 warns of once a day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "\nArviZ is undergoing", FutureWarning)
        import arviz
    return arviz


def build(trace: Trace) -> InferenceData:
    """The run as arviz.InferenceData (0.23) or xarray.DataTree (1.x).

    The posterior is a rectangle: the draws after burn-in that every chain has, and the chains that
    were not retired. Those left out are named in the attribute ``lost_chains``.

    Raises:
        StoreError: if a committed draw is missing or damaged.
    """
    arviz = arviz_module()
    groups = datasets(trace)
    attrs = {
        "config": trace.manifest.config.model_dump_json(),
        "status": trace.manifest.status,
        "lost_chains": json.dumps(trace.manifest.retired),
    }
    if int(arviz.__version__.partition(".")[0]) < 1:
        warmup = any(name.startswith(WARMUP) for name in groups)
        return arviz.InferenceData(attrs=attrs, save_warmup=warmup, **groups)
    tree = xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
    tree.attrs.update(attrs)
    return tree


def datasets(trace: Trace, draws: int | None = None) -> dict[str, xr.Dataset]:
    """The groups of the run as Datasets in float64.

    Args:
        trace: of the run.
        draws: only so many after burn-in; None: all that every chain has.
    """
    early = min([trace.burn_in, *(trace.committed[chain] for chain in trace.chains)])
    kept = trace.kept if draws is None else draws
    groups: dict[str, xr.Dataset] = {}
    for name in GROUPS:
        groups[name] = between(trace, name, trace.burn_in, trace.burn_in + kept)
    if early:
        for name in GROUPS:
            groups[WARMUP + name] = between(trace, name, 0, early)
    groups["constant_data"] = _constants(trace)
    return groups


def group(data: InferenceData, name: str) -> xr.Dataset:
    """One group of an InferenceData or DataTree, as a Dataset."""
    found: Any = data[name]
    dataset: xr.Dataset = found.to_dataset() if isinstance(found, xr.DataTree) else found
    return dataset


def between(trace: Trace, group: str, start: int, stop: int) -> xr.Dataset:
    """The draws of a group from start to stop, counted from the chains' start.

    Raises:
        StoreError: if one is missing or damaged.
    """
    chains, draws = list(trace.chains), stop - start
    variables, coords = {}, {"chain": chains, "draw": np.arange(draws)}
    for variable in trace.manifest.variables:
        if variable.group != group:
            continue
        values = trace.between(group, variable.name, start, stop)[chains]
        if values.shape[1] < draws or missing_in(values).any():
            raise StoreError(
                f"{trace.path}: {group}/{variable.name} lacks draws that were committed: a file "
                f"of the run directory is missing or old; {AGAIN}"
            )
        dims = ("chain", "draw", *variable.dims)
        variables[variable.name] = xr.DataArray(
            values, dims=dims, attrs={"long_name": variable.meaning}
        )
        coords |= {d: np.arange(s) for d, s in zip(variable.dims, variable.shape, strict=True)}
    return xr.Dataset(variables, coords=coords)


def _constants(trace: Trace) -> xr.Dataset:
    """Numbers and losses; the gradient variance, as large as the model, stays in the store."""
    arrays: dict[str, object] = dict(trace.facts())
    for name in ("probe_losses", "init_losses"):
        values = trace.constant(name)
        if values is not None:
            arrays[name] = (CONSTANTS[name], values)
    return xr.Dataset(arrays)
