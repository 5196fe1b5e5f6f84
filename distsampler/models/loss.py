"""The user's loss function: what it returns, and in which precision a run calls it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

LossFn = Callable[[nn.Module, object], Tensor]
"""``loss(model, batch)``: one value per example, or the batch mean."""


class LossKind(NamedTuple):
    """What model and loss were seen to do (``inspection``); at first, what the simplest ones do."""

    per_example: bool = True  # gives one value per example, or else the batch mean
    stochastic: bool = False  # draws from torch's global generator, as dropout does
    coupled: bool = False  # what it gives for an example depends on the others of its batch
    needs_graph: bool = False  # must record a graph: it takes gradients itself
    moves_buffers: bool = False  # a forward pass moves buffers, in the mode of the run
    moves_attributes: bool = False  # a forward pass leaves in attributes what the next one reads
    changes_batch: bool = False  # changes the tensors of its batch, or takes some out
    least: int = 1  # examples that it must be given


SIMPLE = LossKind()


def in_precision(loss: LossFn, precision: str, device: torch.device) -> LossFn:
    """Return the loss, under autocast where the precision is "bf16"."""
    if precision == "fp32":
        return loss

    def cast(model: nn.Module, batch: object) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            losses = loss(model, batch)
        return losses.float()

    return cast


@contextlib.contextmanager
def seeded_globally(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Seed torch's global generators (None: leave their state), and restore them afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield
