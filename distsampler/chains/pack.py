"""Pack: chains that advance together, one step of all at a time.

Chain c belongs to pack ``c // RunConfig.together``. Each is an ordinary chain, with its own noise,
batches, sampler and state; but its weights are a lane of a stack, and the gradients of all lanes
come of one call. What a lane does depends on how many lanes there are, not on what is in the
others: one that diverges, or was retired long ago, stays as a lane at w* that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from distsampler.chains.chain import Chain, ChainDiverged
from distsampler.draws import AtAnchor, DrawBlock
from distsampler.models.replica import ChainSpec, Replica
from distsampler.models.stack import Lanes
from distsampler.optim.joint import Joint
from distsampler.store.large_arrays import WideWriter


@dataclass(frozen=True)
class Advanced:
    """What came of advancing chains.

    Args:
        blocks: the draws of those that went all the way.
        diverged: the others, with the draws that they made before.
    """

    blocks: tuple[DrawBlock, ...]
    diverged: tuple[ChainDiverged, ...] = ()


class Pack:
    """Some chains of one pack, at the same draw.

    Args:
        spec: the recipe of every chain.
        chains: indices, of one pack; those of it that are not named have been retired.
        at_anchor: losses at w*.
        base: a replica at w*, on the device where the chains run.
        writer: what takes the wide values of a chain; None: they are dropped.
    """

    def __init__(
        self,
        spec: ChainSpec,
        chains: Sequence[int],
        at_anchor: AtAnchor,
        base: Replica,
        writer: Callable[[int], WideWriter | None] = lambda chain: None,
    ) -> None:
        config, self._thin = spec.config, spec.config.thin
        self._first = chains[0] // config.together * config.together
        count = min(config.together, config.chains - self._first)
        anchors = [flat.detach() for flat in base.flats]
        self._chains = {
            index: Chain(
                spec, index, at_anchor, anchors=anchors, device=base.device, writer=writer(index)
            )
            for index in chains
        }
        self._joint: Joint | None = None
        self._told = bool(spec.metrics)
        self._rows = np.zeros((count, config.batch_size), np.int64)
        self._lanes = Lanes(base, spec, count) if count > 1 else None
        if self._lanes is not None:
            for index, chain in self._chains.items():
                self._lanes.take_in(chain.replica, index - self._first)

    def at(self, chains: Sequence[int], draw: int) -> bool:
        """Whether it holds these chains and no others, at a draw."""
        here = {chain.draw for chain in self._chains.values()}
        return tuple(self._chains) == tuple(chains) and here == {draw}

    def restore(self, index: int, state: bytes) -> None:
        """Puts a chain to a state that it gave."""
        self._chains[index].restore(state)
        self._joint = None

    def advance(self, draws: int) -> Advanced:
        """Makes the next draws of all chains."""
        if self._lanes is None:
            return self._advance_alone(draws)
        for chain in self._chains.values():
            chain.begin(draws)
        diverged = list[ChainDiverged]()
        for _ in range(draws):
            diverged += self._make_draw(self._lanes)
        return Advanced(tuple(chain.end() for chain in self._chains.values()), tuple(diverged))

    def _advance_alone(self, draws: int) -> Advanced:
        (chain,) = self._chains.values()
        try:
            return Advanced((chain.advance(draws),))
        except ChainDiverged as error:
            return Advanced((), (error,))

    def _make_draw(self, lanes: Lanes) -> list[ChainDiverged]:
        """One draw of every chain; those that diverge at it are put to rest."""
        first = next((chain.draw for chain in self._chains.values()), 0) * self._thin
        last, diverged = first + self._thin - 1, list[ChainDiverged]()
        for step in range(first, last):
            self._losses_and_gradients(lanes, step)
            self._move()
        losses, seen = self._losses_and_gradients(lanes, last), {}
        for index, chain in self._chains.items():
            lane = index - self._first
            seen[index] = chain.look(losses[lane], self._rows[lane], last)
        self._move(told=self._told)
        for index, values in seen.items():
            try:
                self._chains[index].keep(values, last)
            except ChainDiverged as error:
                diverged.append(error)
                self._put_to_rest(lanes, index)
        return diverged

    def _move(self, told: bool = False) -> None:
        """Moves all chains; one after another where each is to tell of its step."""
        samplers = [chain.sampler for chain in self._chains.values()]
        if told:
            for sampler in samplers:
                sampler.move()
        elif samplers:
            self._joint = self._joint or Joint(samplers)
            self._joint.move()

    def _put_to_rest(self, lanes: Lanes, index: int) -> None:
        del self._chains[index]
        lanes.put_to_rest(index - self._first)
        self._joint = None

    def _losses_and_gradients(self, lanes: Lanes, step: int) -> Tensor:
        """Losses of all lanes; their gradients are left where the samplers read them."""
        for index, chain in self._chains.items():
            self._rows[index - self._first] = chain.rows(step)
        return lanes.losses_and_gradients(self._rows)
