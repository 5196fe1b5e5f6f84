"""Chain: a replica, a sampler and a batch stream, advanced draw by draw.

Draw d is measured in the last of its ``thin`` steps, step ``(d + 1) * thin - 1``, before that step
moves: all its values belong to one point. ``advance(a)`` then ``advance(b)`` is ``advance(a + b)``,
to the bit.
"""

from __future__ import annotations

import contextlib
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.chains.dispersed_start import DispersedStart
from distsampler.chains.hop import ControlVariate
from distsampler.chains.observables import DrawMeter, Values, variables
from distsampler.chains.sampler_trial import measures_acceptance, needs_closure
from distsampler.chains.state import dump, parse
from distsampler.curvature.watch import Watch, due
from distsampler.data.batches import AllRows, Batches, BatchStream
from distsampler.draws import AtAnchor, DrawBlock
from distsampler.errors import DistsamplerError, WorkFailedError
from distsampler.models.replica import ChainSpec, Replica
from distsampler.models.sampler import Ground, build, mover
from distsampler.optim import mala_acceptance
from distsampler.seeding import noise_seed
from distsampler.store.large_arrays import WideWriter


class ChainDiverged(DistsamplerError):
    """A chain met a value that is not finite, or left for good; its draws before are in ``block``.

    Args:
        chain: index.
        step: of the chain.
        what: is wrong.
        last_loss: the last finite minibatch loss that was recorded.
        block: the finite draws of the interrupted advance.
    """

    def __init__(
        self, chain: int, step: int, what: str, last_loss: float, block: DrawBlock
    ) -> None:
        super().__init__(chain, step, what, last_loss, block)
        self.chain, self.step, self.what, self.last_loss, self.block = self.args

    def __str__(self) -> str:
        return (
            f"chain {self.chain} diverged at step {self.step}: {self.what} (last finite loss "
            f"{self.last_loss:.6g}); lower sampler.lr or raise sampler.localization"
        )


def wrong_with(
    measured: Mapping[str, float | NDArray[np.floating]],
    spec: ChainSpec,
    at_anchor: AtAnchor,
    moving: int,
) -> str | None:
    """What is wrong with a draw, if anything.

    Args:
        measured: the draw.
        spec: the recipe.
        at_anchor: losses at w*.
        moving: d, how many entries move.
    """
    for name, value in measured.items():
        if not np.isfinite(value).all():
            return f"{name} is not finite"
    factor = spec.config.divergence_factor
    if factor is None:
        return None
    excess = float(measured["probe_loss"]) - at_anchor.probe_init_loss
    found, limit = spec.nbeta * excess, factor * moving / 2
    if found <= limit:
        return None
    return (
        f"nbeta times the probe's excess loss is {found:.4g}, beyond divergence_factor * d/2 = "
        f"{limit:.4g}"
    )


