"""One HTML file about a run: verdict first, then pictures and tables. No network, no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

from distsampler import plots
from distsampler.budget import ErrorBudget
from distsampler.estimators import LLCEstimate
from distsampler.files import Files
from distsampler.inference_data import group
from distsampler.quantities import Row
from distsampler.results import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.headline { font-size: 1.25rem; padding: .8rem 1rem; border-left: .4rem solid; }
.CONVERGED { border-color: #2a7; } .NOT_CONVERGED { border-color: #c33; }
.UNDETERMINED { border-color: #b80; }
figure { margin: 0; } img { max-width: 100%; background: white; border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; font-size: .8rem; }
"""
HEADINGS = ("quantity", "mean", "sd", "MCSE", "R-hat", "bulk ESS", "tail ESS")


def write(run: Run, path: str | Path | None = None) -> str:
    """Writes the report of a run.

    Args:
        run: finished or not.
        path: of the HTML file; None: report.html in the run directory.

    Returns:
        The path.
    """
    files, name = run.files, "report.html"
    if path is not None:
        files, name = Files(Path(path).parent), Path(path).name
    files.write(name, html(run).encode())
    return files.path(name)


def html(run: Run) -> str:
    """The report as text."""
    estimate, verdict = run.llc("ignore"), run.verdict
    numbers = {k: v for k, v in estimate.as_dict().items() if k not in ("verdict", "budget")}
    title = f"distsampler: {run.store.rstrip('/').rpartition('/')[2]}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="headline {verdict.status}">{escape(str(estimate))}</p>',
        f"<p>{escape(str(verdict))}</p>",
        *(_paragraph(f"Note: {advisory}") for advisory in run.advisories),
        _paragraph(f"Run {run.manifest.status}: {run.manifest.reason}"),
        *_lost(run),
        *_figures(run, estimate),
        "<h2>Convergence</h2>",
        "<p>The rows in bold decide; the others are shown beside them.</p>",
        _table(HEADINGS, (_cells(row) for row in run.diagnosis.rows)),
        *(_paragraph(line) for line in run.diagnosis.remarks()),
        "<h2>Error budget</h2>",
        _table(("error", "in the LLC", ""), _parts(estimate.budget)),
        "<h2>Estimate</h2>",
        _table(("", ""), [(k, f"{v}") for k, v in numbers.items()]),
        "<h2>Configuration</h2>",
        f"<pre>{escape(run.manifest.config.model_dump_json(indent=1))}</pre>",
        "<h2>Versions</h2>",
        _table(("", ""), run.manifest.versions.items()),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>"
    )


def _figures(run: Run, estimate: LLCEstimate) -> list[str]:
    posterior = run.posterior
    if not posterior.sizes["draw"]:
        return [_paragraph("No draws after burn-in yet.")]
    return [
        _figure("Loss along the chains", lambda ax: plots.plot_trace(posterior, _warmup(run), ax)),
        _figure(
            "Running LLC",
            lambda ax: plots.plot_running_llc(posterior, run.facts["nbeta"], ax, estimate.se),
        ),
        _figure("Ranks", lambda ax: plots.plot_rank(posterior, ax)),
        _figure("Error budget", lambda ax: plots.plot_budget(estimate.budget, ax)),
    ]


def _warmup(run: Run) -> xr.Dataset | None:
    if not run.burn_in:
        return None
    return group(run.inference_data, "warmup_posterior")


def _figure(title: str, draw: Callable[[Axes], Axes]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    draw(figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}"></figure>'


def _cells(row: Row) -> list[str]:
    name = f"<b>{escape(row.name)}</b>" if row.gated else escape(row.name)
    numbers = [f"{value:.4g}" for value in (row.mean, row.sd, row.mcse)]
    return [name, *numbers, f"{row.r_hat:.4f}", f"{row.ess_bulk:.0f}", f"{row.ess_tail:.0f}"]


def _parts(budget: ErrorBudget) -> Iterable[tuple[str, str, str]]:
    for name, value, meaning in budget.rows():
        yield name, "not predicted" if value is None else f"{value:.3g}", escape(meaning)


def _lost(run: Run) -> list[str]:
    rows = [
        (str(chain), escape(reason.splitlines()[0])) for chain, reason in run.lost_chains.items()
    ]
    return ["<h2>Lost chains</h2>", _table(("chain", "why"), rows)] if rows else []


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{body}</table></div>'


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"
