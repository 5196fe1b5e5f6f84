"""A deep linear net of which one layer moves is a linear regression, whose LLC is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distsampler as ds

pytestmark = pytest.mark.statistical
N = 256


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


@pytest.mark.parametrize(("rank", "limit"), [(10, 100.0), (4, 40.0)])
def test_the_llc_of_one_layer_is_that_of_its_regression(
    tmp_path: Path, rank: int, limit: float
) -> None:
    """``1/2 sum nbeta h / (nbeta h + gamma)``, h = 2 eig(B^T B) eig(x x^T / n), B the layer above.

    In the limit rank(above) rank(below) / 2, below being the inputs.
    """
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(N, 20, generator=generator)
    model = nn.Sequential(nn.Linear(20, 10, bias=False), nn.Linear(10, 20, bias=False))
    with torch.no_grad():
        left, right = (
            torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size in (20, 10)
        )
        above = left * torch.linspace(1, 2, rank) @ right.T
        model[1].weight.copy_(above)
        targets = model(x)
    curvature = torch.outer(
        2 * torch.linalg.eigvalsh(above.double().T @ above.double()),
        torch.linalg.eigvalsh(x.double().T @ x.double() / N),
    ).clamp(min=0)
    nbeta, gamma = 1000.0, 10.0
    exact = float((nbeta * curvature / (nbeta * curvature + gamma)).sum() / 2)
    assert exact == pytest.approx(limit, rel=0.04)
    lr = 1 / (nbeta * float(curvature.max()) + gamma)
    config = ds.RunConfig(
        sampler=ds.SamplerConfig(name="lmsgld", lr=lr, nbeta=nbeta, localization=gamma),
        chains=4, draws=50, burn_in=10, thin=100, batch_size=N, batches="epoch", probe=16,
        restrict_to="0.weight", device="cpu",
    )  # fmt: skip
    run = ds.sample(
        model, (x, targets), squared, config, store=tmp_path / "run", pool=ds.SerialPool(),
        quiet=True,
    )  # fmt: skip
    found = run.llc("ignore")
    assert np.std(found.per_chain) / 2 < 0.01 * exact  # the standard error
    assert found.mean == pytest.approx(exact, rel=0.03)
    assert abs(1.1 * found.mean / exact - 1) > 0.03  # nbeta times 1.1 would be seen
