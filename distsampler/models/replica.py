"""The recipe of a chain, and the replica made of it: a copy of the model, and the loss of batches.

The recipe, a ChainSpec, is a frozen value that travels to wherever chains run.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distsampler.config import RunConfig
from distsampler.data.rows import Rows
from distsampler.data.trees import map_tensors
from distsampler.draws import Variable, WideVariable
from distsampler.facts import Facts, Posterior
from distsampler.models.copies import Attributes, copied
from distsampler.models.loss import (
    SIMPLE,
    ByToken,
    LossFn,
    LossKind,
    in_precision,
    seeded_globally,
)
from distsampler.models.numerics import ProcessSettings
from distsampler.models.restriction import flat_masks, selected
from distsampler.models.sampler import facts_of, posterior_of
from distsampler.probes import ProbeConfig
from distsampler.seeding import step_seed


@dataclass(frozen=True)
class NamedProbe:
    """A user's set of examples whose losses are measured along the chains."""

    name: str
    rows: Rows  # the examples
    numbers: NDArray[np.int64] = field(compare=False)  # of the examples in the user's data
    loss: LossFn  # ``loss(model, batch)``: per-example or per-token losses
    config: ProbeConfig  # how it is measured
    batch_size: int  # most examples that go through the model at once
    kind: LossKind = SIMPLE  # what model and loss were seen to do
    shape: tuple[int, ...] = ()  # of its losses: (examples,) or (examples, tokens)


@dataclass(frozen=True)
class ChainSpec:
    """Everything a chain is made of, except its index."""

    model: nn.Module  # at w*, never moved
    rows: Rows  # the data
    loss: LossFn  # ``loss(model, batch)``: per-example losses or the batch mean
    config: RunConfig  # config of the run
    nbeta: float  # inverse temperature times n
    sampler: type[torch.optim.Optimizer]  # class of the optimizer that moves the chain
    kind: LossKind = SIMPLE  # what model and loss were seen to do
    metrics: tuple[str, ...] = ()  # names of what is recorded of the step that leaves each draw
    observed: tuple[Variable | WideVariable, ...] = ()  # what the user's own observables return
    probes: tuple[NamedProbe, ...] = ()  # what else is measured at the draws
    notes: tuple[str, ...] = ()  # what a user should know of model and loss, in sentences
    run: str = "run"  # name of the run, for dashboards and logs
    pilot: bool = False  # whether it is a trial, whose step may turn out too large
    # of the process where the recipe was written
    settings: ProcessSettings = field(default_factory=ProcessSettings.here)

    @property
    def posterior(self) -> Posterior:
        """The density that is sampled."""
        return posterior_of(self.config.sampler, self.nbeta)

    @property
    def facts(self) -> Facts:
        """What is known of the run before its first draw."""
        sampler, examples = self.config.sampler, len(self.rows)
        if isinstance(self.loss, ByToken):
            return facts_of(sampler, self.nbeta, self.loss.tokens, examples)
        return facts_of(sampler, self.nbeta, examples)

    @property
    def per_example(self) -> bool:
        """Whether ``loss`` returns one value per example."""
        return self.kind.per_example

    @property
    def stochastic(self) -> bool:
        """Whether ``loss`` draws from torch's global generator, as dropout does."""
        return self.kind.stochastic

    @property
    def coupled(self) -> bool:
        """Whether an example's loss depends on more than itself and the weights.

        On what the loss draws at random, or, by batch norm in mode "train", on its batch.
        """
        return self.stochastic or self._trains_buffers or self.kind.coupled

    @property
    def moves_buffers(self) -> bool:
        """Whether a forward pass may move the model's buffers, as batch norm does."""
        return self._trains_buffers or self.kind.moves_buffers

    def of_probe(self, probe: NamedProbe) -> "ChainSpec":
        """Return the recipe with the data and the loss of a named probe."""
        return replace(self, rows=probe.rows, loss=probe.loss, kind=probe.kind, probes=())

    @property
    def _trains_buffers(self) -> bool:
        return self.config.mode == "train" and any(True for _ in self.model.buffers())


