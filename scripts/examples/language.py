"""The LLC of a small GPT while it learns to write, of all of it and of each attention head.

    python scripts/examples/language.py --store runs/language --figure language.png

The model is GPT-2 of the package transformers, two layers of two heads, from a config: nothing is
downloaded. It learns, character by character, the help texts that every Python has in it.

An example is a sequence of 32 characters, and its loss the mean over the 31 that are predicted. So
n counts sequences. With the sum in place of the mean the posterior would be 31 times as cold.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import curves
import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import distsampler as ds

LENGTH = 32  # characters of a sequence
LAYERS, HEADS, WIDTH = 2, 2, 32
CHARACTERS = 128  # ASCII
SEQUENCES, HELD_OUT = 4_096, 1_024
STEPS = 4_000


def gpt(seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 of 30,592 parameters, without dropout."""
    config = GPT2Config(
        vocab_size=CHARACTERS, n_positions=LENGTH, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        use_cache=False,  # of keys and values: for writing text, not for reading it
        attn_implementation="eager",  # can be differentiated twice, as watching curvature needs
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def text(part: str = "train") -> Tensor:
    """Sequences (N, 32) of Python's help topics, characters as numbers."""
    letters = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    rows = torch.frombuffer(bytearray(letters), dtype=torch.uint8).long()
    rows = rows[: len(rows) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    first = order[: SEQUENCES + HELD_OUT]
    return rows[{"train": first[HELD_OUT:], "test": first[:HELD_OUT]}[part]]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy of every sequence (batch,): the mean over its predicted characters."""
    logits = model(input_ids=batch).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(dim=1)


def heads(model: GPT2LMHeadModel) -> dict[str, dict[str, Tensor]]:
    """What moves, by head: masks of its columns of the fused query, key and value, and of its rows
    of the output projection."""
    by_head, size = {}, WIDTH // HEADS
    for layer in range(LAYERS):
        names = [f"transformer.h.{layer}.attn.{part}.weight" for part in ("c_attn", "c_proj")]
        for head in range(HEADS):
            masks = [
                torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for name in names
            ]
            own = slice(head * size, (head + 1) * size)
            masks[0].view(WIDTH, 3, WIDTH)[:, :, own] = True  # (in, [query, key, value] x out)
            masks[1][own] = True
            by_head[f"head{layer}.{head}"] = dict(zip(names, masks, strict=True))
    return by_head


def trained(
    steps: list[int], batch_size: int = 32
) -> tuple[dict[str, dict[str, Tensor]], xr.Dataset]:
    """Weights after some of the steps, by name, and both losses there."""
    model, train, test = gpt(), text("train"), text("test")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps))
    rows = torch.Generator().manual_seed(0)
    weights, curve = {}, []
    for step in range(1, max(steps) + 1):
        picked = torch.randint(len(train), (batch_size,), generator=rows)
        optimizer.zero_grad()
        loss(model, train[picked]).mean().backward()
        optimizer.step()
        schedule.step()
        if step in steps:
            weights[f"step{step}"] = {k: v.clone() for k, v in model.state_dict().items()}
            curve.append([mean_loss(model, each) for each in (train, test)])
    columns = zip(("training loss", "held-out loss"), zip(*curve, strict=True), strict=True)
    return weights, xr.Dataset({k: ("step", list(v)) for k, v in columns}, {"step": steps})


@torch.no_grad()
def mean_loss(model: nn.Module, sequences: Tensor) -> float:
    return torch.cat([loss(model, rows) for rows in sequences.split(512)]).mean().item()


def estimates(weights: dict[str, dict[str, Tensor]], store: str, draws: int) -> xr.Dataset:
    """LLCs (checkpoint, restriction), from two sweeps.

    Along one head the loss curves a fifteenth as much as along all weights (at step 1,000), so that
    its chains may take larger steps, and fewer between two draws. nbeta is 50, not n / log n = 492:
    hot chains take longer steps, and checkpoints and heads compare at any temperature.
    """
    model, data = gpt(), text("train")
    wanted = {"all": ({"all": None}, 2e-4, 10), "heads": (heads(model), 1e-3, 4)}
    tables = []
    for name, (restrictions, lr, thin) in wanted.items():
        sampler = ds.SamplerConfig(name="lmsgld", lr=lr, localization=1_000.0, nbeta=50.0)
        config = ds.RunConfig(
            sampler=sampler, chains=2, draws=draws, burn_in="auto", thin=thin, batch_size=8,
            probe=32, device="cpu", gate=ds.GateConfig(rhat=1.02, ess=200, every=250),
            watch=False,  # a look at the curvature takes as long as a thousand of these steps
        )  # fmt: skip
        sweep = ds.sweep(
            model, data, loss, config, store=f"{store}/{name}", checkpoints=weights,
            restrictions=restrictions, resume="auto",
        )  # fmt: skip
        tables.append(sweep.collect())
    return xr.concat(tables, "restriction").squeeze()


def figure(table: xr.Dataset, curve: xr.Dataset, path: str | Path) -> None:
    """At the left all weights and the losses, at the right each head alone."""
    sheet, (left, right) = curves.sheet(columns=2)
    ds.plot_llc_curve(table.sel(restriction="all"), left)
    named = {name: curve[name] for name in ("training loss", "held-out loss")}
    curves.losses(named, left, scale="linear")
    ds.plot_llc_curve(table.isel(restriction=slice(1, None)), right)
    curves.legend(right)
    titles = {left: "GPT-2 in small, all weights", right: "one attention head, the rest fixed"}
    for ax, title in titles.items():
        ax.set(title=title, xlabel="training step", xscale="log")
    right.set_xlim(left.get_xlim())
    sheet.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="runs/language", help="the directory of the sweep")
    parser.add_argument("--figure", default="language.png", help="where to draw the curves")
    parser.add_argument("--checkpoints", type=int, default=12, help="how many")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--draws", type=int, default=600, help="of a chain, at most")
    options = parser.parse_args()
    steps = np.geomspace(20, options.steps, options.checkpoints).round().astype(int).tolist()
    weights, curve = trained(steps)
    print(curve.to_dataframe(), flush=True)
    table = estimates(weights, options.store, options.draws)
    for column in (table.llc.round(3), table.se.round(3), table.verdict):
        print(column.name, column.to_pandas().to_string(), sep="\n")
    figure(table, curve, options.figure)


if __name__ == "__main__":
    main()
