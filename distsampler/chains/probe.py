"""Probes: fixed examples whose losses are read at the draws, without minibatch noise.

The gate probe is part of the training data, and decides when a run has converged. A loss that
returns one value per example gives as many numbers as there are examples; of a loss that returns
batch means, the probe is cut into eight parts, and the numbers are their means.

Named probes are a user's own sets, and decide nothing. What a model draws at random for one of
their batches is always the same, at w* too: their losses are functions of the weights.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from distsampler.data.tokens import predicted, token_ids
from distsampler.draws import NOT_COUNTED, ProbeAtAnchor, WideVariable
from distsampler.errors import ConfigError
from distsampler.models.calls import Caller
from distsampler.models.loss import LossKind
from distsampler.models.loss_values import RowSet, interplay
from distsampler.models.replica import ChainSpec, NamedProbe, Replica
from distsampler.seeding import probe_rows
from distsampler.store.large_arrays import MEAN_EXCESS, PROBES

PROBE_PARTS = 8  # where the loss returns batch means
ROUNDING = 1e-2  # relative, of losses: more tells one that is divided by the number of examples


class Probe:
    """The probe's examples on a replica's device."""

    def __init__(self, replica: Replica, spec: ChainSpec) -> None:
        self._replica, self._spec = replica, spec
        parts = _parts(spec)
        self._batches = [replica.batch(part) for part in parts]
        self._shares = [len(part) / size(spec) for part in parts]
        self._weights = part_weights(spec)

    @torch.no_grad()
    def losses(self, chain: int = 0, step: int = 0) -> NDArray[np.float64]:
        """Return the losses at the replica's weights: per example, or the means of the parts."""
        return self.tensor(chain, step).double().cpu().numpy()

    @torch.no_grad()
    def tensor(self, chain: int = 0, step: int = 0) -> Tensor:
        """Return the same as the loss gives it, on the device."""
        return torch.cat(
            [self._replica.losses(batch, chain, step).reshape(-1) for batch in self._batches]
        )

    def mean(self, losses: NDArray[np.float64]) -> float:
        """Return the mean over all examples of what ``losses`` returned."""
        return float(np.average(losses, weights=self._weights))

    def gradient(self, chain: int) -> list[Tensor]:
        """Return the gradient of the mean loss at the replica's weights, flat, float64."""
        flats = self._replica.flats
        total = [torch.zeros_like(flat, dtype=torch.float64) for flat in flats]
        for batch, share in zip(self._batches, self._shares, strict=True):
            with torch.enable_grad():
                self._replica.backward(self._replica.losses(batch, chain))
            for entry, flat in zip(total, flats, strict=True):
                assert flat.grad is not None
                entry += flat.grad.double() * share
        return total


def size(spec: ChainSpec) -> int:
    """Return the number of examples in the probe: as asked, or all there are."""
    return min(spec.config.probe, len(spec.rows))


def part_weights(spec: ChainSpec) -> list[int] | None:
    """Return the number of examples that each of the probe's losses stands for; None: one each."""
    return None if spec.per_example else [len(part) for part in _parts(spec)]


def _parts(spec: ChainSpec) -> list[NDArray[np.int64]]:
    """The probe's rows as they go through the model: at once, by microbatches, or eight parts."""
    rows = probe_rows(spec.config.seed, len(spec.rows), spec.config.probe)
    most = spec.config.microbatch or len(rows)
    cuts = range(most, len(rows), most) if spec.per_example else PROBE_PARTS
    return [part for part in np.array_split(rows, cuts) if len(part)]


class NamedLosses:
    """The losses of a named probe at the present weights of a replica."""

    def __init__(self, replica: Replica, probe: NamedProbe) -> None:
        self._replica, self._probe = replica.of_probe(probe), probe
        self._batches = batches(probe)

    @torch.no_grad()
    def measure(self) -> NDArray[np.floating]:
        """Return them, (examples,) or (examples, tokens), with NaN where a token does not count.

        Raises:
            ConfigError: if the loss returns what is neither.
        """
        losses = []
        for number, rows in enumerate(self._batches):
            batch = self._replica.batch(rows)
            losses.append(
                _checked(self._probe, self._replica.raw_losses(batch, piece=number), rows)
            )
        widest = max(each[0].numel() for each in losses)
        if losses[0].ndim == 2:  # a batch may be padded to its own longest example
            losses = [pad(each, (0, widest - each.shape[1]), value=torch.nan) for each in losses]
        together = torch.cat(losses)
        return (together if together.dtype == torch.float64 else together.float()).cpu().numpy()

    def values(self, at_anchor: ProbeAtAnchor) -> Mapping[str, NDArray[np.floating]]:
        """Return what of a draw is stored: the losses, and the mean of their excess over w*."""
        losses, counted, name = self.measure(), at_anchor.counted, self._probe.name
        present = losses[counted].astype(np.float64)
        excess = np.asarray(present.mean() - at_anchor.mean)
        most = np.finfo(self._probe.config.dtype).max
        stored = np.full(losses.shape, NOT_COUNTED, self._probe.config.dtype)
        stored[counted] = present.clip(-most, most)
        return {f"{PROBES}/{name}": stored, f"{MEAN_EXCESS}/{name}": excess}


def named_variables(probe: NamedProbe) -> Iterator[WideVariable]:
    """Yield what of a named probe a draw holds; nothing before it was tried."""
    if not probe.shape:
        return
    name, every, dims = probe.name, probe.config.every, ("example", "token")[: len(probe.shape)]
    what = f"loss of each {dims[-1]} of the probe {name} at w_t"
    yield WideVariable(f"{PROBES}/{name}", what, dims, probe.shape, every, probe.config.dtype)
    what = f"mean loss of the probe {name} at w_t minus that at w*"
    yield WideVariable(f"{MEAN_EXCESS}/{name}", what, (), (), every, "float64")


