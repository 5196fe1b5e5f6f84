"""What the command line prints of a run's diagnosis and of a sweep's estimates."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from distsampler.analysis.diagnosis import Diagnosis
from distsampler.analysis.estimators import plus_minus
from distsampler.analysis.run import Run

WIDTH = 120  # of a table, where there is no terminal


def print_diagnosis(run: Run) -> None:
    """Print every measured quantity, what was lost, and the verdict with its advice."""
    diagnosis, config = run.diagnosis, run.manifest.config
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(_quantities(diagnosis, config.gate.ess, config.thin))
    lost = sum(event["event"] == "lost" for event in run.events)
    lines = [
        *diagnosis.remarks(),
        *(f"lost chain {c}: {reason.splitlines()[0]}" for c, reason in run.lost_chains.items()),
        f"{diagnosis.chains} chains of {diagnosis.draws} draws after a burn-in of {run.burn_in}, "
        f"{lost} actors lost and replaced",
        str(run.verdict),
        *(f"note: {advisory}" for advisory in run.advisories),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def diagnosis_as_dict(run: Run) -> dict[str, Any]:
    """Return what ``print_diagnosis`` shows, for JSON."""
    verdict = run.verdict
    return {
        "verdict": str(verdict.status),
        "reason": verdict.reason,
        "advice": verdict.advice,
        "advisories": list(run.advisories),
        "status": run.manifest.status,
        "burn_in": run.burn_in,
        "lost_chains": run.lost_chains,
        "events": [event for event in run.events if event["event"] in ("lost", "retired")],
        **run.diagnosis.as_dict(),
    }


def estimates(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Return a line for each cell of a sweep that has begun."""
    width = max(len(row["cell"]) for row in rows)
    for row in rows:
        if row["status"] == "waiting":
            continue
        if row["llc"] is None:
            reason = row["reason"].partition("\n")[0]
            result = f"{row['status']}{reason and ': '}{reason}"
        else:
            se = math.nan if row["se"] is None else row["se"]
            unfinished = "" if row["status"] == "finished" else f", {row['status']}"
            result = f"LLC {plus_minus(row['llc'], se)}  {row['verdict']}{unfinished}"
        yield f"{row['cell']:{width}}  {result}"


def _quantities(diagnosis: Diagnosis, ess: float, thin: int) -> Table:
    """Return the table of what was measured; a star marks what the gate reads."""
    table = Table(box=None, pad_edge=False)
    table.add_column("gate")
    table.add_column("quantity", no_wrap=True)
    steps = f"steps for {ess:g}"  # that each quantity needs, the advisory ones too
    for heading in ("mean", "sd", "MCSE", "R-hat", "bulk ESS", "tail ESS", steps):
        table.add_column(heading, justify="right")
    for row in diagnosis.rows:
        table.add_row(
            "*" if row.gated else "",
            row.name.replace("[", r"\["),
            *(f"{value:.4g}" for value in (row.mean, row.sd, row.mcse)),
            f"{row.r_hat:.4f}",
            *(f"{value:.0f}" for value in (row.ess_bulk, row.ess_tail)),
            f"{thin * diagnosis.draws_for(row, ess):.0f}",
        )
    return table
