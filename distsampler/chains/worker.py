"""Worker: what a place does when it is given work. The same in this process and in an actor."""

import threading
import time
import traceback
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from distsampler.chains.anchor_pass import AnchorPart, Part, measure
from distsampler.chains.inspection import Inspection, inspect
from distsampler.chains.observables import wide_variables
from distsampler.chains.pack import Pack
from distsampler.chains.steps import Advanced
from distsampler.draws import AtAnchor, DrawBlock, StateFile
from distsampler.errors import ConfigError, StoreError, WorkFailedError
from distsampler.models.numerics import numerics
from distsampler.models.replica import ChainSpec, Replica
from distsampler.store import chain_states
from distsampler.store.files import Files, writing
from distsampler.store.large_arrays import WideArrays, WideWriter

ALONE = threading.RLock()
"""Held by what sets torch's threads or forks its global generator: one at a time in a process."""


@dataclass(frozen=True)
class Inspect:
    """Try what the user gives, before anything starts."""


@dataclass(frozen=True)
class AnchorPass:
    """Measure a part of the anchor pass."""

    part: Part


@dataclass(frozen=True)
class Advance:
    """Make the next draws of the chains of a pack."""

    chains: tuple[int, ...]  # indices of all chains of the pack that were not retired
    first_draw: int  # position of the first draw
    draws: int  # number of draws
    at_anchor: AtAnchor | None = field(default=None, repr=False, compare=False)  # losses at w*
    # state of each chain at first_draw, None at its start; empty: as this worker left them, or at
    # their start
    states: tuple[bytes | StateFile | None, ...] = field(default=(), repr=False, compare=False)
    # run directory, where large states lie; None: there is none
    files: Files | None = field(default=None, repr=False, compare=False)
    with_states: bool = False  # whether the driver is to send the states along, which may be large


@dataclass(frozen=True)
class NotResident:
    """The answer of a worker that does not have the chains at this draw: it needs their states."""


Work = Inspect | AnchorPass | Advance
Result = Inspection | AnchorPart | Advanced | NotResident


class Worker:
    """Owns a replica at w* and the packs of chains, ``capacity`` at most, it was last asked for."""

    def __init__(self, spec: ChainSpec, device: torch.device, capacity: int = 1) -> None:
        self._spec, self._device, self._capacity = spec, device, capacity
        self._packs: OrderedDict[int, Pack] = OrderedDict()

    def perform(self, work: Work) -> Result:
        """Do the work.

        Raises:
            ConfigError: if what the user gives is not fit for a run.
            WorkFailedError: if the user's model, data or loss raised.
            StoreError: if the store cannot take what this place writes to it.
            torch.OutOfMemoryError: if the device has not enough.
        """
        try:
            with numerics(self._spec):
                match work:
                    case Inspect():
                        return inspect(self._spec, self._device)
                    case AnchorPass():
                        return measure(self._base, self._spec, work.part)
                    case Advance():
                        return self._advance(work)
        except (ConfigError, WorkFailedError, StoreError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise WorkFailedError(
                f"{_what(work)} failed: {type(error).__name__}: {error}\n{traceback.format_exc()}"
            ) from None

    @cached_property
    def _base(self) -> Replica:
        """A replica at w*, where it stays."""
        return Replica(self._spec, self._device)

    def _advance(self, work: Advance) -> Advanced | NotResident:
        """The next draws; large states go to the store at once."""
        number = work.chains[0] // self._spec.config.together
        pack = self._packs.pop(number, None)
        if pack is None or not pack.at(work.chains, work.first_draw):
            if work.first_draw and not work.states:
                return NotResident()
            pack = self._made(work)
        self._packs[number] = pack
        while len(self._packs) > self._capacity:
            self._packs.popitem(last=False)
        done = pack.advance(work.draws)
        return replace(done, blocks=tuple(self._stored(b, work.files) for b in done.blocks))

    def _made(self, work: Advance) -> Pack:
        """The chains at work.first_draw, from their states."""
        if work.at_anchor is None:
            raise RuntimeError("a chain needs the losses at w*")
        wide, writer = wide_variables(self._spec), dict[int, WideWriter]()
        if wide and work.files is not None:
            arrays = WideArrays(work.files, wide)
            writer = {chain: WideWriter(arrays, chain) for chain in work.chains}
        pack = Pack(self._spec, work.chains, work.at_anchor, self._base, writer)
        for chain, state in zip(work.chains, work.states, strict=False):
            if state is not None:
                pack.restore(chain, _read(state, work.files))
        if not pack.at(work.chains, work.first_draw):
            raise RuntimeError(f"chains {work.chains} are not at draw {work.first_draw}")
        return pack

    def _stored(self, block: DrawBlock, files: Files | None) -> DrawBlock:
        """A block whose state, if it is large, lies in the store."""
        limit = self._spec.config.max_state_mb * 2**20
        if files is None or isinstance(block.state, StateFile) or len(block.state) <= limit:
            return block
        began = time.perf_counter()
        with writing(files):
            file = chain_states.write(files, block.chain, block.end, block.state)
        seconds = block.state_seconds + time.perf_counter() - began
        return replace(block, state=file, state_seconds=seconds)


def _read(state: bytes | StateFile, files: Files | None) -> bytes:
    if isinstance(state, bytes):
        return state
    if files is None:
        raise RuntimeError("a state in a file needs the run's files")
    return chain_states.read(files, state.name)


def _what(work: Work) -> str:
    """The work, as errors name it."""
    if isinstance(work, Advance):
        names = f"chains {work.chains}" if len(work.chains) > 1 else f"chain {work.chains[0]}"
        return f"{names} at draws {work.first_draw}..{work.first_draw + work.draws}"
    if isinstance(work, Inspect):
        return "the inspection"
    start, stop, what = work.part
    over = {
        "probe": "the probe",
        "named probe": f"a named probe, rows {start}..{stop} of them all",
        "losses": f"rows {start}..{stop}",
        "gradient noise": f"the gradients of batches {start}..{stop}",
    }
    shard = f"the {what.removeprefix('shard ')} of rows {start}..{stop}"
    return f"the anchor pass over {over.get(what, shard)}"
