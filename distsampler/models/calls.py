"""Calls of model and loss on a few rows, and what they show besides losses."""

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from distsampler.data.trees import as_bytes, map_tensors, tensors_of
from distsampler.errors import ConfigError
from distsampler.models.copies import Attributes
from distsampler.models.loss import ByToken, in_precision, seeded_globally
from distsampler.models.loss_values import MUST, Losses, RowSet
from distsampler.models.reach import (
    aliases,
    check_places,
    graph_of,
    moving_in,
    places_of,
    unreached,
)
from distsampler.models.replica import ChainSpec, Replica

FEW = 3  # rows of a batch that is kept for the next call
AWAY = 0.3  # noise that is added to each parameter, relative to its size


class Caller:
    """Calls model and loss, and keeps what their calls show besides losses."""

    def __init__(self, replica: Replica, spec: ChainSpec) -> None:
        self._replica, self._spec = replica, spec
        loss = spec.loss.checked if isinstance(spec.loss, ByToken) else spec.loss
        self._loss = in_precision(loss, spec.config.precision, replica.device)
        self._own = Attributes(replica.model)
        self._sizes = [self._own.size()]  # at first, and after the first call
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in replica.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._batches: dict[RowSet, object] = {}
        self.stochastic = set[str]()  # modes in which torch's generator is drawn from
        self.generators = set[str]()  # others that are drawn from
        self.moved_buffers = set[str]()  # in the mode of the run
        self.differing: tuple[str, RowSet] | None = None  # where two calls gave two values
        self.changes_batch = False
        self.low = False  # whether something on the way to the loss has low precision
        self._places = places_of(replica.model)
        self.calls_own: bool | None = None  # whether the user's own model is called; None: not seen
        self._unreached = dict[str, nn.Parameter]()
        self._leads = False  # whether the graph, or a gradient, leads to something that moves
        self._reached = False  # whether a gradient was not zero

    def losses(self, mode: str, every: list[RowSet], recorded: bool) -> Losses:
        """Return the losses of several sets of rows; a single row may not be possible.

        Raises:
            ConfigError: if the loss raises, or returns what is none.
        """
        losses = dict[RowSet, Tensor]()
        for rows in every:
            try:
                before = self.call(mode, rows, recorded) if recorded or len(rows) > 1 else None
                losses[rows] = self.call(mode, rows, recorded, restored=True)
                if before is not None and not same_bits(before, losses[rows]):
                    self.differing = self.differing or (mode, rows)
            except ConfigError:
                if len(rows) > 1 or (0, 1) not in losses:  # batch norm needs two
                    raise
        return losses

    def call(self, mode: str, rows: RowSet, recorded: bool, restored: bool = False) -> Tensor:
        """Return the losses of some rows, double, on the CPU.

        Args:
            mode: "train" or "eval".
            rows: numbers of the rows.
            recorded: whether a graph is recorded.
            restored: whether the model is first given back what calls before have changed in it.
        """
        model, device = self._replica.model.train(mode == "train"), self._replica.device
        if restored:
            self._own.put_back()
            model.train(mode == "train")
        batch = self._batch(rows)
        before = _generators()
        try:
            with torch.set_grad_enabled(recorded), seeded_globally(device, self._spec.config.seed):
                seeded = _torch_states(device)
                with self._watched():
                    losses = self._loss(model, batch)
                if not all(map(torch.equal, seeded, _torch_states(device))):
                    self.stochastic.add(mode)
                _check_type(losses, len(rows))
                if recorded and not self._reached:
                    self._check_gradient(losses)  # before buffers are put back, which it may need
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's code: anything can come
            raise ConfigError(
                f"loss(model, batch) must work on {_examples(rows)}, but it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        self._compare(mode, rows, batch, before)
        if len(rows) > FEW:
            del self._batches[rows]
        if not self._sizes[1:]:
            self._sizes.append(self._own.size())
        return losses.detach().double().cpu()

    def in_double(self, mode: str, every: list[RowSet]) -> Losses:
        """Return losses in double precision; the replica stays in it."""
        self._replica.model.double()
        self._batches = {
            rows: map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
            for rows, batch in self._batches.items()
        }
        self._loss = self._spec.loss
        return {rows: self.call(mode, rows, recorded=True) for rows in every if rows != (0, 1, 2)}

    def grows(self, mode: str, rows: RowSet) -> bool:
        """Return whether each call adds to a list or dict of the model."""
        if self._sizes[0] >= self._sizes[1]:
            return False
        sizes = list[int]()
        for _ in range(2):
            self.call(mode, rows, recorded=True)
            sizes.append(self._own.size())
        return sizes[0] < sizes[1]

    def check_kept(self) -> None:
        """Check that the calls have left the parameters that move where they were."""
        check_places(self._places, places_of(self._replica.model))

    def check_attributes(self, mode: str, rows: RowSet, losses: Tensor) -> None:
        """Check that nothing is read that the user's model shares with what moves, and copies not.

        Such an attribute is not a number here, and so are losses that read it.
        """
        if not any(aliases(self._spec.model, self._replica.model)):
            return
        self._own.put_back()
        shared = list(aliases(self._spec.model, self._replica.model))
        for _, _, tensor in shared:
            tensor.fill_(torch.nan)
        read = True
        with contextlib.suppress(ConfigError):
            read = bool(
                (losses.isfinite() & ~self.call(mode, rows, recorded=True).isfinite()).any()
            )
        self._own.put_back()
        if read:
            path, name, _ = shared[0]
            raise ConfigError(
                f"model.{path} must not share memory with the parameter {name!r}: a copy of the "
                "model would not have that, so that it would stay at w* while the parameter "
                "moves; compute it in forward()"
            )
        self.call(mode, rows, recorded=True)  # leaves in attributes what it did before

    def check_unreached(self, mode: str, rows: RowSet) -> None:
        """Check that the loss does not depend on what moves and has no gradient."""
        past, share = self._unreached, AWAY
        if not self._reached:  # all losses are flat here, or a layer lets no gradient through
            past, share = moving_in(self._replica.model), AWAY / 30
        if not past:
            return
        before = self.call(mode, rows, recorded=True, restored=True)
        move(past.values(), share)
        if same_bits(before, self.call(mode, rows, recorded=True, restored=True)):
            return  # on these rows it is not used, as an expert that is not asked
        names = list(past)
        raise ConfigError(
            "what moves must have a gradient where the loss depends on it, but the loss depends on "
            f"{names[0]!r}{f' and {len(names) - 1} others' if names[1:] else ''} past autograd "
            "(no_grad, detach, argmax, a quantised layer): freeze what shall stay with "
            "requires_grad_(False) or restrict_to, or let the gradient through"
        )

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """See whether the first call calls parts of the user's own model."""
        if self.calls_own is not None:
            yield
            return
        own, self.calls_own = set(self._spec.model.modules()), False

        def see(module: nn.Module, _: object) -> None:
            self.calls_own = self.calls_own or module in own

        with register_module_forward_pre_hook(see):
            yield

    def _batch(self, rows: RowSet) -> object:
        """A batch that nobody has changed."""
        if rows not in self._batches:
            self._batches[rows] = self._replica.batch(np.array(rows))
        return map_tensors(torch.clone, self._batches[rows])

    def _compare(self, mode: str, rows: RowSet, batch: object, before: dict[str, object]) -> None:
        """Keep what a call has changed besides losses, and put buffers back."""
        tensors, own = tensors_of(batch), tensors_of(self._batches[rows])
        same = len(tensors) == len(own) and all(map(same_bits, tensors, own))
        self.changes_batch = self.changes_batch or not same
        for name, state in _generators().items():
            if state != before[name]:
                self.generators.add(name)
        for module, name, buffer, value in self._buffers:
            now = module._buffers.get(name)
            if now is buffer and same_bits(buffer, value):
                continue
            if mode == self._spec.config.mode:
                self.moved_buffers.add(name)
            module._buffers[name] = buffer
            buffer.data = value.clone()  # a forward pass may have given it another shape

    def _check_gradient(self, losses: Tensor) -> None:
        """Check that the gradient reaches something that moves, and nothing of the user's own."""
        if not losses.requires_grad:
            raise ConfigError(
                "loss(model, batch) must depend on the parameters that move, by way of autograd: "
                "its result needs no gradient; remove no_grad, detach or item from it, or let "
                "others move (restrict_to)"
            )
        graph, model = graph_of(losses), self._replica.model
        if not graph.leaves.isdisjoint(map(id, self._spec.model.parameters())):
            raise ConfigError(
                "loss(model, batch) must use the model that it is given, a copy for each chain, "
                "but it uses your own: call its argument (a lambda or closure in the model or the "
                "loss may hold the other one)"
            )
        self.low, self._unreached = graph.low, unreached(model, graph)
        leads = not graph.leaves.isdisjoint(map(id, self._replica.moving))
        if not leads and not graph.opaque:
            self.check_reached()
        try:
            self._replica.backward(losses)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the user's code: anything can come
            raise ConfigError(
                "the gradient of loss(model, batch) must exist, but backward() raised "
                f"{type(error).__name__}: {error}"
            ) from error
        check_places(self._places, places_of(model))
        gradients = (flat.grad for flat in self._replica.flats if flat.grad is not None)
        self._reached = any(bool(gradient.any()) for gradient in gradients)
        self._leads = self._leads or leads or self._reached

    def check_reached(self) -> None:
        """Check that a gradient has reached something that moves, in one of the calls at least."""
        if not self._leads:
            raise ConfigError(
                "loss(model, batch) must depend on the parameters that move, but its gradient "
                "reaches none of them: call the model that is its argument, or let others move "
                "(restrict_to)"
            )


@torch.no_grad()
def move(parameters: Iterable[Tensor], share: float = AWAY) -> None:
    """Move weights away from w*, each parameter by a part of its size."""
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        noise = torch.randn(p.shape, generator=generator).to(p)
        size = p.double().square().mean().sqrt()
        p.add_(noise * float(share * size if size > 0 else share / 10))


def _check_type(losses: object, size: int) -> None:
    if not isinstance(losses, Tensor):
        raise ConfigError(f"{MUST.format(size)}: got {type(losses).__name__}")
    if not losses.is_floating_point():
        raise ConfigError(f"{MUST.format(size)}, of real numbers: got {losses.dtype}")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(as_bytes(one), as_bytes(other))


def _examples(rows: RowSet) -> str:
    return f"{len(rows)} example{'s' if len(rows) > 1 else ''}"


def _torch_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _generators() -> dict[str, object]:
    """States of the generators that a run does not seed."""
    kind, keys, *rest = np.random.get_state()
    return {
        "numpy.random": (kind, np.asarray(keys).tobytes(), *rest),
        "Python's random": random.getstate(),
    }
