"""Where a run may begin: in a new directory, an empty one, or one whose run has made no draw.

A run without a draw is none yet: whoever starts there begins anew, and nothing of what was measured
before is believed. A start that fails before its first draw leaves no run behind.

A directory may come from anybody. What it names (model, data, loss, observables, a sampler) is code
to be run: it is said before it is imported, and imported only where the directory is the user's own
or trusted.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, NamedTuple

from distsampler.analysis.run import Run
from distsampler.config import RunConfig
from distsampler.errors import ConfigError, StoreError
from distsampler.recipe import PARTS, Recipe, reload
from distsampler.redaction import redacted
from distsampler.store.files import Files
from distsampler.store.folders import TEMPORARY, LocalFolder
from distsampler.store.lease import CLAIM, EPOCH
from distsampler.store.lease import NAME as LEASE
from distsampler.store.manifest import MANIFEST
from distsampler.store.trace import CONTENTS, clear, has_draws

Resume = Literal["never", "auto", "must"]
LEFT_BY_A_START = {*CONTENTS, LEASE, "cell.json"}
TRUST = "if you trust who wrote it,"
log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """What a directory may hold."""

    name: str  # what people call it
    manifest: str  # the file that says that it is there
    reader: str  # the function that opens it
    has_draws: Callable[[Files], bool]


RUN = Stored("run", MANIFEST, "distsampler.open", has_draws)


def continues(files: Files, resume: Resume, what: Stored = RUN) -> bool:
    """Return whether there is a run (or sweep) to continue; check that one can be made, if not.

    Raises:
        ConfigError: if resume is none of its values.
        StoreError: if there is something that must not be there, or not what must be.
    """
    if resume not in ("never", "auto", "must"):
        raise ConfigError(f"resume must be 'never', 'auto' or 'must', got {resume!r}")
    if resume == "must" and not files.exists(what.manifest):
        raise StoreError(f"resume='must' needs a {what.name} in {files}, which holds none")
    if resume == "must" or (resume == "auto" and what.has_draws(files)):
        return True
    check_new(files, what)
    return False


def check_new(files: Files, what: Stored = RUN) -> None:
    """Check that a run (or sweep) can begin in a directory, without making it.

    Raises:
        StoreError: if there is one with draws, or something else, or it may not be written.
    """
    if what.has_draws(files):
        raise StoreError(
            f"the store {files} must not exist, but it holds a {what.name}: give another store, "
            f"read it with {what.reader}({str(files)!r}), continue it with resume='auto', or "
            "delete it"
        )
    if not files.exists(what.manifest) and not _only_leftovers(files):
        raise StoreError(f"the store {files} must be new or an empty folder: give another one")
    files.check_writable()


@contextmanager
def beginning(files: Files) -> Iterator[None]:
    """Begin a run in a directory that is held, and leave none where it fails before its first draw.

    Raises:
        StoreError: if another driver has made draws there meanwhile.
    """
    check_new(files)
    replace(files, RUN, clear)
    try:
        yield
    except BaseException:
        with suppress(StoreError, OSError):  # where nothing can be written, it is not ours to clear
            if not has_draws(files):
                clear(files)
        raise


def replace(files: Files, what: Stored, clear: Callable[[Files], None]) -> None:
    """Clear away what has made no draw, and say so where it was more than a start cut short."""
    if files.exists(what.manifest):
        log.warning("the %s in %s had not made a draw: it is replaced", what.name, files)
    clear(files)


def _only_leftovers(files: Files) -> bool:
    """Whether a local folder holds nothing but what a start that was cut short has left."""
    if not isinstance(files.folder, LocalFolder) or not files.folder.root.exists():
        return True
    return files.folder.root.is_dir() and all(
        path.name in LEFT_BY_A_START
        or path.suffix == TEMPORARY
        or EPOCH.fullmatch(path.name)
        or path.name.startswith(CLAIM)
        for path in files.folder.root.iterdir()
    )


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
    probes = (f"data {made.get('data')}" for made in record.get("probes", {}).values())
    names = [*parts, *probes, *_named(manifest.config), f"from {record.get('folder')}"]
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
    losses = {name: probe.loss for name, probe in config.probes.items() if probe.loss is not None}
    yield from (f"loss {loss} of the probe {name}" for name, loss in losses.items())
    if ":" in config.sampler.name:
        yield f"sampler {config.sampler.name}"
    if config.placement.runtime_env:
        yield f"runtime_env {redacted(config.placement.runtime_env, named=True)}"
