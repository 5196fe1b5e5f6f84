"""Local Learning Coefficients of PyTorch models, from SGMCMC chains on a Ray cluster.

The LLC says how degenerate the loss is around trained weights: ``nbeta (E[L(w)] - L(w*))``, where w
is drawn from a posterior around them. Many chains draw; whether they may be believed is checked.

Start reading in ``sampling/sample.py``: its five steps lead everywhere else. The way of the data::

    RunConfig -> ChainSpec -> Chain -> DrawBlock -> Trace -> InferenceData
              -> Diagnosis, Verdict -> LLCEstimate

Rooms, from top to bottom; each imports only what stands below it:

``cli``         the command line
``report``      plots, HTML pages, progress of runs read from their stores (watch, ls), the guide
``sweeps``      many runs: checkpoints x restrictions x settings x data sets
``truth``       models whose LLC is known exactly, and ``certify``, which holds samplers to them
``sampling``    sample, resume, start, calibrate: puts model, data, cluster and store together
``execution``   the driver and its decisions, places and their losses, Ray, live progress
``chains``      one chain: replica, sampler and batches; what is measured at a draw; packs; hopping
``curvature``   Hessian and gradient noise, by Lanczos, at w* and along a chain
``models``      a user's model: its copy, what of it moves, several stacked for one call
``data``        a user's data: rows, batches, shards
``analysis``    from a store to numbers: R-hat, ESS, drift, verdict, LLC, its error and bias
``store``       the run directory: arrays, manifest, events, chain states, the driver's lease
``optim``       the samplers: torch optimizers, each with its step in one file; usable alone

At the door: ``config`` (what a run is), ``schedule`` (what "auto" means in draws), ``recipe`` (YAML
files), ``references`` (functions by name, masks), ``facts`` (the posterior, nbeta), ``seeding``
(randomness as a function of seed, chain and step), ``draws`` (what is recorded), ``errors``.

Eight words:

anchor        the weights w* around which is sampled; what is measured there is ``AtAnchor``
localization  gamma, the strength of the pull back to the anchor
step, draw    a chain moves by steps; every ``thin``-th point is kept as a draw
block         draws that a place sends to the driver at once
place         a process, mostly a Ray actor with a GPU, in which chains advance; it can be lost
probe         fixed examples whose losses show, free of minibatch noise, where a chain is
gate round    when the driver judges all committed draws, and may end the run
pack          chains that advance together, their gradients computed in one call

Four laws:

1. A draw is one point: all it records is measured at the same weights.
2. The same seed gives the same bits, wherever and however often a chain was placed.
3. A draw exists once, when its commit is durable; only the driver commits.
4. No silent number: what has not converged, was lost or is biased says so wherever it is printed.

Importing this package loads neither torch nor ray nor arviz: names are resolved when used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distsampler.analysis.diagnosis import Diagnosis as Diagnosis
    from distsampler.analysis.estimators import LLCEstimate as LLCEstimate
    from distsampler.analysis.estimators import WBICEstimate as WBICEstimate
    from distsampler.analysis.run import Run as Run
    from distsampler.analysis.run import open_run as open  # noqa: F401 (a public name)
    from distsampler.analysis.verdict import Verdict as Verdict
    from distsampler.config import GateConfig as GateConfig
    from distsampler.config import PlacementConfig as PlacementConfig
    from distsampler.config import RunConfig as RunConfig
    from distsampler.config import SamplerConfig as SamplerConfig
    from distsampler.errors import ConfigError as ConfigError
    from distsampler.errors import DistsamplerError as DistsamplerError
    from distsampler.errors import NotConverged as NotConverged
    from distsampler.errors import NotConvergedWarning as NotConvergedWarning
    from distsampler.errors import PlacementError as PlacementError
    from distsampler.errors import RunFailed as RunFailed
    from distsampler.errors import StoreError as StoreError
    from distsampler.errors import WorkFailedError as WorkFailedError
    from distsampler.execution.pool import SerialPool as SerialPool
    from distsampler.execution.ray_pool import RayPool as RayPool
    from distsampler.facts import optimal_nbeta as optimal_nbeta
    from distsampler.optim import SGLD as SGLD
    from distsampler.optim import SGNHT as SGNHT
    from distsampler.report.plots import plot_acceptance as plot_acceptance
    from distsampler.report.plots import plot_autocorrelation as plot_autocorrelation
    from distsampler.report.plots import plot_budget as plot_budget
    from distsampler.report.plots import plot_heatmap as plot_heatmap
    from distsampler.report.plots import plot_llc_curve as plot_llc_curve
    from distsampler.report.plots import plot_norms as plot_norms
    from distsampler.report.plots import plot_rank as plot_rank
    from distsampler.report.plots import plot_running_llc as plot_running_llc
    from distsampler.report.plots import plot_trace as plot_trace
    from distsampler.sampling.calibration import Calibration as Calibration
    from distsampler.sampling.calibration import calibrate as calibrate
    from distsampler.sampling.handle import Running as Running
    from distsampler.sampling.sample import resume as resume
    from distsampler.sampling.sample import sample as sample
    from distsampler.sampling.sample import start as start
    from distsampler.sweeps.results import Sweep as Sweep
    from distsampler.sweeps.results import open_sweep as open_sweep
    from distsampler.sweeps.sweep import sweep as sweep
    from distsampler.truth.certify import certify as certify

__version__ = "0.1.0"

_HOMES = {
    "analysis.diagnosis": "Diagnosis",
    "analysis.estimators": "LLCEstimate WBICEstimate",
    "analysis.run": "Run open",
    "analysis.verdict": "Verdict",
    "config": "GateConfig PlacementConfig RunConfig SamplerConfig",
    "errors": "ConfigError DistsamplerError NotConverged NotConvergedWarning PlacementError "
    "RunFailed StoreError WorkFailedError",
    "execution.pool": "SerialPool",
    "execution.ray_pool": "RayPool",
    "facts": "optimal_nbeta",
    "optim": "SGLD SGNHT",
    "report.plots": "plot_acceptance plot_autocorrelation plot_budget plot_heatmap plot_llc_curve "
    "plot_norms plot_rank plot_running_llc plot_trace",
    "sampling.calibration": "Calibration calibrate",
    "sampling.handle": "Running",
    "sampling.sample": "resume sample start",
    "sweeps.results": "Sweep open_sweep",
    "sweeps.sweep": "sweep",
    "truth.certify": "certify",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'distsampler' has no attribute {name!r}")
    attribute = "open_run" if name == "open" else name
    value: object = getattr(import_module(f"distsampler.{_HOME[name]}"), attribute)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
