"""Where dispersed chains start: away from w*, at a loss above that of any posterior.

``w = w* + r u / |u|``. In a regular model of d moving parameters ``nbeta (E L - L*)`` is d/2, in a
singular one it is less: so r is the distance at which ``nbeta (probe loss - its value at w*)`` is
d/2, by bisection, and at most ``sqrt(d / gamma)``, where localization alone would hold the weights.

Along an isotropic direction nearly all of that loss would lie in the steepest few directions; it
would be gone after a few steps, and the chain would then rise from below like all others. So u is
Gaussian with the standard deviation that a posterior with the measured curvature c would have,
``u_i = N(0, 1) / sqrt(nbeta c_i + gamma)``. c_i is the length of row i of the Hessian, estimated
from differences of the probe's gradient over the distance s at which an isotropic step reaches d/2:
``c_i^2 = d mean_m (g_i(w* + s v_m) - g_i(w*))^2 / s^2``, v_m of unit length. A flat direction that
lies across the coordinates is taken for steeper than it is, and starts closer to w*: there the
bracket is weaker.

All is a function of (seed, chain), on one device model.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distsampler.chains.probe import Probe
from distsampler.draws import AtAnchor
from distsampler.errors import WorkFailedError
from distsampler.facts import Posterior
from distsampler.models.replica import ChainSpec, Replica
from distsampler.seeding import Stream, generator

GRADIENTS = 4  # differences from which the curvature is estimated
FLATTEST = 1e-6  # of the largest curvature: what counts as flat without localization
SMALLEST, DOUBLINGS, HALVINGS = 1e-6, 60, 20


class DispersedStart:
    """The start of one chain, whose replica is moved from ``anchors``, w*, and not put back."""

    def __init__(
        self,
        spec: ChainSpec,
        replica: Replica,
        anchors: list[Tensor],
        at_anchor: AtAnchor,
        chain: int,
    ) -> None:
        self._spec, self._replica, self._at_anchor, self._chain = spec, replica, at_anchor, chain
        self._anchors = [w.detach() for w in anchors]
        self._probe = Probe(replica, spec)
        self._random = generator(spec.config.seed, Stream.START, chain)
        moving = replica.moving_entries()
        self._masks = [mask.to(w.dtype) for mask, w in zip(moving, anchors, strict=True)]
        self._dimension = sum(int(mask.sum()) for mask in moving)
        self._gamma = spec.posterior.localization

    @torch.no_grad()
    def weights(self) -> list[Tensor]:
        """Return the weights to start from, flat, as the replica has them.

        Raises:
            WorkFailedError: if no distance reaches the wanted loss, and the config gives none.
        """
        radius = self._spec.config.init_radius
        if radius is not None:
            return self._at(self._direction(), radius)
        cap = math.sqrt(self._dimension / self._gamma) if self._gamma > 0 else math.inf
        isotropic = self._direction()
        precision = self._precision(self._radius(isotropic, cap))
        direction = self._direction(precision)
        return self._at(direction, self._radius(direction, cap))

    def _direction(self, precision: list[Tensor] | None = None) -> list[Tensor]:
        """A Gaussian direction of unit length; smaller where the loss is steeper."""
        drawn = []
        for mask in self._masks:
            numbers = torch.from_numpy(self._random.standard_normal(mask.numel()))
            drawn.append(numbers.to(mask.device) * mask)
        if precision is not None:
            drawn = [u / c.sqrt() for u, c in zip(drawn, precision, strict=True)]
        length = math.hypot(*(float(torch.linalg.vector_norm(u)) for u in drawn))
        return [u / length for u in drawn]

    def _precision(self, distance: float) -> list[Tensor]:
        """The precision of each entry, ``nbeta c_i + gamma``, float64, above zero."""
        before, squares = self._gradient(self._anchors), list[Tensor]()
        for _ in range(GRADIENTS):
            after = self._gradient(self._at(self._direction(), distance))
            new = [(b - a).square() for a, b in zip(before, after, strict=True)]
            squares = [a + b for a, b in zip(squares, new, strict=True)] if squares else new
        scale = math.sqrt(self._dimension / GRADIENTS) / distance
        posterior = Posterior(self._spec.nbeta * scale, self._gamma)  # of the lengths sqrt(s)
        precision = [posterior.kappa(s.sqrt()) for s in squares]
        least = FLATTEST * max(float(c.max()) for c in precision if c.numel())
        return [c.clamp(min=least or 1.0) for c in precision]

    def _radius(self, direction: list[Tensor], cap: float) -> float:
        """The distance at which nbeta times the probe's excess loss is d/2."""
        wanted = self._dimension / 2
        distance = distance_at(lambda r: self._energy(self._at(direction, r)), wanted, cap)
        if distance is None:
            raise WorkFailedError(
                f"init='dispersed': nbeta times the probe's excess loss never reaches d/2 = "
                f"{wanted:g} on the way from w*, and without localisation nothing else holds a "
                "chain: give init_radius, in weight units, or sampler.localization"
            )
        return distance

    def _energy(self, weights: list[Tensor]) -> float:
        """Nbeta times the probe's excess loss."""
        self._move(weights)
        excess = self._probe.mean(self._probe.losses(self._chain)) - self._at_anchor.probe_init_loss
        return self._spec.nbeta * excess

    def _gradient(self, weights: list[Tensor]) -> list[Tensor]:
        """Gradient of the probe's mean loss, float64, zero where the weights do not move."""
        self._move(weights)
        pairs = zip(self._probe.gradient(self._chain), self._masks, strict=True)
        return [gradient * mask for gradient, mask in pairs]

    def _at(self, direction: list[Tensor], radius: float) -> list[Tensor]:
        pairs = zip(self._anchors, direction, strict=True)
        return [w + (radius * u).to(w.dtype) for w, u in pairs]

    def _move(self, weights: list[Tensor]) -> None:
        for flat, w in zip(self._replica.flats, weights, strict=True):
            flat.copy_(w)


def distance_at(loss: Callable[[float], float], wanted: float, cap: float) -> float | None:
    """Return the distance at which a loss that begins at 0 first reaches a value, by bisection.

    What is not finite counts as beyond it.

    Args:
        loss: function of the distance.
        wanted: value to reach, above 0.
        cap: largest distance; where the loss is lower there, it is the answer.

    Returns:
        A distance at which the loss is at most the value; None if the loss is never larger.
    """

    def below(distance: float) -> bool:
        return loss(distance) < wanted  # NaN is not

    low, high = 0.0, min(SMALLEST, cap)
    for _ in range(DOUBLINGS):
        if not below(high):
            break
        if high == cap:
            return cap
        low, high = high, min(2 * high, cap)
    else:
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low
