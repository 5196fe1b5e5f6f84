"""What model and loss do is seen before a run, by calling them on a few rows: ``inspect_loss``.

They are called on a replica, away from w*, where no loss is zero by perfection: on the rows {0, 1},
{0, 1, 2}, {0} and {1}, in mode "eval" and in that of the run, with and without a graph; and twice,
once as the calls before have left the model, and once as the user gave it. What cannot be sampled
is a ConfigError; what can, but is not what it seems, is a note.
"""

import contextlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distsampler.data.trees import as_bytes, map_tensors, tensors_of
from distsampler.errors import ConfigError
from distsampler.models.copies import Attributes
from distsampler.models.loss import LossKind, in_precision, seeded_globally
from distsampler.models.loss_values import (
    MUST,
    Judged,
    Losses,
    RowSet,
    agree,
    is_per_example,
    judge,
    largest,
)
from distsampler.models.replica import ChainSpec, Replica

AWAY = 0.3  # noise that is added to each parameter, relative to its size
ROWS: tuple[RowSet, ...] = ((0, 1), (0, 1, 2), (0,), (1,))
TINY = 1e-3  # losses below are compared in double precision, before anything is made of them
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative difference, of losses
ROUGH = 0.1  # likewise, in lower precision
UNREPEATABLE = (
    "two runs of one seed differ, and what a fault has lost is made again with other numbers"
)


def inspect_loss(replica: Replica, spec: ChainSpec) -> tuple[LossKind, tuple[str, ...]]:
    """Return what model and loss do, and what a user should know of it, in sentences.

    The replica is not at w* afterwards.

    Raises:
        ConfigError: if this loss cannot be sampled.
    """
    inspection = _Inspection(replica, spec)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        kind = inspection.kind()
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    return kind, tuple(inspection.notes)


