"""The one way to open a run directory and to read it; what is damaged is an error, never a value.

A draw exists if and only if the counts say so: they are written last, after the state behind the
draw and the draw itself. All that lies beyond them is what an interrupted commit left.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from distsampler.config import RunConfig
from distsampler.draws import Variable, WideVariable
from distsampler.facts import Facts, Posterior
from distsampler.schedule import Schedule
from distsampler.store import events, manifest
from distsampler.store.constants import Constants
from distsampler.store.files import Files, as_files, damaged
from distsampler.store.large_arrays import WideArrays
from distsampler.store.zarr_arrays import NarrowArrays
from distsampler.store.zarr_files import ZarrFiles, ZarrRows, array_of

ZARR, COUNTS = "trace.zarr", "n_committed"


class TraceReader:
    """A run directory, for reading.

    Args:
        store: the run directory: its path or URL, or its files.

    Raises:
        StoreError: if it is no run directory, or damaged: now, or where a part is read.
    """

    def __init__(self, store: str | Path | Files) -> None:
        self.files = as_files(store)
        self.manifest = manifest.read(self.files)
        try:
            root = ZarrFiles(self.files, ZARR, self.manifest.identity)
            self._root = zarr.open_group(root, mode="r+", zarr_format=3)
        except Exception as error:  # zarr raises what it likes
            raise damaged(self.files.path(f"{ZARR}/zarr.json"), error) from error
        warmup, _ = sizes(self.manifest.config)
        if self.manifest.kept is not None and self.manifest.burn_in is not None:
            warmup = self.manifest.burn_in  # one that was chosen, and written out at the seal
        self.constants = Constants(self._root)
        self.narrow = NarrowArrays(self._root, self.manifest.variables, warmup)
        self.wide = WideArrays(self.files, self.manifest.wide, self.manifest.identity)
        self._committed = self._counts()

    @property
    def committed(self) -> tuple[int, ...]:
        """Draws of each chain that exist, burn-in included."""
        return tuple(self._committed)

    @property
    def ends(self) -> tuple[int, ...]:
        """Draws of each chain that count, burn-in included: to the end of a run that was sealed."""
        if self.manifest.kept is None:
            return self.committed
        end = self.burn_in + self.manifest.kept
        return tuple(min(count, end) for count in self._committed)

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
        """Return what was known before the first draw; None while it is not recorded."""
        numbers = self.constants.numbers()
        if not {"nbeta", "n"} <= set(numbers):
            return None
        decay = self.manifest.config.sampler.options.get("weight_decay", 0.0)
        if not isinstance(decay, int | float):
            where = self.files.path(manifest.MANIFEST)
            raise damaged(where, f"weight_decay must be a number, got {decay!r}")
        posterior = Posterior(numbers["nbeta"], numbers.get("localization", 0.0), float(decay))
        rows = numbers.get("examples")
        examples = None if rows is None else int(rows)
        return Facts(int(numbers["n"]), posterior, numbers.get("lr"), self.manifest.law, examples)

    def rows(self, variable: Variable | WideVariable) -> ZarrRows:
        """Return the rows of a variable: the draws from the chains' start that have it."""
        if isinstance(variable, WideVariable):
            rows = self.wide.rows(variable)
        else:
            rows = self.narrow.rows(variable)
        if rows.chains != self.manifest.config.chains:
            raise damaged(rows.place(0, 0), f"{variable.name} has {rows.chains} chains")
        return rows

    def by_chain(
        self, name: str, chains: Sequence[int], start: int = 0
    ) -> dict[int, NDArray[np.float64]]:
        """Return the draws of a scalar of the posterior, of each chain as many as it has.

        Args:
            name: name of the variable.
            chains: indices of chains; those without draws are left out.
            start: the first draw, counted from the chains' start.
        """
        ends = np.array(self.ends)
        some = np.array([chain for chain in chains if ends[chain] > start], np.int64)
        if not some.size:
            return {}
        variable = next((v for v in self.manifest.variables if v.name == name), None)
        if variable is None:
            raise damaged(self.files.path(manifest.MANIFEST), f"it has no variable {name}")
        draws = np.arange(start, ends[some].max())
        values = self.rows(variable).read(some, draws, ends=ends[some]).astype(np.float64)
        cut = [row[: end - start] for row, end in zip(values, ends[some], strict=True)]
        return dict(zip(some.tolist(), cut, strict=True))

    def read(self, group: str, name: str) -> NDArray[Any]:
        """Return all values of one variable as they are stored, beyond what is committed too."""
        return np.asarray(array_of(self._root, f"{group}/{name}")[:])

    @property
    def _in_all_chains(self) -> int:
        """Draws that every chain of the posterior has, burn-in included."""
        return min((self._committed[chain] for chain in self.chains), default=0)

    def _counts(self) -> list[int]:
        """As the trace and, where it is damaged or behind, the manifest say: both are true."""
        repeated = self.manifest.n_committed
        try:
            counts = np.asarray(array_of(self._root, COUNTS)[:])
        except Exception:  # zarr and its codecs raise what they like
            return list(repeated)
        if counts.shape != (len(repeated),):
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
