"""Chains that hop over shards: is their LLC that of replicated data, and what is left where not.

Dealt at random: a regular model and a deep linear net, 1 to 32 shards, 16 replicas each, z against
16 that draw from all data; beside them chains pinned to a shard without the correction. Shards of
other curvature: the bias against hop_every, measured and predicted, with --figure as a picture.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.chains import hop
from distsampler.truth import networks
from scripts.benchmarks.machine import log, machine

FIGURE = Path(__file__).parents[1] / "figures/hop.png"
REPLICAS, SHARDS = 16, (1, 4, 16, 32)
NEVER = 10**9
Z = 3.0
GENTLE, STEEP, VISITS = 0.1, 0.4, (1, 3, 10, 30, 100)
SPREADS = {"curvatures 0.2 to 1.8": 0.8, "0.6 to 1.4": 0.4}


class Problem(NamedTuple):
    """What is sampled, and how."""

    title: str
    model: nn.Module
    data: Any
    loss: Any
    sampler: dict[str, Any]
    run: dict[str, Any]


class Bowl(nn.Module):
    """One vector, w* at zero."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))


def bowl(model: Bowl, batch: Any) -> Tensor:
    """``c/2 |w - x|^2`` of examples (c, x)."""
    c, x = batch
    return c / 2 * (model.w - x).square().sum(1)


def regular() -> Problem:
    """50 directions, LLC about 25 of the regular theory."""
    x = torch.randn(4096, 50, generator=torch.Generator().manual_seed(0))
    sampler = {"name": "lmsgld", "lr": 1e-3, "nbeta": 100.0, "localization": 1.0}
    run = {"thin": 40, "burn_in": 20, "draws": 150, "batch_size": 64}
    return Problem(
        "regular, d = 50", Bowl(50), (torch.ones(len(x)), x - x.mean(0)), bowl, sampler, run
    )


def singular() -> Problem:
    """Five copies of a deep linear net of learning coefficient 2."""
    net = networks.unit_network((2, 2, 2, 2), 1, localization=20.0, copies=5)
    sampler = {"name": "lmsgld", "lr": 3e-5, "nbeta": net.nbeta, "localization": net.localization}
    run = {"thin": 40, "burn_in": 60, "draws": 100, "batch_size": 64}
    return Problem("deep linear net [2, 2, 2, 2]", net.model, net.data, net.loss, sampler, run)


def sample(problem: Problem, **fields: Any) -> ds.Run:
    """A run of 16 chains, each its own replica."""
    settings = {"chains": REPLICAS, "device": "cpu", "divergence_factor": None, **problem.run}
    config = ds.RunConfig(sampler=ds.SamplerConfig(**problem.sampler), **{**settings, **fields})
    parts = (problem.model, problem.data, problem.loss, config)
    return ds.sample(*parts, pool=ds.SerialPool(), quiet=True)


def read(run: ds.Run) -> dict[str, float]:
    """Mean and standard error of the LLC over the replicas, as chains read it."""
    each = np.array(run.llc("ignore").per_chain)
    return {"mean": float(each.mean()), "se": float(each.std(ddof=1) / math.sqrt(len(each)))}


def dealt(problem: Problem) -> dict[str, Any]:
    """Replicated, hopping, and pinned without the correction."""
    log(f"{problem.title}: replicate")
    whole = read(sample(problem))
    rows = []
    for shards in SHARDS:
        log(f"{problem.title}: {shards} shards")
        fields = {"data_mode": "hop", "shards": shards}
        moving = read(sample(problem, **fields, hop_every=50))
        with mock.patch.object(hop, "gradient", _nothing):
            pinned = read(sample(problem, **fields, hop_every=NEVER, watch=False))
        rows.append({"shards": shards, "hop": moving, "pinned": pinned, "z": z(moving, whole)})
    return {"title": problem.title, "replicate": whole, "rows": rows}


def _nothing(replica: Any, *_: Any) -> Any:
    return np.zeros(sum(flat.numel() for flat in replica.flats), np.float32)


def z(one: dict[str, float], other: dict[str, float]) -> float:
    return (one["mean"] - other["mean"]) / math.hypot(one["se"], other["se"])


