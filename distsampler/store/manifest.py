"""run.json: what a run is and how far it is. Replaced whole, never edited in place.

It holds a digest of itself, as every manifest does: one that was changed is an error.
"""

import json
import math
import shlex
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from distsampler.config import RunConfig, SamplerConfig
from distsampler.draws import Variable, WideVariable
from distsampler.errors import StoreError
from distsampler.facts import Law
from distsampler.frozen import Frozen
from distsampler.redaction import redacted
from distsampler.store import integrity
from distsampler.store.files import Files
from distsampler.store.integrity import parsed

MANIFEST, SWEEP_MANIFEST = "run.json", "sweep.json"
READERS = {  # of what a directory may hold: what it is called, the function and the command
    MANIFEST: ("run", "distsampler.open", "distsampler llc"),
    SWEEP_MANIFEST: ("sweep", "distsampler.open_sweep", "distsampler collect"),
}
SCHEMA_VERSION = 2
UNSEALED = 1  # version that is read as it is: it has no digests
MOST_DRAWS = 10**8  # of a chain
MOST_NUMBERS, MOST_WIDE = 2**16, 2**40  # of a draw, in one variable that travels, or is wide
DTYPES, WIDE_DTYPES = ("float64", "float32", "int64"), ("float64", "float32", "float16")
M = TypeVar("M", bound=Frozen)
RunStatus = Literal["running", "finished", "interrupted", "failed"]


def _unrecorded_law(sampler: SamplerConfig) -> Law | None:
    """Return the law of a run whose store does not record it, as it was known before."""
    options = sampler.options
    match sampler.name:
        case "mala":
            return Law("mala", None)
        case "sghmc":
            return Law("sghmc", 4 * (1 - float(options.get("friction", 0.0)) / 2))
        case "sgnht" if options.get("scheme") == "badodab":
            return Law("badodab", 4.0)
        case "sgld" | "lmsgld" | "sgnht":
            return Law(sampler.name, 4.0)
    return None


