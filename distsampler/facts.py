"""What is known of a run before its first draw: the posterior it samples, and by which step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar


class _Scales(Protocol):
    """A number, or an array or a tensor of numbers."""

    def __rmul__(self, factor: float, /) -> Any: ...  # noqa: ANN401 (of the same type)


Curvature = TypeVar("Curvature", bound=_Scales)


@dataclass(frozen=True)
class Posterior:
    """The density ``exp(-nbeta L(w) - localization/2 |w - w*|^2 - weight_decay/2 |w|^2)``.

    Args:
        nbeta: inverse temperature times the number of examples.
        localization: gamma, the strength of the pull to w*.
        weight_decay: lambda, the precision of a Gaussian prior around 0.
    """

    nbeta: float
    localization: float = 0.0
    weight_decay: float = 0.0

    def kappa(self, h: Curvature) -> Curvature:
        """Return ``nbeta h + gamma + lambda``, its curvature where the mean loss has curvature h.

        Args:
            h: a curvature, or an array or tensor of them.
        """
        kappa: Curvature = self.nbeta * h + (self.localization + self.weight_decay)
        return kappa


@dataclass(frozen=True)
class Law:
    """The law of a sampler's chain on a quadratic, as far as the reading half needs it.

    Args:
        name: what the law is called.
        limit: ``lr kappa`` at which the chain diverges; None: it never does.
    """

    name: str
    limit: float | None


@dataclass(frozen=True)
class Facts:
    """What is known of a run before its first draw.

    Args:
        n: number of examples.
        posterior: the density that is sampled.
        lr: step size; None: the sampler, a user's own, has no such option.
        law: the law of the sampler's chain on a quadratic; None: not known.
    """

    n: int
    posterior: Posterior
    lr: float | None = None
    law: Law | None = None

    def numbers(self) -> dict[str, float]:
        """Return the numbers that a store records, by name."""
        numbers = {
            "nbeta": self.posterior.nbeta,
            "n": float(self.n),
            "localization": self.posterior.localization,
        }
        return numbers if self.lr is None else {**numbers, "lr": self.lr}
