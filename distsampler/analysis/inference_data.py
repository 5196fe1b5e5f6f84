"""The draws of a store as xarray has them: read when they are asked for, and checked as they are.

The posterior is a rectangle: the draws after burn-in that every chain has, and the chains that were
not retired. A missing or damaged draw is a StoreError when it is met.
"""

import json
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from distsampler.analysis.arviz_bridge import InferenceData, container
from distsampler.draws import NOT_COUNTED, Variable, WideVariable
from distsampler.errors import StoreError
from distsampler.seeding import probe_rows
from distsampler.store.constants import DIMS, probe_array
from distsampler.store.files import damaged
from distsampler.store.large_arrays import PROBES, WEIGHTS
from distsampler.store.manifest import MANIFEST
from distsampler.store.reader import ZARR, TraceReader
from distsampler.store.zarr_arrays import GROUPS, WARMUP


def build(trace: TraceReader) -> InferenceData:
    """Return the run as arviz.InferenceData (0.23) or xarray.DataTree (1.x).

    The chains left out of the posterior are named in the attribute ``lost_chains``.
    """
    attrs = {
        "config": trace.manifest.config.model_dump_json(),
        "status": trace.manifest.status,
        "lost_chains": json.dumps(trace.manifest.retired),
    }
    return container(datasets(trace), attrs)


def datasets(trace: TraceReader) -> dict[str, xr.Dataset]:
    """Return all groups of the run, read: the posterior's, the warm-up's, the constants."""
    groups = {name: data.load() for name, data in lazy_groups(trace).items()}
    constants = groups.pop("constant_data")
    early = min([trace.burn_in, *(trace.committed[chain] for chain in trace.chains)])
    if early:
        groups |= {WARMUP + name: between(trace, name, 0, early) for name in GROUPS}
    return {**groups, "constant_data": constants}


def lazy_groups(trace: TraceReader, draws: int | None = None) -> dict[str, xr.Dataset]:
    """Return the groups after burn-in, and the constants; a variable is read when it is used.

    ``draws`` counts those after burn-in; None: all that every chain has.
    """
    start, kept = trace.burn_in, trace.kept if draws is None else draws
    groups = {str(name): _lazy_group(trace, name, start, start + kept) for name in GROUPS}
    return {**groups, "constant_data": _constants(trace)}


def between(trace: TraceReader, group: str, start: int, stop: int) -> xr.Dataset:
    """Return the draws of a group from start to stop, counted from the chains' start."""
    return _lazy_group(trace, group, start, stop).load()


def wide(trace: TraceReader) -> dict[str, xr.DataArray]:
    """Return each wide variable of a run, dims (chain, draw, ...); nothing is read yet."""
    return {variable.name: _lazy_wide(trace, variable) for variable in trace.manifest.wide}


def weights(trace: TraceReader) -> xr.Dataset:
    """Return the saved weights by the parameters' names, each (chain, draw, *shape)."""
    saved = {v.name: v for v in trace.manifest.wide if v.name.startswith(f"{WEIGHTS}/")}
    return xr.Dataset(
        {n.removeprefix(f"{WEIGHTS}/"): _lazy_wide(trace, v) for n, v in saved.items()}
    )


class CommittedArray(BackendArray):
    """Committed values of some rows of a variable, as xarray reads them."""

    def __init__(self, trace: TraceReader, variable: Variable | WideVariable, rows: range) -> None:
        self._trace, self._variable = trace, variable
        self._chains, self._rows = _chains(trace), np.array(rows, np.int64)
        self.shape = (len(self._chains), len(rows), *variable.shape)
        self.dtype = np.dtype(variable.dtype)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:  # noqa: ANN401 (as xarray has it)
        """Read a selection."""
        support = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """Values by integers, slices and 1-d arrays of integers, one a dimension."""
        chains, rows = self._chains[key[0]], self._rows[key[1]]
        values = self._trace.rows(self._variable).read(chains, rows, key[2:])
        return _counted(values) if self._variable.dims[-1:] == ("token",) else values


