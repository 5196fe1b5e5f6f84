"""Worker: what a place does when it is given work. The same in this process and in an actor."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from distsampler import states
from distsampler.anchor import AnchorPart, Part, measure
from distsampler.chain import Chain, ChainDiverged
from distsampler.config import RunConfig
from distsampler.draws import Anchor, DrawBlock, StateFile
from distsampler.errors import WorkFailedError
from distsampler.files import Files
from distsampler.replica import ChainSpec, Replica


@dataclass(frozen=True)
class AnchorPass:
    """Measure a part of the anchor pass."""

    part: Part


@dataclass(frozen=True)
class Advance:
    """Make the next draws of a chain.

    Args:
        chain: index.
        first_draw: position of the first of them.
        draws: how many.
        anchor: the losses at w*.
        state: of the chain at first_draw; None: at its start, or where this worker left it.
        files: of the run directory, where large states lie; None: there are none.
    """

    chain: int
    first_draw: int
    draws: int
    anchor: Anchor | None = field(default=None, repr=False, compare=False)
    state: bytes | StateFile | None = field(default=None, repr=False, compare=False)
    files: Files | None = field(default=None, repr=False, compare=False)


Work = AnchorPass | Advance
Result = AnchorPart | DrawBlock


class Worker:
    """Owns a replica at w* and the chains it was last asked for.

    Args:
        spec: the recipe of every chain.
        device: where they run.
        capacity: chains that stay in memory between two requests.
    """

    def __init__(self, spec: ChainSpec, device: torch.device, capacity: int = 1) -> None:
        self._spec, self._device, self._capacity = spec, device, capacity
        self._base = Replica(spec, device)
        self._anchors = [flat.detach() for flat in self._base.flats]
        self._chains: OrderedDict[int, Chain] = OrderedDict()

    def perform(self, work: Work) -> Result:
        """Does the work.

        Raises:
            ChainDiverged: if a chain met a value that is not finite.
            WorkFailedError: if the user's model, data or loss raised.
            torch.OutOfMemoryError: if the device has not enough.
        """
        try:
            with numerics(self._spec.config):
                match work:
                    case AnchorPass():
                        return measure(self._base, self._spec, work.part)
                    case Advance():
                        return self._advance(work)
        except (ChainDiverged, WorkFailedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise WorkFailedError(
                f"{_what(work)} failed: {type(error).__name__}: {error}\n{traceback.format_exc()}"
            ) from None

    def _advance(self, work: Advance) -> DrawBlock:
        """The next draws; a large state goes to the store at once."""
        block = self._chain(work).advance(work.draws)
        limit = self._spec.config.max_state_mb * 2**20
        if work.files is None or isinstance(block.state, StateFile) or len(block.state) <= limit:
            return block
        began = time.perf_counter()
        file = states.write(work.files, block.chain, block.end, block.state)
        seconds = block.state_seconds + time.perf_counter() - began
        return replace(block, state=file, state_seconds=seconds)

    def _chain(self, work: Advance) -> Chain:
        """The chain at work.first_draw: as it was left here, or made anew from its state."""
        chain = self._chains.pop(work.chain, None)
        if chain is None or chain.draw != work.first_draw:
            if work.anchor is None:
                raise RuntimeError("a chain needs the losses at w*")
            chain = Chain(
                self._spec, work.chain, work.anchor, anchors=self._anchors, device=self._device
            )
            state = work.state
            if isinstance(state, StateFile):
                if work.files is None:
                    raise RuntimeError("a state in a file needs the run's files")
                state = states.read(work.files, state.name)
            if state is not None:
                chain.restore(state)
        if chain.draw != work.first_draw:
            raise RuntimeError(f"chain is at draw {chain.draw}, not at {work.first_draw}")
        self._chains[work.chain] = chain
        while len(self._chains) > self._capacity:
            self._chains.popitem(last=False)
        return chain


@contextlib.contextmanager
def numerics(config: RunConfig) -> Iterator[None]:
    """Threads and determinism as configured, put back afterwards."""
    threads = torch.get_num_threads()
    mode = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.set_num_threads(config.threads)
    # use_deterministic_algorithms would say the same, and import the whole compiler: two seconds
    torch.set_deterministic_debug_mode("error" if config.deterministic else "default")
    memory.fill_uninitialized_memory = False  # costs time, finds no bug here
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill


def _what(work: Work) -> str:
    match work:
        case AnchorPass(part=Part(what="probe")):
            return "the anchor pass over the probe"
        case AnchorPass(part=Part(start, stop, "gradient noise")):
            return f"the anchor pass over the gradients of batches {start}..{stop}"
        case AnchorPass(part=Part(start, stop)):
            return f"the anchor pass over rows {start}..{stop}"
        case Advance():
            return f"chain {work.chain} at draws {work.first_draw}..{work.first_draw + work.draws}"
