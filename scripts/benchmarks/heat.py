"""The heat of minibatches, and what its correction leaves: SGLD and LMSGLD at two step sizes.

On a quadratic (400 directions, curvature 0.1 to 10, n 4096, batches of 64, gradients of standard
deviation 2 between examples, nbeta n / log n, gamma 100) the error has a law, printed beside what
was measured. With --network also around the demo's network, where a run at a tenth of the shorter
step stands for the truth.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distsampler.optim import LMSGLD, SGLD
from distsampler.truth import discretised_laws

Kind = type[SGLD] | type[LMSGLD]
SHARES = (0.3, 1.0)  # lr kappa_max
LAWS = {SGLD: discretised_laws.sgld, LMSGLD: discretised_laws.lmsgld}
N, BATCH, VARIANCE, GAMMA = 4096, 64, 4.0, 100.0
NBETA = N / math.log(N)
CURVATURE = torch.logspace(-1, 1, 400, dtype=torch.float64)
KAPPA = NBETA * CURVATURE + GAMMA
EXACT = float((NBETA * CURVATURE / KAPPA).sum() / 2)


class Cell(NamedTuple):
    """One entry of the table: relative errors of the LLC."""

    sampler: str
    corrected: bool
    share: float
    error: float
    se: float
    law: float | None


def settings() -> Iterator[tuple[Kind, bool, float]]:
    """Sampler, whether corrected, lr kappa_max."""
    kinds: tuple[Kind, ...] = (SGLD, LMSGLD)
    for share, corrected, kind in product(SHARES, (False, True), kinds):
        yield kind, corrected, share


def law(kind: Kind, corrected: bool, share: float, injected: float = 1.0) -> float:
    """Relative error of the LLC on the quadratic, exactly; ``injected`` scales the noise."""
    lr = share / float(KAPPA.max())
    heat = lr * NBETA**2 * VARIANCE / (4 * BATCH)
    left = (max(0.0, 1 - heat) if corrected else 1.0) * injected**2
    variances = [LAWS[kind](lr, kappa, lr * heat, left) for kappa in KAPPA.tolist()]
    weights = NBETA * CURVATURE / 2
    return float((weights * torch.tensor(variances)).sum()) / EXACT - 1


def quadratic(
    kind: Kind, corrected: bool, share: float, copies: int = 50, draws: int = 40
) -> tuple[float, float]:
    """Relative error of the LLC as sampled, and its standard error over the copies."""
    lr = share / float(KAPPA.max())
    slowest = math.ceil(2 / (lr * float(KAPPA.min())))  # steps
    curvature = CURVATURE.float().expand(copies, -1)
    w = nn.Parameter(torch.zeros(copies, len(CURVATURE)))
    options = {"gradient_variance": VARIANCE, "batch_size": BATCH} if corrected else {}
    source = torch.Generator().manual_seed(2)
    chain = kind(
        [w],
        lr,
        nbeta=NBETA,
        localization=GAMMA,
        generator=torch.Generator().manual_seed(1),
        **options,
    )

    def advance(steps: int) -> None:
        for _ in range(steps):
            noise = torch.randn(w.shape, generator=source) * math.sqrt(VARIANCE / BATCH)
            w.grad = torch.addcmul(noise, curvature, w.detach())
            chain.step()

    advance(5 * slowest)
    energies = torch.zeros(copies, dtype=torch.float64)
    for _ in range(draws):
        advance(slowest)
        energies += NBETA * (CURVATURE * w.detach().double().square()).sum(1) / 2
    ratios = energies / draws / EXACT
    return float(ratios.mean()) - 1, float(ratios.std()) / math.sqrt(copies)


def quadratic_cells(draws: int = 40) -> list[Cell]:
    """The table on the quadratic."""
    return [
        Cell(kind.__name__, c, s, *quadratic(kind, c, s, draws=draws), law(kind, c, s))
        for kind, c, s in settings()
    ]


class Network:
    """The demo's network and its data, with what a chain around it must know.

    Args:
        batch: Examples a step.
    """

    def __init__(self, batch: int) -> None:
        from scripts.examples import mnist

        self.batch, self.loss = batch, mnist.loss
        self.model = mnist.trained_network()
        self.data = mnist.data()
        self.n = len(self.data[0])
        self.nbeta, self.gamma = self.n / math.log(self.n), 1000.0
        self.params = list(self.model.parameters())
        self.anchors = [p.detach().clone() for p in self.params]
        self.init_loss = self.full_loss()
        self.kappa = self.nbeta * self._leading()[0] + self.gamma
        self.variance = self.at_anchor = [g.var(0) for g in self._gradients()]
        self.along_leading = math.nan

    def refresh(self, lr: float, times: int = 4) -> None:
        """Take the gradient's variance where chains go: far larger than at a minimum."""
        variances, along = [], []
        for seed in range(times):
            self.energies(LMSGLD, False, lr, way=1.0, seed=10 + seed)
            each = self._gradients()
            variances.append([g.var(0) for g in each])
            _, leading = self._leading()
            projected = sum((g * v).flatten(1).sum(1) for g, v in zip(each, leading, strict=True))
            along.append(self._share(lr) * float(torch.as_tensor(projected).var()))
        self.variance = [torch.stack(each).mean(0) for each in zip(*variances, strict=True)]
        self.along_leading = sum(along) / times

    def full_loss(self) -> float:
        """Mean loss over all data, at the present weights."""
        with torch.no_grad():
            return float(self.loss(self.model, self.data).double().mean())

    def heat(self, lr: float, variance: list[Tensor]) -> str:
        """The heat lr nbeta^2 v / (4 m), as a share of the injected noise, in words."""
        flat = torch.cat([v.reshape(-1) for v in variance]) * self._share(lr)
        return f"{flat.mean():.2g} in the mean and {flat.max():.2g} at most"

    def energies(self, kind: Kind, corrected: bool, lr: float, way: float, seed: int = 1) -> Tensor:
        """Nbeta times the excess loss over all data, along a chain.

        Args:
            kind: The sampler.
            corrected: Whether its noise is.
            lr: Step size.
            way: Length in units of the slowest relaxation, 2 / (lr gamma); five are burnt in.
            seed: Of noise and batches; the same for all samplers, whose errors then compare.
        """
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.anchors)
        options = {"gradient_variance": self.variance, "batch_size": self.batch}
        group = {"params": self.params, "anchors": self.anchors}
        chain = kind(
            [group],
            lr,
            nbeta=self.nbeta,
            localization=self.gamma,
            generator=torch.Generator().manual_seed(seed),
            **(options if corrected else {}),
        )
        rows = torch.Generator().manual_seed(1_000 + seed)
        relaxation = 2 / (lr * self.gamma)
        every, measured = max(1, round(relaxation / 10)), []
        for step in range(math.ceil((5 + way) * relaxation)):
            picked = torch.randint(self.n, (self.batch,), generator=rows)
            chain.zero_grad()
            self.loss(self.model, (self.data[0][picked], self.data[1][picked])).mean().backward()
            chain.step()
            if step > 5 * relaxation and step % every == 0:
                measured.append(self.nbeta * (self.full_loss() - self.init_loss))
        return torch.tensor(measured, dtype=torch.float64)

    def _share(self, lr: float) -> float:
        """What a variance of the gradient is to be multiplied with to be a share of the noise."""
        return lr * self.nbeta**2 / (4 * self.batch)

    def _gradients(self) -> list[Tensor]:
        """The gradient of every example, (n, *shape) a parameter."""
        names = [name for name, _ in self.model.named_parameters()]

        def one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            logits = torch.func.functional_call(self.model, params, (x[None],))
            return nn.functional.cross_entropy(logits, y[None])

        values = {name: p.detach() for name, p in self.model.named_parameters()}
        each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0), chunk_size=250)
        grads = each(values, *self.data)
        return [grads[name] for name in names]

    def _leading(self, rounds: int = 50) -> tuple[float, list[Tensor]]:
        """Largest Hessian eigenvalue of the mean loss here, by power iteration, and its vector."""
        loss = self.loss(self.model, self.data).mean()
        grads = torch.autograd.grad(loss, self.params, create_graph=True)
        source = torch.Generator().manual_seed(0)
        v, size = [torch.randn(p.shape, generator=source) for p in self.params], 1.0
        for _ in range(rounds):
            v = list(torch.autograd.grad(grads, self.params, v, retain_graph=True))
            size = math.sqrt(sum(float(x.square().sum()) for x in v))
            v = [x / size for x in v]
        return size, v


