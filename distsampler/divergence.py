"""When a chain has diverged: what it measures is not finite, or far beyond any posterior."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from distsampler.draws import Anchor, DrawBlock
from distsampler.errors import DistsamplerError
from distsampler.replica import ChainSpec


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
    anchor: Anchor,
    moving: int,
) -> str | None:
    """What is wrong with a draw, if anything.

    Args:
        measured: the draw.
        spec: the recipe.
        anchor: the losses at w*.
        moving: d, how many entries move.
    """
    for name, value in measured.items():
        if not np.isfinite(value).all():
            return f"{name} is not finite"
    factor = spec.config.divergence_factor
    if factor is None:
        return None
    excess = float(measured["probe_loss"]) - anchor.probe_init_loss
    found, limit = spec.nbeta * excess, factor * moving / 2
    if found <= limit:
        return None
    return (
        f"nbeta times the probe's excess loss is {found:.4g}, beyond divergence_factor * d/2 = "
        f"{limit:.4g}"
    )
