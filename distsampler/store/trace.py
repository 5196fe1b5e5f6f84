"""The run directory: zarr trace, manifest, states, events, lease. One driver writes, anybody reads.

A draw exists if and only if the counts say so: they are written last, after the state behind the
draw and the draw itself. All that lies beyond them is what an interrupted commit left.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ZarrUserWarning

from distsampler.config import RunConfig
from distsampler.draws import AtAnchor, DrawBlock, StateFile
from distsampler.errors import StoreError
from distsampler.facts import Facts, Posterior
from distsampler.schedule import Schedule
from distsampler.store import chain_states, events
from distsampler.store import manifest as manifests
from distsampler.store.events import EVENTS, Damaged, DeviceChanged, RunEvent
from distsampler.store.files import TEMPORARY, Files, is_url, refused
from distsampler.store.large_arrays import WIDE, WideArrays
from distsampler.store.manifest import Manifest, RunStatus
from distsampler.store.zarr_arrays import ALL, Draws, ZarrFiles, array_of, codecs

MANIFEST, ZARR = "run.json", "trace.zarr"
OURS = {
    "lease.json",
    "cell.json",
    EVENTS,
    ZARR,
    WIDE,
    "checkpoints",
}  # what a start cut short leaves
CONSTANTS: dict[str, tuple[str, ...]] = {
    "probe_losses": ("probe",),
    "init_losses": ("example",),
    "gradient_variance": ("parameter",),
    "shard_gradients": ("shard", "parameter"),
}
HOP_BIASES = ("hop_bias", "hop_bias_on_all_data")  # relative, of the LLC
AGAIN = (
    "restore it from a copy; or continue the run, which computes what is missing again; or delete "
    "the store and sample again: the same seed gives the same bits"
)
T = TypeVar("T")


class Trace:
    """One run directory.

    Args:
        store: of a directory that ``create`` made: its path, or its files.

    Raises:
        StoreError: if it is no run directory, or damaged.
    """

    def __init__(self, store: str | Path | Files) -> None:
        self.files = as_files(store)
        self.manifest = manifests.read(self.files, MANIFEST)
        config = self.manifest.config
        try:
            self._root = zarr.open_group(ZarrFiles(self.files, ZARR), mode="r+", zarr_format=3)
        except Exception as error:  # zarr raises what it likes
            where = self.files.path(f"{ZARR}/zarr.json")
            raise StoreError(f"{where} cannot be read: {error}; {AGAIN}") from error
        self._draws = Draws(self._root, self.manifest.variables, self._first_draws(config))
        self.wide = WideArrays(self.files, self.manifest.wide)
        self._committed = self._counts()

    @classmethod
    def create(cls, store: str | Path | Files, manifest: Manifest) -> Trace:
        """Makes the run directory of a new run; run.json is written last."""
        files, config = as_files(store), manifest.config
        try:
            root = zarr.create_group(ZarrFiles(files, ZARR), zarr_format=3, overwrite=True)
            root.attrs["config"] = config.model_dump_json()
            burn_in, draws = _sizes(config)
            Draws(root, manifest.variables, burn_in).create(config.chains, draws)
            WideArrays(files, manifest.wide).create(config.chains, Schedule.of(config).total)
            root.create_group("constant_data")
            _make_counts(root, [0] * config.chains)
            manifests.write(files, MANIFEST, manifest)
        except OSError as error:
            raise StoreError(f"the store {files} cannot be written: {error}") from error
        return cls(files)

    @property
    def path(self) -> str:
        """Where it is, for people."""
        return str(self.files)

    @property
    def committed(self) -> tuple[int, ...]:
        """Draws of each chain that exist, burn-in included."""
        return tuple(self._committed)

    @property
    def burn_in(self) -> int:
        """Draws before the posterior.

        Of a run that chooses: as many as it chose when the gate last looked, or, before it has
        looked, half of what there is.
        """
        given = Schedule.of(self.manifest.config).burn_in
        if given is not None:
            return given
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

    def record_facts(self, facts: Facts, at_anchor: AtAnchor) -> None:
        """Write what is known before the first draw, once."""
        numbers = {
            **facts.numbers(),
            "init_loss": at_anchor.init_loss,
            "probe_init_loss": at_anchor.probe_init_loss,
            "init_losses": at_anchor.losses,
            "gradient_variance": at_anchor.gradient_variance,
            "shard_gradients": at_anchor.shard_gradients,
            **dict(zip(HOP_BIASES, at_anchor.hop_bias or (None, None), strict=True)),
            "probe_losses": at_anchor.probe_losses,  # last: where it is, the pass is whole
        }
        given = {name: value for name, value in numbers.items() if value is not None}
        self._writing(lambda: self._put_constants(given))

    def numbers(self) -> dict[str, float]:
        """Return the recorded numbers by name: nbeta, n, init_loss, localization ..."""
        return {
            name: float(self._read_constant(name, array))
            for name, array in self._arrays("constant_data")
            if array.ndim == 0
        }

    def facts(self) -> Facts | None:
        """Return what was known before the first draw; None while it is not recorded.

        Raises:
            StoreError: if it is damaged.
        """
        numbers, options = self.numbers(), self.manifest.config.sampler.options
        if not {"nbeta", "n"} <= set(numbers):
            return None
        decay = float(options.get("weight_decay", 0.0))
        return Facts(
            int(numbers["n"]),
            Posterior(numbers["nbeta"], numbers.get("localization", 0.0), decay),
            numbers.get("lr"),
            self.manifest.law,
        )

    def at_anchor(self) -> AtAnchor | None:
        """The anchor pass as recorded; None before it has been.

        Raises:
            StoreError: if it is damaged.
        """
        probe = self.constant("probe_losses")
        if probe is None:
            return None
        numbers = self.numbers()
        if not {"init_loss", "probe_init_loss", "nbeta", "n"} <= set(numbers):
            where = self.files.path(f"{ZARR}/constant_data")
            raise StoreError(f"{where} lacks a number: a file is missing; {AGAIN}")
        own, law = HOP_BIASES
        return AtAnchor(
            losses=self.constant("init_losses"),
            init_loss=numbers["init_loss"],
            probe_init_loss=numbers["probe_init_loss"],
            probe_losses=probe,
            gradient_variance=self.constant("gradient_variance"),
            shard_gradients=self.constant("shard_gradients"),
            hop_bias=(numbers[own], numbers[law]) if {own, law} <= set(numbers) else None,
        )

    def constant(self, name: str) -> NDArray[Any] | None:
        """One array of the anchor pass; None where there is none.

        Raises:
            StoreError: if it is damaged.
        """
        arrays = dict(self._arrays("constant_data"))
        return self._read_constant(name, arrays[name]) if name in arrays else None

    def commit(self, blocks: Sequence[DrawBlock]) -> None:
        """Makes blocks durable together: states, then draws, then the counts that make them exist.

        Draws that exist already, computed again after a state was lost, are left as they are.

        Raises:
            StoreError: if a block begins beyond where its chain ends, or what is wide of its draws
                was not written before it came.
            StoreFault: if writing fails.
        """
        counts, new = list(self._committed), []
        for block in blocks:
            self.wide.check(block)
            known = counts[block.chain] - block.first_draw
            if known < 0:
                raise StoreError(
                    f"chain {block.chain} must go on at draw {counts[block.chain]}, got a block "
                    f"from {block.first_draw}"
                )
            if block.draws > known:
                new.append(block.after(known))
                counts[block.chain] = block.end
        if new:
            self._writing(lambda: self._commit(new, counts))

    def state(self, chain: int, draw: int | None = None) -> bytes | StateFile | None:
        """The last committed state of a chain that is whole; None at its start.

        A large one is not read: its place is given.

        Args:
            chain: index.
            draw: that it must not lie beyond; None: any.
        """
        upto = self._committed[chain] if draw is None else min(draw, self._committed[chain])
        found = chain_states.newest(self.files, chain, upto)[1]
        if found is None or found.size > self.manifest.config.max_state_mb * 2**20:
            return found
        return chain_states.read(self.files, found.name)

    def restart_points(self) -> tuple[int, ...]:
        """The draw from which each chain can go on: the last where its whole pack has states."""
        found, retired = list[int](), self.manifest.retired
        for pack in self.manifest.config.packs:
            point = self._restart_point([chain for chain in pack if chain not in retired])
            found += [self._restart_point([c]) if c in retired else point for c in pack]
        return tuple(found)

    def _restart_point(self, chains: Sequence[int]) -> int:
        """The last draw at which each of these chains has a whole state."""
        upto = min((self._committed[chain] for chain in chains), default=0)
        while True:
            found = [chain_states.newest(self.files, chain, upto)[0] for chain in chains]
            upto = min(found, default=0)
            if all(draw == upto for draw in found):
                return upto

    def read(self, group: str, name: str) -> NDArray[Any]:
        """All values of one variable, beyond what is committed too.

        Raises:
            StoreError: if a chunk is damaged.
        """
        return self._reading(f"{group}/{name}", lambda: self._draws.read(group, name))

    def between(
        self, group: str, name: str, start: int, stop: int, chains: slice = ALL
    ) -> NDArray[Any]:
        """Draws of one variable, counted from the chains' start, wherever they lie.

        Args:
            group: of the variable.
            name: of the variable.
            start: the first draw.
            stop: behind the last.
            chains: of which chains, retired ones counted.

        Raises:
            StoreError: if a chunk is damaged.
        """
        return self._reading(
            f"{group}/{name}", lambda: self._draws.between(group, name, start, stop, chains)
        )

    def choose_burn_in(self, draws: int) -> None:
        """Notes the burn-in that was chosen at a look."""
        self._update(burn_in=draws)

    def retire(self, chain: int, reason: str) -> None:
        """Takes a chain out of the posterior; its draws stay."""
        self._update(retired={**self.manifest.retired, chain: reason})

    def finished(self, config: RunConfig) -> bool:
        """Whether there is nothing to do for a config: all draws are there, and whole."""
        before = self.manifest
        if before.status != "finished" or before.kept is None or _wants_more(config, before.config):
            return False
        try:
            anchored = self.at_anchor() is not None
        except StoreError:
            return False
        counts = self._counts_to(self.burn_in + before.kept)
        whole = self._intact(counts) == counts and self._draws.fits(before.kept, self.burn_in)
        return anchored and whole

    def reopen(self, config: RunConfig, epoch: int) -> None:
        """Makes a run that was interrupted, damaged or finished ready to go on.

        What was half written is removed. Draws that are damaged count as not committed, with all
        that follow them: they will be computed again, to the same bits.

        Args:
            config: of the run; it may ask for more draws.
            epoch: of the new driver.
        """

        def ready() -> None:
            self.files.sweep()
            try:
                array_of(self._root, "n_committed")[:]
            except Exception:  # zarr and its codecs raise what they like
                _make_counts(self._root, self._committed)
            counts = list(self._committed)
            if self.manifest.kept is not None:  # sealed: what lay beyond was cut off
                counts = self._counts_to(self.burn_in + self.manifest.kept)
            budgets = {Schedule.of(each).budget for each in (config, self.manifest.config)}
            if self.manifest.kept is not None or len(budgets) > 1:
                self._make_room(config)
                self._root.attrs["config"] = config.model_dump_json()
            intact = self._intact(counts)
            if intact != counts:
                self._draws.mend()
                self.log(Damaged(counts, intact))
            if intact != self._committed:
                self._count(intact)
            self.wide.sweep(intact)
            chain_states.sweep(self.files, tuple(intact))
            self._drop_damaged_anchor()

        self._writing(ready)
        self._update(
            status="running",
            reason="",
            kept=None,
            burn_in=None,
            config=config,
            epoch=epoch,
            n_committed=tuple(self._committed),
        )
        burn_in, draws = _sizes(config)
        self._writing(lambda: self._draws.resize(draws, burn_in))
        self._writing(lambda: self.wide.resize(Schedule.of(config).total))

    def record_device(self, device: str) -> None:
        """Notes the device that the chains run on; a run stays on one type.

        Raises:
            StoreError: if it has begun on another type.
        """
        before = self.manifest.fingerprint.get("device")
        if before is None:
            self._update(fingerprint={**self.manifest.fingerprint, "device": device})
        elif _kind(before) != _kind(device):
            raise StoreError(
                f"the run in {self.path} can only be continued as it was started; different are\n"
                f"  device: stored {before!r}, now {device!r}"
            )
        elif before != device:
            self.log(DeviceChanged(before, device))

    def seal(self, status: RunStatus, reason: str, kept: int | None, seconds: float) -> None:
        """Ends the run.

        A burn-in that was chosen is written out: the draws behind it are copied into the posterior
        groups; then the manifest, in one write, makes them count; then the warm-up groups are cut.

        Args:
            status: how it ended.
            reason: why.
            kept: draws that all chains are cut to, a burn-in given by number not counted.
            seconds: that it took.
        """
        ending: dict[str, object] = {"status": status, "reason": reason, "seconds": seconds}
        if kept is None:
            self._update(**ending)
            return
        burn_in, chosen = self.burn_in, None
        if Schedule.of(self.manifest.config).burn_in is None:
            chosen, kept = burn_in, kept - burn_in
            self._writing(lambda: self._draws.split(burn_in, kept))
        self._update(**ending, kept=kept, burn_in=chosen)
        self._writing(lambda: self._draws.resize(kept, burn_in))
        self._writing(lambda: self.wide.resize(burn_in + kept))

    def log(self, event: RunEvent) -> None:
        """Appends an event to events.jsonl."""
        self._writing(lambda: events.append(self.files, event))

    def events(self) -> list[dict[str, Any]]:
        """Return all lines of events.jsonl that are whole."""
        return events.read(self.files)

    def _commit(self, blocks: Sequence[DrawBlock], counts: list[int]) -> None:
        newest = {block.chain: block for block in blocks if block.state}
        for block in newest.values():
            if isinstance(block.state, bytes):
                chain_states.write(self.files, block.chain, block.end, block.state)
        self._draws.write(blocks)
        self._count(counts)
        self._update(n_committed=tuple(counts))
        ends = (0, *Schedule.of(self.manifest.config).round_ends)
        for chain, block in newest.items():
            boundary = max(end for end in ends if end <= block.end)
            chain_states.forget(self.files, chain, block.end, boundary)

    @property
    def _in_all_chains(self) -> int:
        """Draws that every chain of the posterior has, burn-in included."""
        return min((self._committed[chain] for chain in self.chains), default=0)

    def _first_draws(self, config: RunConfig) -> int:
        """Draws that lie in the warm-up groups: all, until a burn-in that is chosen is written."""
        if self.manifest.kept is not None and self.manifest.burn_in is not None:
            return self.manifest.burn_in
        return _sizes(config)[0]

    def _make_room(self, config: RunConfig) -> None:
        """For the draws of a config, leaving those that count where they are."""
        burn_in, draws = _sizes(config)
        before = self.manifest
        if before.kept is not None and before.burn_in is not None:
            self._draws.join(before.burn_in, before.kept, burn_in)
        else:
            self._draws.resize(draws, burn_in)

    def _counts(self) -> list[int]:
        """As the trace and, where it is damaged or behind, the manifest say: both are true."""
        repeated = self.manifest.n_committed
        try:
            counts = np.asarray(array_of(self._root, "n_committed")[:])
        except Exception:  # zarr and its codecs raise what they like
            return list(repeated)
        return [max(int(a), b) for a, b in zip(counts, repeated, strict=True)]

    def _counts_to(self, end: int) -> list[int]:
        return [min(count, end) for count in self._committed]

    def _count(self, counts: list[int]) -> None:
        array_of(self._root, "n_committed")[:] = np.array(counts)
        self._committed = counts

    def _put_constants(self, arrays: Mapping[str, Any]) -> None:
        group = self._root.require_group("constant_data")
        for name, value in arrays.items():
            data = np.asarray(value)
            group.create_array(
                name,
                data=data if data.dtype.kind == "f" else data.astype(np.float64),
                fill_value=np.nan,
                dimension_names=CONSTANTS.get(name, ()),
                overwrite=True,
                **codecs(),
            )

    def _read_constant(self, name: str, array: zarr.Array[Any]) -> NDArray[Any]:
        where = self.files.path(f"{ZARR}/constant_data/{name}")
        values = self._reading(f"constant_data/{name}", lambda: np.asarray(array[...]))
        if np.isnan(values).any():
            raise StoreError(f"{where} lacks a value, its file is missing; {AGAIN}")
        return values

    def _drop_damaged_anchor(self) -> None:
        """Forgets an anchor pass that cannot be read: it will be made again."""
        try:
            self.at_anchor()
        except StoreError as error:
            self.log(Damaged(what=str(error)))
            del self._root["constant_data"]
            self._root.create_group("constant_data")

    def _update(self, **changes: object) -> None:
        changed = self.manifest.replaced(**changes)
        self._writing(lambda: manifests.write(self.files, MANIFEST, changed))
        self.manifest = changed

    def _writing(self, write: Callable[[], T]) -> T:
        try:
            return write()
        except StoreError:
            raise
        except OSError as error:
            raise refused(self.files, error) from error

    def _arrays(self, group: str) -> list[tuple[str, zarr.Array[Any]]]:
        return self._reading(group, lambda: list(self._root.require_group(group).arrays()))

    def _intact(self, counts: list[int]) -> list[int]:
        narrow = self._reading("", lambda: self._draws.intact(counts))
        return self.wide.intact(narrow)

    def _reading(self, name: str, read: Callable[[], T]) -> T:
        """What was read; zarr and its codecs raise what they like, and warn of a lost file."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ZarrUserWarning)
                return read()
        except StoreError:
            raise
        except Exception as error:
            where = self.files.path(f"{ZARR}/{name}")
            raise StoreError(
                f"{where} is damaged: {type(error).__name__}: {error}; {AGAIN}"
            ) from error


