"""What model and loss do is seen before a run, by calling them on a few rows: ``inspect_loss``.

They are called on a replica, away from w*, where no loss is zero by perfection: on the rows {0, 1},
{0, 1, 2}, {0} and {1}, in mode "eval" and in that of the run, with and without a graph; and twice,
once as the calls before have left the model, and once as the user gave it. At last they are called
on one batch of the run's size, and on its halves. What cannot be sampled is a ConfigError; what
can, but is not what it seems, is a note.
"""

import contextlib
import random

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distsampler.data.trees import as_bytes
from distsampler.errors import ConfigError
from distsampler.models.calls import Caller, move, same_bits
from distsampler.models.loss import LossKind
from distsampler.models.loss_values import (
    Interplay,
    Losses,
    RowSet,
    agree,
    interplay,
    interplay_in_batch,
    is_per_example,
    largest,
)
from distsampler.models.replica import ChainSpec, Replica

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
        self._caller = Caller(replica, spec)
        self._rows = [rows for rows in ROWS if max(rows) < len(spec.rows)]
        lowest = min((flat.dtype for flat in replica.flats), key=lambda dtype: dtype.itemsize)
        rough = spec.config.precision != "fp32" or torch.get_float32_matmul_precision() != "highest"
        self._rounding = ROUGH if rough else ROUNDING.get(lowest, ROUGH)
        self.notes = list[str]()
        self._unrepeatable = False  # whether the same call does not give the same loss

    @property
    def _tolerance(self) -> float:
        """What rounding may make of the same loss, relative to the largest."""
        return ROUGH if self._caller.low else self._rounding

    def kind(self) -> LossKind:
        """Call model and loss, and return what they do."""
        recorded, unrecorded = self._losses()
        in_mode, caller = recorded[self._mode], self._caller
        per_example, moves_attributes = is_per_example(in_mode), self._moves_attributes()
        if not self._unrepeatable:
            caller.check_unreached(self._mode, self._rows[0])
        if caller.calls_own:
            self.notes.append(
                "loss(model, batch) calls your own model beside its argument, without a gradient: "
                "what comes from there stays as it is at w*; where that is not meant, call the "
                "argument"
            )
        alike = not (self._unrepeatable or self._spec.rows.varies)  # calls can be compared
        needs_graph = self._needs_graph(in_mode, unrecorded)
        between = self._interplay(recorded, needs_graph) if alike else Interplay()
        if between.refusal:
            raise ConfigError(between.refusal)
        batches = f"batches of {self._spec.config.batch_size} examples"
        if between.note:
            self.notes.append(between.note.format(batches=batches))
        elif self._is_normed(in_mode):
            self.notes.append(
                f"in mode {self._mode!r} the loss of an example depends on the others of its batch "
                f"(batch norm does that): the LLC is that of {batches}; mode='eval' takes the "
                "statistics that the model has"
            )
        return LossKind(
            per_example=per_example,
            stochastic=self._mode in caller.stochastic,
            coupled=between.coupled,
            needs_graph=needs_graph,
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
        self._caller.check_attributes(self._mode, self._rows[0], first)
        move(replica.moving)
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
        with contextlib.suppress(ConfigError):  # not of a loss that takes gradients itself
            unrecorded = caller.losses(self._mode, self._rows, recorded=False)
        if self._mode != "eval":
            with contextlib.suppress(ConfigError):  # a model that gives something else then
                recorded["eval"] = caller.losses("eval", self._rows, recorded=True)
        caller.check_kept()
        caller.check_reached()
        for name, value in _sums(self._replica.model).items():
            if value != sums.get(name):
                raise ConfigError(
                    f"a forward pass must leave the weights as they are, but it changes {name!r}: "
                    "keep what it computes in a buffer or a variable of its own"
                )
        return recorded, unrecorded

    def _interplay(self, recorded: dict[str, Losses], needs_graph: bool) -> Interplay:
        """What examples have to do with each other, where nothing is dropped or normed by batch."""
        mode = "eval" if "eval" in recorded else self._mode
        if mode in self._caller.stochastic:
            return Interplay()  # each call draws other numbers for the same example
        between = interplay(recorded[mode], self._tolerance)
        if largest(recorded[mode]) > TINY:
            return (
                between if between != Interplay() else self._interplay_in_batch(mode, needs_graph)
            )
        if between == Interplay():
            return between
        try:  # of losses as small, rounding in the logits is a large part
            return interplay(self._caller.in_double(mode, self._rows), ROUNDING[torch.float64])
        except Exception:  # the user's code, in a precision that it was not written for
            return Interplay()

    def _interplay_in_batch(self, mode: str, recorded: bool) -> Interplay:
        """The same of as many rows as go through the model at once, from all over the data."""
        config, (start, stop) = self._spec.config, self._spec.rows.spans[0]
        size = min(config.microbatch or config.batch_size, stop - start)
        if size <= max(map(len, self._rows)):
            return Interplay()
        rows = tuple(int(row) for row in np.linspace(start, stop - 1, size))
        parts = (rows, rows[: size // 2], rows[size // 2 :])
        losses = {part: self._caller.call(mode, part, recorded, True) for part in parts}
        return interplay_in_batch(losses, self._tolerance)

    def _is_normed(self, in_mode: Losses) -> bool:
        """Whether examples touch each other in the mode of the run, though not in themselves."""
        if self._mode == "eval" or self._unrepeatable:
            return False
        layers = (isinstance(each, _BatchNorm) for each in self._replica.model.modules())
        random = self._mode in self._caller.stochastic
        return any(layers) or (not random and interplay(in_mode, self._tolerance).coupled)

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
            grows = caller.grows(self._mode, self._rows[0])
            if grows:
                self.notes.append(
                    "every forward pass adds to a list or dict that the model keeps, which would "
                    "grow for as long as the run lasts: it is put back after each"
                )
            return grows
        mode, rows = caller.differing
        one, two = (caller.call(mode, rows, recorded=True, restored=True) for _ in range(2))
        if same_bits(one, two):
            self.notes.append(
                "a forward pass leaves something in the model that changes the next one (a cache, "
                "a counter or a generator): every pass starts from what the model had at first"
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


def _sums(model: nn.Module) -> dict[str, int]:
    """Sums over the bytes of the parameters: which of them have changed."""
    return {name: int(as_bytes(p).sum(dtype=torch.int64)) for name, p in model.named_parameters()}
