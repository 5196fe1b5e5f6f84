"""All from Python, in one process: train, calibrate, sample, and read with plain ArviZ.

python scripts/examples/from_python.py runs/from-python
"""

import sys

import arviz as az
import torch
from torch import nn

import distsampler as ds


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return (model(inputs) - targets).square().mean(dim=1)  # one value an example


if __name__ == "__main__":
    torch.manual_seed(0)
    inputs = torch.randn(512, 4)
    targets = torch.sin(inputs[:, :1]) + 0.1 * torch.randn(512, 1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2_000):
        optimizer.zero_grad()
        loss(model, (inputs, targets)).mean().backward()
        optimizer.step()

    sampler = ds.SamplerConfig(localization=10.0)  # its name and lr are left to the pilots
    asked = ds.RunConfig(sampler=sampler, batch_size=128, draws="auto", max_draws=4_000)
    pool, data = ds.SerialPool(), (inputs, targets)
    found = ds.calibrate(model, data, loss, asked, pool=pool, bias=0.02)
    run = ds.sample(model, data, loss, found.config, pool=pool, store=sys.argv[1], resume="auto")
    print(run.llc("ignore"))

    idata = run.inference_data  # ArviZ's own object: every function of ArviZ takes it
    names = ["excess_loss", "probe_loss", "distance"]
    print(az.summary(idata, var_names=names, round_to=5).to_string())
    print("R-hat", az.rhat(idata, var_names=["probe_loss"])["probe_loss"].item())
    print("LLC", float(run.facts["nbeta"] * idata["posterior"]["excess_loss"].mean()))
