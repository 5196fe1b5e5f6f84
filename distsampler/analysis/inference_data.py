"""Trace -> InferenceData: the one place that knows ArviZ's two data models.

ArviZ 0.23 has ``InferenceData``; 1.x uses ``xarray.DataTree``. Both are made from the same xarray
Datasets, so that nothing above this file can tell them apart.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from distsampler.analysis.arviz_bridge import InferenceData, container
from distsampler.draws import Variable, WideVariable
from distsampler.errors import StoreError
from distsampler.seeding import probe_rows
from distsampler.store.large_arrays import AGAIN as AGAIN_LARGE
from distsampler.store.large_arrays import WEIGHTS
from distsampler.store.trace import AGAIN, CONSTANTS, Trace
from distsampler.store.zarr_arrays import CHUNK, GROUPS, WARMUP, missing_in

ROWS = 4 * CHUNK[0]  # chains that are read at a time


def build(trace: Trace) -> InferenceData:
    """The run as arviz.InferenceData (0.23) or xarray.DataTree (1.x).

    The posterior is a rectangle: the draws after burn-in that every chain has, and the chains that
    were not retired. Those left out are named in the attribute ``lost_chains``.

    Raises:
        StoreError: if a committed draw is missing or damaged.
    """
    groups = datasets(trace)
    attrs = {
        "config": trace.manifest.config.model_dump_json(),
        "status": trace.manifest.status,
        "lost_chains": json.dumps(trace.manifest.retired),
    }
    return container(groups, attrs)


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


def unread(trace: Trace, draws: int | None = None) -> dict[str, xr.Dataset]:
    """The groups behind burn-in, and the constants; a variable is read when it is asked for.

    What is cut out of one, every tenth draw say, is read chunk by chunk: memory holds what was
    asked for, and not the trace. A missing or damaged draw is a StoreError when it is met.

    Args:
        trace: of the run.
        draws: only so many after burn-in; None: all that every chain has.
    """
    kept = trace.kept if draws is None else draws
    start, stop = trace.burn_in, trace.burn_in + kept
    groups: dict[str, xr.Dataset] = {n: _opened(trace, n, start, stop) for n in GROUPS}
    return {**groups, "constant_data": _constants(trace)}


def between(trace: Trace, group: str, start: int, stop: int) -> xr.Dataset:
    """The draws of a group from start to stop, counted from the chains' start.

    Raises:
        StoreError: if one is missing or damaged.
    """
    return _opened(trace, group, start, stop).load()


def _opened(trace: Trace, group: str, start: int, stop: int) -> xr.Dataset:
    """Draws of a group, of which nothing is read yet."""
    variables: dict[str, xr.Variable] = {}
    coords: dict[str, Any] = {"chain": list(trace.chains), "draw": np.arange(stop - start)}
    for variable in trace.manifest.variables:
        if variable.group == group:
            values = indexing.LazilyIndexedArray(_Stored(trace, variable, start, stop))
            dims = ("chain", "draw", *variable.dims)
            variables[variable.name] = xr.Variable(dims, values, {"long_name": variable.meaning})
            coords |= {d: np.arange(s) for d, s in zip(variable.dims, variable.shape, strict=True)}
    return xr.Dataset(variables, coords=coords)


class _Stored(BackendArray):
    """Committed draws of one variable, as xarray reads them.

    Args:
        trace: of the run.
        variable: to read.
        start: the first draw, counted from the chains' start.
        stop: behind the last.
    """

    def __init__(self, trace: Trace, variable: Variable, start: int, stop: int) -> None:
        self._trace, self._variable, self._start = trace, variable, start
        self._chains = np.array(trace.chains, np.int64)
        self.shape = (len(self._chains), stop - start, *variable.shape)
        self.dtype = np.dtype(variable.dtype)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:  # noqa: ANN401 (as xarray has it)
        """Reads a selection."""
        support = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """Values by integers and slices, a few chunks at a time put where they belong."""
        draws = np.atleast_1d(np.arange(self.shape[1])[key[1]])
        found = np.empty((self.shape[0], len(draws), *self.shape[2:]), self.dtype)
        for low in range(0, self.shape[1], CHUNK[1]):
            columns = _span((draws >= low) & (draws < low + CHUNK[1]))
            for top in range(0, int(self._chains.max(initial=-1)) + 1, ROWS):
                rows = _span((self._chains >= top) & (self._chains < top + ROWS))
                if draws[columns].size and self._chains[rows].size:
                    found[rows, columns] = self._values(self._chains[rows], draws[columns])
        within = 0 if isinstance(key[1], int | np.integer) else slice(None)
        return np.asarray(found[(key[0], within, *key[2:])])

    def _values(self, chains: NDArray[np.int64], draws: NDArray[np.int64]) -> NDArray[Any]:
        """Of some chains at some draws, both rising and close together.

        Raises:
            StoreError: if one is missing or damaged.
        """
        group, name = self._variable.group, self._variable.name
        top, first, last = chains[0], int(draws[0]), int(draws[-1])
        values = self._trace.between(
            group, name, self._start + first, self._start + last + 1, slice(top, chains[-1] + 1)
        )
        if len(values) > len(chains):
            values = values[chains - top]
        if values.shape[1] <= last - first or missing_in(values).any():
            raise StoreError(
                f"{self._trace.path}: {group}/{name} lacks draws that were committed: a file "
                f"of the run directory is missing or old; {AGAIN}"
            )
        return values[:, draws - first]


def _span(wanted: NDArray[np.bool_]) -> slice:
    """Where the wanted ones lie, which are neighbours."""
    places = np.flatnonzero(wanted)
    return slice(places[0], places[-1] + 1) if places.size else slice(0, 0)


def _constants(trace: Trace) -> xr.Dataset:
    """Numbers and losses; the gradient variance, as large as the model, stays in the store."""
    arrays: dict[str, object] = dict(trace.numbers())
    for name in ("probe_losses", "init_losses"):
        values = trace.constant(name)
        if values is not None:
            arrays[name] = (CONSTANTS[name], values)
    return xr.Dataset(arrays)


def wide(trace: Trace) -> dict[str, xr.DataArray]:
    """Each wide variable of a run, dims (chain, draw, ...); nothing is read yet."""
    return {variable.name: _opened_large(trace, variable) for variable in trace.manifest.wide}


def weights(trace: Trace) -> xr.Dataset:
    """The saved weights by the parameters' names, each (chain, draw, *shape)."""
    prefix = f"{WEIGHTS}/"
    saved = [v for v in trace.manifest.wide if v.name.startswith(prefix)]
    return xr.Dataset({v.name.removeprefix(prefix): _opened_large(trace, v) for v in saved})


