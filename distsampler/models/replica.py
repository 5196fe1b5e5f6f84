"""A model to itself: a copy on its device, the parameters that move, the loss of a batch.

The recipe of it all is a ChainSpec: a frozen value that travels to wherever chains run.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distsampler.config import RunConfig
from distsampler.data.rows import Rows, map_tensors, taker
from distsampler.draws import Variable, WideVariable
from distsampler.errors import ConfigError
from distsampler.facts import Facts, Posterior
from distsampler.models.restriction import flat_masks, selected
from distsampler.models.sampler import facts_of, posterior_of
from distsampler.seeding import step_seed

LossFn = Callable[[nn.Module, object], Tensor]


@dataclass(frozen=True)
class ChainSpec:
    """All that a chain is made of, but its index.

    Args:
        model: at w*, never moved.
        rows: the data.
        loss: ``loss(model, batch)``: per-example losses or the batch mean.
        config: of the run.
        nbeta: inverse temperature times n.
        per_example: whether ``loss`` returns one value per example.
        stochastic: whether ``loss`` draws from torch's global generator (dropout).
        sampler: the class of the optimizer that moves the chain.
        metrics: names of what is recorded of the step behind each draw.
        observed: what the user's own observables give.
        run: the run's name, for dashboards and logs.
    """

    model: nn.Module
    rows: Rows
    loss: LossFn
    config: RunConfig
    nbeta: float
    per_example: bool
    stochastic: bool
    sampler: type[torch.optim.Optimizer]
    metrics: tuple[str, ...] = ()
    observed: tuple[Variable | WideVariable, ...] = ()
    run: str = "run"

    @property
    def posterior(self) -> Posterior:
        """The density that is sampled."""
        return posterior_of(self.config.sampler, self.nbeta)

    @property
    def facts(self) -> Facts:
        """What is known of the run before its first draw."""
        return facts_of(self.config.sampler, self.nbeta, len(self.rows))

    @property
    def coupled(self) -> bool:
        """Whether an example's loss depends on more than itself and the weights.

        On what the loss draws at random, or, by batch norm in mode "train", on its batch.
        """
        return self.stochastic or self.moves_buffers

    @property
    def moves_buffers(self) -> bool:
        """Whether a forward pass may move the model's buffers, as batch norm does."""
        return self.config.mode == "train" and any(True for _ in self.model.buffers())


