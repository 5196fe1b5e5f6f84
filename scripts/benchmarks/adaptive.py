"""What adaptation that never ends does to RMSPropSGLD: the relative error of the LLC, measured.

On a quadratic (400 directions, curvature 0.1 to 1000), with the published options (nbeta 10, gamma
300, lr 1e-5, beta2 0.99, stability 0.1, the second moment from 1), at full gradients and at
gradients with noise. A frozen preconditioner has a law, printed beside what was measured; one that
adapts has none: its step is large where the recent gradients, and so the weights, were small.
"""

import argparse
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distsampler.optim import RMSPropSGLD

LR, NBETA, GAMMA = 1e-5, 10.0, 300.0
CURVATURE = torch.logspace(-1, 3, 400, dtype=torch.float64)
KAPPA = NBETA * CURVATURE + GAMMA
EXACT = float((NBETA * CURVATURE / KAPPA).sum() / 2)
NOISES = (0.0, 1.0, 3.0)  # standard deviation of a minibatch's gradient, in each direction
BURN_IN, EVERY = 10_000, 100  # steps; at noise 3 the slowest direction relaxes in some 2,000


class Cell(NamedTuple):
    """One entry of the table: relative errors of the LLC."""

    noise: float
    frozen: bool
    error: float
    se: float
    law: float | None  # None: there is none


def quadratic(noise: float, frozen: bool, copies: int = 100, draws: int = 60) -> Cell:
    """Return the error of the LLC as sampled, beside its law where the preconditioner is frozen."""
    curvature = CURVATURE.float().expand(copies, -1)
    w = nn.Parameter(torch.zeros(copies, len(CURVATURE)))
    source = torch.Generator().manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is measured here
        chain = RMSPropSGLD(
            [w],
            LR,
            nbeta=NBETA,
            localization=GAMMA,
            freeze_after=BURN_IN // 2 if frozen else None,
            generator=torch.Generator().manual_seed(1),
            initial_scale=1.0,
            bias_correction=False,
        )

    def advance(steps: int) -> None:
        for _ in range(steps):
            w.grad = curvature * w.detach()
            if noise:
                w.grad.add_(torch.randn(w.shape, generator=source), alpha=noise)
            chain.step()

    advance(BURN_IN)
    energies = torch.zeros(copies, dtype=torch.float64)
    for _ in range(draws):
        advance(EVERY)
        energies += NBETA * (CURVATURE * w.detach().double().square()).sum(1) / 2
    ratios = energies / draws / EXACT
    se = float(ratios.std()) / math.sqrt(copies)
    law = _law(chain, noise) if frozen else None
    return Cell(noise, frozen, float(ratios.mean()) - 1, se, law)


def _law(chain: RMSPropSGLD, noise: float) -> float:
    """Relative error of the LLC of chains with these P: discretisation, and the noise's heat."""
    preconditioner: Tensor = chain._current_layouts()[0].columns["root"][0].double().square()
    step = LR * preconditioner
    variance = (1 + step * (NBETA * noise) ** 2 / 4) / (KAPPA * (1 - step * KAPPA / 4))
    return float((NBETA * CURVATURE * variance).sum(1).mean() / 2) / EXACT - 1


def cells(draws: int = 60) -> list[Cell]:
    """Return the table."""
    return [quadratic(noise, frozen, draws=draws) for noise in NOISES for frozen in (True, False)]


def markdown(rows: list[Cell]) -> str:
    """Return the table: a row a noise, a column for a second moment that is frozen, or never."""
    lines = [["noise of a gradient", "frozen after burn-in", "adaptive"], ["---"] * 3]
    for noise in NOISES:
        lines.append([f"{noise:g}", *(_entry(cell) for cell in rows if cell.noise == noise)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _entry(cell: Cell) -> str:
    expected = "" if cell.law is None else f" (law {100 * cell.law:+.1f})"
    return f"{100 * cell.error:+.1f} ± {100 * cell.se:.1f} %{expected}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the draws")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(markdown(cells(15 if options.quick else 60)))


if __name__ == "__main__":
    main()
