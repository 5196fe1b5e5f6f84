"""One HTML file about a run: the verdict first, then pictures, tables, and how to repeat it."""

import time
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from pprint import pformat
from typing import TYPE_CHECKING, Any

import yaml

from distsampler.analysis.arviz_bridge import group
from distsampler.analysis.error_budget import ErrorBudget
from distsampler.analysis.estimators import LLCEstimate, options_of, plus_minus
from distsampler.analysis.run import Run
from distsampler.draws import ACCEPTANCE
from distsampler.recipe import CALIBRATION
from distsampler.redaction import redacted
from distsampler.report import plots
from distsampler.report.html import (
    Html,
    Page,
    code,
    figure,
    figures,
    folded,
    header,
    pairs,
    paragraph,
    table,
)
from distsampler.report.summary import readings
from distsampler.store.events import Draining, Lost, Started, losses, losses_named
from distsampler.store.files import Files
from distsampler.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Plot = Callable[[Run, "Axes"], "Axes"]
MOST_EVENTS = 200  # shown, at most
RETIRED = (Column("retired chain", "label"), Column("why", "sentence"))
HAPPENED = tuple(Column(heading, "sentence") for heading in ("time", "event", "what"))
CAPTIONS: dict[Plot, str] = {
    plots.plot_trace: "Loss of each chain on the probe: without minibatch noise. Converged chains "
    "overlap and have no trend; burn-in is shaded and enters no number.",
    plots.plot_running_llc: "The estimate from the draws so far. Chains should meet and stay in "
    "the band, two standard errors wide to either side.",
    plots.plot_rank: "Flat near 1 for chains that sample the same law. A trend, or a hump at one "
    "end, is a chain that lies apart.",
    plots.plot_autocorrelation: "How long a chain remembers. The slower this falls, the fewer "
    "effective draws there are.",
    plots.plot_budget: "Blue: standard errors, to both sides. Orange: biases, predicted or seen.",
    plots.plot_acceptance: "Well below 1 is a step that is too large.",
    plots.plot_norms: "Line: the median chain. Shade: from the least to the largest. A weight norm "
    "or distance that still grows is a chain still on its way.",
}


def write(run: Run, path: str | Path | None = None) -> str:
    """Write the report of a run to a file, else as report.html into its store; return where."""
    return put(render(run), run.files, path)


def put(text: str, files: Files, path: str | Path | None) -> str:
    """Write a page to a file, else as report.html into a store; return where."""
    name = "report.html"
    if path is not None:
        files, name = Files(Path(path).parent), Path(path).name
    files.write(name, text.encode())
    return files.path(name)


def render(run: Run) -> str:
    """Return the report as text."""
    estimate = run.llc("ignore")
    page = Page(f"distsampler: {run.files.name}", _header(run, estimate))
    page.section("Chains", *_chains(run))
    page.section("Convergence", *_convergence(run))
    page.section("Error budget", *_budget(run, estimate.budget))
    page.section("Estimate", pairs(_estimate(estimate)))
    page.section("Sampler", *_sampler(run))
    page.section("Retired chains and lost actors", *_losses(run))
    page.section("Configuration", *_configuration(run))
    page.section("Versions", pairs(run.manifest.versions.items()))
    page.section("How to reproduce", *_again(run))
    return page.text()


def _header(run: Run, estimate: LLCEstimate) -> Html:
    verdict, (low, high) = run.verdict, estimate.interval
    status = Html(f'<span class="status">{verdict.status}</span>: {escape(verdict.reason)}.')
    return header(
        verdict.status,
        f"LLC {plus_minus(estimate.mean, estimate.se)}",
        paragraph(status),
        *([paragraph(f"To do: {verdict.advice}.")] if verdict.advice else []),
        *(paragraph(f"Note: {advisory}") for advisory in run.advisories),
        paragraph(f"95 % interval {low:.5g} .. {high:.5g}: {estimate.budget.covers}."),
        paragraph(str(estimate), "faint"),
        *(paragraph(str(reading), "faint") for reading in readings(run)),
        paragraph(f"Run {run.manifest.status}: {_state(run)}", "faint"),
    )


