"""What is raced: models, data, losses and batches, the same for every contestant.

Peers import this file in environments of their own: it needs torch and numpy, nothing else.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distsampler.data.batches import BatchStream

Batch = tuple[Tensor, Tensor]
EXAMPLES = 4_096
SEED = 0


@dataclass(frozen=True)
class Workload:
    """A model, its data, and a loss of every example; its name is that of its place below."""

    name: str
    title: str
    layers: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    batch_size: int = 256
    lr: float = 1e-6
    localization: float = 100.0
    nbeta: float = EXAMPLES / math.log(EXAMPLES)

    def model(self) -> nn.Module:
        """The model, the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(SEED)
            return self.layers()

    def rows(self) -> Batch:
        """All examples."""
        return self.data(torch.Generator().manual_seed(SEED))

    def batches(self) -> Iterator[Batch]:
        """The batches of chain 0, from step 0 on."""
        inputs, targets = self.rows()
        stream = BatchStream(SEED, 0, EXAMPLES, self.batch_size, epochs=False)
        step = 0
        while True:
            rows = torch.from_numpy(stream.indices(step))
            yield inputs.index_select(0, rows), targets.index_select(0, rows)
            step += 1


def _classes(generator: torch.Generator) -> Batch:
    inputs = torch.randn(EXAMPLES, 784, generator=generator)
    return inputs, (inputs @ torch.randn(784, 10, generator=generator)).argmax(1)


def _linear_map(generator: torch.Generator) -> Batch:
    inputs = torch.randn(EXAMPLES, 16, generator=generator)
    noise = 0.1 * torch.randn(EXAMPLES, 16, generator=generator)
    return inputs, inputs @ torch.randn(16, 16, generator=generator) / 4 + noise


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _squared_error(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


VOCABULARY, CONTEXT, WIDTH, HEADS = 64, 16, 32, 4


class Transformer(nn.Module):
    """A causal language model of two layers, its attention written out: it can be mapped over."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, text: Tensor) -> Tensor:
        """Logits of every next token."""
        x = self.tokens(text) + self.places.weight
        for layer in self.layers:
            x = layer(x)
        return torch.as_tensor(self.out(x))


class Layer(nn.Module):
    """Attention and a feed-forward net, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attend, self.merge = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream behind this layer."""
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        parts = self.attend(self.norms[0](x)).chunk(3, -1)
        query, key, value = (part.reshape(shape).transpose(1, 2) for part in parts)
        later = torch.full((CONTEXT, CONTEXT), -1e9).triu(1)
        scores = query @ key.transpose(-1, -2) / shape[-1] ** 0.5 + later
        x = x + self.merge((scores.softmax(-1) @ value).transpose(1, 2).reshape(x.shape))
        return torch.as_tensor(x + self.down(F.gelu(self.up(self.norms[1](x)))))


def _text(generator: torch.Generator) -> Batch:
    text = torch.randint(VOCABULARY, (EXAMPLES, CONTEXT + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def _next_token(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch[0]).transpose(1, 2)
    return F.cross_entropy(logits, batch[1], reduction="none").mean(1)


WORKLOADS = {
    "mlp": Workload(
        "mlp",
        "MLP 784-128-10",
        lambda: nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)),
        _classes,
        _cross_entropy,
    ),
    "linear": Workload(
        "linear",
        "deep linear net, 4 layers 16x16, no bias",
        lambda: nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4))),
        _linear_map,
        _squared_error,
    ),
    "transformer": Workload(
        "transformer",
        "transformer, 2 layers, width 32, 16 tokens",
        Transformer,
        _text,
        _next_token,
    ),
}
