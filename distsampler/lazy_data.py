"""Trace -> DataArrays that are read when used: what is too large for InferenceData.

Chains and draws are those of the posterior. What is missing or damaged below the committed draws is
an error when it is read, never a value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from distsampler.draws import WideVariable
from distsampler.errors import StoreError
from distsampler.seeding import probe_rows
from distsampler.trace import Trace
from distsampler.wide import AGAIN, WEIGHTS


def wide(trace: Trace) -> dict[str, xr.DataArray]:
    """Each wide variable of a run, dims (chain, draw, ...); nothing is read yet."""
    return {variable.name: _opened(trace, variable) for variable in trace.manifest.wide}


def weights(trace: Trace) -> xr.Dataset:
    """The saved weights by the parameters' names, each (chain, draw, *shape)."""
    prefix = f"{WEIGHTS}/"
    saved = [v for v in trace.manifest.wide if v.name.startswith(prefix)]
    return xr.Dataset({v.name.removeprefix(prefix): _opened(trace, v) for v in saved})


def _opened(trace: Trace, variable: WideVariable) -> xr.DataArray:
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
    if "n" not in facts:
        raise StoreError(f"{trace.path} holds no draw yet: the run has only been started")
    return probe_rows(config.seed, int(facts["n"]), config.probe)


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
                    f"draw {variable.draw(whole)}, which was committed; {AGAIN}"
                )
        return StoreError(f"{arrays.place(variable, 0, 0)} could not be read; {AGAIN}")