def _state(run: Run) -> str:
    manifest = run.manifest
    if manifest.status == "running":
        alive = [n for chain, n in enumerate(manifest.n_committed) if chain not in manifest.retired]
        return f"{min(alive, default=0)} draws of every chain so far; all numbers are preliminary."
    return f"{manifest.reason}, after {manifest.seconds:.0f} s."


def _has_draws(run: Run) -> bool:
    return bool(run.posterior.sizes["draw"] and run.posterior.sizes["chain"])


def _chains(run: Run) -> list[Html]:
    sizes = run.posterior.sizes
    if not sizes["chain"] or not (sizes["draw"] or run.burn_in):
        return [paragraph("No draws yet.")]
    shown: list[Plot] = [plots.plot_trace]
    if _has_draws(run):
        shown += [plots.plot_running_llc, plots.plot_rank, plots.plot_autocorrelation]
    text = f"{sizes['chain']} chains of {sizes['draw']} draws after a burn-in of {run.burn_in}."
    return [paragraph(text), figures(*(_figure(run, plot) for plot in shown))]


def _figure(run: Run, plot: Plot) -> Html:
    sizes, name = run.posterior.sizes, plot.__name__.removeprefix("plot_").replace("_", " ")
    alt = f"Figure: {name}, {sizes['chain']} chains, {sizes['draw']} draws. {CAPTIONS[plot]}"
    return figure(lambda ax: plot(run, ax), alt, CAPTIONS[plot])


def _convergence(run: Run) -> list[Html]:
    gate = run.manifest.config.gate
    limits = f"R-hat below {gate.rhat}, ESS above {gate.ess:g}"
    how = paragraph(f"Rows with a star decide: {limits}; red is what fails.")
    return [how, table(run.diagnosis.table()), *map(paragraph, run.diagnosis.remarks())]


def _budget(run: Run, budget: ErrorBudget) -> list[Html]:
    parts = table(budget.table())
    return [figures(parts, _figure(run, plots.plot_budget)) if _has_draws(run) else parts]


def _estimate(estimate: LLCEstimate) -> Iterator[tuple[str, str]]:
    chains = zip(estimate.chains, estimate.per_chain, strict=True)
    yield "LLC of each chain", ", ".join(f"{value:.4g} ({chain})" for chain, value in chains)
    yield "sampler", str(estimate.sampler["name"])
    yield f"{estimate.unit}, n", f"{estimate.n}"
    yield "nbeta", f"{estimate.nbeta:.6g}"
    yield "localization (gamma)", f"{estimate.localization:g}"
    for name, value in options_of(estimate.sampler).items():
        if name not in ("nbeta", "localization"):
            yield f"sampler.{name}", str(value)
    yield "loss at w*", f"{estimate.init_loss:.6g}"
    if estimate.bracket is not None:
        yield "bracket", "{:.4g} from w*, {:.4g} from dispersed starts".format(*estimate.bracket)


def _sampler(run: Run) -> list[Html]:
    if not _has_draws(run):
        return []
    drawn = [_figure(run, plots.plot_norms)] if any(plots.norms(run)) else []
    if ACCEPTANCE in group(run.inference_data, "sample_stats"):
        drawn.append(_figure(run, plots.plot_acceptance))
    else:
        drawn.append(paragraph("Acceptance was not recorded: save_mala_vars=True does.", "faint"))
    return [figures(*drawn)]


