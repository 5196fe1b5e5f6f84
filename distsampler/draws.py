"""What travels upwards from a chain: its draws, and the names and shapes of what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# Recorded at every draw.
LOSS = "loss"
EXCESS_LOSS = "excess_loss"
PROBE_LOSS = "probe_loss"
PROJECTIONS = "projections"
DISTANCE = "distance"
WEIGHT_PROJECTIONS = "weight_projections"
STEP = "step"
# Recorded while the curvature is watched.
CURVATURE = "curvature"
DISCRETISATION_BIAS = "discretisation_bias"
HEAT_BIAS = "heat_bias"
# Recorded where it is asked for, beside what else a sampler measures of its steps.
ACCEPTANCE = "acceptance"

# Stands for the loss of a token that does not count: a draw never holds it otherwise.
NOT_COUNTED = np.inf

Group = Literal["posterior", "sample_stats"]


@dataclass(frozen=True)
class Variable:
    """One recorded quantity: what it is called, where it is stored, what shape a draw has."""

    name: str
    group: Group  # of the InferenceData it belongs to
    meaning: str  # one line for people
    dims: tuple[str, ...] = ()  # names of the dimensions behind (chain, draw)
    shape: tuple[int, ...] = ()
    dtype: str = "float64"


@dataclass(frozen=True)
class WideVariable:
    """One quantity too large to travel: the chain's owner writes it to the store."""

    name: str
    meaning: str  # one line for people
    dims: tuple[str, ...]  # names of the dimensions behind (chain, draw)
    shape: tuple[int, ...]
    every: int = 1  # saved at every k-th draw, counted from the chain's start
    dtype: str = "float32"  # or "float16", "float64"

    def saved(self, draws: int) -> int:
        """Return at how many of a chain's first draws it was saved."""
        return draws // self.every

    def draw(self, row: int) -> int:
        """Return the draw that a saved row belongs to."""
        return (row + 1) * self.every - 1


@dataclass(frozen=True)
class StateFile:
    """A chain's state that lies in the store already."""

    name: str  # of the file, within the run directory; it contains the digest
    size: int


@dataclass(frozen=True)
class DrawBlock:
    """Consecutive draws of one chain, and the state behind the last of them."""

    chain: int  # index of the chain
    first_draw: int  # position of the first draw, counted from the chain's start (burn-in included)
    values: Mapping[str, NDArray[np.generic]]  # name -> array of shape (draws, ...)
    # the chain after the last draw; bytes to everybody but the chain, or the file that
    # holds them
    state: bytes | StateFile = field(repr=False)
    state_seconds: float = 0.0  # time it took to serialise the state
    # names of the wide variables whose values of these draws lie in the store already
    wide: tuple[str, ...] = ()

    @property
    def end(self) -> int:
        """Position behind the last draw."""
        return self.first_draw + self.draws

    @property
    def draws(self) -> int:
        """Number of draws."""
        return min((len(array) for array in self.values.values()), default=0)

    def after(self, draws: int) -> DrawBlock:
        """Return the same block without its first draws."""
        values = {name: array[draws:] for name, array in self.values.items()}
        return replace(self, first_draw=self.first_draw + draws, values=values)


@dataclass(frozen=True)
class ProbeAtAnchor:
    """What the anchor pass measures of a named probe at w*."""

    rows: NDArray[np.int64]  # numbers of its examples in the user's data, (example,)
    # (example,) or (example, token), float32 or float64; NOT_COUNTED where a token does not count
    losses: NDArray[np.floating]
    # place in the sequence of each token that is predicted, (token,); None: one loss an example
    tokens: NDArray[np.int64] | None = None
    token_ids: NDArray[np.int64] | None = None  # of these tokens, (example, token), if known

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Which of the losses exist."""
        counted: NDArray[np.bool_] = self.losses != NOT_COUNTED
        return counted

    @property
    def mean(self) -> float:
        """Mean of the losses that exist, in float64."""
        return float(self.losses[self.counted].mean(dtype=np.float64))


@dataclass(frozen=True)
class AtAnchor:
    """What the anchor pass measures at w*."""

    # per-example losses, shape (n,), float32; None if the loss gives batch means
    losses: NDArray[np.float32] | None
    init_loss: float  # L_n(w*), the mean over all data
    probe_init_loss: float  # the mean over the probe's examples
    # the probe's per-example losses (or the means of its eight parts)
    probe_losses: NDArray[np.float64]
    # variance between examples of each entry of the gradient that may move, float32; None
    # if not asked for
    gradient_variance: NDArray[np.float32] | None = None
    # gradient of each shard's mean loss, (shards, d), float32; None for data that are not
    # in shards
    shard_gradients: NDArray[np.float32] | None = None
    # predicted relative error that hopping brings: of the LLC as chains read it, and of the
    # LLC read on all data; None if not predicted
    hop_bias: tuple[float, float] | None = None
    named: Mapping[str, ProbeAtAnchor] = field(default_factory=dict)  # probe -> its losses