def uneven(steps: int) -> Iterator[dict[str, Any]]:
    """Eight shards of other curvature, 200 directions: bias measured and predicted."""
    nbeta, gamma, size = 100.0, 1.0, 200
    for (label, spread), share, visit in (
        (item, share, visit)
        for item in SPREADS.items() for share in (GENTLE, STEEP) for visit in VISITS
    ):  # fmt: skip
        log(f"{label}, lr kappa {share}, hop_every {visit}")
        curvatures = 1 + spread * np.linspace(-1, 1, 8)
        data = [(torch.full((8,), float(c)), torch.zeros(8, size)) for c in curvatures]
        lr = share / (nbeta + gamma)
        sampler = {"name": "sgld", "lr": lr, "nbeta": nbeta, "localization": gamma}
        thin = max(1, round(2 / share))
        run = {"thin": thin, "burn_in": 20, "draws": steps // thin, "batch_size": 8, "probe": 64}
        problem = Problem(label, Bowl(size), data, bowl, sampler, run)
        with mock.patch.object(hop, "TOLERATED", math.inf):
            hopped = sample(problem, data_mode="hop", hop_every=visit)
        plain = size / 2 * nbeta / (nbeta + gamma) / (1 - share / 4)
        probe = hopped.posterior["probe_loss"].values.mean(axis=1) - hopped.facts["probe_init_loss"]
        onto = {
            "own": np.array(hopped.llc("ignore").per_chain),
            "all": nbeta * probe,
        }
        facts = hopped.facts
        predicted = {"own": facts["hop_bias"], "all": facts["hop_bias_on_all_data"]}
        yield {
            "shards": label, "lr_kappa": share, "hop_every": visit, "predicted": predicted,
            "measured": {k: float(v.mean() / plain - 1) for k, v in onto.items()},
            "se": {k: float(v.std(ddof=1) / math.sqrt(len(v)) / plain) for k, v in onto.items()},
            "refused": predicted["all"] > hop.TOLERATED,
        }  # fmt: skip


def dealt_table(results: list[dict[str, Any]]) -> list[str]:
    lines = list[str]()
    for each in results:
        whole = each["replicate"]
        lines.append(f"\n{each['title']}: replicated {whole['mean']:.2f} +- {whole['se']:.2f}")
        lines.append("  shards  hop             z     pinned, uncorrected")
        for row in each["rows"]:
            moving, pinned = (
                f"{row[how]['mean']:6.2f} +- {row[how]['se']:.2f}" for how in ("hop", "pinned")
            )
            lines.append(f"  {row['shards']:6d}  {moving}  {row['z']:+5.1f}  {pinned}")
    worst = max(abs(row["z"]) for each in results for row in each["rows"])
    met = "met" if worst < Z else "MISSED"
    return [*lines, f"goal: abs(z) below {Z:g}, largest {worst:.1f}: {met}"]


def uneven_table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "\nshards of other curvature, SGLD: bias of the LLC on all data, and as chains read it",
        "  curvatures             lr kappa  hop_every        all  predicted       read  predicted",
    ]
    for row in results:
        cells = [f"{row['shards']:22s} {row['lr_kappa']:8g} {row['hop_every']:10d}"]
        for which in ("all", "own"):
            got, se = row["measured"][which], row["se"][which]
            cells.append(f"{got:+.1%} +- {se:.1%} {row['predicted'][which]:+9.1%}")
        lines.append("  ".join(["", *cells, "refused" if row["refused"] else ""]).rstrip())
    return lines


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bias against hop_every: points measured, lines predicted."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(8, 3.4), layout="constrained")
    panels = sheet.subplots(1, 2, sharey=True)
    for ax, share in zip(panels, (GENTLE, STEEP), strict=True):
        for number, label in enumerate(SPREADS):
            rows = [r for r in results if (r["shards"], r["lr_kappa"]) == (label, share)]
            for which, style in (("all", "-"), ("own", ":")):
                visits = [r["hop_every"] for r in rows]
                law = [100 * r["predicted"][which] for r in rows]
                got = [100 * r["measured"][which] for r in rows]
                error = [200 * r["se"][which] for r in rows]
                ax.plot(visits, law, style, color=f"C{number}", lw=1)
                name = f"{label}, {'on all data' if which == 'all' else 'as chains read it'}"
                marker = "o" if which == "all" else "s"
                ax.errorbar(visits, got, error, fmt=marker, ms=4, color=f"C{number}", label=name)
        ax.axhspan(2, ax.get_ylim()[1], color="0.5", alpha=0.1, lw=0)
        ax.set(xscale="log", xlabel="hop_every, steps", title=f"lr kappa = {share}")
    panels[0].set_ylabel("bias of the LLC, %")
    panels[0].legend(fontsize="x-small")
    sheet.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench hop", description=__doc__)
    parser.add_argument("--steps", type=int, default=4_000, help="of a chain, on uneven shards")
    parser.add_argument("--only", choices=("dealt", "uneven"), help="one of the two tables")
    parser.add_argument("--figure", action="store_true", help=f"draw {FIGURE.name} again")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine()}
    if options.only != "uneven":
        results["dealt"] = [dealt(regular()), dealt(singular())]
    if options.only != "dealt":
        results["uneven"] = list(uneven(options.steps))
    if options.figure:
        draw(results["uneven"], FIGURE)
    if options.json:
        print(json.dumps(results))
        return
    for name, lines in (("dealt", dealt_table), ("uneven", uneven_table)):
        print("\n".join(lines(results[name]) if name in results else []))


if __name__ == "__main__":
    main()
