"""The loop in which chains make their draws, alone or as a pack, and how a chain alone steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from distsampler.analysis.bias import Slower
from distsampler.chains.observables import Values
from distsampler.chains.sampler_trial import measures_acceptance, needs_closure
from distsampler.draws import ACCEPTANCE, DrawBlock
from distsampler.errors import DistsamplerError
from distsampler.optim import mala_acceptance

if TYPE_CHECKING:
    from distsampler.chains.chain import Chain


class ChainDiverged(DistsamplerError):
    """A chain met a value that is not finite, or left for good; ``block`` has its draws before."""

    def __init__(
        self, chain: int, step: int, what: str, last_loss: float, block: DrawBlock, remedy: Slower
    ) -> None:
        super().__init__(chain, step, what, last_loss, block, remedy)
        self.chain, self.step, self.what, self.last_loss, self.block, self.remedy = self.args

    def __str__(self) -> str:
        return (
            f"chain {self.chain} diverged at step {self.step}: {self.what} (last finite loss "
            f"{self.last_loss:.6g}); {self.remedy}"
        )


@dataclass(frozen=True)
class Advanced:
    """What came of advancing chains."""

    blocks: tuple[DrawBlock, ...]  # draws of the chains that made all of them
    diverged: tuple[ChainDiverged, ...] = ()  # the others, with the draws that they made before


class Stepper(Protocol):
    """How chains make a step: where their gradients come from, and what moves them."""

    def step(self, step: int) -> None:
        """Make a step of which nothing is measured."""
        ...

    def losses(self, step: int) -> Mapping[int, Tensor]:
        """Return each chain's losses on a step's batch, at the weights that the step will leave."""
        ...

    def move(self, step: int) -> Mapping[int, Values]:
        """Make the step whose losses were returned; return what was measured of it, by chain."""
        ...

    def retire(self, chain: int) -> None:
        """Forget a chain that has diverged."""
        ...


def advance(chains: dict[int, Chain], stepper: Stepper, draws: int) -> Advanced:
    """Make the next draws of chains that have made equally many; those that diverge are removed."""
    made, thin, diverged = 0, 1, list[ChainDiverged]()
    for chain in chains.values():
        made, thin = chain.draw, chain.spec.config.thin
        chain.begin(draws)
    for draw in range(made, made + draws):
        if not chains:
            break
        last = (draw + 1) * thin - 1
        for step in range(draw * thin, last):
            stepper.step(step)
        losses = stepper.losses(last)
        measured = {index: chain.measure(losses[index], last) for index, chain in chains.items()}
        moved = stepper.move(last)
        for index, values in measured.items():
            try:
                chains[index].keep({**moved[index], **values}, last)
            except ChainDiverged as error:
                diverged.append(error)
                del chains[index]
                stepper.retire(index)
    return Advanced(tuple(chain.end() for chain in chains.values()), tuple(diverged))


def alone(chain: Chain) -> Stepper:
    """Return how a chain with a replica of its own makes its steps."""
    spec = chain.spec
    if needs_closure(spec.sampler):
        return _Adjusted(chain)
    if measures_acceptance(spec.sampler, spec.config):
        return _WithAcceptance(chain)
    return _Alone(chain)


class _Alone:
    """Steps along the gradient of the replica."""

    def __init__(self, chain: Chain) -> None:
        self._chain, self._gradient, self._move = chain, chain.losses_and_gradient, chain.mover.move

    def step(self, step: int) -> None:
        self._gradient(step)
        self._move()

    def losses(self, step: int) -> Mapping[int, Tensor]:
        return {self._chain.index: self._gradient(step)}

    def move(self, step: int) -> Mapping[int, Values]:
        self._move()
        return {self._chain.index: self._chain.metrics()}

    def retire(self, chain: int) -> None:
        pass


class _WithAcceptance(_Alone):
    """Such steps, compared at each draw with their way back, at one gradient more."""

    def losses(self, step: int) -> Mapping[int, Tensor]:
        losses = self._gradient(step)
        self._before = self._chain.sampler.side(losses.mean())
        return {self._chain.index: losses}

    def move(self, step: int) -> Mapping[int, Values]:
        self._move()
        after = self._chain.sampler.side(self._gradient(step).mean())
        acceptance = float(mala_acceptance(self._before, after))
        return {self._chain.index: {**self._chain.metrics(), ACCEPTANCE: acceptance}}


class _Adjusted(_Alone):
    """Steps of a sampler that evaluates loss and gradient itself, to accept or refuse a move."""

    def step(self, step: int) -> None:
        self._chain.sampler.step(lambda: self._gradient(step).mean())

    def losses(self, step: int) -> Mapping[int, Tensor]:
        return {self._chain.index: self._chain.losses(step)}

    def move(self, step: int) -> Mapping[int, Values]:
        self.step(step)
        return {self._chain.index: self._chain.metrics()}