class Replica:
    """A copy of the model, and its loss as a function of a batch.

    The parameters that move (``moving``), and their gradients, are views of one flat tensor (one
    for each dtype): what samples and measures them has one tensor to deal with, however many layers
    there are. ``masks`` has one boolean tensor for each of them, or is None where all entries move.

    Args:
        spec: the recipe; its model is copied, and stays as it is.
        device: where the copy lives.
    """

    def __init__(self, spec: ChainSpec, device: torch.device) -> None:
        self._spec, self.device = spec, device
        self._take = taker(spec.rows, device)
        self._loss = forward(spec.loss, spec.config, device)
        self.model = copy.deepcopy(spec.model).to(device)
        self.model.train(spec.config.mode == "train")
        names = selected(self.model, spec.config.restrict_to)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)
        moving = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.moving = list(moving.values())
        self.flats = _flatten(self.moving)
        self.masks = flat_masks(moving, spec.config.restrict_to, self.flats)
        self._buffers = [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if self.model.training and buffer is not None
        ]

    @torch.no_grad()
    def live_in(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Moves what moves into given memory: a lane of a stack, and one of its gradient.

        Args:
            weights: one tensor for each flat one, of its shape; the present weights go there.
            gradients: likewise.
        """
        for flat, home, gradient in zip(self.flats, weights, gradients, strict=True):
            before = int(flat.storage_offset())
            home.copy_(flat)
            flat.data, flat.grad = home, gradient
            for p in self.moving:
                if p.dtype == flat.dtype:
                    start = int(p.storage_offset()) - before
                    p.data = piece(home, p, start)
                    p.grad = piece(gradient, p, start)

    def losses_and_gradient(self, rows: NDArray[np.int64], chain: int, step: int) -> Tensor:
        """Losses of some rows, detached; the gradient of their mean is left in ``grad``.

        A microbatch at a time, where the run has any: then no more than one of them is in memory.
        """
        pieces = self._pieces(rows)
        if len(pieces) == 1:
            losses = self.losses(self.batch(rows), chain, step)
            self.gradient(losses)
            return losses.detach()
        found = []
        for flat in self.flats:
            flat.grad.zero_()  # type: ignore[union-attr]  # made in _flatten, never dropped
        for number, piece in enumerate(pieces):
            losses = self.losses(self.batch(piece), chain, step, number)
            share = len(piece) / len(rows)
            losses.backward(torch.full_like(losses, share / losses.numel()))  # type: ignore[no-untyped-call]
            found.append(losses.detach())
        return self._together(found, pieces)

    @torch.no_grad()
    def values(self, rows: NDArray[np.int64], chain: int = 0, step: int = 0) -> Tensor:
        """Losses of some rows, and nothing else: per example, or their mean."""
        pieces = self._pieces(rows)
        found = [
            self.losses(self.batch(piece), chain, step, number)
            for number, piece in enumerate(pieces)
        ]
        return self._together(found, pieces)

    def _pieces(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """What goes through the model at once."""
        size = self._spec.config.microbatch or len(rows)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _together(self, found: list[Tensor], pieces: list[NDArray[np.int64]]) -> Tensor:
        if len(found) == 1:
            return found[0]
        if self._spec.per_example:
            return torch.cat(found)
        sizes = torch.tensor([len(piece) for piece in pieces], device=self.device)
        return (torch.stack(found) * sizes).sum() / sizes.sum()

    def gradient(self, losses: Tensor) -> None:
        """Leaves the gradient of the mean loss in the flat tensors' ``grad``.

        The mean enters as the weight of each loss: autograd need not walk through it.
        """
        for flat in self.flats:
            flat.grad.zero_()  # type: ignore[union-attr]  # made in _flatten, never dropped
        share = torch.full_like(losses, 1 / losses.numel())
        losses.backward(share)  # type: ignore[no-untyped-call]

    def losses(
        self, batch: object, chain: int = 0, step: int = 0, piece: int = 0, exact: bool = False
    ) -> Tensor:
        """Losses of a batch on this device: shape (examples,), or () for a batch mean.

        What the model draws at random is a function of (seed, chain, step, piece); buffers that a
        train-mode forward pass moves (batch-norm statistics) are put back.

        Args:
            batch: as the loss takes it.
            chain: index.
            step: of the chain.
            piece: of the step's batch.
            exact: in full precision and not compiled: as a double backward needs it.
        """
        loss = self._spec.loss if exact else self._loss
        if not (self._spec.stochastic or self._buffers):
            return loss(self.model, batch)
        stochastic = self._spec.stochastic
        seeded = self._seeded(chain, step, piece) if stochastic else contextlib.nullcontext()
        with seeded, self._still_buffers():
            return loss(self.model, batch)

    def evaluate(
        self, function: Callable[[nn.Module, object], object], batch: object, chain: int, step: int
    ) -> object:
        """What any function of model and batch gives; what it draws at random is as for a loss."""
        with self._seeded(chain, step), self._still_buffers():
            return function(self.model, batch)

    def batch(self, rows: NDArray[np.int64]) -> object:
        """The batch of some rows, on this device."""
        return self._take(rows)

    @contextlib.contextmanager
    def _seeded(self, chain: int, step: int, piece: int = 0) -> Iterator[None]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(step_seed(self._spec.config.seed, chain, step, piece))
            yield

    @contextlib.contextmanager
    def _still_buffers(self) -> Iterator[None]:
        """Lets the forward pass move copies: the backward pass may still need the ones it used."""
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer.clone()
        yield
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer


def forward(loss: LossFn, config: RunConfig, device: torch.device) -> LossFn:
    """The loss as a run computes it: in which precision, compiled or not."""
    if config.compile:
        loss = torch.compile(loss, dynamic=False)
    if config.precision == "fp32":
        return loss

    def cast(model: nn.Module, batch: object) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            found = loss(model, batch)
        return found.float()

    return cast


def piece(home: Tensor, parameter: Tensor, start: int) -> Tensor:
    """What belongs to a parameter, in its shape and memory format.

    Args:
        home: a flat tensor, or a stack of them, (lanes, d): then a lane comes first.
        parameter: whose shape it is.
        start: the parameter's place in a flat tensor.
    """
    lanes, steps = home.shape[:-1], home.stride()[:-1]
    place = home.storage_offset() + start
    return home.as_strided((*lanes, *parameter.shape), (*steps, *parameter.stride()), place)


def _flatten(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Moves parameters, memory format and all, into one flat tensor for each dtype.

    Returns:
        Leaf tensors that share their memory, with a ``grad`` that shares the gradients'.
    """
    flats = []
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        members = [p for p in parameters if p.dtype == dtype]
        size = sum(p.numel() for p in members)
        flat = torch.empty(size, dtype=dtype, device=members[0].device, requires_grad=True)
        flat.grad = torch.zeros_like(flat)
        start = 0
        for p in members:
            dense = p.detach().clone(memory_format=torch.preserve_format)
            p.data = piece(flat.detach(), dense, start).copy_(dense)
            p.grad = piece(flat.grad, dense, start)
            start += p.numel()
        flats.append(flat)
    return flats


def inspect_loss(
    model: nn.Module, rows: Rows, loss: LossFn, mode: str, names: Container[str]
) -> tuple[bool, bool]:
    """Calls the loss once, on two examples, and leaves model and global generator as they were.

    Args:
        model: at w*.
        rows: the data.
        loss: as in ChainSpec.
        mode: "train" or "eval".
        names: of the parameters that move.

    Returns:
        Whether it gives one value per example, and whether it draws from the global generator.

    Raises:
        ConfigError: if it raises, gives another shape, or needs no gradient.
    """
    size = min(2, len(rows))
    device = next(model.parameters()).device
    batch = map_tensors(lambda tensor: tensor.to(device), rows.take(np.arange(size)))
    buffers = [buffer.clone() for buffer in model.buffers()]
    training = model.training
    still = [p for name, p in model.named_parameters() if p.requires_grad and name not in names]
    try:
        for p in still:
            p.requires_grad_(False)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.train(mode == "train")
            before = _generator_states(device)
            found = loss(model, batch)
            after = _generator_states(device)
    except Exception as error:
        raise ConfigError(
            f"loss(model, batch) must work on {size} examples, but it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(training)
        for p in still:
            p.requires_grad_()
        with torch.no_grad():
            for buffer, saved in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(saved)
    _check_loss(found, size)
    stochastic = not all(map(torch.equal, before, after))
    return found.ndim == 1, stochastic


def _check_loss(found: object, size: int) -> None:
    wanted = f"loss(model, batch) must return one value per example, shape ({size},), or a mean, ()"
    if not isinstance(found, Tensor):
        raise ConfigError(f"{wanted}: got {type(found).__name__}")
    if found.shape not in ((), (size,)):
        raise ConfigError(f"{wanted}: got shape {tuple(found.shape)}")
    if not found.requires_grad:
        raise ConfigError(
            "loss(model, batch) must depend on the parameters that move, by way of autograd: its "
            "result needs no gradient; remove no_grad, detach or item from it, or let others move "
            "(restrict_to)"
        )


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
