"""The command line. Heavy imports stay inside the commands, so that --help is quick.

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 not converged, 4 converged without the
chains that were lost, 130 interrupted after a clean commit.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from distsampler.analysis.run import Run
    from distsampler.recipe import Recipe
    from distsampler.sweeps.results import Sweep

FAILED, USAGE, NOT_CONVERGED, LOST_CHAINS, INTERRUPTED = 1, 2, 3, 4, 130

app = typer.Typer(
    help="Local Learning Coefficients of PyTorch models, from chains on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Store = Annotated[str, typer.Argument(help="The run directory.", show_default=False)]
Bias = Annotated[float, typer.Option(help="Wanted of step and minibatches, relative.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML: RunConfig, and model, data, loss.")],
    store: Annotated[str | None, typer.Option(help="The run directory; must be new.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Set a field: sampler.lr=1e-5.")
    ] = None,
    resume: Annotated[str, typer.Option(help="never, auto or must.")] = "never",
    calibrated: Annotated[
        bool, typer.Option("--calibrate", help="Choose by pilots what the file leaves open.")
    ] = False,
    bias: Bias = 0.005,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Sample the posterior that a config file describes."""
    from distsampler import recipe

    found = recipe.load(config, changes or [])
    if calibrated:
        found = _calibrated(found, store, resume, bias)
    from distsampler.sampling.sample import sample_recipe

    done = sample_recipe(found, store, None, resume, quiet=quiet)  # type: ignore[arg-type]  # checked
    _finish(done)


