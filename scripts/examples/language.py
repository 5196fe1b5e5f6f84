"""Which parts of a small GPT are for code and which for prose: LLCs of heads and MLPs in training.

    pip install 'transformers>=4.50'
    python scripts/examples/language.py --store runs/language --figure language.png

The model is GPT-2 of the package transformers, two layers of four heads, from a config: nothing is
downloaded. It learns the standard library's code, without comments and docstrings, and prose: those
docstrings, Python's help topics, and what the installed packages say of themselves. So the text
depends on what is installed, and is under the licences of Python and of those packages. It is not
shipped, and no text is stored: probes whose loss is one value a sequence keep no token ids.

An example is a sequence of 32 tokens, and its loss the mean over the 31 that are predicted
(``ds.lm.sequence_losses``). So n counts sequences; with the sum in place of the mean the posterior
would be 31 times as cold. The tokens of a sequence are dependent: n says nothing of them.

Each cell of the sweep moves one component of one checkpoint, ``restrict_to="l0h1"``, all else
fixed. Its chains sample the posterior of the training text, and three named probes read along the
way: held-out code, held-out prose, and both with the tokens of each sequence shuffled. A reading is
nbeta times the probe's excess loss: how much of what the component is worth shows on that text. It
is the LLC where the probe is the training text, and where the weights are no minimum of the probe's
loss it may be negative: noise in what predicts from order is a gain where there is no order.

More: ``--components`` takes any names of ``ds.components(model)`` (all heads: ``l0h0 l0h1 ...``),
``--checkpoints``, ``--steps`` and ``--draws`` make it longer.
"""

import argparse
import ast
import random
import warnings
import zlib
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics
from sysconfig import get_path

import curves
import numpy as np
import torch
import xarray as xr
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import distsampler as ds
from distsampler.data.rows import Rows

LENGTH = 32  # tokens of a sequence
LAYERS, HEADS, WIDTH = 2, 4, 128
TOKENS = 2_048  # that the tokenizer knows
END = "<|endoftext|>"
SEQUENCES = 2_048  # of the training text, whose LLC is estimated
PROBE = 64  # sequences of each named probe
STEPS = 800  # of training
FIRST = 60  # step that the first checkpoint comes after
LR, LOCALIZATION, NBETA = 1.25e-3, 1_000.0, 50.0
DRAWS, BURN_IN = 200, 10
TRAINING = "training text (LLC)"
COLORS = {TRAINING: "0.35", "code": "C0", "prose": "C1", "shuffled": "C2"}
COMPONENTS = ("l0h1", "l0h3", "l0.mlp", "l1h1", "l1h3", "l1.mlp")  # of eight heads four