def _make_counts(root: zarr.Group, counts: Sequence[int]) -> None:
    root.create_array(
        "n_committed",
        data=np.array(counts, np.int64),
        fill_value=-1,
        dimension_names=("chain",),
        overwrite=True,
        **codecs(),
    )


def _sizes(config: RunConfig) -> tuple[int, int]:
    """Draws of the warm-up groups and of the posterior's while a run runs.

    A burn-in that is yet to be chosen may be any: all draws are warm-up until it is written out.
    """
    schedule = Schedule.of(config)
    if schedule.burn_in is None:
        return schedule.budget, 0
    return schedule.burn_in, schedule.budget


def _wants_more(config: RunConfig, before: RunConfig) -> bool:
    """Whether a finished run must go on; one that ran until a verdict also for another gate."""
    other_end = (config.draws, config.max_draws) != (before.draws, before.max_draws)
    return other_end or (config.draws == "auto" and config.gate != before.gate)


def as_files(store: str | Path | Files) -> Files:
    """The files of a store."""
    return store if isinstance(store, Files) else Files(store)


def check_new(files: Files) -> None:
    """Sees that a run directory can be made here, making nothing.

    Raises:
        StoreError: if there is one already, or something else, or it may not be written.
    """
    refuse_existing(files)
    local = None if is_url(files.root) else Path(files.root)
    if local is not None and local.exists() and not _only_ours(local):
        raise StoreError(f"the store {local} must be new or an empty folder: give another one")
    files.check_writable()


def refuse_existing(files: Files) -> None:
    """Sees that there is no run.

    Raises:
        StoreError: if there is.
    """
    if files.exists(MANIFEST):
        raise StoreError(
            f"the store {files} must not exist, but it holds a run: give another store, read it "
            f"with distsampler.open({str(files)!r}), continue it with resume='auto', or delete it"
        )


def _only_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but what a start that was cut short has left."""
    return folder.is_dir() and all(
        path.name in OURS or path.suffix == TEMPORARY for path in folder.iterdir()
    )


def _kind(device: str) -> str:
    return device.partition(" ")[0].partition(":")[0]
