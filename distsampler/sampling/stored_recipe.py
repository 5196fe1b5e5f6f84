"""The recipe of a run that is continued by its directory alone: what it names is code to be run.

A run directory may come from anybody. What it names is said before it is imported, and imported
without a word only where the directory is the user's own.
"""

from collections.abc import Callable, Iterator, Sequence

from distsampler.analysis.run import Run
from distsampler.config import RunConfig
from distsampler.errors import StoreError
from distsampler.recipe import PARTS, Recipe, reload
from distsampler.store.manifest import MANIFEST

TRUST = "if you trust who wrote it,"


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
    record = manifest.recipe
    parts = (f"{part} {record.get(part)}" for part in PARTS)
    names = [*parts, *_named(manifest.config), f"from {record.get('folder')}"]
    say(f"{run.files.path(MANIFEST)} names, to be imported: {', '.join(names)}")
    if not trust and not run.files.own(MANIFEST):
        raise StoreError(f"{_not_own(run)}: read the line above; {TRUST} add --trust")
    return reload(record, manifest.config, changes)


def trusted_config(run: Run, trust: bool) -> RunConfig:
    """Return the config of a run, whose model, data and loss are given by the caller.

    Raises:
        StoreError: if it names code of its own, and is another user's and not trusted.
    """
    config = run.manifest.config
    names = ", ".join(_named(config))
    if names and not trust and not run.files.own(MANIFEST):
        raise StoreError(f"{_not_own(run)}: {names}; {TRUST} pass trust=True")
    return config


def _not_own(run: Run) -> str:
    return (
        f"the run in {run.store} must be your own to be continued by what it names, and it is "
        "another user's, or nobody knows whose"
    )


def _named(config: RunConfig) -> Iterator[str]:
    """What is imported or started because the config in a run's directory names it."""
    yield from (f"observable {function}" for function in config.observables.values())
    if ":" in config.sampler.name:
        yield f"sampler {config.sampler.name}"
    if config.placement.runtime_env:
        yield f"runtime_env {config.placement.runtime_env}"