class Replica:
    """A copy of the model, and its loss as a function of a batch.

    The parameters that move (``moving``), and their gradients, are views of one flat tensor for
    each dtype (``flats``): what samples and measures them has one tensor to deal with, however many
    layers there are. ``masks`` has one boolean tensor for each of them, or is None where all
    entries move.
    """

    def __init__(self, spec: ChainSpec, device: torch.device) -> None:
        self.device = device
        self.model = copied(spec.model).to(device)
        self.model.train(spec.config.mode == "train")
        selection = selected(self.model, spec.config)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in selection)
        moving = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase):  # which on CUDA gathers its weights elsewhere
                vars(module)["flatten_parameters"] = _left_as_they_are
        self.moving = list(moving.values())
        self.flats = _flatten(self.moving)
        self.masks = flat_masks(moving, selection, self.flats)
        self._look_at(spec)

    def _look_at(self, spec: ChainSpec) -> None:
        """Take data and loss from a recipe, and how they are called."""
        self._spec = spec
        self.batch = spec.rows.taker(self.device)
        """Return the batch of some rows, on this device."""
        loss = torch.compile(spec.loss, dynamic=False) if spec.config.compile else spec.loss
        self._loss = in_precision(loss, spec.config.precision, self.device)
        self._buffers = [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if spec.moves_buffers and buffer is not None
        ]
        self._attributes = Attributes(self.model) if spec.kind.moves_attributes else None
        kind = spec.kind
        self._pure = not (self._buffers or kind.stochastic or kind.moves_attributes)
        self._plain = self._pure and not (kind.needs_graph or kind.changes_batch)

    def of_probe(self, probe: NamedProbe) -> "Replica":
        """Return the same copy of the model, seen with the data and the loss of a named probe.

        What moves this replica moves that one. To be made while the model is as the user gave it.
        """
        other = copy.copy(self)
        other._look_at(self._spec.of_probe(probe))
        return other

    def moving_entries(self) -> list[Tensor]:
        """Return a boolean tensor for each flat one, True where an entry moves."""
        return self.masks or [torch.ones_like(flat, dtype=torch.bool) for flat in self.flats]

    @torch.no_grad()
    def live_in(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Move the flat tensors and their gradients into other memory, such as lanes of a stack."""
        torch._foreach_copy_(list(weights), self.flats)
        homes = zip(self.moving, self.views(weights), self.views(gradients), strict=True)
        for p, home, gradient in homes:
            p.data, p.grad = home, gradient
        for flat, home, gradient in zip(self.flats, weights, gradients, strict=True):
            flat.data, flat.grad = home, gradient

    def views(self, homes: Sequence[Tensor]) -> list[Tensor]:
        """Return, of tensors laid out like the flat ones, the part of each parameter that moves."""
        pairs = [(flat, home) for flat, home in zip(self.flats, homes, strict=True)]
        by_dtype = {flat.dtype: (home, int(flat.storage_offset())) for flat, home in pairs}
        return [
            view_like(p, home, int(p.storage_offset()) - first)
            for p in self.moving
            for home, first in [by_dtype[p.dtype]]
        ]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return a vector over all entries, (d,), on this device, a part for each flat tensor."""
        return list(torch.split(flat.to(self.device), [each.numel() for each in self.flats]))

    def losses_and_gradient(self, rows: NDArray[np.int64], chain: int, step: int) -> Tensor:
        """Return the losses of some rows, and leave the gradient of their mean in ``grad``.

        A microbatch at a time, where the run has any: then no more than one of them is in memory.
        """
        pieces, parts = self._pieces(rows), []
        for number, piece in enumerate(pieces):
            losses = self.losses(self.batch(piece), chain, step, number)
            self.backward(losses, len(piece) / len(rows), first=not number)
            parts.append(losses.detach())
        return self._together(parts, pieces)

    @torch.no_grad()
    def losses_of_rows(self, rows: NDArray[np.int64], chain: int = 0, step: int = 0) -> Tensor:
        """Return the losses of some rows, without a gradient: per example, or their mean."""
        pieces = self._pieces(rows)
        parts = [
            self.losses(self.batch(piece), chain, step, number)
            for number, piece in enumerate(pieces)
        ]
        return self._together(parts, pieces)

    def backward(self, losses: Tensor, share: float = 1.0, first: bool = True) -> None:
        """Leave the gradient of the mean loss in the flat tensors' ``grad``.

        The mean enters as the weight of each loss: autograd need not walk through it. Of a batch in
        pieces, ``share`` is the part in this one, and all but the ``first`` add to the gradient.
        """
        for flat in self.flats if first else ():
            flat.grad.zero_()  # type: ignore[union-attr]  # made in _flatten, never dropped
        losses.backward(torch.full_like(losses, share / losses.numel()))  # type: ignore[no-untyped-call]

    def losses(
        self, batch: object, chain: int = 0, step: int = 0, piece: int = 0, exact: bool = False
    ) -> Tensor:
        """Return the losses of a batch on this device: shape (examples,), or () for a batch mean.

        What the model draws at random is a function of (seed, chain, step, piece); what a forward
        pass moves (batch-norm statistics, caches) is put back. ``piece`` numbers the microbatches;
        ``exact`` means full precision, not compiled, as a double backward needs it.
        """
        losses = self.raw_losses(batch, chain, step, piece, exact)
        single = self._spec.per_example and not losses.ndim  # one example, its dimension dropped
        return losses.reshape(1) if single else losses

    def raw_losses(
        self, batch: object, chain: int = 0, step: int = 0, piece: int = 0, exact: bool = False
    ) -> Tensor:
        """Return what the loss gives for a batch, whatever its shape; see ``losses``."""
        loss = self._spec.loss if exact else self._loss
        if self._plain:
            return loss(self.model, batch)
        return self._guarded(loss, batch, chain, step, piece)

    def _guarded(self, loss: LossFn, batch: object, *place: int) -> Tensor:
        """The losses of a batch, where model or loss need more than a call."""
        kind, recording = self._spec.kind, torch.is_grad_enabled()
        if kind.changes_batch:
            batch = map_tensors(torch.clone, batch)
        with contextlib.ExitStack() as stack:
            if kind.needs_graph:
                stack.enter_context(torch.enable_grad())
            if kind.stochastic:
                stack.enter_context(self._seeded(*place))
            if not self._pure:
                stack.enter_context(self._put_back())
            losses = loss(self.model, batch)
        return losses if recording else losses.detach()

    def evaluate(
        self, function: Callable[[nn.Module, object], object], batch: object, chain: int, step: int
    ) -> object:
        """Return what any function of model and batch returns, seeded like a loss."""
        if self._spec.kind.changes_batch:
            batch = map_tensors(torch.clone, batch)
        with self._seeded(chain, step), self._put_back():
            return function(self.model, batch)

    def _pieces(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """What goes through the model at once."""
        size = self._spec.config.microbatch or len(rows)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _together(self, parts: list[Tensor], pieces: list[NDArray[np.int64]]) -> Tensor:
        """The losses of all pieces as those of one batch."""
        if len(parts) == 1:
            return parts[0]
        if self._spec.per_example:
            return torch.cat(parts)
        sizes = torch.tensor([len(piece) for piece in pieces], device=self.device)
        return (torch.stack(parts) * sizes).sum() / sizes.sum()

    def _seeded(self, *place: int) -> contextlib.AbstractContextManager[None]:
        """A seeded global generator; place: chain, step and number of the microbatch."""
        return seeded_globally(self.device, step_seed(self._spec.config.seed, *place))

    @contextlib.contextmanager
    def _put_back(self) -> Iterator[None]:
        """Let the forward pass move copies: the backward pass may still need the ones it used."""
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer.clone()
        yield
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        if self._attributes is not None:
            self._attributes.put_back()


def _left_as_they_are() -> None:
    """Do nothing: parameters that move stay in the flat tensors."""


def view_like(parameter: Tensor, home: Tensor, start: int) -> Tensor:
    """Return the part of a flat tensor that belongs to a parameter, in its shape and strides.

    ``start`` is its place there; of a stack, (lanes, d), the part of all lanes is returned.
    """
    lanes, steps = home.shape[:-1], home.stride()[:-1]
    place = home.storage_offset() + start
    return home.as_strided((*lanes, *parameter.shape), (*steps, *parameter.stride()), place)


def _flatten(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Move parameters and gradients, memory format and all, into one flat leaf for each dtype."""
    flats = []
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        members = [p for p in parameters if p.dtype == dtype]
        size = sum(p.numel() for p in members)
        flat = torch.empty(size, dtype=dtype, device=members[0].device, requires_grad=True)
        flat.grad = torch.zeros_like(flat)
        start = 0
        for p in members:
            dense = p.detach().clone(memory_format=torch.preserve_format)
            p.data = view_like(dense, flat.detach(), start).copy_(dense)
            p.grad = view_like(dense, flat.grad, start)
            start += p.numel()
        flats.append(flat)
    return flats
