"""The codimension of the set of zero loss at w*: what a chain estimates that has not left w*.

The set of zero loss of a deep linear network, ``W_L ... W_1 = W*_L ... W*_1``, has strata: near w*
it is a manifold whose codimension is the rank of the product's derivative, ``dW_s -> W_L .. dW_s ..
W_1``. A chain that stays near w* estimates half of that rank as the LLC, plus what the directions
of higher order add; the posterior, where localization lets it, lies where more is degenerate, and
has less. The way there leads along flat directions and takes about ``2 / (lr gamma)`` steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distsampler.truth.gibbs import product

TOLERANCE = 1e-6  # of the largest singular value: what counts as zero


def codimension(layers: Sequence[Tensor]) -> int:
    """Return the rank of the derivative of ``W_L ... W_1`` by all its layers.

    With a_s the rank of ``W_L .. W_(s+1)`` and b_s that of ``W_(s-1) .. W_1``: the images of the
    former grow with s, the row spaces of the latter shrink, so that the rank of the sum is
    ``sum_s (a_s - a_(s-1)) b_s``, a_0 = 0.

    Args:
        layers: W_1 .. W_L, each (H_s, H_(s-1)), float64.

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> codimension([eye, eye]), codimension([eye, 0 * eye])
        (4, 4)
    """
    above = [_rank(layers[s + 1 :], layers[s].shape[0]) for s in range(len(layers))]
    below = [_rank(layers[:s], layers[s].shape[1]) for s in range(len(layers))]
    before = [0, *above[:-1]]
    return sum((a - c) * b for a, b, c in zip(above, below, before, strict=True))


def _rank(layers: Sequence[Tensor], width: int) -> int:
    """Return the rank of a product of layers; of the identity where there is none."""
    return int(torch.linalg.matrix_rank(product(layers), rtol=TOLERANCE)) if layers else width