class Chain:
    """One chain of the run.

    Args:
        spec: the recipe.
        index: of the chain.
        at_anchor: losses at w*.
        anchors: the flat parameters at w*, shared and never written; None: the replica's own.
        device: where it runs.
        writer: takes what is too large to travel; None: it is dropped.
    """

    def __init__(
        self,
        spec: ChainSpec,
        index: int,
        at_anchor: AtAnchor,
        *,
        anchors: list[Tensor] | None = None,
        device: torch.device | None = None,
        writer: WideWriter | None = None,
    ) -> None:
        self._spec, self._index, self._at_anchor = spec, index, at_anchor
        self._replica = Replica(spec, device or torch.device("cpu"))
        config = spec.config
        self._generator = torch.Generator(self._replica.device)
        self._generator.manual_seed(noise_seed(config.seed, index))
        if anchors is None:
            anchors = [flat.detach().clone() for flat in self._replica.flats]
        with warnings.catch_warnings():
            # The sampler's cautions were given before the run; shared memory is read-only.
            warnings.simplefilter("ignore")
            known = _variance(self._replica, at_anchor)
            ground = Ground(self._replica.flats, anchors, self._replica.masks, known)
            self._sampler: Any = build(spec.sampler, config, spec.nbeta, ground, self._generator)
        self._mover = mover(self._sampler)
        n, size, epochs = len(spec.rows), config.batch_size, config.batches == "epoch"
        self._batches = batches_of(spec, index)
        self._shift = self._control_variate()
        # An epoch's own batch is not independent of w_t: its excess loss would be biased.
        apart = epochs and size < n
        streams = (config.seed, index, n, size)
        self._readout = BatchStream(*streams, epochs=False) if apart else None
        self._meter = DrawMeter(spec, self._replica, anchors, at_anchor, index)
        self._variables, self._writer = variables(spec), writer
        self._watch = Watch(spec, self._replica, index, known) if config.watch else None
        self._first = self._draw = 0
        self._values: dict[str, NDArray[Any]] = {}
        self._last_loss = at_anchor.init_loss
        self._moving = sum(flat.numel() for flat in self._replica.flats)
        self._anchors = anchors

    @property
    def replica(self) -> Replica:
        """Its model, at its present weights."""
        return self._replica

    @property
    def sampler(self) -> Any:  # noqa: ANN401 (an Optimizer, of the user's class)
        """What moves it."""
        return self._sampler

    @property
    def draw(self) -> int:
        """Draws made so far."""
        return self._draw

    def advance(self, draws: int) -> DrawBlock:
        """Makes and returns the next draws.

        Raises:
            ChainDiverged: if a recorded value is not finite; it carries the draws before.
        """
        thin = self._spec.config.thin
        self.begin(draws)
        for _ in range(draws):
            last = (self._draw + 1) * thin - 1
            for step in range(last - thin + 1, last):
                self._step(step)
            self._keep(self._measured_step(last), last)
        return self.end()

    # What a pack calls in place of ``advance``: it leaves the gradients of all its chains at once.

    def begin(self, draws: int) -> None:
        """Makes room for the next draws; goes to the start where none has been made."""
        self._first = self._draw
        if self._first == 0 and self._spec.config.init == "dispersed" and self._index % 2:
            self._disperse()
        self._values = {v.name: np.empty((draws, *v.shape), v.dtype) for v in self._variables}
        if self._watch is not None and self._first == 0:
            self._watch.look(0, self._batches.span(0))

    def rows(self, step: int) -> NDArray[np.int64]:
        """The batch of a step."""
        return self._batches.indices(step)

    def look(self, losses: Tensor, rows: NDArray[np.int64], step: int) -> Values:
        """What a draw holds of the present weights.

        Args:
            losses: of the batch there.
            rows: of the batch.
            step: of the chain, the last of a draw.
        """
        return {**self._watched(step), **self._read(losses, rows, step)}

    def keep(self, values: Values, step: int) -> None:
        """Keeps a draw, when the step that leaves it has been made.

        Raises:
            ChainDiverged: as ``advance``.
        """
        self._keep({**self._told(), **values}, step)

    def end(self) -> DrawBlock:
        """The draws since ``begin``, and the state behind them; what is wide lies in the store."""
        began = time.perf_counter()
        state = self.state()
        seconds = time.perf_counter() - began
        return DrawBlock(self._index, self._first, self._values, state, seconds, self._written())

    def state(self) -> bytes:
        """All that the next step depends on, but what the recipe gives."""
        return dump(
            {
                "draw": self._draw,
                "last_loss": self._last_loss,
                "parameters": [flat.detach() for flat in self._replica.flats],
                "generator": self._generator.get_state(),
                "sampler": self._mover.chain_state(),
                "watched": self._watch.values if self._watch is not None else {},
            }
        )

    @torch.no_grad()
    def restore(self, data: bytes) -> None:
        """Goes to a state that ``state`` gave."""
        state = parse(data)
        self._draw, self._last_loss = state["draw"], state["last_loss"]
        for flat, saved in zip(self._replica.flats, state["parameters"], strict=True):
            flat.copy_(saved)
        self._mover.restore_chain_state(state["sampler"])
        self._generator.set_state(state["generator"])
        if self._watch is not None:
            self._watch.values = state["watched"]

    @torch.no_grad()
    def _disperse(self) -> None:
        """Goes to where a dispersed chain starts; the anchors stay at w*."""
        ground = (self._spec, self._replica, self._anchors, self._at_anchor, self._index)
        self._mover.move_to(DispersedStart(*ground).weights())

    def _keep(self, measured: Values, step: int) -> None:
        """Puts a draw beside those before it, if it is sound."""
        kept = self._draw - self._first
        bad = wrong_with(measured, self._spec, self._at_anchor, self._moving)
        if bad is not None:
            finite = {name: array[:kept] for name, array in self._values.items()}
            block = DrawBlock(self._index, self._first, finite, b"", wide=self._written())
            raise ChainDiverged(self._index, step, bad, self._last_loss, block)
        for name, array in self._values.items():
            array[kept] = measured[name]
        if self._writer is not None:
            self._writer.put(self._draw, measured)
        self._last_loss = float(self._values["loss"][kept])
        self._draw += 1

    def _written(self) -> tuple[str, ...]:
        """Sees that what is wide of the draws so far lies in the store; what that is."""
        return () if self._writer is None else self._writer.flush()

    def _step(self, step: int) -> None:
        """Moves once, measuring nothing."""
        rows = self._batches.indices(step)
        if needs_closure(self._spec.sampler):
            self._sampler.step(lambda: self._losses_and_gradient(rows, step).mean())
        else:
            self._losses_and_gradient(rows, step)
            self._mover.move()

    def _measured_step(self, step: int) -> Values:
        """Measures, then moves."""
        watched = self._watched(step)
        rows = self._batches.indices(step)
        closure = needs_closure(self._spec.sampler)
        losses = self._losses(rows, step) if closure else self._losses_and_gradient(rows, step)
        values = self._read(losses, rows, step)
        if closure:
            self._sampler.step(lambda: self._losses_and_gradient(rows, step).mean())
        elif measures_acceptance(self._spec.sampler, self._spec.config):
            values["acceptance"] = self._move_as_proposal(losses, rows, step)
        else:
            self._mover.move()
        return {**self._told(), **values, **watched}

    def _read(self, losses: Tensor, rows: NDArray[np.int64], step: int) -> Values:
        """What is measured at the present weights."""
        if self._readout is None:
            return self._meter.measure(losses, rows, step)
        other = self._readout.indices(step)
        with torch.no_grad():
            return self._meter.measure(self._losses(other, step), other, step)

    def _told(self) -> Values:
        """What the sampler tells of the step that it has just made."""
        if not self._spec.metrics:
            return {}
        return {name: float(value) for name, value in self._mover.metrics().items()}

    def _watched(self, step: int) -> Values:
        """What is known of the curvature, measured now where that is due."""
        if self._watch is None:
            return {}
        if due(step - self._spec.config.thin + 1, step + 1):
            self._watch.look(step, self._batches.span(step))
        return {**self._watch.values}

    def _losses_and_gradient(self, rows: NDArray[np.int64], step: int) -> Tensor:
        """Losses of some rows; the gradient of their mean is left where the sampler reads it."""
        with self._told_where(rows, step):
            losses = self._replica.losses_and_gradient(rows, self._index, step)
        if self._shift is not None:
            self._shift.apply(step)
        return losses

    def _losses(self, rows: NDArray[np.int64], step: int) -> Tensor:
        """Losses of some rows at the present weights."""
        with self._told_where(rows, step):
            return self._replica.losses_of_rows(rows, self._index, step)

    @contextlib.contextmanager
    def _told_where(self, rows: NDArray[np.int64], step: int) -> Iterator[None]:
        """What goes wrong in the user's code is told with its step and examples."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise  # the place's fault, not the chain's
        except Exception as error:  # the user's code: anything can come
            indices = np.array2string(rows, threshold=24, edgeitems=8, separator=", ")
            raise WorkFailedError(
                f"chain {self._index} failed at step {step}, on the examples {indices}: "
                f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            ) from None

    def _move_as_proposal(self, losses: Tensor, rows: NDArray[np.int64], step: int) -> float:
        """Moves; with what chance Metropolis would have accepted, at one gradient more."""
        before = self._sampler.side(losses.mean())
        self._mover.move()
        after = self._sampler.side(self._losses_and_gradient(rows, step).mean())
        return float(mala_acceptance(before, after))

    def _control_variate(self) -> ControlVariate | None:
        """What makes a shard's gradient one of all data."""
        gradients, shards = self._at_anchor.shard_gradients, self._spec.rows.shards
        if gradients is None or shards is None:
            return None
        return ControlVariate(self._replica, gradients, shards.sizes, self._batches)


def batches_of(spec: ChainSpec, chain: int) -> Batches:
    """Which rows a chain takes at which step."""
    if needs_closure(spec.sampler):
        return AllRows(len(spec.rows))
    return spec.rows.stream(spec.config, chain)


def _variance(replica: Replica, at_anchor: AtAnchor) -> list[Tensor] | None:
    """The gradient variance, as the flat tensors lie; shared memory where it can be."""
    if at_anchor.gradient_variance is None:
        return None
    whole = torch.from_numpy(at_anchor.gradient_variance).to(replica.device)
    return replica.split(whole)