def blocked(values: Tensor, blocks: int = 20) -> tuple[float, float]:
    """Mean, and its standard error from the means of blocks in a row."""
    means = torch.stack([block.mean() for block in values.tensor_split(blocks)])
    return float(values.mean()), float(means.std()) / math.sqrt(blocks)


def network_cells(way: float, say: Callable[[str], None]) -> list[Cell]:
    """The table around the demo's network."""
    net = Network(batch=64)
    step = 1 / net.kappa
    lr = SHARES[0] * step
    net.refresh(lr)
    say(
        f"demo's network: kappa_max {net.kappa:.0f}; heat at {SHARES[0]} / kappa_max, as a share "
        f"of the injected noise: {net.heat(lr, net.at_anchor)} at w*, {net.heat(lr, net.variance)} "
        f"along chains, whose variances are used; {net.along_leading:.2g} there in the direction "
        "of the largest curvature, which a correction by coordinates does not see"
    )
    exact, se = blocked(net.energies(LMSGLD, True, lr / 10, 3 * way))
    say(f"LLC {exact:.3f} ± {se:.3f} at a tenth of that step (LMSGLD, corrected)\n")
    cells = []
    for kind, corrected, share in settings():
        mean, error = blocked(net.energies(kind, corrected, share * step, way))
        ratio = mean / exact
        both = ratio * math.hypot(error / mean, se / exact)
        cells.append(Cell(kind.__name__, corrected, share, ratio - 1, both, None))
        say(f"{kind.__name__}, corrected {corrected}, {share}: {mean:.3f} ± {error:.3f}")
    say("")
    return cells


def markdown(cells: list[Cell]) -> str:
    """A row a sampler, a column a step size."""
    rows = [["sampler", *(f"lr = {share} / kappa_max" for share in SHARES)]]
    rows.append(["---"] * len(rows[0]))
    for corrected, name in product((False, True), ("SGLD", "LMSGLD")):
        matching = [c for c in cells if (c.corrected, c.sampler) == (corrected, name)]
        rows.append([name + corrected * ", corrected", *map(_entry, matching)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _entry(cell: Cell) -> str:
    expected = "" if cell.law is None else f" (law {100 * cell.law:+.1f})"
    return f"{100 * cell.error:+.1f} ± {100 * cell.se:.1f} %{expected}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", action="store_true", help="the demo's network as well")
    parser.add_argument("--only-network", action="store_true", help="that alone")
    parser.add_argument("--quick", action="store_true", help="a quarter of the draws")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.only_network:
        print(markdown(quadratic_cells(10 if options.quick else 40)) + "\n", flush=True)
    if options.network or options.only_network:
        cells = network_cells(100 if options.quick else 400, lambda text: print(text, flush=True))
        print(markdown(cells))


if __name__ == "__main__":
    main()
