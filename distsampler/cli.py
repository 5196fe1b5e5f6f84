"""The command line. Heavy imports stay inside the commands, so that --help is quick.

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 not converged, 4 converged without the
chains that were lost, 130 interrupted after a clean commit.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from distsampler.store.integrity import printable

if TYPE_CHECKING:
    from distsampler.analysis.run import Run
    from distsampler.recipe import Recipe
    from distsampler.sweeps.results import Sweep

T = TypeVar("T")
FAILED, USAGE, NOT_CONVERGED, LOST_CHAINS, INTERRUPTED = 1, 2, 3, 4, 130

app = typer.Typer(
    help="Local Learning Coefficients of PyTorch models, from chains on a Ray cluster.",
    epilog="Explanations: distsampler guide.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
ConfigFile = Annotated[
    Path, typer.Argument(help="YAML file: the fields of RunConfig, and model, data, loss.")
]
Store = Annotated[str, typer.Argument(help="Run directory.", show_default=False)]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Set a field, for example sampler.lr=1e-5. May be repeated."),
]
ResumeOption = Annotated[
    str, typer.Option(help="Continue what the store holds: never, auto (if it does) or must.")
]
BiasOption = Annotated[
    float, typer.Option(help="Relative bias of the LLC that step and minibatches may bring.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Trust = Annotated[bool, typer.Option("--trust", help="Import what another's store names.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def run(
    config: ConfigFile,
    store: Annotated[str | None, typer.Option(help="Run directory; it must be new.")] = None,
    changes: Changes = None,
    resume: ResumeOption = "never",
    calibrated: Annotated[
        bool,
        typer.Option("--calibrate", help="Choose by short pilots what the file leaves open."),
    ] = False,
    bias: BiasOption = 0.005,
    quiet: Quiet = False,
) -> None:
    """Sample the posterior that a config file describes."""
    from distsampler.recipe import load

    recipe = load(config, changes or [])
    if calibrated:
        recipe = _until_interrupted(lambda: _calibrated(recipe, store, resume, bias))
    from distsampler.sampling.sample import sample_recipe  # slow: mistakes in the file come first

    work = partial(sample_recipe, recipe, store, None, resume, quiet=quiet)  # type: ignore[arg-type]  # checked
    _finish(_until_interrupted(work))


@app.command()
def calibrate(
    config: ConfigFile,
    out: Annotated[
        Path | None, typer.Option(help="YAML file to write the choice to.", show_default=False)
    ] = None,
    changes: Changes = None,
    bias: BiasOption = 0.005,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            help="Sample the LLC over lr and nbeta too, and write this figure.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose sampler, step size and length by short pilots."""
    from distsampler.recipe import load, write

    recipe = load(config, changes or [])
    _check_writable(out, heatmap)
    if heatmap is not None:
        from distsampler.report.plots import check_format

        check_format(heatmap)
    from distsampler.sampling.calibration import calibrate_recipe

    work = partial(calibrate_recipe, recipe, heatmap=heatmap is not None, bias=bias)
    chosen, calibration = _until_interrupted(work)
    _print(json.dumps(calibration.as_dict()) if as_json else str(calibration))
    if out is not None:
        write(chosen, out)
    if calibration.heatmap is not None and heatmap is not None:
        from distsampler.report.plots import save_heatmap

        save_heatmap(calibration.heatmap, heatmap)


@app.command()
def resume(
    store: Store,
    changes: Changes = None,
    quiet: Quiet = False,
    trust: Trust = False,
) -> None:
    """Continue an interrupted run, or extend a finished one."""
    from distsampler.sampling.directory import stored_recipe

    recipe = stored_recipe(_open(store), changes or [], trust, lambda text: _print(text, err=True))
    from distsampler.sampling.sample import sample_recipe

    _finish(_until_interrupted(lambda: sample_recipe(recipe, store, None, "must", quiet=quiet)))


@app.command()
def llc(
    store: Store,
    budget: Annotated[
        bool, typer.Option("--budget", help="Print what the error is made of.")
    ] = False,
    probe: Annotated[str | None, typer.Option(help="Read this named probe.")] = None,
    as_json: Json = False,
) -> None:
    """Print the LLC of a run, with its error, its verdict and the sampler's options."""
    from distsampler.report.summary import llc_as_dict, llc_text

    run = _open(store)
    _print(json.dumps(llc_as_dict(run, probe)) if as_json else llc_text(run, budget, probe))
    raise typer.Exit(_code(run))


