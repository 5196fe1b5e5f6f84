"""The LLC across grokking: a network learns to add modulo 53, by heart at first, then by rule.

    python scripts/examples/grokking.py --store runs/grokking --figure grokking.png

After 200 steps the sums that it is trained on are known by heart, and no others; after 2,000 most
others come out right too. The LLC is largest where all is known by heart, and falls while the rule
takes its place, which needs fewer directions of weight space.
"""

import argparse
from pathlib import Path

import curves
import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

import distsampler as ds

P = 53
TRAINED_SHARE = 0.35  # of all P * P sums: with more the rule is found at once, with less never
STEPS = 3_000
Batch = tuple[Tensor, Tensor]


class Adder(nn.Module):
    """logits(a, b) = W (u_a + v_b)^2: products of two Fourier modes, as the rule needs them."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(P, width), nn.Embedding(P, width)
        self.out = nn.Linear(width, P, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.out((self.left(pairs[:, 0]) + self.right(pairs[:, 1])).square())


def adder(seed: int = 0) -> Adder:
    """A network before training."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        model = Adder()
        for table in (model.left, model.right):
            nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)
        return model


def sums(part: str = "train") -> Batch:
    """Pairs (N, 2) and their sums modulo P (N,): some to "train", the others to "test"."""
    pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P))
    order = torch.randperm(P * P, generator=torch.Generator().manual_seed(0))
    first = round(TRAINED_SHARE * P * P)
    rows = {"train": order[:first], "test": order[first:]}[part]
    return pairs[rows], pairs[rows].sum(dim=1) % P


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of every sum (batch,)."""
    pairs, targets = batch
    return F.cross_entropy(model(pairs), targets, reduction="none")


def trained(steps: list[int]) -> tuple[dict[str, dict[str, Tensor]], xr.Dataset]:
    """Weights after some of the steps, by name, and both losses and the accuracy there."""
    model, train, test = adder(), sums("train"), sums("test")
    # Weight decay drives the network from the many solutions by heart to the small one by rule.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1.0, betas=(0.9, 0.98))
    weights, rows = {}, []
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        loss(model, train).mean().backward()
        optimizer.step()
        if step in steps:
            weights[f"step{step}"] = {k: v.clone() for k, v in model.state_dict().items()}
            rows.append(measured(model, train, test))
    names = ("training loss", "held-out loss", "accuracy")
    columns = {
        name: ("step", list(c)) for name, c in zip(names, zip(*rows, strict=True), strict=True)
    }
    return weights, xr.Dataset(columns, {"step": sorted(steps)})


@torch.no_grad()
def measured(model: nn.Module, train: Batch, test: Batch) -> tuple[float, float, float]:
    """Mean loss in training and held out, and the share of held-out sums that come out right."""
    right = (model(test[0]).argmax(dim=1) == test[1]).double().mean().item()
    return loss(model, train).mean().item(), loss(model, test).mean().item(), right


def figure(table: xr.Dataset, curve: xr.Dataset, path: str | Path) -> None:
    """LLC and both losses over training."""
    sheet, ax = curves.sheet()
    ds.plot_llc_curve(table, ax)
    curves.losses({name: curve[name] for name in ("training loss", "held-out loss")}, ax)
    ax.set(title=f"Addition modulo {P}", xlabel="training step", xscale="log")
    sheet.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="runs/grokking", help="the directory of the sweep")
    parser.add_argument("--figure", default="grokking.png", help="where to draw the curve")
    parser.add_argument("--checkpoints", type=int, default=12, help="how many")
    parser.add_argument("--max-draws", type=int, default=2_000, help="of a chain")
    options = parser.parse_args()
    steps = np.geomspace(40, STEPS, options.checkpoints).round().astype(int).tolist()
    weights, curve = trained(steps)
    config = ds.RunConfig(
        sampler=ds.SamplerConfig(localization=10.0),  # its name and lr are left to the pilots
        chains=4, draws="auto", max_draws=options.max_draws, batch_size=256, device="cpu",
    )  # fmt: skip
    sweep = ds.sweep(
        adder(), sums("train"), loss, config, store=options.store, checkpoints=weights,
        calibrate=True, bias=0.02, resume="auto",
    )  # fmt: skip
    table = sweep.collect().squeeze()
    columns = ["llc", "se", "r_hat", "ess", "verdict", "seconds"]
    shown = table[columns].to_dataframe()[columns].assign(accuracy=curve.accuracy.values)
    print(shown.round(3).to_string())
    figure(table, curve, options.figure)


if __name__ == "__main__":
    main()
