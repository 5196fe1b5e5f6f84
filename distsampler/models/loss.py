"""The user's loss function: what it returns, and in which precision a run calls it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distsampler.data.tokens import counted
from distsampler.errors import ConfigError

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


@dataclass(frozen=True)
class ByToken:
    """The loss of examples of which every token weighs the same: for n="tokens".

    Of example i it is ``sum_s l_is / c``: s runs over its tokens that count, c is how many do in an
    example of the data, in the mean. So the mean over any batch that is drawn uniformly has the
    expectation ``sum_is l_is / tokens``, the mean over all tokens.
    """

    per_token: (
        LossFn  # ``loss(model, batch)``: (batch, positions), NaN where a token is not counted
    )
    tokens: int  # that count, in all data
    examples: int

    def __call__(self, model: nn.Module, batch: object) -> Tensor:
        """Return the loss of each example, (batch,)."""
        losses, counts = self._losses(model, batch)
        # Not nansum: where a token counts, NaN must stay NaN.
        return losses.masked_fill(~counts, 0.0).sum(1) / (self.tokens / self.examples)

    def checked(self, model: nn.Module, batch: object) -> Tensor:
        """Return the same; that the loss is NaN where it must be, and nowhere else, is checked."""
        losses, counts = self._losses(model, batch)
        if wrong := (losses.isnan() == counts).nonzero().tolist():
            row, column = wrong[0]
            got = float(losses[row, column].detach())
            raise ConfigError(
                "with n='tokens' the loss must be NaN where a token does not count (it or the one "
                "before it is padding by attention_mask, or its label is -100), and nowhere else, "
                f"but for token {column + 1} of an example, which "
                f"{'counts' if counts[row, column] else 'does not count'}, it is {got:.6g}: give "
                "ds.lm.token_losses, or mask as it does"
            )
        return self(model, batch)

    def _losses(self, model: nn.Module, batch: object) -> tuple[Tensor, Tensor]:
        losses, counts = self.per_token(model, batch), counted(batch)
        if isinstance(losses, Tensor) and losses.shape == counts.shape:
            return losses, counts
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(
            "with n='tokens' the loss must return one value per token that is predicted, shape "
            f"(batch, length - 1), here {tuple(counts.shape)}, got {shape}: give "
            "ds.lm.token_losses, or leave n='tokens' out"
        )


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
