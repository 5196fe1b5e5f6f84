"""What is said about a run and about a sweep, once: as tables, as lines, and for JSON."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from distsampler.analysis.estimators import ProbeEstimate, plus_minus, sampler_line
from distsampler.analysis.run import Run
from distsampler.store.events import Lost, Retired, losses, losses_named
from distsampler.table import Column, Content, Marked, Table


def llc_text(run: Run, budget: bool, probe: str | None = None) -> str:
    """Return an LLC with its sampler, why it cannot be trusted, and what its error is made of.

    Of a named probe its reading.
    """
    if probe is not None:
        return str(run.llc("ignore", probe=probe))
    estimate = run.llc("ignore")
    lines = [str(estimate), *map(str, readings(run)), sampler_line(estimate.sampler)]
    lines += [] if estimate.converged else [str(estimate.verdict)]
    return "\n".join([*lines, str(estimate.budget)] if budget else lines)


def llc_as_dict(run: Run, probe: str | None = None) -> dict[str, Any]:
    """Return what ``llc_text`` says, for JSON."""
    if probe is not None:
        return run.llc("ignore", probe=probe).as_dict()
    probes = {each.probe: each.as_dict() for each in readings(run)}
    return run.llc("ignore").as_dict() | ({"probes": probes} if probes else {})


def readings(run: Run) -> list[ProbeEstimate]:
    """Return what the named probes of a run read."""
    return [run.llc("ignore", probe=name) for name in run.probes]


def diagnosis_text(run: Run) -> str:
    """Return every measured quantity, what was lost, and the verdict with its advice, as text."""
    diagnosis = run.diagnosis
    lines = [
        str(diagnosis),
        *(f"retired chain {c}: {reason.splitlines()[0]}" for c, reason in run.lost_chains.items()),
        f"{diagnosis.chains} chains of {diagnosis.draws} draws after a burn-in of {run.burn_in}, "
        + losses_named(losses(run.events)),
        sampler_line(run.sampler),
        *map(str, readings(run)),
        str(run.verdict),
    ]
    return "\n".join(lines)


def diagnosis_as_dict(run: Run) -> dict[str, Any]:
    """Return what ``diagnosis_text`` says, for JSON."""
    verdict = run.verdict
    return {
        **verdict.as_dict(),
        "verdict": str(verdict.status),
        "advisories": list(run.advisories),
        "status": run.manifest.status,
        "burn_in": run.burn_in,
        "sampler": run.sampler,
        "probes": {each.probe: each.as_dict() for each in readings(run)},
        "lost_chains": run.lost_chains,
        "events": [event for event in run.events if event["event"] in (Lost.kind, Retired.kind)],
        **run.diagnosis.as_dict(),
    }


def estimates(dataset: xr.Dataset, waiting: bool = True) -> Table:
    """Return the table of a sweep's cells.

    Args:
        dataset: what ``Sweep.collect`` gives.
        waiting: whether cells that have not begun have a row.
    """
    dims = [str(dim) for dim in dataset["llc"].dims]
    named = [dim for dim in dims if dim == "checkpoint" or dataset.sizes[dim] > 1]
    cells = (
        dataset.isel(dict(zip(dims, index, strict=True)))
        for index in np.ndindex(*dataset["llc"].shape)
    )
    labels = [Column(heading, "label") for heading in named]
    verdict, status = Column("verdict", "label"), Column("status", "label")
    return Table(
        [
            *labels,
            Column("LLC"),
            Column("95 % interval"),
            verdict,
            status,
            Column("reason", "sentence"),
        ],
        [
            (*(str(cell[dim].item()) for dim in named), *_estimate(cell))
            for cell in cells
            if waiting or cell["status"].item() != "waiting"
        ],
    )


def _estimate(cell: xr.Dataset) -> Iterator[Content]:
    llc, se, low, high = (float(cell[k]) for k in ("llc", "se", "interval_low", "interval_high"))
    yield plus_minus(llc, se) if math.isfinite(llc) else "none"
    yield f"{low:.5g} .. {high:.5g}" if math.isfinite(llc) else ""
    verdict = str(cell["verdict"].item())
    yield verdict and Marked(verdict, "good" if verdict == "CONVERGED" else "bad")
    yield str(cell["status"].item())
    yield str(cell["reason"].item())