class Manifest(Frozen):
    """The facts of a run directory.

    Args:
        schema_version: version of the layout.
        identity: text that no other run has, to which all that lies beside the manifest is bound;
            empty: it was written before that was.
        config: config of the run.
        fingerprint: what the bits of the trace depend on beside the config.
        variables: what a draw holds.
        wide: what of a draw is too large to travel.
        law: the law of the sampler's chain on a quadratic; None: not known.
        sampler: name and options of the sampler, each with the value that it had, the defaults
            included; empty in stores of older versions.
        calibration: what pilots chose for the run, why, and at which cost; None: nothing.
        versions: versions of the libraries that wrote it.
        recipe: the config file's model, data and loss, and the file; None for a run from Python.
        status: how the run stands.
        epoch: number of drivers that the run has had.
        n_committed: draws of each chain, burn-in included; repeated from the trace.
        burn_in: draws before the posterior, where the run chooses them (burn_in="auto"), as chosen
            at the last gate round; until the run is sealed the draws lie together in the warm-up
            groups, and this alone divides them.
        kept: draws after burn-in that every chain was cut to when the run was sealed.
        retired: chain -> why it is not in the posterior.
        reason: why the run ended.
        seconds: wall-clock time of the run, up to the seal.
    """

    schema_version: int = SCHEMA_VERSION
    identity: str = ""
    config: RunConfig
    fingerprint: dict[str, str]
    variables: tuple[Variable, ...]
    wide: tuple[WideVariable, ...] = ()
    law: Law | None = Field(default_factory=lambda known: _unrecorded_law(known["config"].sampler))
    sampler: dict[str, Any] = Field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    versions: dict[str, str]
    recipe: dict[str, Any] | None = None
    status: RunStatus = "running"
    epoch: int = 1
    n_committed: tuple[int, ...]
    burn_in: int | None = None
    kept: int | None = None
    retired: dict[int, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    reason: str = ""
    seconds: float = Field(0.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for what in self._contradictions():
            raise ValueError(what)
        return self

    def _contradictions(self) -> Iterator[str]:
        """Say what cannot be of a run that was written here."""
        counts, chains = self.n_committed, self.config.chains
        if len(counts) != chains or not all(0 <= count <= MOST_DRAWS for count in counts):
            yield f"n_committed must be a number of draws for each of {chains} chains, got {counts}"
        for name in ("kept", "burn_in"):
            draws = getattr(self, name)
            if draws is not None and not 0 <= draws <= max(counts, default=0):
                yield f"{name} must be at most the draws that were committed, got {draws}"
        if not set(self.retired) <= set(range(chains)):
            yield f"retired must be some of {chains} chains, got {sorted(self.retired)}"
        if self.sampler and not isinstance(self.sampler.get("name"), str):
            yield f"sampler must have a name, got {self.sampler}"
        variables: list[Variable | WideVariable] = [*self.variables, *self.wide]
        places = {(getattr(variable, "group", ""), variable.name) for variable in variables}
        if len(places) != len(variables):  # a sampler may measure what a draw holds too
            yield "variables of one group must have different names"
        yield from filter(None, map(_impossible, variables))


def _impossible(variable: Variable | WideVariable) -> str:
    """Say what cannot be of a variable; nothing, if it can be."""
    size, name = math.prod(variable.shape), variable.name
    if len(variable.dims) != len(variable.shape) or min(variable.shape, default=1) < 0:
        return f"{name} must have a size for each of its dimensions"
    if isinstance(variable, Variable) and (size > MOST_NUMBERS or variable.dtype not in DTYPES):
        return f"{name} must be at most {MOST_NUMBERS} numbers of {DTYPES}"
    if isinstance(variable, WideVariable) and variable.dtype not in WIDE_DTYPES:
        return f"{name} must be numbers of {WIDE_DTYPES}"
    if isinstance(variable, WideVariable) and (size > MOST_WIDE or variable.every < 1):
        return f"{name} must be at most {MOST_WIDE} numbers, at every k-th draw"
    return ""


def write(files: Files, manifest: Manifest) -> None:
    """Replace the manifest, whole or not at all, safe from power loss."""
    write_as(files, MANIFEST, manifest, fsync=True)


def read(files: Files) -> Manifest:
    """Return the manifest of a run directory.

    Raises:
        StoreError: if there is none, or it is damaged, or of another version.
    """
    return read_as(Manifest, files, MANIFEST, "a run", "delete the store and sample again")


def write_as(files: Files, name: str, value: Frozen, fsync: bool = False) -> None:
    """Write a manifest, of a run or of more, without secrets, sealed; whole or not at all."""
    document = integrity.seal(redacted(json.loads(value.model_dump_json())))
    files.write(name, json.dumps(document, indent=1).encode(), fsync=fsync)


def read_as(kind: type[M], files: Files, name: str, what: str, repair: str) -> M:
    """Return a manifest, of a run or of more, with a version that its type knows.

    Args:
        kind: type of the manifest.
        files: the directory.
        name: file of the manifest.
        what: what the directory is of: "a run".
        repair: what to do where a damaged manifest has no copy.

    Raises:
        StoreError: if there is none, or it is damaged, or of another version.
    """
    path = files.path(name)
    try:
        document: dict[str, Any] = parsed(files.read(name))
        version = document.get("schema_version", UNSEALED)
        if version not in (UNSEALED, SCHEMA_VERSION):
            raise StoreError(
                f"{path} must have schema version {SCHEMA_VERSION}, got {version!r}: read it with "
                "the version of distsampler that wrote it"
            )
        if version != UNSEALED or integrity.SEAL in document:
            integrity.check(document)
        return kind.model_validate({k: v for k, v in document.items() if k != integrity.SEAL})
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{files} must be the directory of {what}, but it {_instead(files, name, what)}"
        ) from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{path} must be the manifest of {what}, but it cannot be read: {error}; restore it "
            f"from a copy, or {repair}: the same seed gives the same bits"
        ) from error


def _instead(files: Files, name: str, what: str) -> str:
    """Say what a directory holds that is not what was meant, and how that is read."""
    others = READERS.items() if name in READERS else ()
    for other, (kind, reader, command) in others:
        if other != name and files.exists(other):
            return (
                f"is that of a {kind}: read it with {reader}({str(files)!r}), or the command: "
                f"{command} {shlex.quote(str(files))}"
            )
    return f"holds no {name}: give the store of {what}"
