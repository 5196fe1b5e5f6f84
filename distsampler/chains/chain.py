"""Chain: a replica, a sampler and a batch stream, advanced draw by draw.

Draw d is measured in the last of its ``thin`` steps, step ``(d + 1) * thin - 1``, before that step
moves: all its values belong to one point. ``advance(a)`` then ``advance(b)`` is ``advance(a + b)``,
to the bit. One loop, ``steps.advance``, serves a chain alone and a pack.
"""

import math
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.analysis import bias
from distsampler.chains.dispersed_start import DispersedStart
from distsampler.chains.hop import ControlVariate
from distsampler.chains.observables import DrawMeter, Values, variables
from distsampler.chains.sampler_trial import needs_closure
from distsampler.chains.state import dump, parse
from distsampler.chains.steps import ChainDiverged, advance, alone
from distsampler.curvature.watch import Watch
from distsampler.data.batches import AllRows, BatchStream
from distsampler.draws import CURVATURE, LOSS, PROBE_LOSS, AtAnchor, DrawBlock
from distsampler.errors import WorkFailedError
from distsampler.models.replica import ChainSpec, Replica
from distsampler.models.sampler import Ground, build, mover
from distsampler.seeding import noise_seed
from distsampler.store.large_arrays import PROBES, WideWriter