@app.command()
def diagnose(store: Store, as_json: Json = False) -> None:
    """Print R-hat, ESS and the verdict of a run."""
    from distsampler.report.summary import diagnosis_as_dict, diagnosis_text

    run = _open(store)
    _print(json.dumps(diagnosis_as_dict(run)) if as_json else diagnosis_text(run))
    raise typer.Exit(_code(run))


@app.command()
def report(
    store: Annotated[str, typer.Argument(help="Directory of a run or sweep.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file about a run, or about a sweep."""
    from distsampler.report import run_report, sweep_report
    from distsampler.sweeps.results import is_sweep, open_sweep

    if is_sweep(store):
        path = sweep_report.write(open_sweep(store), out)
    else:
        path = run_report.write(_open(store), out)
    _print(json.dumps({"report": path}) if as_json else path)


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="YAML file as for run, with a block 'sweep'.")],
    store: Annotated[str, typer.Option(help="Directory of the sweep; it must be new.")],
    changes: Changes = None,
    resume: ResumeOption = "never",
    max_cells: Annotated[
        int | None, typer.Option(help="Largest number of cells, in place of the file's.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing as cells end.")] = False,
    as_json: Json = False,
) -> None:
    """Sample many checkpoints, restrictions, settings and data sets."""
    from distsampler.sweeps import recipe as sweep_recipe

    request = sweep_recipe.load(config, changes or [], max_cells)
    from distsampler.sweeps.plan import make_plan
    from distsampler.sweeps.sweep import run_plan

    work = partial(run_plan, make_plan(request), store, None, resume, quiet)  # type: ignore[arg-type]  # checked
    _finish_sweep(_until_interrupted(work), as_json)