def _opened_large(trace: Trace, variable: WideVariable) -> xr.DataArray:
    values = _Committed(trace, variable)
    draws = [variable.draw(row) - trace.burn_in for row in values.rows]
    coords: dict[str, Any] = {"chain": list(trace.chains), "draw": draws}
    coords |= {d: np.arange(s) for d, s in zip(variable.dims, variable.shape, strict=True)}
    if "example" in coords:
        coords["example"] = _examples(trace)
    dims = ("chain", "draw", *variable.dims)
    lazy = xr.Variable(dims, indexing.LazilyIndexedArray(values), {"long_name": variable.meaning})
    return xr.DataArray(lazy, coords=coords, name=variable.name)


def _examples(trace: Trace) -> NDArray[np.int64]:
    """The rows of the data that are the probe."""
    config, facts = trace.manifest.config, trace.facts()
    if facts is None:
        raise StoreError(f"{trace.path} holds no draw yet: the run has only been started")
    return probe_rows(config.seed, facts.n, config.probe)


class _Committed(BackendArray):
    """The committed part of an array, as xarray reads it.

    Args:
        trace: of the run.
        variable: to read.
    """

    def __init__(self, trace: Trace, variable: WideVariable) -> None:
        self._arrays, self._variable = trace.wide, variable
        self._chains = np.array(trace.chains, np.int64)
        first = variable.saved(trace.burn_in)
        self.rows = range(first, variable.saved(trace.burn_in + trace.kept))
        self.shape = (len(self._chains), len(self.rows), *variable.shape)
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:  # noqa: ANN401 (as xarray has it)
        """Reads a selection."""
        support = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """Values by integers, slices and 1-d arrays of integers, one a dimension.

        Raises:
            StoreError: if one is missing or damaged.
        """
        chains, rows = self._chains[key[0]], np.asarray(self.rows)[key[1]]
        array = self._arrays.array(self._variable)
        try:
            values = np.asarray(array.oindex[(chains, rows, *key[2:])])
        except Exception as error:  # zarr and its codecs raise what they like
            raise self._fault(chains, rows) from error
        if np.isnan(values).any():
            raise self._fault(chains, rows)
        return values

    def _fault(self, chains: NDArray[Any], rows: NDArray[Any]) -> StoreError:
        """Names the first chunk that is not whole."""
        arrays, variable = self._arrays, self._variable
        for chain in np.atleast_1d(chains):
            whole = arrays.whole(variable, int(chain), int(np.max(rows)) + 1)
            if whole <= np.max(rows):
                where = arrays.place(variable, int(chain), whole)
                return StoreError(
                    f"{where} is missing or damaged: it holds {variable.name} of chain {chain} at "
                    f"draw {variable.draw(whole)}, which was committed; {AGAIN_LARGE}"
                )
        return StoreError(f"{arrays.place(variable, 0, 0)} could not be read; {AGAIN_LARGE}")
