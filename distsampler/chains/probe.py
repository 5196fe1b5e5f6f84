"""The probe: fixed examples whose losses are read at every draw, without minibatch noise.

A loss that returns one value per example gives as many numbers as there are examples; of a loss
that returns batch means, the probe is cut into eight parts, and the numbers are their means.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.models.replica import ChainSpec, Replica
from distsampler.seeding import probe_rows

PROBE_PARTS = 8  # where the loss returns batch means


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
        parts = [self._replica.losses(batch, chain, step).reshape(-1) for batch in self._batches]
        return torch.cat(parts).double().cpu().numpy()

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
