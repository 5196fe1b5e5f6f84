"""Worker: what a place does when it is given work. The same in this process and in an actor."""

from __future__ import annotations

import contextlib
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from distsampler.anchor import AnchorPart, Part, measure
from distsampler.chain import Chain, ChainDiverged
from distsampler.config import RunConfig
from distsampler.draws import Anchor, DrawBlock
from distsampler.errors import WorkFailedError
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
    """

    chain: int
    first_draw: int
    draws: int
    anchor: Anchor | None = field(default=None, repr=False, compare=False)
    state: bytes | None = field(default=None, repr=False, compare=False)


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
        """
        try:
            with numerics(self._spec.config):
                match work:
                    case AnchorPass():
                        return measure(self._base, self._spec, work.part)
                    case Advance():
                        return self._chain(work).advance(work.draws)
        except ChainDiverged:
            raise
        except Exception as error:
            raise WorkFailedError(
                f"{_what(work)} failed: {type(error).__name__}: {error}\n{traceback.format_exc()}"
            ) from None

    def _chain(self, work: Advance) -> Chain:
        """The chain at work.first_draw: as it was left here, or made anew from its state."""
        chain = self._chains.pop(work.chain, None)
        if chain is None or chain.draw != work.first_draw:
            if work.anchor is None:
                raise RuntimeError("a chain needs the losses at w*")
            chain = Chain(
                self._spec, work.chain, work.anchor, anchors=self._anchors, device=self._device
            )
            if work.state is not None:
                chain.restore(work.state)
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
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.deterministic)
    memory.fill_uninitialized_memory = False  # costs time, finds no bug here
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
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
