"""What beside_devinterp2 samples: tiny language models, their text, and the runs of its table.

Both contestants import this file, the peer in an environment of its own: it needs torch and
transformers, nothing else.
"""

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH = 32  # bytes of a row
ROWS = 1024  # that are sampled on
VOCABULARY, WIDTH, LAYERS, HEADS = 256, 32, 1, 4
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    ),
    "gpt_neox": dict(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH,
    ),
    "llama": dict(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2, intermediate_size=2 * WIDTH,
        max_position_embeddings=LENGTH,
    ),
}  # fmt: skip
"""Model type of transformers -> its config. No dropout: devinterp samples in mode "train"."""


@dataclass(frozen=True)
class Settings:
    """One run: what both contestants are to sample."""

    lr: float
    nbeta: float
    localization: float
    chains: int
    burn_in: int  # steps
    steps: int  # after burn-in
    thin: int
    batch_size: int
    seed: int = 100
    distances: bool = False  # |w - w*| is wanted
    watch: bool = True  # ours measures the curvature too

    @property
    def made(self) -> int:
        """Steps of all chains together."""
        return self.chains * (self.burn_in + self.steps)


def untrained(name: str) -> nn.Module:
    """Return a model with random weights, the same every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        name, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **MODELS[name]
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        net: nn.Module = AutoModelForCausalLM.from_config(config)
    return net.eval()


def trained(name: str, dtype: str, weights: str) -> nn.Module:
    """Return the trained model in float32, its weights rounded to bf16 where that is the dtype."""
    net = untrained(name)
    net.load_state_dict(torch.load(weights, weights_only=True))
    if dtype == "bf16":
        for weight in net.parameters():
            weight.data.copy_(weight.data.bfloat16())
    return net


def text() -> Tensor:
    """Return the help texts of Python as bytes, (rows, LENGTH)."""
    data = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
    return data[: len(data) // LENGTH * LENGTH].reshape(-1, LENGTH).long()


def rows() -> Tensor:
    """Return the rows that are sampled on, spread over the text, (ROWS, LENGTH)."""
    every = text()
    return every[:: len(every) // ROWS][:ROWS].contiguous()


def loss(net: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean loss of the tokens of each row, (batch,)."""
    logits = net(input_ids=batch, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


def train(name: str, steps: int, path: Path) -> None:
    """Train a model on all of the text and write its weights."""
    net, data = untrained(name), text()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        batch = data[torch.randint(len(data), (32,), generator=generator)]
        loss(net, batch).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        falling.step()
    torch.save(net.state_dict(), path)
