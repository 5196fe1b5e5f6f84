"""The loss of a causal language model: of each token, and of each sequence.

The loss of token s + 1 is ``-log p(x_{s+1} | x_1 ... x_s)``, in nats. What a model returns is read
by its form, not by its class: any causal language model of transformers, and a user's own.
"""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from distsampler.data.tokens import IGNORED, MASK, POSITIONS, column, counted, predicted, token_ids
from distsampler.errors import ConfigError


def token_losses(model: nn.Module, batch: object) -> Tensor:
    """Return the loss of each token, (batch, length - 1), in nats, at least float32.

    Column s is the loss of predicting token s + 1 from those before it. It is NaN where that token
    does not count: padding (``attention_mask`` 0), a label of -100, the first token of a sequence.

    Args:
        model: returns logits (batch, length, vocabulary), a tuple whose first entry they are, or
            an object with ``logits``, as the models of transformers do.
        batch: token ids, (batch, length); or a mapping with ``input_ids`` and, where needed,
            ``attention_mask``, ``labels`` (what is predicted, where it is not the ids; not
            shifted) and ``position_ids``, all of that shape. Sequences may be padded left or right.

    Raises:
        ConfigError: if the batch or what the model returns has another form.

    Example:
        >>> ids = torch.tensor([[3, 1, 2]])
        >>> token_losses(nn.Embedding(4, 4), ids).shape  # a model of pairs
        torch.Size([1, 2])
    """
    counts = counted(batch)
    return _losses(model, batch, counts).masked_fill(~counts, torch.nan)


def sequence_losses(model: nn.Module, batch: object) -> Tensor:
    """Return the mean loss over the tokens of each sequence that count, (batch,), in nats.

    A sequence without any has NaN. Arguments and errors are those of ``token_losses``.
    """
    counts = counted(batch)
    return _losses(model, batch, counts).sum(1) / counts.sum(1)


def _losses(model: nn.Module, batch: object, counts: Tensor) -> Tensor:
    """The loss of each token; 0 where it does not count."""
    ids = token_ids(batch)
    logits = _logits(model, batch)
    if logits.shape[:2] != ids.shape or logits.ndim != 3:
        raise ConfigError(
            "a language model must return logits of shape (batch, length, vocabulary), for these "
            f"ids ({len(ids)}, {ids.shape[1]}, ...), got {tuple(logits.shape)}"
        )
    targets = predicted(batch).masked_fill(~counts, IGNORED)
    # The last position predicts nothing: left out of the logits, it would cost a copy of them.
    targets = pad(targets, (0, 1), value=IGNORED)
    low = logits.dtype.itemsize < 4
    parts = zip(logits if low else [logits], targets if low else [targets], strict=True)
    losses = [
        cross_entropy(
            (part.float() if low else part).flatten(end_dim=-2),
            target.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        for part, target in parts
    ]
    return torch.cat(losses).view(ids.shape)[:, :-1]


def _logits(model: nn.Module, batch: object) -> Tensor:
    """What a model returns for a batch, whatever it is wrapped in."""
    ids, mask, asked = token_ids(batch), column(batch, MASK), column(batch, POSITIONS)
    positions = asked
    if positions is None and mask is not None:
        positions = _counted_positions(mask)
    options = {MASK: mask, POSITIONS: positions, "use_cache": False}
    parameters = inspect.signature(_inner(model).forward).parameters
    known = options.keys() & parameters
    if not known and any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        known = {MASK, POSITIONS}  # a module around another, which passes on what it gets
    taken = {name: value for name, value in options.items() if name in known and value is not None}
    if mask is not None and MASK not in taken:
        _check_padding(mask)
    if asked is not None and POSITIONS not in taken:
        _check_positions(asked, mask if mask is not None else torch.ones_like(ids))
    output = model(ids if ids.dtype == torch.int32 else ids.long(), **taken)
    logits = output[0] if isinstance(output, tuple | list) and output else output
    logits = logits.get("logits") if isinstance(logits, Mapping) else logits
    logits = getattr(logits, "logits", logits)
    if isinstance(logits, Tensor):
        return logits
    raise ConfigError(
        "a language model must return logits, a tuple whose first entry they are, or an object "
        f"with .logits, got {_named(output)}: give the model with its head, such as "
        "AutoModelForCausalLM"
    )


def _counted_positions(mask: Tensor) -> Tensor:
    """The place of each token among those of its sequence that are no padding."""
    return ((mask != 0).long().cumsum(1) - 1).clamp_min(0)


def _is_true(condition: Tensor) -> bool:
    """Whether any entry is; False in a pack or a compiled loss, whose values cannot be asked for.

    At w* every loss was called outside both.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(condition.any())
    except RuntimeError:
        return False


def _check_positions(asked: Tensor, mask: Tensor) -> None:
    """Check that a model that takes no positions needs none: those asked for are counted ones."""
    if _is_true((asked != _counted_positions(mask)) & (mask != 0)):
        raise ConfigError(
            f"a model must take {POSITIONS} where a batch has them, and this one's forward() does "
            "not name it: leave them out, or give sequences whose positions are counted from "
            "their first token"
        )


def _check_padding(mask: Tensor) -> None:
    """Check that a model that takes no mask reads no padding before a token."""
    real = mask != 0
    if _is_true(real[:, 1:] & ~real[:, :-1]):
        raise ConfigError(
            f"a model must take {MASK} where sequences are padded on the left, or it reads the "
            "padding as text, and this one's forward() does not name it: pad on the right, or let "
            f"forward(input_ids, {MASK}) mask it"
        )


def _inner(model: nn.Module) -> nn.Module:
    """The model whose forward() names what it takes: adapters and torch.compile pass it on."""
    base = getattr(model, "get_base_model", None)
    inner: nn.Module = base() if callable(base) else getattr(model, "_orig_mod", model)
    return inner


def _named(output: object) -> str:
    names = f" with {', '.join(output)}" if isinstance(output, Mapping) else ""
    return type(output).__name__ + names
