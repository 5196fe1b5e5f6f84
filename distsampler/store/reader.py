"""The one way to open a run directory and to read it; what is damaged is an error, never a value.

A draw exists if and only if the counts say so: they are written last, after the state behind the
draw and the draw itself. All that lies beyond them is what an interrupted commit left.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from distsampler.config import RunConfig
from distsampler.draws import Variable, WideVariable
from distsampler.errors import StoreError
from distsampler.facts import Facts
from distsampler.schedule import Schedule
from distsampler.store import events, manifest
from distsampler.store.constants import Constants
from distsampler.store.files import Files, as_files, damaged
from distsampler.store.large_arrays import WideArrays
from distsampler.store.zarr_arrays import NarrowArrays
from distsampler.store.zarr_files import Index, StoredRows, ZarrFiles, array_of, missing_in

ZARR, COUNTS = "trace.zarr", "n_committed"


class TraceReader:
    """A run directory, for reading.

    Args:
        store: the run directory: its path or URL, or its files.

    Raises:
        StoreError: if it is no run directory, or damaged.
    """

    def __init__(self, store: str | Path | Files) -> None:
        self.files = as_files(store)
        self.manifest = manifest.read(self.files)
        try:
            self._root = zarr.open_group(ZarrFiles(self.files, ZARR), mode="r+", zarr_format=3)
        except Exception as error:  # zarr raises what it likes
            raise damaged(self.files.path(f"{ZARR}/zarr.json"), error) from error
        self.constants = Constants(self._root)
        self.narrow = NarrowArrays(self._root, self.manifest.variables, self._warmup_draws())
        self.wide = WideArrays(self.files, self.manifest.wide)
        self._committed = self._counts()

    @property
    def path(self) -> str:
        """Where the run directory is, for people."""
        return str(self.files)

    @property
    def committed(self) -> tuple[int, ...]:
        """Draws of each chain that exist, burn-in included."""
        return tuple(self._committed)

    @property
    def ends(self) -> tuple[int, ...]:
        """Draws of each chain that count, burn-in included: to the end of a run that was sealed."""
        if self.manifest.kept is None:
            return self.committed
        return tuple(min(count, self.burn_in + self.manifest.kept) for count in self._committed)

    @property
    def burn_in(self) -> int:
        """Draws before the posterior.

        Where the run chooses them: as chosen at the last gate round; before the first, half of
        what there is.
        """
        planned = Schedule.of(self.manifest.config).burn_in
        if planned is not None:
            return planned
        chosen = self.manifest.burn_in
        return self._in_all_chains // 2 if chosen is None else chosen

    @property
    def kept(self) -> int:
        """Draws after burn-in that all chains of the posterior have."""
        if self.manifest.kept is not None:
            return self.manifest.kept
        return max(0, self._in_all_chains - self.burn_in)

    @property
    def chains(self) -> tuple[int, ...]:
        """Chains of the posterior: all but the retired."""
        retired = self.manifest.retired
        return tuple(c for c in range(self.manifest.config.chains) if c not in retired)

    def events(self) -> list[dict[str, Any]]:
        """Return all whole lines of events.jsonl, the oldest first."""
        return events.read(self.files)

    def facts(self) -> Facts | None:
        """Return what was known before the first draw; None while it is not recorded.

        Raises:
            StoreError: if it is damaged.
        """
        return self.constants.facts(self.manifest)

    def values(
        self,
        variable: Variable | WideVariable,
        chains: Index,
        rows: Index,
        inside: tuple[Any, ...] = (),
    ) -> NDArray[Any]:
        """Return committed values of a variable; memory holds what is asked for, and a few chunks.

        Args:
            variable: the variable.
            chains: index or indices of chains.
            rows: position or positions along the draws, counted from the chains' start; of a wide
                variable along the draws that have it.
            inside: an index of each further dimension.

        Raises:
            StoreError: if one is missing or damaged; it names the file.
        """
        values = self._select(variable, chains, rows, inside)
        if missing_in(values).any():
            raise self._damage(variable, chains, rows)
        return values

    def by_chain(
        self, name: str, chains: Sequence[int], start: int = 0
    ) -> dict[int, NDArray[np.float64]]:
        """Return the draws of each chain, as many as it has, of a scalar of the posterior.

        Args:
            name: name of the variable.
            chains: indices of chains; those without draws are left out.
            start: the first draw, counted from the chains' start.

        Raises:
            StoreError: if one is missing or damaged; it names the file.
        """
        sizes = {chain: self.ends[chain] - start for chain in chains if self.ends[chain] > start}
        if not sizes:
            return {}
        (variable,) = (v for v in self.manifest.variables if v.name == name)
        draws = np.arange(start, start + max(sizes.values()))
        values = self._select(variable, np.array(list(sizes)), draws).astype(np.float64)
        series = {c: row[:size] for row, (c, size) in zip(values, sizes.items(), strict=True)}
        for chain, each in series.items():
            if missing_in(each).any():
                raise self._damage(variable, chain, draws[: len(each)])
        return series

    def read(self, group: str, name: str) -> NDArray[Any]:
        """Return all values of one variable as they are stored, beyond what is committed too."""
        return np.asarray(array_of(self._root, f"{group}/{name}")[:])

    def _rows(self, variable: Variable | WideVariable) -> StoredRows:
        if isinstance(variable, WideVariable):
            return self.wide.rows(variable)
        return self.narrow.rows(variable)

    def _select(
        self,
        variable: Variable | WideVariable,
        chains: Index,
        rows: Index,
        inside: tuple[Any, ...] = (),
    ) -> NDArray[Any]:
        """Values as they are stored."""
        stored = self._rows(variable)
        try:
            return stored.select(chains, rows, inside)
        except Exception as error:  # zarr and its codecs raise what they like
            raise self._damage(variable, chains, rows) from error

    def _damage(self, variable: Variable | WideVariable, chains: Index, rows: Index) -> StoreError:
        """The error that names the first chunk that is not whole."""
        wanted, stored = [0] * self.manifest.config.chains, self._rows(variable)
        for chain in np.atleast_1d(chains):
            wanted[chain] = int(np.max(rows, initial=-1)) + 1
        whole = stored.whole(wanted)
        for chain, row in enumerate(whole):
            if row < wanted[chain]:
                draw = variable.draw(row) if isinstance(variable, WideVariable) else row
                what = f"{variable.name} of chain {chain} at draw {draw}"
                return damaged(stored.place(chain, row), f"it holds {what}, which was committed")
        return damaged(stored.place(0, 0), "it could not be read")

    @property
    def _in_all_chains(self) -> int:
        """Draws that every chain of the posterior has, burn-in included."""
        return min((self._committed[chain] for chain in self.chains), default=0)

    def _warmup_draws(self) -> int:
        """Draws that lie in the warm-up groups: all, until a burn-in that is chosen is written."""
        if self.manifest.kept is not None and self.manifest.burn_in is not None:
            return self.manifest.burn_in
        return sizes(self.manifest.config)[0]

    def _counts(self) -> list[int]:
        """As the trace and, where it is damaged or behind, the manifest say: both are true."""
        repeated = self.manifest.n_committed
        try:
            counts = np.asarray(array_of(self._root, COUNTS)[:])
        except Exception:  # zarr and its codecs raise what they like
            return list(repeated)
        return [max(int(a), b) for a, b in zip(counts, repeated, strict=True)]


def sizes(config: RunConfig) -> tuple[int, int]:
    """Return the draws of the warm-up groups and of the posterior's while a run runs.

    A burn-in that is yet to be chosen may be any: all draws are warm-up until it is written out.
    """
    schedule = Schedule.of(config)
    if schedule.burn_in is None:
        return schedule.budget, 0
    return schedule.burn_in, schedule.budget