def _losses(run: Run) -> list[Html]:
    retired = [(str(chain), _first_line(why)) for chain, why in run.lost_chains.items()]
    happened = [_row(event) for event in _notable(run.events)]
    text = f"Retired chains: {len(retired)}; {losses_named(losses(run.events))}."
    parts = [paragraph(text)]
    if retired:
        parts.append(table(Table(RETIRED, retired)))
    if len(happened) > MOST_EVENTS:
        parts.append(paragraph(f"The last {MOST_EVENTS} of {len(happened)} events:"))
    return [*parts, table(Table(HAPPENED, happened[-MOST_EVENTS:]))]


def _notable(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All events but the places' first starts, of which one stands for all."""
    troubled = set()
    for number, event in enumerate(events):
        if event["event"] in (Lost.kind, Draining.kind):
            troubled.add(str(event.get("place")))
        if event["event"] != Started.kind or not number or str(event.get("place")) in troubled:
            yield event


def _row(event: dict[str, Any]) -> tuple[str, str, str]:
    """Time, kind, and all else that an event says."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(float(event["time"]))) + " UTC"
    skipped = ("time", "event", "cuda_visible_devices")
    rest = ", ".join(f"{k} {_first_line(v)}" for k, v in event.items() if k not in skipped)
    return at, str(event["event"]), rest


def _configuration(run: Run) -> list[Html]:
    config = run.manifest.config
    return [
        paragraph("What differs from the defaults, and the seed:"),
        code(yaml.safe_dump(_settings(run), sort_keys=False)),
        *_chosen(run.manifest.calibration or {}),
        folded("Every field", code(config.model_dump_json(indent=1))),
    ]


def _chosen(calibration: dict[str, Any]) -> list[Html]:
    """What pilots chose, and why."""
    reasons = calibration.get("reasons")
    if not isinstance(reasons, dict):
        return []
    text = f"Pilots of {calibration.get('pilot_steps')} steps chose what of this was left open:"
    return [paragraph(text), pairs((str(name), str(why)) for name, why in reasons.items())]


def _again(run: Run) -> list[Html]:
    manifest = run.manifest
    seed, drivers = str(manifest.config.seed), str(manifest.epoch)
    facts = {"store": run.files.address, "seed": seed, **manifest.fingerprint, "drivers": drivers}
    return [
        paragraph("The same seed gives the same bits, where all of this is the same:"),
        pairs(facts.items()),
        *(_from_file(run) if manifest.recipe is not None else _from_python(run)),
    ]


def _from_file(run: Run) -> list[Html]:
    kept = redacted(run.manifest.recipe or {}).items()
    record = {name: value for name, value in kept if value and name != CALIBRATION}
    folder = str(record.pop("folder", "."))
    fields = {**_effective(run), **record}
    return [
        paragraph(f"With this as again.yaml in {folder}:"),
        code(yaml.safe_dump(fields, sort_keys=False)),
        code("distsampler run again.yaml --store runs/again"),
    ]


def _from_python(run: Run) -> list[Html]:
    settings = pformat(_effective(run), width=76, sort_dicts=False)
    return [
        paragraph("From Python, with the model, data and loss of the fingerprint above:"),
        code(
            f"import distsampler as ds\n\nconfig = ds.RunConfig(**{settings})\n"
            'run = ds.sample(model, data, loss, config, store="runs/again")'
        ),
        paragraph("To read this run again:"),
        code(f"import distsampler as ds\n\nprint(ds.open({run.files.address!r}).llc())"),
    ]


def _settings(run: Run) -> dict[str, Any]:
    """The config, as far as it differs from the defaults; the seed always."""
    config = run.manifest.config
    return {**config.model_dump(mode="json", exclude_defaults=True), "seed": config.seed}


def _effective(run: Run) -> dict[str, Any]:
    """The settings, with the value that each option of the sampler had: no default decides."""
    sampler = {"name": run.sampler["name"], **options_of(run.sampler)}
    return {"sampler": sampler, **{k: v for k, v in _settings(run).items() if k != "sampler"}}


def _first_line(text: object) -> str:
    return next(iter(str(text).splitlines()), "")
