"""What a config file names: used by the tests of the command line."""

from typing import Any

import torch
from torch import Tensor, nn


def data(n: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    return x, x.sum(1, keepdim=True) + torch.randn(n, 1, generator=generator)


def model() -> nn.Module:
    x, y = data()
    linear = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.linalg.lstsq(x.double(), y.double()).solution.T)
    return linear


def loss(model: nn.Module, batch: Any, scale: float = 1.0) -> Tensor:
    inputs, targets = batch
    return scale * (model(inputs) - targets).square().sum(1)


not_callable = 3
