"""What is known of a run before its first draw: the posterior it samples, and by which step."""

import math
import warnings
from dataclasses import dataclass
from operator import index
from typing import Any, Protocol, SupportsIndex, TypeVar

from distsampler.errors import ConfigError


class _Scales(Protocol):
    """A number, or an array or a tensor of numbers."""

    def __rmul__(self, factor: float, /) -> Any: ...  # noqa: ANN401 (of the same type)


Scalable = TypeVar("Scalable", bound=_Scales)


@dataclass(frozen=True)
class Posterior:
    """The density ``exp(-nbeta L(w) - localization/2 |w - w*|^2 - weight_decay/2 |w|^2)``."""

    nbeta: float  # inverse temperature times the number of examples
    localization: float = 0.0  # gamma, the strength of the pull to w*
    weight_decay: float = 0.0  # lambda, the precision of a Gaussian prior around 0

    def kappa(self, h: Scalable) -> Scalable:
        """Return ``nbeta h + gamma + lambda``, its curvature where the mean loss has curvature h.

        Args:
            h: a curvature, or an array or tensor of them.
        """
        kappa: Scalable = self.nbeta * h + (self.localization + self.weight_decay)
        return kappa


@dataclass(frozen=True)
class Law:
    """The law of a sampler's chain on a quadratic, as far as the reading half needs it."""

    name: str  # what the law is called
    limit: float | None  # ``lr kappa`` at which the chain diverges; None: it never does


@dataclass(frozen=True)
class Facts:
    """What is known of a run before its first draw."""

    n: int  # number of examples, or of tokens
    posterior: Posterior  # the density that is sampled
    lr: float | None = None  # step size; None: the sampler, a user's own, has no such option
    law: Law | None = None  # the law of the sampler's chain on a quadratic; None: not known
    examples: int | None = None  # number of examples, where n is that of tokens

    @property
    def rows(self) -> int:
        """Number of examples, whatever n counts."""
        return self.n if self.examples is None else self.examples

    def numbers(self) -> dict[str, float]:
        """Return the numbers that a store records, by name."""
        numbers = {
            "nbeta": self.posterior.nbeta,
            "n": float(self.n),
            "localization": self.posterior.localization,
        }
        more = {"lr": self.lr, "examples": self.examples}
        return numbers | {name: float(value) for name, value in more.items() if value is not None}


class HasBatchSize(Protocol):
    """What ``optimal_nbeta`` needs of a DataLoader."""

    batch_size: int | None

    def __len__(self) -> int:
        """Return the number of batches."""
        ...


def optimal_nbeta(n: int | HasBatchSize) -> float:
    """Return the inverse temperature times n at which the WBIC holds: n / log n (Watanabe 2013).

    Args:
        n: number of examples; or a DataLoader, whose batch size is taken, with a warning, as in
            devinterp's documentation. ``sample()`` always uses the number of examples.

    Raises:
        ConfigError: if n < 2, where the logarithm is not positive, or n is neither of the two.
    """
    if isinstance(n, SupportsIndex):  # numpy's integers too
        return _n_over_log_n(index(n))
    try:
        size = n.batch_size or 1
        examples = len(getattr(n, "dataset", ())) or len(n) * size
    except (AttributeError, TypeError):
        raise ConfigError(
            "optimal_nbeta needs the number of examples, an integer, or a DataLoader over them: "
            f"got {n!r}; give len(dataset)"
        ) from None
    nbeta = _n_over_log_n(size)
    warnings.warn(
        f"nbeta of a DataLoader is that of its batch size {size}: {nbeta:.6g}; of its {examples} "
        f"examples it would be {_n_over_log_n(examples):.6g}: give len(dataset) to get that",
        stacklevel=2,
    )
    return nbeta


def _n_over_log_n(n: int) -> float:
    if n < 2:
        raise ConfigError(f"n / log n needs at least 2 examples, got {n}: give sampler.nbeta")
    return n / math.log(n)
