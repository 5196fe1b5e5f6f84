"""Local Learning Coefficients of PyTorch models, from SGMCMC chains on a Ray cluster.

The way of the data, one direction::

    RunConfig -> ChainSpec -> Chain -> DrawBlock -> Trace -> InferenceData
              -> Diagnosis, Verdict -> LLCEstimate

``config``       what a run is; ``seeding`` makes randomness a function of (seed, chain, step)
``optim``        the samplers: torch optimizers whose step leaves a posterior invariant
``replica``      a model to itself, and the ChainSpec: the recipe that travels to the actors
``restriction``  which parameters, and by ``masks`` which entries, move
``anchor``       the loss at w*, over all data once; ``gradient_noise``: its gradient's variance
``sharded``      data of which a process holds one shard at a time; ``hop``: chains on such
``observables``  what is measured at a draw; ``own_observables``: what users add, ``named`` in
                 configs; ``dispersion``: where dispersed chains start
``spectrum``     curvature and gradient noise by Lanczos; ``curvature_watch``: those along a chain;
                 ``bias``: what a step's errors will be
``chain``        replica + sampler + batch stream; knows nothing of Ray; ``divergence``: its end
``lanes``        the gradients of several chains in one call; ``pack``: chains that advance so;
                 ``packing``: how many, and why not
``worker``       what a place does; ``pool`` and ``ray_pool``: the places
``situation``    where a run stands; ``transition`` decides; ``driver`` does, and only it commits
``trace``        the run directory: zarr arrays, manifest, checkpoints, events; ``wide``: what a
                 chain's owner writes there itself; ``lazy_data``: how that is read
``inference_data``, ``drift``, ``quantities``, ``diagnostics``, ``estimators``, ``results``
                 from there to numbers, without torch and Ray
``metrics``      a run's numbers for other programs: Ray's metrics, the user's ``log=``
``run``          ``sample()``: puts it all together
``sweeping``     many cells: ``checkpoints`` x restrictions x settings x data, a ``grid``; a
                 ``plan`` is checked, a ``scheduler`` runs its cells on a ``fleet`` of actors, each
                 from a ``warm_start``; ``sweep_files``, ``collect``: what is kept and read of it
``calibration``  which sampler, step and length: ``tuning`` chooses from ``pilots``; ``heatmap``
``listing``, ``following``  what ``ls`` and ``watch`` read from stores; ``live``: how it is shown
``plots``, ``page``, ``report``, ``sweep_report``  figures, and the HTML around them
``truth``        models whose LLC is known exactly; ``certify()`` holds samplers against them

Laws: a draw is one point; the same seed gives the same bits, wherever and however often a chain was
placed; a draw exists once, when its commit is durable; no number without a verdict.

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
    value: object = getattr(
        import_module(f"distsampler.{_HOME[name]}"), "open_run" if name == "open" else name
    )
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