def batches(probe: NamedProbe) -> list[NDArray[np.int64]]:
    """Return the rows of a named probe as they go through the model, in parts of like size."""
    count = -(-len(probe.rows) // probe.batch_size)
    return np.array_split(np.arange(len(probe.rows)), count)


def at_anchor(probe: NamedProbe, losses: NDArray[np.floating]) -> ProbeAtAnchor:
    """Return what is kept of a named probe's losses at w*."""
    losses = np.where(np.isnan(losses), NOT_COUNTED, losses)
    if losses.ndim == 1:
        return ProbeAtAnchor(probe.numbers, losses)
    positions = losses.shape[1]
    ids, following = list[NDArray[np.int64]](), list[NDArray[np.int64]]()
    with contextlib.suppress(ConfigError):  # where batches are not of token ids
        taken = [probe.rows.take(rows) for rows in batches(probe)]
        ids = [token_ids(batch).long().numpy() for batch in taken]
        following = [predicted(batch).numpy() for batch in taken]
    # The first token of a sequence is not predicted.
    shift = max((each.shape[1] for each in ids), default=-1) - positions
    if shift not in (0, 1) or any((each < 0).any() for each in ids):  # then they are none
        return ProbeAtAnchor(probe.numbers, losses, np.arange(positions))
    together = np.zeros(losses.shape, np.int64)
    for rows, each in zip(batches(probe), following if shift else ids, strict=True):
        together[rows, : each.shape[1]] = each
    return ProbeAtAnchor(probe.numbers, losses, np.arange(shift, shift + positions), together)


def _checked(probe: NamedProbe, losses: object, rows: NDArray[np.int64]) -> Tensor:
    """The losses of a batch, if they are one value per example or per token."""
    shape: object = type(losses).__name__
    if isinstance(losses, Tensor) and losses.is_floating_point():
        losses = losses.reshape(1) if not losses.ndim and len(rows) == 1 else losses
        shape = tuple(losses.shape)
        if losses.ndim in (1, 2) and len(losses) == len(rows) and losses.numel():
            return losses
        if not losses.ndim:
            shape = (
                "their mean, shape (): return each, as with reduction='none', or give the probe a "
                f"loss of its own, RunConfig(probes={{{probe.name!r}: {{'loss': ...}}}})"
            )
    raise ConfigError(
        f"probes.{probe.name}: its loss must return one value per example, shape ({len(rows)},), "
        f"or one per token, shape ({len(rows)}, tokens), NaN where a token does not count; got "
        f"{shape}"
    )


class Seen(NamedTuple):
    """What was seen of the losses of a named probe."""

    kind: LossKind  # what model and loss do
    shape: tuple[int, ...]  # (examples,) or (examples, tokens)


def try_probe(spec: ChainSpec, probe: NamedProbe, device: torch.device) -> Seen:
    """Measure a named probe at w*, on a replica of its own.

    Raises:
        ConfigError: if its loss is none, or not finite on an example.
    """
    replica = Replica(spec, device)
    try:
        kind = spec.kind if probe.loss is spec.loss else _kind(replica, spec.of_probe(probe))
        probe = replace(probe, kind=kind)
        losses = NamedLosses(replica, probe).measure()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's code: anything can come
        said = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        where = f"probes.{probe.name}"
        if not said.startswith(where):
            said = f"{where}: its loss must work on its examples: {said}"
        raise ConfigError(said) from error
    _check_finite(probe, losses)
    return Seen(probe.kind, losses.shape)


def _kind(replica: Replica, spec: ChainSpec) -> LossKind:
    """What model and a probe's own loss do: seen without a gradient, which it need not have."""
    caller, mode = Caller(replica, spec), str(spec.config.mode)
    pairs: list[RowSet] = [(0, 1), (0,), (1,)]
    rows = [each for each in pairs if max(each) < len(spec.rows)]
    try:
        losses = caller.losses(mode, rows, recorded=False)
    except ConfigError:  # it may take a gradient itself: then it is called as carefully as can be
        return spec.kind._replace(needs_graph=True, stochastic=True, changes_batch=True)
    stochastic = mode in caller.stochastic
    if not stochastic and len(losses) == 3 and all(each.ndim for each in losses.values()):
        sums = {key: each.nan_to_num().reshape(len(key), -1).sum(1) for key, each in losses.items()}
        if refusal := interplay(sums, ROUNDING).refusal:
            raise ConfigError(refusal)
    return LossKind(
        stochastic=stochastic,
        moves_buffers=bool(caller.moved_buffers),
        moves_attributes=caller.differing is not None,
        changes_batch=caller.changes_batch,
    )


def _check_finite(probe: NamedProbe, losses: NDArray[np.floating]) -> None:
    """Check that the losses at w* are finite, and can be stored."""
    where = f"probes.{probe.name}: its loss at w* must be"
    counted = ~np.isnan(losses) if losses.ndim == 2 else np.ones(losses.shape, bool)
    if not counted.any():
        raise ConfigError(f"{where} a number for at least one token, but it is NaN for all")
    most = np.finfo(probe.config.dtype).max
    for what, bad in {
        "finite": ~np.isfinite(losses),
        f"at most {most:g} to be stored as {probe.config.dtype}": ~(np.abs(losses) <= most),
    }.items():
        if places := np.argwhere(bad & counted).tolist():
            got = f"{losses[tuple(places[0])]:g} at row {probe.numbers[places[0][0]]}"
            raise ConfigError(
                f"{where} {what}, but it is {got}: leave such examples out, mend the loss, or, of "
                "numbers too large for float16, ask for dtype 'float32'"
            )
