"""The driver's hand on a run directory: it alone makes it, commits draws, repairs and seals it.

A commit writes the states behind the draws, then the draws, then the counts that make them exist:
whatever dies in between, what was committed before stays as it was.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zarr

from distsampler.config import RunConfig
from distsampler.draws import AtAnchor, DrawBlock, StateFile
from distsampler.errors import StoreError
from distsampler.facts import Facts
from distsampler.schedule import Schedule
from distsampler.store import chain_states, events, manifest
from distsampler.store.constants import Constants
from distsampler.store.events import Damaged, DeviceChanged, RunEvent
from distsampler.store.files import Files, as_files, writing
from distsampler.store.large_arrays import WIDE, WideArrays
from distsampler.store.manifest import MANIFEST, Manifest, RunStatus
from distsampler.store.reader import COUNTS, ZARR, TraceReader, sizes
from distsampler.store.zarr_arrays import NarrowArrays
from distsampler.store.zarr_files import array_of, codecs, create_root

CONTENTS = (MANIFEST, ZARR, WIDE, chain_states.FOLDER, events.EVENTS)  # of a run directory


class Trace(TraceReader):
    """A run directory that ``create`` made, for its driver."""

    @classmethod
    def create(cls, store: str | Path | Files, made: Manifest) -> Trace:
        """Make the run directory of a new run; run.json is written last."""
        files, config = as_files(store), made.config
        made = made.replaced(identity=uuid.uuid4().hex)
        try:
            root = create_root(files, ZARR, made.identity, {"config": config.model_dump_json()})
            burn_in, draws = sizes(config)
            NarrowArrays(root, made.variables, burn_in).create(config.chains, draws)
            total = Schedule.of(config).total
            WideArrays(files, made.wide, made.identity).create(config.chains, total)
            Constants(root).clear()
            _make_counts(root, [0] * config.chains)
            manifest.write(files, made)
        except OSError as error:
            raise StoreError(f"the store {files} cannot be written: {error}") from error
        return cls(files)

    def record_facts(self, facts: Facts, at_anchor: AtAnchor) -> None:
        """Write what is known before the first draw, once."""
        with writing(self.files):
            self.constants.record(facts, at_anchor)

    def commit(self, blocks: Sequence[DrawBlock]) -> None:
        """Make blocks durable together.

        Draws that exist already, computed again after a state was lost, are left as they are.

        Raises:
            StoreError: if a block begins beyond where its chain ends, or its wide values were not
                written before it came.
            StoreFault: if writing fails.
        """
        counts, new = list(self._committed), []
        for block in blocks:
            self.wide.check(block)
            known = counts[block.chain] - block.first_draw
            if known < 0:
                raise StoreError(
                    f"chain {block.chain} must continue at draw {counts[block.chain]}, got a "
                    f"block from {block.first_draw}"
                )
            if block.draws > known:
                new.append(block.after(known))
                counts[block.chain] = block.end
        if new:
            with writing(self.files):
                self._commit(new, counts)

    def state(self, chain: int, draw: int | None = None) -> bytes | StateFile | None:
        """Return a chain's last whole committed state, up to a draw; None at its start.

        Of a large one only the file is given.
        """
        upto = self._committed[chain] if draw is None else min(draw, self._committed[chain])
        newest = chain_states.newest(self.files, chain, upto)[1]
        if newest is None or newest.size > self.manifest.config.max_state_mb * 2**20:
            return newest
        return chain_states.read(self.files, newest.name)

    def restart_points(self) -> tuple[int, ...]:
        """Return the draw from which each chain can continue: where its whole pack has states."""
        points, retired = list[int](), self.manifest.retired
        for pack in self.manifest.config.packs:
            point = self._restart_point([chain for chain in pack if chain not in retired])
            points += [self._restart_point([c]) if c in retired else point for c in pack]
        return tuple(points)

    def choose_burn_in(self, draws: int) -> None:
        """Record the burn-in that was chosen at a gate round."""
        self._update(burn_in=draws)

    def retire(self, chain: int, reason: str) -> None:
        """Take a chain out of the posterior; its draws stay."""
        self._update(retired={**self.manifest.retired, chain: reason})

    def record_device(self, device: str) -> None:
        """Record the device that the chains run on; a run stays on one type.

        Raises:
            StoreError: if it began on another type.
        """
        before = self.manifest.fingerprint.get("device")
        if before is None:
            self._update(fingerprint={**self.manifest.fingerprint, "device": device})
        elif _type(before) != _type(device):
            raise StoreError(
                f"the run in {self.files} can only be continued as it was started; different are\n"
                f"  device: stored {before!r}, now {device!r}"
            )
        elif before != device:
            self.log(DeviceChanged(before, device))

    def log(self, event: RunEvent) -> None:
        """Append an event to events.jsonl."""
        with writing(self.files):
            events.append(self.files, event)

    def finished(self, config: RunConfig) -> bool:
        """Return whether nothing is left to do for a config: all draws are there, and whole."""
        before = self.manifest
        if before.status != "finished" or before.kept is None or _wants_more(config, before.config):
            return False
        try:
            anchored = self.constants.at_anchor() is not None
            fits = self.narrow.fits(before.kept, self.burn_in)
            return anchored and fits and self._intact() == list(self.ends)
        except StoreError:
            return False

    def reopen(self, config: RunConfig, epoch: int) -> None:
        """Make a run that was interrupted, damaged or finished ready to continue.

        What was half written is removed. Draws that are damaged count as not committed, with all
        that follow them: they will be computed again, to the same bits. The config may ask for more
        draws than before.
        """
        burn_in, draws = sizes(config)
        with writing(self.files):
            self.files.sweep()
            self._make_room(config)
            self._forget_damage()
        fresh = {"status": "running", "reason": "", "kept": None, "burn_in": None}
        self._update(**fresh, config=config, epoch=epoch, n_committed=self.committed)
        with writing(self.files):
            self.narrow.resize(draws, burn_in)
            self.wide.resize(Schedule.of(config).total)

    def seal(self, status: RunStatus, reason: str, kept: int | None, seconds: float) -> None:
        """End the run.

        A burn-in that was chosen is written out: the draws behind it are copied into the posterior
        groups; then the manifest, in one write, makes them count; then the warm-up groups are cut.

        Args:
            status: how the run ended.
            reason: why it ended.
            kept: draws that all chains are cut to, a burn-in given by number not counted; None:
                the run can continue, and keeps all draws.
            seconds: wall-clock time of the run.
        """
        ending: dict[str, object] = {"status": status, "reason": reason, "seconds": seconds}
        if kept is None:
            self._update(**ending)
            return
        burn_in, chosen = self.burn_in, None
        with writing(self.files):
            if Schedule.of(self.manifest.config).burn_in is None:
                chosen, kept = burn_in, kept - burn_in
                self.narrow.split(burn_in, kept)
            self._update(**ending, kept=kept, burn_in=chosen)
            self.narrow.resize(kept, burn_in)
            self.wide.resize(burn_in + kept)

    def _commit(self, blocks: Sequence[DrawBlock], counts: list[int]) -> None:
        newest = {block.chain: block for block in blocks if block.state}
        for block in newest.values():
            if isinstance(block.state, bytes):
                chain_states.write(self.files, block.chain, block.end, block.state)
        self.narrow.write(blocks)
        self._count(counts)
        self._update(n_committed=tuple(counts))
        ends = (0, *Schedule.of(self.manifest.config).round_ends)
        for chain, block in newest.items():
            boundary = max(end for end in ends if end <= block.end)
            chain_states.forget(self.files, chain, block.end, boundary)

    def _restart_point(self, chains: Sequence[int]) -> int:
        """The last draw at which each of these chains has a whole state."""
        upto = min((self._committed[chain] for chain in chains), default=0)
        while True:
            draws = [chain_states.newest(self.files, chain, upto)[0] for chain in chains]
            upto = min(draws, default=0)
            if all(draw == upto for draw in draws):
                return upto

    def _make_room(self, config: RunConfig) -> None:
        """Make room for the draws of a config, leaving those that count where they are."""
        before, (burn_in, draws) = self.manifest, sizes(config)
        if before.kept is None and sizes(before.config) == (burn_in, draws):
            return
        if before.kept is not None and before.burn_in is not None:
            self.narrow.join(before.burn_in, before.kept, burn_in)
        else:
            self.narrow.resize(draws, burn_in)
        self._root.attrs["config"] = config.model_dump_json()

    def _forget_damage(self) -> None:
        """Remove what is damaged or was never committed: it will be computed again."""
        try:
            array_of(self._root, COUNTS)[:]
        except Exception:  # zarr and its codecs raise what they like
            _make_counts(self._root, self._committed)
        ends, intact = list(self.ends), self._intact()
        if intact != ends:
            self.narrow.mend()
            self.log(Damaged(ends, intact))
        if intact != self._committed:
            self._count(intact)
        self.wide.sweep(intact)
        chain_states.remove_old(self.files, tuple(intact))
        try:
            self.constants.at_anchor()
        except StoreError as error:
            self.log(Damaged(what=str(error)))
            self.constants.clear()

    def _intact(self) -> list[int]:
        """The draws of each chain that count and are whole."""
        return self.wide.intact(self.narrow.intact(self.ends))

    def _count(self, counts: list[int]) -> None:
        array_of(self._root, COUNTS)[:] = np.array(counts)
        self._committed = counts

    def _update(self, **changes: object) -> None:
        changed = self.manifest.replaced(**changes)
        with writing(self.files):
            manifest.write(self.files, changed)
        self.manifest = changed


def _make_counts(root: zarr.Group, counts: Sequence[int]) -> None:
    root.create_array(
        COUNTS,
        data=np.array(counts, np.int64),
        fill_value=-1,
        dimension_names=("chain",),
        overwrite=True,
        **codecs(),
    )


def _wants_more(config: RunConfig, before: RunConfig) -> bool:
    """Whether a finished run must continue; one that ran until a verdict also for another gate."""
    other_end = (config.draws, config.max_draws) != (before.draws, before.max_draws)
    return other_end or (config.draws == "auto" and config.gate != before.gate)


def _type(device: str) -> str:
    return device.partition(" ")[0].partition(":")[0]


def has_draws(files: Files) -> bool:
    """Return whether a directory holds a run with a draw; of a damaged one that is assumed."""
    if not files.exists(MANIFEST):
        return False
    try:
        return any(TraceReader(files).committed)
    except StoreError:
        return True


def clear(files: Files) -> None:
    """Remove a run, first what says that there is one: none that is half there is left."""
    for part in CONTENTS:
        files.remove(part)
