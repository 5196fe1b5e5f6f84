"""The LLC over lr and nbeta: where it is flat, neither matters."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distsampler.analysis.json_values import plain


@dataclass(frozen=True)
class Heatmap:
    """LLCs of short runs over a grid.

    Args:
        lrs: step sizes, the columns.
        nbetas: inverse temperatures times n, the rows.
        llc: shape (nbeta, lr); NaN where a chain diverged.
        spread: standard deviation between the chains over their mean, shape (nbeta, lr).
        steps: number of steps of all chains together.
    """

    lrs: tuple[float, ...]
    nbetas: tuple[float, ...]
    llc: NDArray[np.float64]
    spread: NDArray[np.float64]
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """Return the heatmap for JSON; NaN as None."""
        values = {"llc": self.llc.tolist(), "spread": self.spread.tolist(), "steps": self.steps}
        return plain({"lr": self.lrs, "nbeta": self.nbetas, **values})

    def __str__(self) -> str:
        head = "nbeta \\ lr " + "".join(f"{lr:>18.3g}" for lr in self.lrs)
        lines = [f"LLC (sd / mean between chains), {self.steps} steps", head]
        for i, nbeta in enumerate(self.nbetas):
            pairs = zip(self.llc[i], self.spread[i], strict=True)
            cells = [f"{a:.4g} ({b:.1%})" if np.isfinite(a) else "diverged" for a, b in pairs]
            lines.append(f"{nbeta:<11.4g}" + "".join(f"{cell:>18}" for cell in cells))
        return "\n".join(lines)