class ConstantArray(BackendArray):
    """Constants of a named probe, read when they are used."""

    def __init__(self, trace: TraceReader, name: str, shape: tuple[int, ...], kind: str) -> None:
        self._trace, self._name = trace, name
        self.shape, self.dtype = shape, np.dtype(kind)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:  # noqa: ANN401 (as xarray has it)
        """Read a selection."""
        support = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        values = self._trace.constants.array(self._name)
        if values is None or values.shape != self.shape:
            got = "none" if values is None else f"one of shape {values.shape}"
            where = self._trace.files.path(f"{ZARR}/constant_data")
            raise damaged(where, f"it must hold {self._name} of shape {self.shape}, got {got}")
        selected: NDArray[Any] = _counted(values.astype(self.dtype))[key]
        return selected


def _counted(values: NDArray[Any]) -> NDArray[Any]:
    """The values; of losses, NaN where a token does not count."""
    if values.dtype.kind != "f":
        return values
    counted: NDArray[Any] = np.where(values == NOT_COUNTED, np.array(np.nan, values.dtype), values)
    return counted


def _lazy(trace: TraceReader, variable: Variable | WideVariable, rows: range) -> xr.Variable:
    values = indexing.LazilyIndexedArray(CommittedArray(trace, variable, rows))
    return xr.Variable(("chain", "draw", *variable.dims), values, {"long_name": variable.meaning})


def _chains(trace: TraceReader) -> NDArray[np.int64]:
    return np.array(trace.chains, np.int64)


def _coords(variable: Variable | WideVariable) -> dict[str, NDArray[np.int64]]:
    return {dim: np.arange(size) for dim, size in zip(variable.dims, variable.shape, strict=True)}


def _lazy_group(trace: TraceReader, group: str, start: int, stop: int) -> xr.Dataset:
    """Draws of a group, of which nothing is read yet."""
    coords: dict[str, Any] = {"chain": _chains(trace), "draw": np.arange(stop - start)}
    named = [variable for variable in trace.manifest.variables if variable.group == group]
    for variable in named:
        coords |= _coords(variable)
    return xr.Dataset({v.name: _lazy(trace, v, range(start, stop)) for v in named}, coords=coords)


def _lazy_wide(trace: TraceReader, variable: WideVariable) -> xr.DataArray:
    """A wide variable at the draws of the posterior that have it."""
    burn_in = trace.burn_in
    rows = range(variable.saved(burn_in), variable.saved(burn_in + trace.kept))
    coords: dict[str, Any] = {
        "chain": _chains(trace),
        "draw": np.array([variable.draw(row) - burn_in for row in rows], np.int64),
        **_coords(variable),
    }
    if variable.name.startswith(f"{PROBES}/"):
        coords |= _of_probe(trace, variable)
    elif "example" in coords:  # the rows of the data that are the probe
        config, facts = trace.manifest.config, trace.facts()
        if facts is None:
            raise StoreError(f"{trace.files} holds no draw yet: the run has only been started")
        coords["example"] = probe_rows(config.seed, facts.rows, config.probe)
        if variable.shape != (len(coords["example"]),):
            why = f"{variable.name} has the shape {variable.shape} a draw, not one value an example"
            raise damaged(trace.files.path(MANIFEST), why)
    return xr.DataArray(_lazy(trace, variable, rows), coords=coords, name=variable.name)


def _of_probe(trace: TraceReader, variable: WideVariable) -> dict[str, Any]:
    """The coordinates of a named probe's losses; only those of its dimensions are read."""
    probe, constants = variable.name.removeprefix(f"{PROBES}/"), trace.constants
    rows = constants.array(probe_array(probe, "rows"))
    tokens = constants.array(probe_array(probe, "tokens"))
    if rows is None:
        raise StoreError(f"{trace.files} holds no draw yet: the run has only been started")
    lazy = {"losses_at_anchor": ("losses", "float64")}
    if probe_array(probe, "token_ids") in constants:
        lazy["token_ids"] = ("token_ids", "int64")
    coords: dict[str, Any] = {"example": rows} | ({} if tokens is None else {"token": tokens})
    for name, (field, kind) in lazy.items():
        array = ConstantArray(trace, probe_array(probe, field), variable.shape, kind)
        coords[name] = (variable.dims, indexing.LazilyIndexedArray(array))
    return coords


def _constants(trace: TraceReader) -> xr.Dataset:
    """Numbers and losses; the gradient variance, as large as the model, stays in the store."""
    arrays: dict[str, object] = dict(trace.constants.numbers())
    for name in ("probe_losses", "init_losses"):
        values = trace.constants.array(name)
        if values is not None:
            arrays[name] = (DIMS[name], values)
    return xr.Dataset(arrays)