class _Inspection:
    def __init__(self, replica: Replica, spec: ChainSpec) -> None:
        self._replica, self._spec, self._mode = replica, spec, str(spec.config.mode)
        self._caller = _Caller(replica, spec)
        self._rows = [rows for rows in ROWS if max(rows) < len(spec.rows)]
        lowest = min((flat.dtype for flat in replica.flats), key=lambda dtype: dtype.itemsize)
        low = spec.config.precision != "fp32" or torch.get_float32_matmul_precision() != "highest"
        self._tolerance = ROUGH if low else ROUNDING.get(lowest, ROUGH)
        self.notes = list[str]()
        self._unrepeatable = False  # whether the same call does not give the same loss

    def kind(self) -> LossKind:
        """Call model and loss, and return what they do."""
        recorded, unrecorded = self._losses()
        in_mode, caller = recorded[self._mode], self._caller
        per_example, moves_attributes = is_per_example(in_mode), self._moves_attributes()
        alike = not (self._unrepeatable or self._spec.rows.varies)  # calls can be compared
        judged = self._judged(recorded) if alike else Judged()
        if judged.refusal:
            raise ConfigError(judged.refusal)
        batches = f"batches of {self._spec.config.batch_size} examples"
        if judged.note:
            self.notes.append(judged.note.format(batches=batches))
        elif self._is_normed(in_mode):
            self.notes.append(
                f"in mode {self._mode!r} the loss of an example depends on the others of its batch "
                f"(batch norm does that): the LLC is that of {batches}; mode='eval' takes the "
                "statistics that the model has"
            )
        return LossKind(
            per_example=per_example,
            stochastic=self._mode in caller.stochastic,
            coupled=judged.coupled,
            needs_graph=self._needs_graph(in_mode, unrecorded),
            moves_buffers=self._moves_buffers(),
            moves_attributes=moves_attributes,
            changes_batch=caller.changes_batch,
            least=2 if (0, 1) in in_mode and (0,) not in in_mode else 1,
        )

    def _losses(self) -> tuple[dict[str, Losses], Losses | None]:
        """Losses with a graph, by mode, and in the run's mode without one; None: not possible."""
        replica = self._replica
        weights = [flat.detach().clone() for flat in replica.flats]
        first = self._caller.call(self._mode, self._rows[0], recorded=True)
        _move(replica)
        try:
            losses = self._all_losses()
            if largest(losses[0][self._mode]) > 0 or not first.isfinite().all():
                return losses
        except ConfigError:
            pass  # the loss may not be defined there: then it must be at w*
        with torch.no_grad():
            torch._foreach_copy_(replica.flats, weights)
        return self._all_losses()

    def _all_losses(self) -> tuple[dict[str, Losses], Losses | None]:
        caller, sums = self._caller, _sums(self._replica.model)
        recorded = {self._mode: caller.losses(self._mode, self._rows, recorded=True)}
        unrecorded = None
        with contextlib.suppress(ConfigError):  # a loss that takes gradients itself
            unrecorded = caller.losses(self._mode, self._rows, recorded=False)
        if self._mode != "eval":
            with contextlib.suppress(ConfigError):  # a model that gives something else then
                recorded["eval"] = caller.losses("eval", self._rows, recorded=True)
        for name, value in _sums(self._replica.model).items():
            if value != sums.get(name):
                raise ConfigError(
                    f"a forward pass must leave the weights as they are, but it changes {name!r}: "
                    "keep what it computes in a buffer or a variable of its own"
                )
        return recorded, unrecorded

    def _judged(self, recorded: dict[str, Losses]) -> Judged:
        """What examples have to do with each other, where nothing is dropped or normed by batch."""
        mode = "eval" if "eval" in recorded else self._mode
        if mode in self._caller.stochastic:
            return Judged()  # each call draws other numbers for the same example
        judged = judge(recorded[mode], self._tolerance)
        if judged == Judged() or largest(recorded[mode]) > TINY:
            return judged
        try:  # of losses as small, rounding in the logits is a large part
            return judge(self._caller.in_double(mode, self._rows), ROUNDING[torch.float64])
        except Exception:  # the user's code, in a precision that it was not written for
            return Judged()

    def _is_normed(self, in_mode: Losses) -> bool:
        """Whether examples touch each other in the mode of the run, though not in themselves."""
        if self._mode == "eval" or self._unrepeatable:
            return False
        layers = (isinstance(each, _BatchNorm) for each in self._replica.model.modules())
        random = self._mode in self._caller.stochastic
        return any(layers) or (not random and judge(in_mode, self._tolerance).coupled)

    def _needs_graph(self, recorded: Losses, unrecorded: Losses | None) -> bool:
        """Whether losses must be measured with a graph, to be those whose gradient is taken."""
        if unrecorded is None:
            return True
        if self._unrepeatable or agree(recorded, unrecorded, self._tolerance):
            return False
        self.notes.append(
            "the loss has other values under torch.no_grad() than with a graph "
            f"({largest(unrecorded):.6g} and {largest(recorded):.6g} at most, on the same "
            "examples): it is measured with one, as its gradient is"
        )
        return True

    def _moves_buffers(self) -> bool:
        names = sorted(self._caller.moved_buffers)
        if names and self._mode == "eval":
            self.notes.append(
                f"a forward pass changes the buffer {names[0]!r} of the model in mode 'eval'"
                f"{' and others' if len(names) > 1 else ''}: it is put back after each"
            )
        return bool(names)

    def _moves_attributes(self) -> bool:
        """Whether calls in a row differ because of what the model keeps; a note of any other."""
        caller = self._caller
        if caller.generators:
            names = " and ".join(sorted(caller.generators))
            self.notes.append(
                f"the loss draws from {names}, which a run does not seed: {UNREPEATABLE}; draw "
                "from torch's own generator, which every chain seeds (torch.rand without "
                "generator=)"
            )
            self._unrepeatable = True
            return False
        if caller.differing is None:
            return False
        mode, rows = caller.differing
        one, two = (caller.call(mode, rows, recorded=True, restored=True) for _ in range(2))
        if _same(one, two):
            self.notes.append(
                "a forward pass leaves something in the model that changes the next one (a cache "
                "or a counter): every pass starts from what the model had at first"
            )
            return True
        self.notes.append(
            f"the loss gives {float(one.mean()):.6g} and then {float(two.mean()):.6g} for the same "
            "examples, weights and seed: it draws from a generator of its own, or keeps a state "
            f"outside of the model; {UNREPEATABLE}; draw from torch's own generator, which every "
            "chain seeds, and keep states in the model's buffers"
        )
        self._unrepeatable = True
        return False