class Chain:
    """One chain of a run.

    Args:
        spec: the recipe.
        index: index of the chain.
        at_anchor: losses at w*.
        anchors: flat parameters at w*, shared and never written; None: the replica's own.
        device: where it runs.
        writer: takes what is too large to travel; None: it is dropped.
    """

    def __init__(
        self,
        spec: ChainSpec,
        index: int,
        at_anchor: AtAnchor,
        anchors: list[Tensor] | None = None,
        device: torch.device | None = None,
        writer: WideWriter | None = None,
    ) -> None:
        self.spec, self.index, self._at_anchor, self._writer = spec, index, at_anchor, writer
        self.replica = replica = Replica(spec, device or torch.device("cpu"))
        self._generator = torch.Generator(replica.device)
        self._generator.manual_seed(noise_seed(spec.config.seed, index))
        self._anchors = anchors or [flat.detach().clone() for flat in replica.flats]
        with warnings.catch_warnings():
            # The sampler's cautions were given before the run; shared memory is read-only.
            warnings.simplefilter("ignore")
            variance = at_anchor.gradient_variance
            noise = None if variance is None else replica.split(torch.from_numpy(variance))
            ground = Ground(replica.flats, self._anchors, replica.masks, noise)
            self.sampler: Any = build(
                spec.sampler, spec.config, spec.nbeta, ground, self._generator
            )
        self.mover = mover(self.sampler)
        self._make_batches()
        self._meter = DrawMeter(spec, replica, self._anchors, at_anchor, index)
        self._watch = Watch(spec, replica, index, noise) if spec.config.watch else None
        self._first = self.draw = 0  # draws made before this advance, and so far
        self._variables = variables(spec)
        self._values: dict[str, NDArray[Any]] = {}
        self._last_loss = at_anchor.init_loss

    def _make_batches(self) -> None:
        """What the chain takes of the data at which step."""
        spec, config, n = self.spec, self.spec.config, len(self.spec.rows)
        self._batches = (
            AllRows(n) if needs_closure(spec.sampler) else spec.rows.stream(config, self.index)
        )
        self._shift: ControlVariate | None = None
        gradients = self._at_anchor.shard_gradients
        if gradients is not None:
            self._shift = ControlVariate(self.replica, gradients, spec.rows, self._batches)
        # An epoch's own batch is not independent of w_t: its excess loss would be biased.
        self._readout: BatchStream | None = None
        if config.batches == "epoch" and config.batch_size < n:
            self._readout = BatchStream(config.seed, self.index, n, config.batch_size, epochs=False)

    def advance(self, draws: int) -> DrawBlock:
        """Make and return the next draws.

        Raises:
            ChainDiverged: if a recorded value is not finite; it carries the draws before.
        """
        done = advance({self.index: self}, alone(self), draws)
        for error in done.diverged:
            raise error
        return done.blocks[0]

    # What the loop asks of each chain

    def begin(self, draws: int) -> None:
        """Make room for the next draws; a dispersed chain that has none goes to its start."""
        config, self._first = self.spec.config, self.draw
        self._values = {v.name: np.empty((draws, *v.shape), v.dtype) for v in self._variables}
        if self.draw:
            return
        if config.init == "dispersed" and self.index % 2:
            start = DispersedStart(
                self.spec, self.replica, self._anchors, self._at_anchor, self.index
            )
            self.mover.move_to(start.weights())
        if self._watch is not None:
            self._watch.measure(0, self._batches.span(0))

    def rows(self, step: int) -> NDArray[np.int64]:
        """Return the rows of a step's batch."""
        return self._batches.indices(step)

    def losses_and_gradient(self, step: int) -> Tensor:
        """Return the losses of a step's batch; leave the gradient of their mean to the sampler."""
        losses = self._computed(self.replica.losses_and_gradient, self.rows(step), step)
        if self._shift is not None:
            self._shift.apply(step)
        return losses

    def losses(self, step: int) -> Tensor:
        """Return the losses of a step's batch."""
        return self._computed(self.replica.losses_of_rows, self.rows(step), step)

    def measure(self, losses: Tensor, step: int) -> Values:
        """Return what a draw holds of the present weights, with the losses of its last step."""
        rows = self.rows(step)
        if self._readout is not None:
            rows = self._readout.indices(step)
            losses = self._computed(self.replica.losses_of_rows, rows, step)
        values = self._meter.measure(losses, rows, step)
        if self._watch is None:
            return values
        if self._watch.due(step):
            self._watch.measure(step, self._batches.span(step))
        return values | self._watch.values

    def metrics(self) -> Values:
        """Return what the sampler has measured of the step that it has just made."""
        if not self.spec.metrics:
            return {}
        return {name: float(value) for name, value in self.mover.metrics().items()}

    def keep(self, values: Values, step: int) -> None:
        """Keep a draw, when the step that leaves it has been made.

        Raises:
            ChainDiverged: if it is not sound.
        """
        kept, fault = self.draw - self._first, self._fault(values)
        if fault is not None:
            finite = {name: array[:kept] for name, array in self._values.items()}
            block = DrawBlock(self.index, self._first, finite, b"", wide=self._written())
            raise ChainDiverged(self.index, step, fault, self._last_loss, block, self._remedy())
        for name, array in self._values.items():
            array[kept] = values[name]
        if self._writer is not None:
            self._writer.put(self.draw, values)
        self._last_loss = float(self._values[LOSS][kept])
        self.draw += 1

    def end(self) -> DrawBlock:
        """Return the draws since ``begin``, and the state behind them; store what is wide."""
        began = time.perf_counter()
        state = self.state()
        seconds = time.perf_counter() - began
        return DrawBlock(self.index, self._first, self._values, state, seconds, self._written())

    # What survives a fault

    def state(self) -> bytes:
        """Return all that the next step depends on, except what the recipe gives."""
        return dump(
            {
                "draw": self.draw,
                "last_loss": self._last_loss,
                "parameters": [flat.detach() for flat in self.replica.flats],
                "generator": self._generator.get_state(),
                "sampler": self.mover.chain_state(),
                "watched": self._watch.values if self._watch is not None else {},
            }
        )

    @torch.no_grad()
    def restore(self, data: bytes) -> None:
        """Go to a state that ``state`` returned."""
        state = parse(data)
        self.draw, self._last_loss = state["draw"], state["last_loss"]
        for flat, saved in zip(self.replica.flats, state["parameters"], strict=True):
            flat.copy_(saved)
        self.mover.restore_chain_state(state["sampler"])
        self._generator.set_state(state["generator"])
        if self._watch is not None:
            self._watch.values = state["watched"]

    def _written(self) -> tuple[str, ...]:
        """Names of the wide variables, when their values of all draws so far lie in the store."""
        return () if self._writer is None else self._writer.flush()

    def _computed(
        self,
        compute: Callable[[NDArray[np.int64], int, int], Tensor],
        rows: NDArray[np.int64],
        step: int,
    ) -> Tensor:
        """Losses of some rows; an error in the user's code names its step and examples."""
        try:
            return compute(rows, self.index, step)
        except torch.OutOfMemoryError:
            raise  # the place's fault, not the chain's
        except Exception as error:  # the user's code: anything can come
            indices = np.array2string(rows, threshold=24, edgeitems=8, separator=", ")
            raise WorkFailedError(
                f"chain {self.index} failed at step {step}, on the examples {indices}: "
                f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            ) from None

    def _remedy(self) -> bias.Slower:
        """What to do about a divergence."""
        met = {} if self._watch is None else self._watch.values
        return bias.after_divergence(self.spec.facts, met.get(CURVATURE, math.nan))

    def _fault(self, values: Values) -> str | None:
        """What is wrong with a draw; None if it is sound."""
        for name, value in values.items():
            if name.startswith(f"{PROBES}/"):
                continue  # it marks what does not count; the mean of the rest stands beside it
            if not np.isfinite(value).all():
                return f"{name} is not finite"
        factor = self.spec.config.divergence_factor
        if factor is None:
            return None
        dimension = sum(flat.numel() for flat in self.replica.flats)
        energy = self.spec.nbeta * (float(values[PROBE_LOSS]) - self._at_anchor.probe_init_loss)
        limit = factor * dimension / 2
        if energy <= limit:
            return None
        return (
            f"nbeta times the probe's excess loss is {energy:.4g}, beyond divergence_factor * d/2 "
            f"= {limit:.4g}"
        )
