"""Models as users have them, tiny, with data and losses: nothing is wrong with any of them."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

N, CLASSES, WORDS, LENGTH = 16, 4, 16, 6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LABELS = torch.randint(CLASSES, (N,), generator=seeded(0))
VECTORS = torch.randn(N, 6, generator=seeded(1)), LABELS
IMAGES = torch.randn(N, 3, 8, 8, generator=seeded(2)), LABELS
MASKS = IMAGES[0], torch.randint(CLASSES, (N, 8, 8), generator=seeded(3))
TOKENS = torch.randint(1, WORDS, (N, LENGTH), generator=seeded(4))
PADDED = TOKENS * (torch.arange(LENGTH) < torch.arange(N)[:, None] % 3 + 3)


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def predicted(model: nn.Module, tokens: Any) -> Tensor:
    logits = model(tokens)[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)


def mean_predicted(model: nn.Module, tokens: Any) -> Tensor:
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def counted(model: nn.Module, tokens: Any) -> Tensor:
    """The mean over the tokens that are no padding: longer examples weigh more."""
    logits = model(tokens)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, tokens[:, 1:].flatten(), ignore_index=0)


def rebuilt(model: nn.Module, batch: Any) -> Tensor:
    return torch.as_tensor((model(batch[0]) - batch[0]).square().sum(1))


def focal(model: nn.Module, batch: Any) -> Tensor:
    losses = entropy(model, batch)
    return (1 - torch.exp(-losses)).square() * losses


def sharpened(model: nn.Module, batch: Any) -> Tensor:
    """Weights so large that all losses are zero, or nearly."""
    targets = F.one_hot(batch[1], CLASSES) * 1e3
    return F.cross_entropy(model(batch[0]) + targets, batch[1], reduction="none")


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, CLASSES)
    )


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, CLASSES),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([norm(4), norm(4)])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norms[1](self.two(self.relu(self.norms[0](self.one(x)))))
        out += x
        return torch.as_tensor(self.relu(out))


def resnet(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), Residual(norm), *head(4))


def grouped() -> nn.Module:
    return resnet(lambda channels: nn.GroupNorm(2, channels))


def mobilenet() -> nn.Module:
    """Convolutions of each channel alone, batch norm, activations in place."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True),
        *head(8),
    )  # fmt: skip


class Dense(nn.Module):
    """Each layer sees all before it, and computes them again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 2 * k, 2, 3, padding=1) for k in range(3))
        self.out = nn.Sequential(nn.BatchNorm2d(9), *head(9))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, checkpoint(layer, x, use_reentrant=False).relu()], 1)
        return torch.as_tensor(self.out(x))


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 4, 2, 2)
        self.out = nn.Conv2d(7, CLASSES, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.out(torch.cat([x, self.up(self.down(x).relu())], 1))}


def of_pixels(model: nn.Module, batch: Any) -> Tensor:
    losses = F.cross_entropy(model(batch[0])["out"], batch[1], reduction="none")
    return losses.mean((1, 2))


def mean_of_pixels(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0])["out"], batch[1])


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, CLASSES)
        self.first = nn.Parameter(torch.zeros(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        return torch.as_tensor(self.out(self.encoder(x)[:, 0]))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, 6), nn.Linear(8, WORDS)
        self.cells = kind(6, 8, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        self.cells.flatten_parameters()
        return torch.as_tensor(self.out(self.cells(self.embed(tokens))[0]))


class Encoder(nn.Module):
    """A language model, whose layers take a path of their own where no graph is recorded."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS, bias=False)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        if tied:
            self.out.weight = self.embed.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = self.get_buffer("mask")
        return torch.as_tensor(self.out(self.encoder(self.embed(tokens), mask, is_causal=True)))


class Nested(nn.Module):
    """Examples of unequal lengths, which the layers leave out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, 8, padding_idx=0), nn.Linear(8, CLASSES)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        away = tokens == 0
        x = self.encoder(self.embed(tokens), src_key_padding_mask=away)
        return torch.as_tensor(self.out(x.masked_fill(away[:, : x.shape[1], None], 0).sum(1)))


class Attention(nn.Module):
    """Llama's idiom: angles that are kept from the first call, and one layer computed again."""

    angles: Any = None

    def __init__(self, again: bool | None = None) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(WORDS, 8), nn.Linear(8, 24)
        self.out, self.again = nn.Linear(8, WORDS), again

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.angles is None or len(self.angles) < tokens.shape[1]:
            self.angles = torch.arange(tokens.shape[1])[:, None].cos()
        x = self.embed(tokens) * self.angles[: tokens.shape[1]]
        if self.again is None:
            return torch.as_tensor(self.out(x + self.attend(x)))
        return torch.as_tensor(self.out(x + checkpoint(self.attend, x, use_reentrant=self.again)))


