"""One contestant of scripts/bench beside in a process of its own: `MODEL,DTYPE,WEIGHTS CONTESTANT`.

It says hello with its loss at w*, then answers every line, the settings of a run as JSON, with a
line of JSON: what it measured. Other packages are imported by their contestant only.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scripts.benchmarks import beside_models
from scripts.benchmarks.beside_models import Settings

PROBE_BATCHES = 4  # whose losses both record at every draw
INIT_LOSS_BATCHES = 32  # that devinterp reads its loss at w* from, by default
WARM_UP = Settings(
    lr=1e-6, nbeta=1.5, localization=1.0, chains=1, burn_in=10, steps=20, thin=10, batch_size=16
)

Sampler = Callable[[nn.Module, str, Settings], dict[str, Any]]
"""Makes a run of the model at w*, in a dtype; returns what it measured."""


def ours(net: nn.Module, dtype: str, run: Settings) -> dict[str, Any]:
    """A run with the defaults of the package: fp32 weights, bf16 by autocast."""
    import distsampler as ds

    sampler = ds.SamplerConfig(
        name="sgld", lr=run.lr, nbeta=run.nbeta, localization=run.localization
    )
    config = ds.RunConfig(
        sampler=sampler, chains=run.chains, draws=run.steps // run.thin, thin=run.thin,
        burn_in=run.burn_in // run.thin, batch_size=run.batch_size, seed=run.seed,
        probe=PROBE_BATCHES * run.batch_size, precision=dtype, watch=run.watch, device="cpu",
    )  # fmt: skip
    data = beside_models.rows()
    with tempfile.TemporaryDirectory() as store:
        began = time.perf_counter()
        made = ds.sample(
            net, data, beside_models.loss, config, store=store, pool=ds.SerialPool(), quiet=True
        )
        llc = made.llc(on_unconverged="ignore")
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "llc": llc.mean,
            "se": llc.se,
            "verdict": llc.verdict.status,
            "init_loss": llc.init_loss,
            "excess": every_draw(made, "excess_loss").tolist(),
            "distance": every_draw(made, "distance").tolist(),
            "init_loss_of_their_rows": loss_of_their_rows(net, data, run),
        }


def every_draw(made: Any, name: str) -> NDArray[np.float64]:
    """Return what was recorded at every draw, burn-in included, (chain, draw)."""
    groups = ("warmup_posterior", "posterior")
    parts = [made.inference_data[g][name].values for g in groups if g in made.inference_data]
    return np.concatenate(parts, axis=1)


def loss_of_their_rows(net: nn.Module, data: Tensor, run: Settings) -> float:
    """Return the mean loss of the rows from which devinterp reads the loss at w*.

    They are the first batches of a DataLoader that is shuffled with the run's seed.
    """
    order = torch.Generator().manual_seed(run.seed)
    loader = DataLoader(TensorDataset(data), run.batch_size, shuffle=True, generator=order)
    read = torch.cat([rows for (rows,), _ in zip(loader, range(INIT_LOSS_BATCHES), strict=False)])
    with torch.no_grad():
        return beside_models.loss(net, read).double().mean().item()


def theirs(net: nn.Module, dtype: str, run: Settings) -> dict[str, Any]:
    """A run of devinterp with its own defaults: bf16 is the dtype of the weights."""
    from datasets import Dataset
    from devinterp.slt.llc import compute_llc
    from devinterp.slt.sampling import sample

    net = net.bfloat16() if dtype == "bf16" else net
    data = Dataset.from_dict({"input_ids": beside_models.rows().tolist()}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        samples = sample(
            net, data, {"probe": (data, PROBE_BATCHES)}, lr=run.lr, n_beta=run.nbeta,
            localization=run.localization, num_chains=run.chains, batch_size=run.batch_size,
            num_draws=run.steps // run.thin, num_burnin_steps=run.burn_in,
            num_steps_bw_draws=run.thin, init_seed=run.seed, device="cpu",
            save_metrics=run.distances, output_path=Path(folder) / "samples",
        )  # fmt: skip
        llc = compute_llc(samples)
        seconds = time.perf_counter() - began
        distance = samples["metrics_distance"].values.tolist() if run.distances else None
        return {
            "seconds": seconds,
            "per_chain": llc.llc_per_chain.values.tolist(),
            "init_loss": float(llc.init_loss),
            "distance": distance,
        }


CONTESTANTS: dict[str, Sampler] = {"ours": ours, "theirs": theirs}
PACKAGES = {"ours": "distsampler", "theirs": "devinterp"}


def peak() -> float:
    """Return the most memory that this process has held, in MB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, dtype, weights = sys.argv[1].split(",", 2)
    contestant = CONTESTANTS[sys.argv[2]]

    def net() -> nn.Module:
        return beside_models.trained(model, dtype, weights)

    contestant(net(), dtype, WARM_UP)
    with torch.no_grad():
        loss = beside_models.loss(net(), beside_models.rows()).mean().item()
    hello = {
        "loss": loss,
        "parameters": sum(p.numel() for p in net().parameters()),
        "versions": {x: version(x) for x in (PACKAGES[sys.argv[2]], "torch", "transformers")},
    }
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        answer = contestant(net(), dtype, Settings(**json.loads(line)))
        print(json.dumps({**answer, "peak_mb": peak()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
