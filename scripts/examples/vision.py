"""The LLC of an image classifier while it learns: MNIST digits, a small convolutional network.

    distsampler sweep scripts/examples/vision.yaml --store runs/vision
    python scripts/examples/vision.py runs/vision --figure vision.png

The first command trains the network, keeps ten checkpoints, each after twice the steps of the one
before, and estimates the LLC at each; the second draws what the first has found. Early in training
an LLC may be negative: the weights are no minimum then, and chains find lower loss around them.
"""

import argparse
from pathlib import Path

import curves
import mnist  # the network, digits and loss of the demo
import torch
from torch import nn

import distsampler as ds

STEPS = 6_000
CHECKPOINTS = Path("runs/vision-checkpoints")


def trained_network(
    folder: str | Path = CHECKPOINTS, steps: int = STEPS, doublings: int = 9
) -> nn.Sequential:
    """The network, having been trained; its checkpoints lie in `folder`, where a sweep finds them.

    LLC and loss change with the logarithm of time, so checkpoints are spaced by factors of two.
    """
    kept = {steps // 2**k for k in range(doublings + 1)}
    files = {step: Path(folder) / f"step{step}.pt" for step in kept}
    if all(file.exists() for file in files.values()):
        model = mnist.network()
        model.load_state_dict(torch.load(files[steps], weights_only=True))
        return model
    Path(folder).mkdir(parents=True, exist_ok=True)
    for step, model in enumerate(mnist.training(steps=steps), start=1):
        if step in kept:
            torch.save(model.state_dict(), files[step])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", help="the directory of the sweep")
    parser.add_argument("--figure", default="vision.png", help="where to draw its curve")
    options = parser.parse_args()
    table = ds.open_sweep(options.store).collect().squeeze()
    columns = ["llc", "se", "init_loss", "r_hat", "ess", "verdict", "seconds"]
    print(table[columns].to_dataframe()[columns].round(4).to_string())
    sheet, ax = curves.sheet()
    ds.plot_llc_curve(table, ax)
    curves.losses({"training loss": table.init_loss}, ax)
    ax.set(title="MNIST, convolutional network", xlabel="training step", xscale="log")
    sheet.savefig(options.figure, dpi=80)


if __name__ == "__main__":
    main()