def code_and_docstrings() -> tuple[list[str], list[str]]:
    """The modules of the standard library without comments and docstrings, and the docstrings."""
    code, docstrings = list[str](), list[str]()
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(Path(get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings(action="ignore"):  # of escapes in old strings
            tree = ast.parse(file.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, scopes) and (docstring := ast.get_docstring(node)):
                docstrings.append(docstring)
                node.body[0] = ast.Pass()
        code.append(ast.unparse(tree))
    return code, docstrings


def texts() -> dict[str, list[str]]:
    """Code, a text a module; prose, a text a docstring, help topic or package."""
    code, docstrings = code_and_docstrings()
    payloads = {each.metadata.get_payload() for each in distributions()}
    descriptions = sorted(text for text in payloads if isinstance(text, str) and text.strip())
    return {"code": code, "prose": [*docstrings, *map(topics.get, sorted(topics)), *descriptions]}


def tokenizer(lines: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte pairs, learned from the text."""
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(lines, vocab_size=TOKENS, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=pairs._tokenizer, eos_token=END)


def ids(rows: Rows) -> np.ndarray:
    """All token ids, (sequence, token)."""
    return rows.take(np.arange(len(rows)))["input_ids"].numpy()


def shuffled(sequences: np.ndarray, seed: int = 0) -> np.ndarray:
    """The same tokens of every sequence, in random order."""
    return np.random.default_rng(seed).permuted(sequences, axis=1)


def picked(sequences: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """So many of the sequences, chosen at random."""
    rows = np.random.default_rng(seed).permutation(len(sequences))[:count]
    return sequences[np.sort(rows)]


def corpus() -> tuple[np.ndarray, dict[str, Rows]]:
    """Training sequences, and the three probes from every tenth text, which is held out."""
    kinds = texts()
    encode = tokenizer([text for lines in kinds.values() for text in lines])
    training, probes = list[np.ndarray](), dict[str, np.ndarray]()
    for kind, lines in kinds.items():
        random.Random(0).shuffle(lines)
        probes[kind] = picked(ids(ds.lm.blocks(lines[::10], encode, LENGTH)), PROBE)
        del lines[::10]
        training.append(ids(ds.lm.blocks(lines, encode, LENGTH)))
    both = np.concatenate([part[: PROBE // 2] for part in probes.values()])
    probes["shuffled"] = shuffled(both)
    rows = {name: ds.lm.blocks(part, length=LENGTH) for name, part in probes.items()}
    return np.concatenate(training), rows


def gpt(width: int = WIDTH, seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 without dropout, of 0.67 million parameters by default."""
    config = GPT2Config(
        vocab_size=TOKENS, n_positions=LENGTH, n_layer=LAYERS, n_head=HEADS, n_embd=width,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        use_cache=False,  # of keys and values: for writing text, not for reading it
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def train(
    model: GPT2LMHeadModel, sequences: np.ndarray, files: dict[int, Path], batch_size: int = 32
) -> None:
    """Train the model, and keep its weights after the steps that `files` names."""
    steps = max(files)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        3e-3,
        total_steps=steps + 1,
        pct_start=min(100 / steps, 0.5),
        cycle_momentum=False,
    )
    rows = np.random.default_rng(0)
    for step in range(1, steps + 1):
        batch = torch.from_numpy(sequences[rows.integers(len(sequences), size=batch_size)])
        optimizer.zero_grad()
        ds.lm.sequence_losses(model, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step in files:
            torch.save(model.state_dict(), files[step])
            print(f"trained {step} steps", flush=True)


def checkpoints(store: Path, sequences: np.ndarray, steps: int, count: int) -> Path:
    """Checkpoints spaced by equal factors, trained if they are not there yet; their folder.

    Its name has a checksum of the text: with other packages installed the tokens mean other things.
    """
    folder = store / f"checkpoints-{zlib.crc32(sequences.tobytes()):08x}"
    wanted = np.geomspace(FIRST, steps, count).round().astype(int).tolist()
    files = {step: folder / f"step{step}.pt" for step in wanted}
    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        train(gpt(), sequences, files)
    return folder


def estimates(
    weights: Path, data: Rows, probes: dict[str, Rows], options: argparse.Namespace
) -> ds.Sweep:
    """A cell for every checkpoint and component.

    nbeta is 50, not n / log n = 269: hot chains take longer steps, and checkpoints and components
    compare at any temperature.
    """
    sampler = ds.SamplerConfig(name="lmsgld", lr=LR, localization=LOCALIZATION, nbeta=NBETA)
    config = ds.RunConfig(
        sampler=sampler, chains=2, draws=options.draws, burn_in=BURN_IN, thin=2, batch_size=8,
        probe=16, device="cpu", gate=ds.GateConfig(rhat=1.05, ess=100, every=50),
        watch=False,  # a look at the curvature takes as long as a thousand of these steps
        probes={name: ds.ProbeConfig(batch_size=32, every=5) for name in probes},
    )  # fmt: skip
    return ds.sweep(
        gpt(), data, ds.lm.sequence_losses, config, store=f"{options.store}/sweep",
        checkpoints=weights, restrictions={name: name for name in options.components},
        probes=probes, resume="auto",
    )  # fmt: skip


def readings(sweep: ds.Sweep) -> xr.Dataset:
    """A sweep by text: the LLC on the training text, what a probe reads on another."""
    tables = [sweep.collect(probe=None if text == TRAINING else text) for text in COLORS]
    table = xr.concat(tables, xr.DataArray(list(COLORS), dims="text", name="text"))
    return table.squeeze(["setting", "data"], drop=True)


def figure(table: xr.Dataset, path: str | Path) -> None:
    """A panel a component: its LLC, and what the probes read, over training."""
    names = table.restriction.values.tolist()
    sheet, axes = curves.panels(len(names))
    for name, ax in zip(names, axes, strict=True):
        cells = table.sel(restriction=name)
        for text, color in COLORS.items():
            line = "--" if text == TRAINING else "-"
            curves.series(ax, cells.step, cells.sel(text=text), color, ls=line)
        ax.set_title(title(name, cells.isel(checkpoint=-1)), fontsize=10)
        ax.set_xscale("log")
        ax.set_xticks(cells.step.values, cells.step.values)
        ax.minorticks_off()
        ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    curves.key(sheet, COLORS)
    for ax in axes[-3:]:
        ax.set_xlabel("training step")
    sheet.supylabel("nbeta x excess loss", fontsize=10)
    sheet.suptitle("One component of a small GPT moves, all else is fixed: on which text it shows")
    sheet.savefig(path, dpi=72)


def title(name: str, cell: xr.Dataset) -> str:
    """The component, and on which text more of it shows, where that is beyond the error."""
    read = cell.sel(text=["code", "prose"]).sortby("llc")
    (low, high), beyond = read.llc.values, 1.96 * np.hypot(*read.se.values)
    if not (low > 0 and high - low > beyond):
        return name
    less, more = read.text.values
    return f"{name}:  {more} = {high / low:.1f} x {less}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=curves.AsWritten)
    parser.add_argument("--store", default="runs/language", help="of checkpoints and sweep")
    parser.add_argument("--figure", default="language.png", help="where to draw")
    parser.add_argument("--components", nargs="+", default=COMPONENTS, help="what moves, in turn")
    parser.add_argument("--checkpoints", type=int, default=4, help="how many")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of a chain, at most")
    options = parser.parse_args()
    training, probes = corpus()
    weights = checkpoints(Path(options.store), training, options.steps, options.checkpoints)
    data = ds.lm.blocks(picked(training, SEQUENCES), length=LENGTH)
    table = readings(estimates(weights, data, probes, options))
    for column in (table.r_hat, table.ess, table.verdict):
        print(column.name, column.isel(text=0).to_pandas().round(3).to_string(), sep="\n")
    for text in COLORS:
        at = table.sel(text=text)
        print(f"{text}: loss at w*", at.init_loss.isel(restriction=0).values.round(3))
        print("nbeta x excess loss", at.llc.to_pandas().round(2).to_string(), sep="\n")
        print("its se", at.se.to_pandas().round(2).to_string(), sep="\n")
    figure(table, options.figure)


if __name__ == "__main__":
    main()
