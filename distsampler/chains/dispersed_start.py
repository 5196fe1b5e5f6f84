"""Where dispersed chains start: away from w*, at a loss above that of any posterior.

``w = w* + r u / |u|``. In a regular model of d moving parameters ``nbeta (E L - L*)`` is d/2, in a
singular one it is less: so r is found at which ``nbeta (probe loss - its anchor) = d/2``, by
bisection, and at most ``sqrt(d / gamma)``, where localisation alone would hold the weights.

Along an isotropic direction nearly all of that loss would lie in the steepest few directions; it
would be gone after a few steps, and the chain then rise from below like all others. So u is
Gaussian with the standard deviation that a posterior with the measured curvature c would have,
``u_i = N(0, 1) / sqrt(nbeta c_i + gamma)``. c_i is the length of row i of the Hessian, as
differences of the probe's gradient see it over the distance s at which an isotropic step reaches
d/2: ``c_i^2 = d mean_m (g_i(w* + s v_m) - g_i(w*))^2 / s^2``, v_m of unit length. A flat direction
that lies across the coordinates is taken for steeper than it is, and starts closer to w*: there
the bracket is weaker.

All is a function of (seed, chain), on one device model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distsampler.chains.anchor_pass import probe_batches, probe_losses, probe_parts, probe_weights
from distsampler.draws import AtAnchor
from distsampler.errors import WorkFailedError
from distsampler.facts import Posterior
from distsampler.models.replica import ChainSpec, Replica
from distsampler.seeding import Stream, generator

GRADIENTS = 4  # differences that measure the curvature
FLATTEST = 1e-6  # of the largest curvature: what counts as flat without localisation
SMALLEST, DOUBLINGS, HALVINGS = 1e-6, 60, 20


class Dispersion:
    """The start of one chain.

    Args:
        spec: the recipe.
        replica: the chain's model, at w*; it is moved, and put back by ``start``'s caller only.
        anchors: the replica's flat parameters at w*.
        at_anchor: losses at w*.
        chain: index.
    """

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
        self._probe = probe_batches(replica, spec)
        self._weights = probe_weights(spec)
        self._random = generator(spec.config.seed, Stream.START, chain)
        masks = replica.masks or [torch.ones_like(w, dtype=torch.bool) for w in self._anchors]
        self._masks = [mask.to(w.dtype) for mask, w in zip(masks, self._anchors, strict=True)]
        self.moving = sum(int(mask.sum()) for mask in masks)
        self._gamma = spec.posterior.localization

    @torch.no_grad()
    def start(self) -> list[Tensor]:
        """The weights to start from, flat, as the replica holds them.

        Raises:
            WorkFailedError: if no distance reaches the wanted loss, and none is given.
        """
        given = self._spec.config.init_radius
        if given is not None:
            return self._at(self._direction(), given)
        cap = math.sqrt(self.moving / self._gamma) if self._gamma > 0 else math.inf
        isotropic = self._direction()
        curvature = self._curvature(self._radius(isotropic, cap))
        direction = self._direction(curvature)
        return self._at(direction, self._radius(direction, cap))

    def _direction(self, curvature: list[Tensor] | None = None) -> list[Tensor]:
        """A Gaussian direction of unit length; smaller where the loss is steeper."""
        drawn = []
        for mask in self._masks:
            numbers = torch.from_numpy(self._random.standard_normal(mask.numel()))
            drawn.append(numbers.to(mask.device) * mask)
        if curvature is not None:
            drawn = [u / c.sqrt() for u, c in zip(drawn, curvature, strict=True)]
        length = math.hypot(*(float(torch.linalg.vector_norm(u)) for u in drawn))
        return [u / length for u in drawn]

    def _curvature(self, distance: float) -> list[Tensor]:
        """The precision of each entry, ``nbeta c_i + gamma``, float64, above zero."""
        before, squares = self._gradient(self._anchors), list[Tensor]()
        for _ in range(GRADIENTS):
            after = self._gradient(self._at(self._direction(), distance))
            new = [(b - a).square() for a, b in zip(before, after, strict=True)]
            squares = [a + b for a, b in zip(squares, new, strict=True)] if squares else new
        scale = math.sqrt(self.moving / GRADIENTS) / distance
        precision = Posterior(self._spec.nbeta * scale, self._gamma)  # of sqrt(s), by its kappa
        found = [precision.kappa(s.sqrt()) for s in squares]
        least = FLATTEST * max(float(c.max()) for c in found if c.numel())
        return [c.clamp(min=least or 1.0) for c in found]

    def _radius(self, direction: list[Tensor], cap: float) -> float:
        """The distance at which nbeta times the probe's excess loss is d/2."""
        wanted = self.moving / 2
        found = distance_at(lambda r: self._excess(self._at(direction, r)), wanted, cap)
        if found is None:
            raise WorkFailedError(
                f"init='dispersed': nbeta times the probe's excess loss never reaches d/2 = "
                f"{wanted:g} on the way from w*, and without localisation nothing else holds a "
                "chain: give init_radius, in weight units, or sampler.localization"
            )
        return found

    def _excess(self, weights: list[Tensor]) -> float:
        """What is nbeta times the probe's excess loss."""
        self._move(weights)
        losses = probe_losses(self._replica, self._spec, self._probe, self._chain)
        mean = float(np.average(losses, weights=self._weights))
        return self._spec.nbeta * (mean - self._at_anchor.probe_init_loss)

    def _gradient(self, weights: list[Tensor]) -> list[Tensor]:
        """Of the probe's mean loss, float64, zero where the weights do not move."""
        self._move(weights)
        sizes = [len(part) for part in probe_parts(self._spec)]
        total = [torch.zeros_like(w, dtype=torch.float64) for w in self._anchors]
        for batch, size in zip(self._probe, sizes, strict=True):
            with torch.enable_grad():
                self._replica.gradient(self._replica.losses(batch, self._chain))
            for entry, flat, mask in zip(total, self._replica.flats, self._masks, strict=True):
                assert flat.grad is not None
                entry += flat.grad.double() * mask * (size / sum(sizes))
        return total

    def _at(self, direction: list[Tensor], radius: float) -> list[Tensor]:
        pairs = zip(self._anchors, direction, strict=True)
        return [w + (radius * u).to(w.dtype) for w, u in pairs]

    def _move(self, weights: list[Tensor]) -> None:
        for flat, w in zip(self._replica.flats, weights, strict=True):
            flat.copy_(w)


def distance_at(loss: Callable[[float], float], wanted: float, cap: float) -> float | None:
    """The distance at which a loss that begins at nothing first reaches a value, by bisection.

    What is not finite counts as beyond it.

    Args:
        loss: of a distance.
        wanted: above 0.
        cap: the largest distance; where the loss is lower there, it is the answer.

    Returns:
        A distance at which the loss is at most as wanted; None if it never is more.
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
