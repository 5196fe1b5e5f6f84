"""What can go wrong, as types: each says what must hold, what was got and what to do."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from distsampler.redaction import redacted


class DistsamplerError(Exception):
    """Base of every error raised on purpose; all can be pickled, and hold no secret."""

    def __init__(self, *args: object) -> None:
        super().__init__(*map(redacted, args))


class ConfigError(DistsamplerError, ValueError):
    """A configuration, model, data set or loss that cannot be sampled."""


class PlacementError(DistsamplerError):
    """The cluster cannot hold what was asked of it."""


class StoreError(DistsamplerError):
    """A run directory that cannot be written, read or continued."""


class RunFailed(DistsamplerError):
    """A run ended with fewer chains than ``min_chains``; what was committed stays readable.

    Attributes:
        lost_chains: the chains that were retired, each with its reason.
    """

    def __init__(self, message: str, lost_chains: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.lost_chains = dict(lost_chains or {})


class WorkFailedError(DistsamplerError):
    """User code (model, data or loss) raised inside a chain; names chain and step."""


class NotConverged(DistsamplerError):
    """An estimate was asked for that the verdict does not support."""


class NotConvergedWarning(UserWarning):
    """An estimate was given that the verdict does not support."""


class StepTooLargeWarning(UserWarning):
    """A chain of a run under way met a curvature for which its step is too large."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return a sentence for a name that does not exist: the nearest known one, then all of them."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}: {hint}known are {', '.join(names)}"