class _Caller:
    """Calls model and loss, and keeps what their calls show besides losses."""

    def __init__(self, replica: Replica, spec: ChainSpec) -> None:
        self._replica, self._spec = replica, spec
        self._loss = in_precision(spec.loss, spec.config.precision, replica.device)
        self._own = Attributes(replica.model)
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
        self._reached = False

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
                if before is not None and not _same(before, losses[rows]):
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
                losses = self._loss(model, batch)
                if not all(map(torch.equal, seeded, _torch_states(device))):
                    self.stochastic.add(mode)
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's code: anything can come
            raise ConfigError(
                f"loss(model, batch) must work on {_examples(rows)}, but it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        self._compare(mode, rows, batch, before)
        _check_type(losses, len(rows))
        if recorded and not self._reached:
            self._check_gradient(losses)
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

    def _batch(self, rows: RowSet) -> object:
        """A batch that nobody has changed."""
        if rows not in self._batches:
            self._batches[rows] = self._replica.batch(np.array(rows))
        return map_tensors(torch.clone, self._batches[rows])

    def _compare(self, mode: str, rows: RowSet, batch: object, before: dict[str, object]) -> None:
        """Keep what a call has changed besides losses, and put buffers back."""
        tensors, own = tensors_of(batch), tensors_of(self._batches[rows])
        same = len(tensors) == len(own) and all(map(_same, tensors, own))
        self.changes_batch = self.changes_batch or not same
        for name, state in _generators().items():
            if state != before[name]:
                self.generators.add(name)
        for module, name, buffer, value in self._buffers:
            now = module._buffers.get(name)
            if now is buffer and _same(buffer, value):
                continue
            if mode == self._spec.config.mode:
                self.moved_buffers.add(name)
            module._buffers[name] = buffer
            buffer.copy_(value)

    def _check_gradient(self, losses: Tensor) -> None:
        """Check that the gradient reaches something that moves, and nothing of the user's own."""
        if not losses.requires_grad:
            raise ConfigError(
                "loss(model, batch) must depend on the parameters that move, by way of autograd: "
                "its result needs no gradient; remove no_grad, detach or item from it, or let "
                "others move (restrict_to)"
            )
        leaves, opaque = _leaves(losses)
        if not leaves.isdisjoint(map(id, self._spec.model.parameters())):
            raise ConfigError(
                "loss(model, batch) must use the model that it is given, a copy for each chain, "
                "but it uses your own: call its argument (a lambda or closure in the model or the "
                "loss may hold the other one)"
            )
        moving = set(map(id, self._replica.moving))
        if leaves.isdisjoint(moving) and not (opaque and self._has_gradient(losses)):
            raise ConfigError(
                "loss(model, batch) must depend on the parameters that move, but its gradient "
                "reaches none of them: call the model that is its argument, or let others move "
                "(restrict_to)"
            )
        self._reached = True

    def _has_gradient(self, losses: Tensor) -> bool:
        self._replica.backward(losses)
        return any(bool(flat.grad.any()) for flat in self._replica.flats if flat.grad is not None)


def _check_type(losses: object, size: int) -> None:
    if not isinstance(losses, Tensor):
        raise ConfigError(f"{MUST.format(size)}: got {type(losses).__name__}")
    if not losses.is_floating_point():
        raise ConfigError(f"{MUST.format(size)}, of real numbers: got {losses.dtype}")


def _leaves(losses: Tensor) -> tuple[set[int], bool]:
    """What the gradient reaches (their ids), and whether a function may hide more of it."""
    leaves, opaque, seen, todo = set[int](), False, set[Any](), [losses.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        opaque = opaque or isinstance(node, torch.autograd.function.BackwardCFunction)
        todo += [following for following, _ in node.next_functions]
    return (leaves | {id(losses)} if losses.is_leaf else leaves), opaque


@torch.no_grad()
def _move(replica: Replica) -> None:
    """Move the weights away from w*, each parameter by a part of its size."""
    generator = torch.Generator().manual_seed(0)
    for p in replica.moving:
        noise = torch.randn(p.shape, generator=generator).to(p)
        size = p.double().square().mean().sqrt()
        p.add_(noise * float(AWAY * size if size > 0 else AWAY / 10))


def _sums(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What tells whether a parameter has changed: which one it is, and a sum over its bytes."""
    return {
        name: (id(p), int(as_bytes(p).sum(dtype=torch.int64)))
        for name, p in model.named_parameters()
    }


def _same(one: Tensor, other: Tensor) -> bool:
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