@app.command()
def collect(
    store: Annotated[str, typer.Argument(help="Directory of the sweep.", show_default=False)],
    csv: Annotated[Path | None, typer.Option(help="CSV file to write.", show_default=False)] = None,
    netcdf: Annotated[
        Path | None, typer.Option(help="NetCDF file to write, for xarray.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the estimates of a sweep, or write them as CSV or netCDF."""
    from distsampler.sweeps.results import open_sweep

    done = open_sweep(store)
    _check_writable(csv, netcdf)
    if csv is not None:
        done.to_csv(csv)
    if netcdf is not None:
        done.to_netcdf(netcdf)
    _finish_sweep(done, as_json)


@app.command()
def components(config: ConfigFile, changes: Changes = None, as_json: Json = False) -> None:
    """List the parts of a model, heads, layers and others, that restrict_to can name."""
    from distsampler.models.components import listing
    from distsampler.recipe import load_model

    parts = listing.components(*load_model(config, changes or []))
    listed = {"components": [part.as_dict() for part in parts.values()]}
    _print(json.dumps(listed) if as_json else str(parts))


@app.command()
def watch(
    store: Store,
    once: Annotated[bool, typer.Option("--once", help="Print the progress now, and exit.")] = False,
) -> None:
    """Show the progress of a run, from wherever its store is seen."""
    from distsampler.report.watch import follow

    try:
        snapshot = follow(store, once)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None  # the run goes on
    if not once:
        codes = {"failed": FAILED, "interrupted": INTERRUPTED}
        raise typer.Exit(codes.get(snapshot.phase) or _code(_open(store)))


@app.command("ls")
def list_runs(
    folder: Annotated[str, typer.Argument(help="Folder to search.")] = ".",
    as_json: Json = False,
) -> None:
    """List the runs in a folder and its subfolders, one per line."""
    from distsampler.report.listing import entries, table

    runs = entries(folder)
    listed = {"runs": [entry.as_dict() for entry in runs]}
    _print(json.dumps(listed) if as_json else table(runs).text())


@app.command()
def certify(
    sampler: Annotated[
        str | None, typer.Option(help="Sampler to try; by default, each row has its own.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Try a few rows of each kind.")] = False,
    as_json: Json = False,
) -> None:
    """Hold samplers against models whose LLC is known."""
    from distsampler.truth import certify as truth

    certificate = truth.certify(
        sampler=sampler, quick=quick, say=lambda row: _print(str(row), err=True)
    )
    _print(json.dumps(certificate.as_dict()) if as_json else str(certificate))
    raise typer.Exit(0 if certificate.holds else FAILED)


@app.command()
def guide(
    page: Annotated[str | None, typer.Argument(help="Name of a page.", show_default=False)] = None,
) -> None:
    """Print a page of the guide; without PAGE, list the pages."""
    from distsampler.report.guide import contents, show

    if page is None:
        _print(contents())
    else:
        show(page)


def main() -> None:
    """Run a command; an error made on purpose is one message and an exit code."""
    from distsampler.errors import DistsamplerError, RunFailed, WorkFailedError
    from distsampler.store.files import StoreFault

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    warnings.showwarning = lambda message, *_, **__: _print(f"warning: {message}", err=True)
    warnings.simplefilter("default", UserWarning)
    try:
        app()
    except DistsamplerError as error:
        _print(f"error: {error}", err=True)
        sys.exit(FAILED if isinstance(error, RunFailed | WorkFailedError | StoreFault) else USAGE)


def _print(text: str, err: bool = False) -> None:
    """Print what may have come from a store: the one place where anything is printed as text."""
    typer.echo(printable(text), err=err)


def _until_interrupted(work: Callable[[], T]) -> T:
    """Return what work gives; after Ctrl-C, what it had committed by then."""
    from distsampler.sampling.stopping import Interrupted

    try:
        return work()
    except Interrupted as error:
        if error.run is None:
            _print(str(error), err=True)
            raise typer.Exit(INTERRUPTED) from None
        committed: T = error.run
        return committed


def _calibrated(recipe: Recipe, store: str | None, resume: str, bias: float) -> Recipe:
    """Return the recipe with what pilots choose; of a run that exists, with what they chose."""
    from distsampler.sampling.calibration import calibrate_recipe, continued
    from distsampler.sampling.directory import continues
    from distsampler.store.files import as_files

    if store is not None and continues(as_files(store), resume):  # type: ignore[arg-type]
        return continued(recipe, store)
    chosen, calibration = calibrate_recipe(recipe, bias=bias)
    _print(str(calibration), err=True)
    return chosen


def _finish(done: Run) -> None:
    """Print how a run ended, and exit with the code for that."""
    if done.manifest.status == "interrupted":
        words = ["resume", done.store, *([] if done.files.own("run.json") else ["--trust"])]
        reason = f"interrupted ({done.manifest.reason}), committed cleanly; go on with"
        _print(f"{reason}: distsampler {shlex.join(words)}", err=True)
        raise typer.Exit(INTERRUPTED)
    _print(str(done.llc("ignore")))
    _print(str(done.verdict))
    _print(f"run {done.store}")
    raise typer.Exit(_code(done))


def _finish_sweep(done: Sweep, as_json: bool) -> None:
    """Print the estimates of a sweep, and exit with the code of its worst cell."""
    from distsampler.report.summary import estimates

    dataset = done.collect()
    if as_json:
        _print(json.dumps({"sweep": done.store, "cells": done.rows(dataset)}))
    else:
        _print(f"{estimates(dataset, waiting=False).text()}\nsweep {done.store}")
    left = int((~dataset["status"].isin(["finished", "failed"])).sum())
    if left:
        missing = f"{left} of {dataset['status'].size} cells have not ended"
        _print(f"{missing}; go on with the same command and --resume auto", err=True)
        raise typer.Exit(INTERRUPTED)
    if (dataset["status"] == "failed").any():
        raise typer.Exit(FAILED)
    if (dataset["verdict"] != "CONVERGED").any():
        raise typer.Exit(NOT_CONVERGED)
    raise typer.Exit(LOST_CHAINS if dataset["lost_chains"].any() else 0)


def _check_writable(*paths: Path | None) -> None:
    """Check that files can be written, before work is done for them."""
    from distsampler.errors import ConfigError

    for path in paths:
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise ConfigError(f"{path} must be a file in a folder that can be written: make it")


def _open(store: str) -> Run:
    from distsampler.analysis.run import Run

    return Run(store)


def _code(run: Run) -> int:
    if not run.verdict.converged:
        return NOT_CONVERGED
    return LOST_CHAINS if run.lost_chains else 0
