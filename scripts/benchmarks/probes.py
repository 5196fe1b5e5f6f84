"""Named probes: what a draw costs beside the forward passes of their examples, and their memory.

Three probes of 256 sequences of 256 tokens, a small GPT-2. Per round, in turns: a draw of a chain
with the probes, which writes them to a store, one of a chain without them, and the bare forward
passes of the same batches. The ratio is that of the first less the second to the third. Memory: the
resident size of a process that samples with such probes, after its first draws and after many, with
a model so small that a draw takes little time.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.chains import anchor_pass, probe
from distsampler.chains.chain import Chain
from distsampler.chains.observables import wide_variables
from distsampler.lm.losses import sequence_losses, token_losses
from distsampler.models.numerics import numerics
from distsampler.models.replica import ChainSpec, Replica
from distsampler.sampling.prepare import prepare
from distsampler.store.files import Files
from distsampler.store.large_arrays import WideArrays, WideWriter
from scripts.benchmarks.machine import heading, log, machine

NAMES = ("code", "prose", "shuffled")
VOCABULARY = 256
CPU = torch.device("cpu")


class Pairs(nn.Module):
    """A language model that sees one token back: its forward pass is nearly free."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 2), nn.Linear(2, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits of the next token."""
        logits: Tensor = self.head(self.embed(input_ids))
        return logits


def gpt2(width: int, layers: int, length: int) -> nn.Module:
    """A small GPT-2 with weights drawn at random."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": length}
    plain = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**plain, **shape))
    return model


def sequences(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """Tokens drawn at random."""
    source = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(VOCABULARY, (rows, length), generator=source)}


def config(batch_size: int, **fields: Any) -> ds.RunConfig:
    """One chain from w*, with three probes."""
    sampler = ds.SamplerConfig(lr=1e-6, localization=100.0)
    each = {"loss": token_losses, "batch_size": batch_size}
    return ds.RunConfig(
        sampler=sampler, chains=1, thin=1, batch_size=8, probe=8, watch=False, device="cpu",
        probes=dict.fromkeys(NAMES, each), **fields,
    )  # fmt: skip


def chain_of(spec: ChainSpec, folder: Path, draws: int) -> Chain:
    """A chain at w*, whose wide values go to a store."""
    replica = Replica(spec, CPU)
    parts = [anchor_pass.measure(replica, spec, part) for part in anchor_pass.parts_of(spec, 1)]
    arrays = WideArrays(Files(folder), wide_variables(spec), "bench")
    arrays.create(1, draws)
    return Chain(spec, 0, anchor_pass.reduce(parts, spec), writer=WideWriter(arrays, 0))


def bare(spec: ChainSpec) -> Callable[[], None]:
    """The forward passes of the probes' batches, and nothing else."""
    model = Replica(spec, CPU).model
    batches = [each.rows.take(rows) for each in spec.probes for rows in probe.batches(each)]

    @torch.no_grad()
    def passes() -> None:
        for batch in batches:
            token_losses(model, batch)

    return passes


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cost(options: argparse.Namespace) -> dict[str, Any]:
    """Time draws with probes, draws without, and bare forward passes, in turns."""
    rows, length = options.rows, options.length
    model = gpt2(options.width, options.layers, length)
    data = {name: sequences(rows, length, seed) for seed, name in enumerate(NAMES, 1)}
    settings = config(options.batch_size, draws=options.rounds + 1)
    spec = prepare(model, sequences(64, length, 0), sequence_losses, settings, probes=data)
    plain = prepare(model, sequences(64, length, 0), sequence_losses, settings)
    rounds = []
    with tempfile.TemporaryDirectory() as home, numerics(spec):
        measured = chain_of(spec, Path(home) / "run", options.rounds + 1)
        other = chain_of(plain, Path(home) / "plain", options.rounds + 1)
        works = (lambda: measured.advance(1), lambda: other.advance(1), bare(spec))
        for number in range(options.rounds + 1):  # the first warms up
            with_probes, without, forward = map(seconds, works)
            log(f"round {number}: {with_probes:.3f} - {without:.3f} over {forward:.3f} s")
            rounds.append((with_probes - without) / forward)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward_seconds": forward,
        "ratios": rounds[1:],
        "ratio": statistics.median(rounds[1:]),
    }


def resident() -> float:
    """Return the resident size of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Sample in this process, and see how large it is as draws are committed."""
    sizes = dict[int, float]()
    settings = config(
        options.batch_size, draws=max(options.draws), burn_in=0, commit_seconds=1e-9,
        placement=ds.PlacementConfig(block=5),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as home:
        data = {n: sequences(options.rows, options.length, s) for s, n in enumerate(NAMES, 1)}
        ds.sample(
            Pairs(), sequences(64, options.length, 0), sequence_losses, settings,
            store=f"{home}/run", probes=data, pool=ds.SerialPool(), quiet=True,
            log=lambda step, values: sizes.setdefault(step, resident()) and None,
        )  # fmt: skip
        written = sum(
            f.stat().st_size for f in Path(home, "run/wide.zarr").rglob("*") if f.is_file()
        )
    reached = [min(step for step in sizes if step >= draws) for draws in options.draws]
    return {
        "mib": {str(step): round(sizes[step], 1) for step in reached},
        "written_mib": round(written / 2**20, 1),
    }


def text(result: dict[str, Any]) -> str:
    """Return the result for people."""
    cost, sizes = result["cost"], result["memory"]["mib"]
    ratios = ", ".join(f"{ratio:.3f}" for ratio in cost["ratios"])
    grown = ", ".join(f"{size} MiB after {step} draws" for step, size in sizes.items())
    return "\n".join(
        [
            heading(result["machine"]),
            f"3 probes of {result['rows']} x {result['length']} tokens, batches of "
            f"{result['batch_size']}, GPT-2 of {cost['parameters']} parameters",
            f"a draw's probes over their bare forward passes ({cost['forward_seconds']:.2f} s): "
            f"{cost['ratio']:.3f}, the median of {ratios}",
            f"a process that samples: {grown}; {result['memory']['written_mib']} MiB written",
        ]
    )


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--draws", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = {name: getattr(options, name) for name in ("rows", "length", "batch_size")}
    parts = {"cost": cost(options), "memory": memory(options)}
    result = {"machine": machine(), **shape, **parts}
    print(json.dumps(result) if options.json else text(result))


if __name__ == "__main__":
    main()
