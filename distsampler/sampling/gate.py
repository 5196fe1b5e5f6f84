"""The gate: judges at the end of each gate round what was committed, and chooses the burn-in."""

import math

from distsampler.analysis import diagnosis, inference_data
from distsampler.analysis.advice import Situation
from distsampler.analysis.verdict import Verdict, judge
from distsampler.models.sampler import freeze_after
from distsampler.schedule import Schedule
from distsampler.store.trace import Trace


class Gate:
    """Judges a run from its committed draws alone, so that no fault can change what it says."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._config = trace, trace.manifest.config
        self._schedule = Schedule.of(self._config)

    def judge(self, draws: int) -> Verdict:
        """Return the verdict on the first counted draws of every chain; see ``Schedule``."""
        end = self._schedule.counted_from + draws
        if self._schedule.burn_in is None:
            self._trace.choose_burn_in(self._burn_in(end))
        groups = inference_data.lazy_groups(self._trace, end - self._trace.burn_in)
        return judge(groups, Situation(self._config)).verdict

    def _burn_in(self, end: int) -> int:
        """Return the draw at which the drift ends, but not before the sampler's adaptation does."""
        config = self._config
        draws = inference_data.between(self._trace, "posterior", 0, end)
        adapting = math.ceil(freeze_after(config) / config.thin)
        return diagnosis.burn_in(draws, adapting, dispersed=config.init == "dispersed")
