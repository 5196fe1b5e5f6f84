"""The user's loss function: what it returns, and in which precision a run calls it."""

import contextlib
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distsampler.data.rows import Rows
from distsampler.data.trees import to_device
from distsampler.errors import ConfigError

LossFn = Callable[[nn.Module, object], Tensor]
"""``loss(model, batch)``: one value per example, or the batch mean."""


class LossKind(NamedTuple):
    """What a loss function was seen to do."""

    per_example: bool  # returns one value per example
    stochastic: bool  # draws from torch's global generator, as dropout does


def in_precision(loss: LossFn, precision: str, device: torch.device) -> LossFn:
    """Return the loss, under autocast where the precision is "bf16"."""
    if precision == "fp32":
        return loss

    def cast(model: nn.Module, batch: object) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            losses = loss(model, batch)
        return losses.float()

    return cast


def inspect_loss(
    model: nn.Module, rows: Rows, loss: LossFn, mode: str, moving: Container[str]
) -> LossKind:
    """Call the loss once, on two examples, and return what it does; the model stays as it was.

    ``moving`` has the names of the parameters that move.
    """
    size = min(2, len(rows))
    device = next(model.parameters()).device
    batch = to_device(rows.take(np.arange(size)), device)
    try:
        with _borrowed(model, mode, moving), seeded_globally(device):
            before = _generator_states(device)
            losses = loss(model, batch)
            stochastic = not all(map(torch.equal, before, _generator_states(device)))
    except Exception as error:
        raise ConfigError(
            f"loss(model, batch) must work on {size} examples, but it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    _check_losses(losses, size)
    return LossKind(losses.ndim == 1, stochastic)


@contextlib.contextmanager
def seeded_globally(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Seed torch's global generators (None: leave their state), and restore them afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _borrowed(model: nn.Module, mode: str, moving: Container[str]) -> Iterator[None]:
    """The model in a mode, with gradients of what moves alone; restored afterwards."""
    training = model.training
    buffers = [buffer.clone() for buffer in model.buffers()]
    fixed = [p for name, p in model.named_parameters() if p.requires_grad and name not in moving]
    try:
        for p in fixed:
            p.requires_grad_(False)
        model.train(mode == "train")
        yield
    finally:
        model.train(training)
        for p in fixed:
            p.requires_grad_()
        with torch.no_grad():
            for buffer, saved in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(saved)


def _check_losses(losses: object, size: int) -> None:
    must = f"loss(model, batch) must return one value per example, shape ({size},), or a mean, ()"
    if not isinstance(losses, Tensor):
        raise ConfigError(f"{must}: got {type(losses).__name__}")
    if losses.shape not in ((), (size,)):
        raise ConfigError(f"{must}: got shape {tuple(losses.shape)}")
    if not losses.requires_grad:
        raise ConfigError(
            "loss(model, batch) must depend on the parameters that move, by way of autograd: its "
            "result needs no gradient; remove no_grad, detach or item from it, or let others move "
            "(restrict_to)"
        )


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
