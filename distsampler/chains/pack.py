"""Pack: chains that advance together, one step of all at a time.

Chain c belongs to pack ``c // RunConfig.together``. Each is an ordinary chain, with its own noise,
batches, sampler and state; but its weights are a lane of a stack, and the gradients of all lanes
come of one call. What a lane does depends on how many lanes there are, not on what is in the
others: one that diverges, or was retired long ago, stays as a lane at w* that nobody reads.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from distsampler.chains.chain import Chain
from distsampler.chains.observables import Values
from distsampler.chains.steps import Advanced, Stepper, advance, alone
from distsampler.draws import AtAnchor
from distsampler.models.replica import ChainSpec, Replica
from distsampler.models.stack import Lanes
from distsampler.optim.joint import Joint
from distsampler.store.large_arrays import WideWriter


class Pack:
    """Some chains of one pack, at the same draw.

    Args:
        spec: the recipe of every chain.
        chains: indices, of one pack; those of it that are not named have been retired.
        at_anchor: losses at w*.
        base: a replica at w*, on the device where the chains run.
        writers: what takes the wide values, by chain; None: they are dropped.
    """

    def __init__(
        self,
        spec: ChainSpec,
        chains: Sequence[int],
        at_anchor: AtAnchor,
        base: Replica,
        writers: Mapping[int, WideWriter] | None = None,
    ) -> None:
        config = spec.config
        anchors, writers = [flat.detach() for flat in base.flats], writers or {}
        self._chains = {
            index: Chain(spec, index, at_anchor, anchors, base.device, writers.get(index))
            for index in chains
        }
        self._first = chains[0] // config.together * config.together
        count = min(config.together, config.chains - self._first)
        self._lanes = Lanes(base, spec, count) if count > 1 else None
        if self._lanes is not None:
            for index, chain in self._chains.items():
                self._lanes.take_in(chain.replica, index - self._first)
        self._stepper = self._make_stepper()

    def at(self, chains: Sequence[int], draw: int) -> bool:
        """Return whether it holds these chains and no others, at a draw."""
        here = {chain.draw for chain in self._chains.values()}
        return tuple(self._chains) == tuple(chains) and here == {draw}

    def restore(self, index: int, state: bytes) -> None:
        """Put a chain to a state that it gave."""
        self._chains[index].restore(state)
        self._stepper = self._make_stepper()

    def advance(self, draws: int) -> Advanced:
        """Make the next draws of all chains."""
        return advance(self._chains, self._stepper, draws)

    def _make_stepper(self) -> Stepper:
        if self._lanes is None:
            return alone(self._chains[self._first])
        return _Stacked(self._chains, self._lanes, self._first)


class _Stacked:
    """Steps of a pack: all gradients in one call, then one joint move."""

    def __init__(self, chains: Mapping[int, Chain], lanes: Lanes, first: int) -> None:
        self._chains, self._lanes, self._first = chains, lanes, first
        spec = next(iter(chains.values())).spec
        self._rows = np.zeros((len(lanes.weights[0]), spec.config.batch_size), np.int64)
        self._one_by_one = bool(spec.metrics)
        self._joint: Joint | None = None

    def step(self, step: int) -> None:
        self._gradients(step)
        self._move_jointly()

    def losses(self, step: int) -> Mapping[int, Tensor]:
        losses = self._gradients(step)
        return {index: losses[index - self._first] for index in self._chains}

    def move(self, step: int) -> Mapping[int, Values]:
        if self._one_by_one:
            for chain in self._chains.values():
                chain.mover.move()
        else:
            self._move_jointly()
        return {index: chain.metrics() for index, chain in self._chains.items()}

    def retire(self, chain: int) -> None:
        self._lanes.put_to_rest(chain - self._first)
        self._joint = None

    def _gradients(self, step: int) -> Tensor:
        """Losses of all lanes; their gradients are left where the samplers read them."""
        for index, chain in self._chains.items():
            self._rows[index - self._first] = chain.rows(step)
        return self._lanes.losses_and_gradients(self._rows)

    def _move_jointly(self) -> None:
        self._joint = self._joint or Joint([chain.sampler for chain in self._chains.values()])
        self._joint.move()