class Experts(nn.Module):
    """Each token asks two experts of four; how evenly they are asked is kept for the loss."""

    balance: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(WORDS, 8), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, WORDS) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        shares, asked = self.router(x).softmax(-1).topk(2)
        out = x.new_zeros((*tokens.shape, WORDS))
        for number, expert in enumerate(self.experts):
            *places, rank = torch.where(asked == number)
            if len(rank):
                weighed = expert(x[tuple(places)]) * shares[(*places, rank)][:, None]
                out = out.index_put(tuple(places), weighed, accumulate=True)
        self.balance = shares.mean((1, 2))
        return out


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))


class Adapted(nn.Module):
    """LoRA: a frozen layer, and two thin ones beside it, the second of which is zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features) / 2)
        self.b = nn.Parameter(torch.zeros(base.out_features, 2))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.base(x) + self.dropout(x) @ self.a.T @ self.b.T)


def lora() -> nn.Module:
    return nn.Sequential(*(Adapted(m) if isinstance(m, nn.Linear) else m for m in mlp()))


def with_first(change: Callable[[Any], object]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = mlp()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old forms are deprecated
            change(model[0])
        return model

    return made


weight_norm = with_first(parametrizations.weight_norm)
old_weight_norm = with_first(nn.utils.weight_norm)
spectral_norm = with_first(parametrizations.spectral_norm)
old_spectral_norm = with_first(nn.utils.spectral_norm)
pruned = with_first(lambda layer: prune.l1_unstructured(layer, "weight", 0.5))


class Variational(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, -1)
        drawn = mean + torch.randn_like(mean) * torch.exp(log_variance / 2)
        return self.decode(drawn), mean, log_variance


def bound(model: nn.Module, batch: Any) -> Tensor:
    out, mean, log_variance = model(batch[0])
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
    return torch.as_tensor((out - batch[0]).square().sum(1) + divergence)


class Autoencoder(nn.Module):
    """The toy model of superposition: one matrix, and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 6) / 3), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.w.T @ self.w + self.b)


class Spectral(nn.Module):
    """Complex numbers within."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.randn(4, 2)), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        filtered = torch.fft.rfft(x) * torch.view_as_complex(self.filter)
        return torch.as_tensor(self.out(torch.fft.irfft(filtered, n=6)))


class Growing(nn.Module):
    """Keeps what every call gave, in a list, by a hook, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.outputs, self.calls = mlp(), list[Tensor](), 0
        self.seen = dict[str, Tensor]()
        self.net[0].register_forward_hook(lambda *args: self.seen.update(out=args[-1].detach()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.outputs.append(self.net(x))
        return self.outputs[-1]


def vmapped(model: nn.Module, batch: Any) -> Tensor:
    """The examples one by one, with functions of torch.func."""
    weights = dict(model.named_parameters())

    def one(x: Tensor, y: Tensor) -> Tensor:
        out = torch.func.functional_call(model, weights, (x[None],))
        return F.cross_entropy(out, y[None])

    return torch.as_tensor(torch.func.vmap(one)(*batch))


def alone() -> nn.Module:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(0.5))
    return model


def scaled(model: Any, batch: Any) -> Tensor:
    return torch.as_tensor((batch[0][:, 0] * model.scale - batch[0][:, 1]).square())


def in_half(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return mean_entropy(model, batch)


def times(factor: float) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: mean_entropy(model, batch) * factor


TEACHER = nn.Linear(6, 6)


def learnt(model: nn.Module, batch: Any) -> Tensor:
    """Zero at w*, where the model is the teacher."""
    with torch.no_grad():
        targets = TEACHER(batch[0])
    return F.mse_loss(model(batch[0]), targets)


def hinge(model: nn.Module, batch: Any) -> Tensor:
    return F.multi_margin_loss(model(batch[0]), batch[1], reduction="none")


def spelled(model: nn.Module, tokens: Any) -> Tensor:
    size, given = len(tokens), tokens[:, :2]
    lengths = torch.full((size,), LENGTH), torch.full((size,), 2)
    return F.ctc_loss(
        model(tokens).log_softmax(-1).transpose(0, 1), given, *lengths, reduction="none"
    )
