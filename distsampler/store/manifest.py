"""run.json: what a run is and how far it is. Replaced whole, never edited in place."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, ValidationError

from distsampler.config import Frozen, RunConfig, SamplerConfig
from distsampler.draws import Variable, WideVariable
from distsampler.errors import StoreError
from distsampler.facts import Law
from distsampler.store.files import Files

SCHEMA_VERSION = 1
LAWS_BY_NAME = ("sgld", "lmsgld", "sghmc", "sgnht", "mala")
"""Samplers whose law was known when stores did not record it, and went by the sampler's name."""

RunStatus = Literal["running", "finished", "interrupted", "failed"]


def _unrecorded_law(sampler: SamplerConfig) -> Law | None:
    """Return the law of a run whose store does not record it."""
    if sampler.name not in LAWS_BY_NAME:
        return None
    if sampler.name == "mala":
        return Law("mala", None)
    friction = float(sampler.options.get("friction", 0.0)) if sampler.name == "sghmc" else 0.0
    name = "badodab" if sampler.options.get("scheme") == "badodab" else sampler.name
    return Law(name, 4 * (1 - friction / 2))


class Manifest(Frozen):
    """The facts of a run directory.

    Args:
        schema_version: of this layout.
        config: of the run.
        fingerprint: what the bits of the trace depend on beside the config.
        variables: what a draw holds.
        wide: what of it is too large to travel.
        law: the law of the sampler's chain on a quadratic; None: not known.
        versions: of the libraries that wrote it.
        recipe: the config file's model, data and loss, and the file; None for a run from Python.
        status: how the run stands.
        epoch: how many drivers the run has had.
        n_committed: draws of each chain, burn-in included; repeated from the trace.
        burn_in: draws before the posterior, of a run that chooses them (burn_in="auto"), as chosen
            at the last look of the gate; until the run is sealed the draws lie together in the
            warm-up groups, and this alone divides them.
        kept: draws after burn-in that every chain was cut to when the run was sealed.
        retired: chain -> why it is not in the posterior.
        reason: why the run ended.
        seconds: of wall-clock time, up to the seal.
    """

    schema_version: int = SCHEMA_VERSION
    config: RunConfig
    fingerprint: dict[str, str]
    variables: tuple[Variable, ...]
    wide: tuple[WideVariable, ...] = ()
    law: Law | None = Field(default_factory=lambda known: _unrecorded_law(known["config"].sampler))
    versions: dict[str, str]
    recipe: dict[str, Any] | None = None
    status: RunStatus = "running"
    epoch: int = 1
    n_committed: tuple[int, ...]
    burn_in: int | None = None
    kept: int | None = None
    retired: dict[int, str] = Field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0


def write(files: Files, name: str, manifest: Manifest) -> None:
    """Puts the manifest in place of the one before, whole or not at all, safe from power loss."""
    files.write(name, manifest.model_dump_json(indent=1).encode(), fsync=True)


def read(files: Files, name: str) -> Manifest:
    """The manifest of a run directory.

    Raises:
        StoreError: if there is none, or it is torn, or of another version.
    """
    path = files.path(name)
    try:
        data: dict[str, Any] = json.loads(files.read(name))
        found = data.get("schema_version")
        if found != SCHEMA_VERSION:
            raise StoreError(
                f"{path} must have schema version {SCHEMA_VERSION}, got {found}: "
                "read it with the version of distsampler that wrote it"
            )
        return Manifest.model_validate(data)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{files} must be a run directory, but it holds no {name}: give the store of a run"
        ) from None
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        raise StoreError(
            f"{path} must be a manifest, but it cannot be read: {error}; restore it from a copy, "
            "or delete the store and sample again: the same seed gives the same bits"
        ) from error
