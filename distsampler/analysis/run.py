"""Run: what a run directory says. Reads with numpy, zarr, xarray and ArviZ alone."""

import math
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import xarray as xr

from distsampler.analysis import inference_data
from distsampler.analysis.advice import Situation
from distsampler.analysis.arviz_bridge import InferenceData, group
from distsampler.analysis.diagnosis import Diagnosis
from distsampler.analysis.error_budget import budget, chain_excess, mean_of
from distsampler.analysis.estimators import (
    LLCEstimate,
    ProbeEstimate,
    WBICEstimate,
    mean_and_error,
)
from distsampler.analysis.verdict import Judgement, Verdict, judge
from distsampler.draws import EXCESS_LOSS, NOT_COUNTED, PROBE_LOSS
from distsampler.errors import ConfigError, NotConverged, NotConvergedWarning, StoreError
from distsampler.facts import Facts, optimal_nbeta
from distsampler.redaction import redacted
from distsampler.store.constants import probe_array
from distsampler.store.events import divergences, inspected
from distsampler.store.files import Files, damaged
from distsampler.store.large_arrays import LOSSES, MEAN_EXCESS, PROBES
from distsampler.store.manifest import MANIFEST, Manifest
from distsampler.store.reader import TraceReader

NO_DRAW = "holds no loss at w*: it ended before any draw was made"
DEPENDENT = (
    "n counts tokens as if they were independent, and those of one sequence are not: the number of "
    "observations lies between that of sequences and n; compare LLCs of one nbeta alone"
)
OnUnconverged = Literal["warn", "raise", "ignore"]


