"""Error against step size on four deep linear networks: SGLD, LMSGLD, SGNHT, held to block Gibbs.

Population gradients, nbeta 100, gamma 1. Every point is the mean over many copies of a network,
which start at draws of the posterior, so that the error is that of the step alone; the bar is one
standard error, that of Gibbs included. Step sizes are in units of 1 / kappa, kappa the median over
the posterior of the largest curvature of U. Writes scripts/figures/step-size.png and prints the
numbers; "diverges" says that at least one copy has left for infinity.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distsampler.optim import LMSGLD, SGLD, SGNHT, Sampler
from distsampler.truth.gibbs import BlockGibbs, DeepLinear, ReplicaMean, block_gibbs
from distsampler.truth.many_copies import sample_copies

NBETA, GAMMA = 100.0, 1.0
STEPS = (0.02, 0.05, 0.12, 0.3, 0.6)  # lr kappa
COPIES, WAY, LEAST = 600, 300, 3_000  # a run takes WAY / (lr kappa) steps, and at least so many
NETS = {
    f"{layers - 1} hidden layers, w* {where}": DeepLinear.of_rank(
        (3,) * (layers + 1), rank, NBETA, GAMMA
    )
    for layers in (3, 4)
    for where, rank in (("at zero", 0), ("of full rank", 3))
}
Make = Callable[[list[torch.nn.Parameter], float], Sampler]


def _make(kind: type[Sampler], **options: object) -> Make:
    return lambda params, lr: kind(
        params,
        lr=lr,
        nbeta=NBETA,
        localization=GAMMA,
        generator=torch.Generator().manual_seed(1),
        **options,
    )


SAMPLERS = {
    "SGLD": _make(SGLD),
    "LMSGLD": _make(LMSGLD),
    "SGNHT": _make(SGNHT, diffusion_factor=0.01),
}


class Posterior(NamedTuple):
    """What is known of a network's posterior without a step size."""

    exact: ReplicaMean
    start: list[Tensor]
    curvature: Tensor  # largest of U, at 64 draws


def posterior(net: DeepLinear) -> Posterior:
    """Exact t E[K], draws to start from, and the curvature there."""
    chains = BlockGibbs(net, COPIES, torch.Generator().manual_seed(0))
    chains.run(200)
    exact = block_gibbs(net, replicas=COPIES, sweeps=400, seed=1)
    return Posterior(exact, [w.float() for w in chains.weights], curvatures(net, chains.weights))


def curvatures(net: DeepLinear, weights: list[Tensor], draws: int = 64) -> Tensor:
    """The largest eigenvalue of the Hessian of U at some draws."""
    sizes = [w[0].numel() for w in weights]

    def potential(flat: Tensor) -> Tensor:
        parts = zip(flat.split(sizes), weights, strict=True)
        return net.tk([part.view(w[0].shape) for part, w in parts])

    flat = torch.cat([w[:draws].flatten(1) for w in weights], dim=1)
    hessians = torch.func.vmap(torch.func.hessian(potential))(flat)
    largest: Tensor = torch.linalg.eigvalsh(hessians)[:, -1]
    return largest + net.localization


def relative_error(net: DeepLinear, known: Posterior, make: Make, lr: float, way: int) -> Tensor:
    """(got - exact) / exact, and its standard error; NaN where the chain has left for infinity."""
    share = lr * float(known.curvature.median())
    steps = max(math.ceil(way / share), LEAST * way // WAY)
    got = sample_copies(
        net, lambda p: make(p, lr), known.start, steps=2 * steps // 3, burn_in=steps // 3
    )
    scale = float(known.exact.mean)
    return torch.tensor(
        [float(got.mean) / scale - 1, math.hypot(float(got.se), float(known.exact.se)) / scale]
    )


def table(errors: dict[str, dict[str, Tensor]]) -> str:
    """Markdown: a row a network and sampler, a column a step size."""
    head = ["network", "sampler", *(f"lr kappa {step:.3g}" for step in STEPS)]
    rows = [head, ["---"] * len(head)]
    for net, samplers in errors.items():
        for name, values in samplers.items():
            rows.append([net, name, *(cell(*pair.tolist()) for pair in values)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(error: float, se: float) -> str:
    """In per cent."""
    return f"{100 * error:+.1f} ± {100 * se:.1f} %" if math.isfinite(error) else "diverges"


def draw(errors: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Four panels, the step logarithmic, the error linear within 2 % and logarithmic beyond."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    sheet = Figure(figsize=(11, 3.4), layout="constrained")
    panels = sheet.subplots(1, len(errors), sharey=True)
    steps, ticks = torch.tensor(STEPS), [-2, -1, 0, 1, 2, 5, 10, 20]
    for axes, (net, samplers) in zip(panels, errors.items(), strict=True):
        axes.axhline(0, color="k", lw=0.6)
        for (name, values), marker in zip(samplers.items(), "os^", strict=True):
            pairs = 100 * values.T
            axes.errorbar(steps, *pairs, label=name, marker=marker, ms=4, lw=1.2, capsize=2)
        axes.set_title(net, fontsize=9)
        axes.set(xlabel="lr kappa", xscale="log", ylim=(-3, 25))
        axes.set_yscale("symlog", linthresh=2)
        axes.xaxis.set_major_locator(FixedLocator(STEPS))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{step:g}" for step in STEPS], fontsize=8)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.set_yticklabels([f"{tick:+d}" for tick in ticks], fontsize=8)
    panels[0].set_ylabel("relative error against Gibbs, %")
    panels[0].legend(fontsize=8, loc="upper left")
    path.parent.mkdir(exist_ok=True)
    sheet.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    way = WAY // 10 if parser.parse_args().quick else WAY
    torch.set_num_threads(1)
    errors: dict[str, dict[str, Tensor]] = {}
    for title, net in NETS.items():
        began, known = time.monotonic(), posterior(net)
        kappa = float(known.curvature.median())
        errors[title] = {
            name: torch.stack(
                [relative_error(net, known, make, step / kappa, way) for step in STEPS]
            )
            for name, make in SAMPLERS.items()
        }
        print(
            f"{title}: exact {float(known.exact.mean):.3f} ± {float(known.exact.se):.3f}, kappa "
            f"{kappa:.0f} (median; 95 % below {float(known.curvature.quantile(0.95)):.0f}, largest "
            f"{float(known.curvature.max()):.0f}), {time.monotonic() - began:.0f} s",
            flush=True,
        )
    print(table(errors))
    draw(errors, Path(__file__).with_name("step-size.png"))


if __name__ == "__main__":
    main()