@app.command()
def calibrate(
    config: Annotated[
        Path, typer.Argument(help="YAML, as for run; what it leaves open is chosen.")
    ],
    out: Annotated[Path | None, typer.Option(help="The YAML to write.", show_default=False)] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Set a field: sampler.localization=1.")
    ] = None,
    bias: Bias = 0.005,
    heatmap: Annotated[
        Path | None,
        typer.Option(help="Sample the LLC over lr x nbeta too; its figure.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose sampler, step size and length by short pilots."""
    from distsampler import recipe

    wanted = recipe.load(config, changes or [])
    _see_writable(out, heatmap)
    if heatmap is not None:
        _see_figure(heatmap)
    from distsampler.sampling.calibration import calibrate_recipe

    chosen, found = calibrate_recipe(wanted, heatmap=heatmap is not None, bias=bias)
    _say(json.dumps(found.as_dict()) if as_json else str(found))
    if out is not None:
        recipe.write(chosen, out)
    if found.heatmap is not None and heatmap is not None:
        from matplotlib.figure import Figure

        from distsampler.report.plots import plot_heatmap

        figure = Figure(figsize=(8, 4), layout="constrained")
        plot_heatmap(found.heatmap, figure.subplots())
        figure.savefig(heatmap)


@app.command()
def resume(
    store: Store,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Set a field: draws=5000 extends the run.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Go on with a run that was interrupted, or extend a finished one."""
    from distsampler import recipe
    from distsampler.errors import StoreError

    manifest = _open(store).manifest
    if manifest.recipe is None:
        raise StoreError(
            f"the run in {store} was started from Python, and its model has no name to be imported "
            f"by: continue it there, with distsampler.resume({str(store)!r}, model, data, loss)"
        )
    found = recipe.reload(manifest.recipe, manifest.config, changes or [])
    from distsampler.sampling.sample import sample_recipe

    _finish(sample_recipe(found, str(store), None, "must", quiet=quiet))


@app.command()
def llc(
    store: Store,
    budget: Annotated[
        bool, typer.Option("--budget", help="Print what the error is made of.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the LLC of a run, with its error and verdict."""
    found = _open(store)
    estimate = found.llc("ignore")
    _say(json.dumps(estimate.as_dict()) if as_json else str(estimate))
    if budget and not as_json:
        _say(estimate.budget.table(estimate.mean))
    raise typer.Exit(_code(found))


@app.command()
def diagnose(store: Store, as_json: Json = False) -> None:
    """Print R-hat, ESS and the verdict of a run."""
    found = _open(store)
    if as_json:
        _say(json.dumps(_diagnosis(found)))
    else:
        _print_table(found)
    raise typer.Exit(_code(found))


@app.command()
def report(
    store: Annotated[str, typer.Argument(help="A run's or a sweep's.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The HTML file.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file about a run, or about a sweep."""
    from distsampler.report import run_report, sweep_report
    from distsampler.sweeps.results import is_sweep, open_sweep

    if is_sweep(store):
        path = sweep_report.write(open_sweep(store), out)
    else:
        path = run_report.write(_open(store), out)
    _say(json.dumps({"report": path}) if as_json else path)


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="YAML, as for run, with a block 'sweep'.")],
    store: Annotated[str, typer.Option(help="The sweep's directory; must be new.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Set a field: sweep.calibrate=true.")
    ] = None,
    resume: Annotated[str, typer.Option(help="never, auto or must.")] = "never",
    max_cells: Annotated[
        int | None, typer.Option(help="Refuse a sweep of more; else the file's.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing of each cell.")] = False,
    as_json: Json = False,
) -> None:
    """Sample many checkpoints, restrictions, settings and data sets."""
    from distsampler.sweeps import recipe as sweep_recipe

    request = sweep_recipe.load(config, changes or [], max_cells)
    from distsampler.sweeps.plan import make_plan
    from distsampler.sweeps.sweep import run_plan

    done = run_plan(make_plan(request), store, None, resume, quiet)  # type: ignore[arg-type]  # checked
    _finish_sweep(done, as_json)


@app.command()
def collect(
    store: Annotated[str, typer.Argument(help="The sweep's directory.", show_default=False)],
    csv: Annotated[Path | None, typer.Option(help="A table to write.", show_default=False)] = None,
    netcdf: Annotated[
        Path | None, typer.Option(help="An xarray file to write.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the estimates of a sweep, or write them as CSV or netCDF."""
    from distsampler.sweeps.results import open_sweep

    found = open_sweep(store)
    _see_writable(csv, netcdf)
    if csv is not None:
        found.to_csv(csv)
    if netcdf is not None:
        found.to_netcdf(netcdf)
    _finish_sweep(found, as_json)


@app.command()
def watch(
    store: Store,
    once: Annotated[bool, typer.Option("--once", help="Print how it stands, and end.")] = False,
) -> None:
    """Show how a run goes, from any machine that sees its directory."""
    from distsampler.report.watch import follow

    try:
        view = follow(store, once)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None  # the run goes on
    if not once:
        codes = {"failed": FAILED, "interrupted": INTERRUPTED}
        raise typer.Exit(codes.get(view.status) or _code(_open(store)))


@app.command("ls")
def list_runs(
    folder: Annotated[str, typer.Argument(help="A folder of runs.")] = ".",
    as_json: Json = False,
) -> None:
    """List the runs beneath a folder, a line each."""
    from distsampler.report.listing import entries, table

    found = entries(folder)
    _say(json.dumps({"runs": [entry.as_dict() for entry in found]}) if as_json else table(found))


@app.command()
def certify(
    sampler: Annotated[
        str | None, typer.Option(help="The one to try; else each row has its own.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few rows of every kind.")] = False,
    as_json: Json = False,
) -> None:
    """Run samplers over models whose LLC is known, and print what came of it."""
    from distsampler.truth.certify import Row
    from distsampler.truth.certify import certify as made

    def say(row: Row) -> None:
        typer.echo(f"{row.seconds:4.0f} s  {row.case}, {row.sampler}: {row.estimate:.4g}", err=True)

    found = made(sampler=sampler, quick=quick, say=say)
    _say(json.dumps(found.as_dict()) if as_json else str(found))
    raise typer.Exit(0 if found.holds else FAILED)


def main() -> None:
    """The console script: errors made on purpose are one message and an exit code."""
    from distsampler.errors import DistsamplerError, RunFailed, WorkFailedError
    from distsampler.store.files import StoreFault

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.captureWarnings(True)
    warnings.simplefilter("default", UserWarning)
    try:
        app()
    except DistsamplerError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(FAILED if isinstance(error, RunFailed | WorkFailedError | StoreFault) else USAGE)


def _finish(done: Run) -> None:
    """Says how a run ended, and exits with the code for that."""
    if done.manifest.status == "interrupted":
        reason = f"interrupted ({done.manifest.reason}), committed cleanly; go on with"
        typer.echo(f"{reason}: distsampler resume {done.store}", err=True)
        raise typer.Exit(INTERRUPTED)
    _say(str(done.llc("ignore")))
    _say(str(done.verdict))
    for advisory in done.advisories:
        _say(f"note: {advisory}")
    _say(f"run {done.store}")
    raise typer.Exit(_code(done))


def _finish_sweep(done: Sweep, as_json: bool) -> None:
    """Prints the estimates of a sweep, and exits with the code of its worst cell."""
    rows = done.rows()
    if as_json:
        _say(json.dumps({"sweep": done.store, "cells": rows}))
    else:
        _print_sweep(done, rows)
    open_ends = [row for row in rows if row["status"] not in ("finished", "failed")]
    if open_ends:
        missing = f"{len(open_ends)} of {len(rows)} cells have not ended"
        typer.echo(f"{missing}; go on with the same command and --resume auto", err=True)
        raise typer.Exit(INTERRUPTED)
    if any(row["status"] == "failed" for row in rows):
        raise typer.Exit(FAILED)
    if any(row["verdict"] != "CONVERGED" for row in rows):
        raise typer.Exit(NOT_CONVERGED)
    raise typer.Exit(LOST_CHAINS if any(row["lost_chains"] for row in rows) else 0)


def _print_sweep(done: Sweep, rows: list[dict[str, Any]]) -> None:
    from distsampler.analysis.estimators import plus_minus

    wide = max(len(row["cell"]) for row in rows)
    for row in rows:
        if row["status"] == "waiting":
            continue  # they are counted below
        if row["llc"] is None:
            reason = row["reason"].partition("\n")[0]
            _say(f"{row['cell']:{wide}}  {row['status']}{reason and ': '}{reason}")
        else:
            se = math.nan if row["se"] is None else row["se"]
            verdict = f"{row['verdict']}" + (
                "" if row["status"] == "finished" else ", " + row["status"]
            )
            _say(f"{row['cell']:{wide}}  LLC {plus_minus(row['llc'], se)}  {verdict}")
    _say(f"sweep {done.store}")


def _calibrated(found: Recipe, store: str | None, resume: str, bias: float) -> Recipe:
    """The recipe with what pilots choose, or, of a run that exists, with what they chose then."""
    from distsampler.sampling.calibration import calibrate_recipe, continued
    from distsampler.sampling.job import continues
    from distsampler.store.trace import as_files

    if store is not None:
        continues(as_files(store), resume)  # type: ignore[arg-type]  # checked there
    if resume != "never" and (chosen := continued(found, store)) is not None:
        return chosen
    found, calibration = calibrate_recipe(found, bias=bias)
    typer.echo(str(calibration), err=True)
    return found


def _see_writable(*paths: Path | None) -> None:
    """Sees before work is done for them that files can be written where they shall be."""
    from distsampler.errors import ConfigError

    for path in paths:
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise ConfigError(f"{path} must be a file in a folder that can be written: make it")


def _see_figure(path: Path) -> None:
    """Sees that matplotlib knows the format of a figure's name."""
    from matplotlib.backend_bases import FigureCanvasBase

    from distsampler.errors import ConfigError

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ConfigError(f"--heatmap must end in one of .{', .'.join(sorted(known))}: got {path}")


def _open(store: str) -> Run:
    from distsampler.analysis.run import open_run

    return open_run(store)


def _code(found: Run) -> int:
    if not found.verdict.converged:
        return NOT_CONVERGED
    return LOST_CHAINS if found.lost_chains else 0


def _diagnosis(found: Run) -> dict[str, Any]:
    verdict = found.verdict
    return {
        "verdict": str(verdict.status),
        "reason": verdict.reason,
        "advice": verdict.advice,
        "advisories": list(found.advisories),
        "status": found.manifest.status,
        "burn_in": found.burn_in,
        "lost_chains": found.lost_chains,
        "events": [event for event in found.events if event["event"] in ("lost", "retired")],
        **found.diagnosis.as_dict(),
    }


def _print_table(found: Run) -> None:
    from rich.console import Console
    from rich.table import Table

    diagnosis = found.diagnosis
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(box=None, pad_edge=False)
    table.add_column("gate")
    table.add_column("quantity", no_wrap=True)
    config = found.manifest.config
    steps = f"steps for {config.gate.ess:g}"  # that each quantity needs, the advisory ones too
    for heading in ("mean", "sd", "MCSE", "R-hat", "bulk ESS", "tail ESS", steps):
        table.add_column(heading, justify="right")
    for row in diagnosis.rows:
        numbers = [f"{value:.4g}" for value in (row.mean, row.sd, row.mcse)]
        ess = [f"{value:.0f}" for value in (row.ess_bulk, row.ess_tail)]
        name = row.name.replace("[", r"\[")
        needed = f"{config.thin * diagnosis.draws_for(row, config.gate.ess):.0f}"
        table.add_row("*" if row.gated else "", name, *numbers, f"{row.r_hat:.4f}", *ess, needed)
    console.print(table)
    for line in diagnosis.remarks():
        _say(line)
    for chain, reason in found.lost_chains.items():
        _say(f"lost chain {chain}: {reason.splitlines()[0]}")
    losses = sum(event["event"] == "lost" for event in found.events)
    _say(
        f"{diagnosis.chains} chains of {diagnosis.draws} draws after a burn-in of {found.burn_in}, "
        f"{losses} actors lost and replaced"
    )
    _say(str(found.verdict))
    for advisory in found.advisories:
        _say(f"note: {advisory}")


def _say(text: str) -> None:
    typer.echo(text)