class Run:
    """A run, as its directory holds it; it may still be running elsewhere.

    Args:
        store: the run directory.

    Raises:
        StoreError: if there is none, or it is damaged.

    Example:
        >>> import distsampler as ds
        >>> print(ds.open("runs/digits").llc())  # doctest: +SKIP
    """

    def __init__(self, store: str | Path | Files) -> None:
        self._trace = TraceReader(store)

    @property
    def store(self) -> str:
        """The run directory: a path, or an fsspec URL."""
        return str(self._trace.files)

    @property
    def files(self) -> Files:
        """The files of the run directory."""
        return self._trace.files

    @property
    def manifest(self) -> Manifest:
        """What the run is and how it stands."""
        return self._trace.manifest

    @property
    def lost_chains(self) -> dict[int, str]:
        """Chain -> why it is not in the posterior."""
        return dict(self._trace.manifest.retired)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened, the oldest first; ``event`` names the kind: started, lost, verdict ..."""
        return self._trace.events()

    @cached_property
    def inference_data(self) -> InferenceData:
        """arviz.InferenceData (0.23) or xarray.DataTree (1.x)."""
        return inference_data.build(self._trace)

    @cached_property
    def posterior(self) -> xr.Dataset:
        """The draws after burn-in, dims (chain, draw, ...)."""
        return group(self.inference_data, "posterior")

    @cached_property
    def wide(self) -> dict[str, xr.DataArray]:
        """What is too large for ``inference_data``: name -> (chain, draw, ...), as stored, lazy.

        Opening reads nothing; a selection is read, and checked, when its values are asked for, and
        again each time: ``.sel(chain=0).load()`` keeps it. Chains and draws are the posterior's.
        """
        return inference_data.wide(self._trace)

    @property
    def losses(self) -> xr.DataArray:
        """Losses of the probe's examples at every draw, dims (chain, draw, example), lazy.

        ``example`` is the example's row in the data (with data_mode="hop": counted through the
        shards); the losses of the same examples at w*, in the same order, are ``probe_losses`` in
        ``constant_data``.

        Raises:
            StoreError: if the run was not asked for them.
        """
        if LOSSES not in self.wide:
            raise StoreError(f"{self.store} holds no losses: sample with save_losses=True")
        return self.wide[LOSSES]

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of the named probes whose losses the run measured."""
        names = (variable.name for variable in self.manifest.wide)
        return tuple(n.removeprefix(f"{PROBES}/") for n in names if n.startswith(f"{PROBES}/"))

    def losses_of(self, probe: str) -> xr.DataArray:
        """Return the losses of a named probe, dims (chain, draw, example[, token]), lazy.

        They are NaN where a token does not count. ``example`` is the example's row in the probe's
        data, ``token`` the place in the sequence of the token that is predicted. Coordinates that
        are lazy too: ``losses_at_anchor``, of the same examples and tokens at w*, and, where the
        batches have ``input_ids``, ``token_ids``, of the tokens that are predicted.

        Raises:
            ConfigError: if the run measured no such probe.

        Example:
            >>> losses = run.losses_of("code")  # doctest: +SKIP
            >>> (losses - losses.losses_at_anchor).mean(("chain", "draw"))  # doctest: +SKIP
        """
        self._check_probe(probe)
        return self.wide[f"{PROBES}/{probe}"]

    @cached_property
    def weights(self) -> xr.Dataset:
        """The weights at the draws that ``save_weights_every`` kept, by parameter name, lazy.

        Each has dims (chain, draw, ...) and the parameter's shape; ``draw`` is the posterior's.

        Raises:
            StoreError: if the run was not asked for them.

        Example:
            >>> run.weights["layer.weight"].sel(chain=0).isel(draw=-1).values  # doctest: +SKIP
        """
        weights = inference_data.weights(self._trace)
        if not weights:
            raise StoreError(f"{self.store} holds no weights: sample with save_weights_every=10")
        return weights

    @property
    def burn_in(self) -> int:
        """Draws before the posterior; with burn_in="auto" as chosen so far."""
        return self._trace.burn_in

    @property
    def diagnosis(self) -> Diagnosis:
        """R-hat, ESS and MCSE of the posterior, its drift, its outliers."""
        return self._judged.diagnosis

    @property
    def verdict(self) -> Verdict:
        """Whether the run's estimates can be trusted."""
        return self._judged.verdict

    @property
    def facts(self) -> dict[str, float]:
        """The numbers recorded at the start, by name: nbeta, n, localization, init_loss ...

        Raises:
            StoreError: if the run ended before the anchor pass.
        """
        numbers = self._trace.constants.numbers()
        if "init_loss" not in numbers:
            raise StoreError(f"{self.store} {NO_DRAW}")
        return numbers

    @property
    def sampler(self) -> dict[str, Any]:
        """The sampler's name and every option, with the value that it had in this run."""
        if self.manifest.sampler:
            return dict(self.manifest.sampler)
        config, facts = self.manifest.config.sampler, self._trace.constants.numbers()
        known = {k: v for k, v in facts.items() if k in ("lr", "nbeta", "localization")}
        return {"name": config.name, "correct_heat": config.correct_heat, **config.options, **known}

    @overload
    def llc(self, on_unconverged: OnUnconverged = "warn", *, probe: None = None) -> LLCEstimate: ...

    @overload
    def llc(self, on_unconverged: OnUnconverged = "warn", *, probe: str) -> ProbeEstimate: ...

    def llc(
        self, on_unconverged: OnUnconverged = "warn", *, probe: str | None = None
    ) -> LLCEstimate | ProbeEstimate:
        """Return the Local Learning Coefficient, with its error and its verdict.

        Args:
            on_unconverged: what to do if the verdict is not CONVERGED.
            probe: name of a named probe, for its data-refined reading; None: the LLC.

        Raises:
            NotConverged: if asked to.
            ConfigError: if the run measured no such probe.
        """
        if probe is not None:
            self._check_probe(probe)
        self._warn(on_unconverged)
        if probe is not None:
            return self._probe_estimate(probe)
        init_loss, facts, parts = self.facts["init_loss"], self._facts, self._judged.budget
        assert parts is not None, "there are facts"
        per_chain = facts.posterior.nbeta * chain_excess(self._groups["posterior"])
        bracket = self.diagnosis.bracket
        return LLCEstimate(
            mean=parts.llc,
            se=parts.se,
            interval=parts.interval,
            per_chain=tuple(per_chain.tolist()),
            chains=self._trace.chains,
            lost=tuple(sorted(self.lost_chains)),
            nbeta=facts.posterior.nbeta,
            n=facts.n,
            localization=facts.posterior.localization,
            init_loss=init_loss,
            sampler=self.sampler,
            verdict=self.verdict,
            budget=parts,
            bracket=bracket and (bracket[0].mean, bracket[1].mean),
            unit=self.manifest.config.n,
        )

    def wbic(self, on_unconverged: OnUnconverged = "warn") -> WBICEstimate:
        """Return Watanabe's WBIC; it needs a run at nbeta = n / log n.

        Args:
            on_unconverged: what to do if the verdict is not CONVERGED.

        Raises:
            NotConverged: if asked to.
            ConfigError: if the run's nbeta is another.
        """
        self._warn(on_unconverged)
        init_loss, facts = self.facts["init_loss"], self._facts
        posterior = self._groups["posterior"]
        n, nbeta, wanted = facts.n, facts.posterior.nbeta, optimal_nbeta(facts.n)
        if not math.isclose(nbeta, wanted, rel_tol=1e-6):
            raise ConfigError(
                f"the WBIC needs nbeta = n / log n = {wanted:.6g}, this run has {nbeta:.6g}: "
                "sample again without sampler.nbeta"
            )
        mean = n * (init_loss + mean_of(chain_excess(posterior)))
        se = budget(posterior, n, self.diagnosis).se
        unit, localization = self.manifest.config.n, facts.posterior.localization
        return WBICEstimate(mean, se, n, localization, self.verdict, unit)

    def _probe_estimate(self, probe: str) -> ProbeEstimate:
        """What a named probe reads."""
        excess, facts = self.wide[f"{MEAN_EXCESS}/{probe}"], self._facts
        losses = self._trace.constants.array(probe_array(probe, "losses"))
        assert losses is not None, "there are facts"
        counted, nbeta = losses[losses != NOT_COUNTED], facts.posterior.nbeta
        mean, se, per_chain = mean_and_error(nbeta * excess)
        return ProbeEstimate(
            probe=probe,
            mean=mean,
            se=se,
            per_chain=per_chain,
            chains=self._trace.chains,
            lost=tuple(sorted(self.lost_chains)),
            draws=excess.sizes["draw"],
            examples=len(losses),
            tokens=counted.size if losses.ndim == 2 else None,
            init_loss=float(counted.mean(dtype=np.float64)),
            nbeta=nbeta,
            n=facts.n,
            localization=facts.posterior.localization,
            verdict=self.verdict,
            unit=self.manifest.config.n,
        )

    def _check_probe(self, name: str) -> None:
        if name not in self.probes:
            measured = ", ".join(map(repr, self.probes)) or "none"
            raise ConfigError(
                f"the run in {self.store} measured no probe {name!r}, it has {measured}: sample "
                f"with probes={{{name!r}: data}}"
            )

    @property
    def advisories(self) -> tuple[str, ...]:
        """What does not enter the verdict and should be known.

        What was seen of model, data and loss before the run; a step that is too large or hot.
        """
        return self.verdict.notes

    @cached_property
    def _groups(self) -> dict[str, xr.Dataset]:
        """The groups, of which only what an estimate needs is read: a trace may be large."""
        groups = inference_data.lazy_groups(self._trace)
        lacking = sorted({EXCESS_LOSS, PROBE_LOSS} - groups["posterior"].keys())
        if lacking:
            raise damaged(self.files.path(MANIFEST), f"its draws lack {' and '.join(lacking)}")
        return groups

    @cached_property
    def _judged(self) -> Judgement:
        return judge(self._groups, self._situation)

    @property
    def _facts(self) -> Facts:
        facts = self._trace.facts()
        if facts is None:
            raise StoreError(f"{self.store} {NO_DRAW}")
        return facts

    @property
    def _situation(self) -> Situation:
        """What an advice depends on beside the draws."""
        manifest, lost, events = self.manifest, self.lost_chains, self.events
        return Situation(
            manifest.config,
            self._trace.facts(),
            self.burn_in,
            self.store,
            manifest.recipe is not None,
            manifest.status,
            lost,
            divergences(events) if lost else {},
            (*inspected(events), *((DEPENDENT,) if manifest.config.n == "tokens" else ())),
        )

    def _warn(self, on_unconverged: OnUnconverged) -> None:
        """Warn of a verdict that is not CONVERGED, or raise."""
        if on_unconverged not in ("warn", "raise", "ignore"):
            raise ValueError(
                f"on_unconverged must be 'warn', 'raise' or 'ignore', got {on_unconverged!r}"
            )
        if self.verdict.converged or on_unconverged == "ignore":
            return
        if on_unconverged == "raise":
            raise NotConverged(str(self.verdict))
        warnings.warn(str(self.verdict), NotConvergedWarning, stacklevel=3)

    def __repr__(self) -> str:
        return f"Run({redacted(self.store)!r}, status={self.manifest.status!r})"


def open(store: str | Path) -> Run:
    """Open a run directory for reading; needs neither Ray nor model nor data."""
    return Run(store)
