# The public names of the package, for type checkers and for __init__.py, which resolves them.
from distsampler import lm as lm
from distsampler import presets as presets
from distsampler.analysis.diagnosis import Diagnosis as Diagnosis
from distsampler.analysis.estimators import LLCEstimate as LLCEstimate
from distsampler.analysis.estimators import WBICEstimate as WBICEstimate
from distsampler.analysis.run import Run as Run
from distsampler.analysis.run import open as open
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

__version__: str
__all__: list[str]
