"""The recipe of a run that is continued by its directory alone: what it names is code to be run.

A run directory may come from anybody. What it names is said before it is imported, and imported
without a word only where the directory is the user's own.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distsampler.analysis.run import Run
from distsampler.config import RunConfig
from distsampler.errors import StoreError
from distsampler.recipe import PARTS, Recipe, reload
from distsampler.store.manifest import MANIFEST


def stored_recipe(
    run: Run, changes: Sequence[str], trust: bool, say: Callable[[str], None]
) -> Recipe:
    """Return the recipe of a run that was started from a YAML file, with fields changed.

    Args:
        run: the run.
        changes: fields to set: ``"draws=2000"``.
        trust: whether the directory may be another user's.
        say: called with a line that says what will be imported.

    Raises:
        StoreError: if the run was started from Python, or is another user's and not trusted.
    """
    manifest = run.manifest
    if manifest.recipe is None:
        raise StoreError(
            f"the run in {run.store} was started from Python, and its model has no name to be "
            f"imported by: continue it there, with distsampler.resume({run.store!r}, model, data, "
            "loss)"
        )
    names = ", ".join(_named(manifest.recipe, manifest.config))
    say(f"{run.files.path(MANIFEST)} names, to be imported: {names}")
    if not trust and not run.files.own(MANIFEST):
        raise StoreError(
            f"the run in {run.store} must be your own to be continued by what it names, and it is "
            "another user's, or nobody knows whose: read the line above; if you trust who wrote "
            "it, add --trust"
        )
    return reload(manifest.recipe, manifest.config, changes)


def _named(record: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """What is imported or started because a run's directory names it."""
    yield from (f"{part} {record.get(part)}" for part in PARTS)
    yield from (f"observable {function}" for function in config.observables.values())
    if ":" in config.sampler.name:
        yield f"sampler {config.sampler.name}"
    if config.placement.runtime_env:
        yield f"runtime_env {config.placement.runtime_env}"
    yield f"from {record.get('folder')}"
