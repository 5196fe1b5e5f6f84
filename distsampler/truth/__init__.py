"""Answers that are known: what a sampler and an estimate are to be held against.

Three kinds, from the limit to the finite problem:

``coefficients``  learning coefficients lambda and multiplicities m, the limit of infinite data
``exact``         ``t E[K]`` at finite t: in closed form for a linear regression, by quadrature in
                  one and two dimensions
``gibbs``         the same for deep linear networks of any depth, by a sampler without step size

``copies`` runs any torch optimizer that samples on many copies of such a network at once, and so
measures its error against Gibbs.

The finite values converge to the limit slowly, ``t E[K] = lambda - (m - 1) / log t + o(1 / log t)``
(Watanabe 2009, theorem 6.6), so an estimate at finite t is held against the finite value. K is the
mean excess loss, t the inverse temperature times the number of examples (nbeta), and the posterior
``p(w) ~ exp(-t K(w) - gamma/2 |w - w*|^2)``.

Example:
    >>> from distsampler import truth
    >>> truth.deep_linear((2, 2, 2), rank=1)
    LearningCoefficient(value=2.0, multiplicity=2)
    >>> round(truth.quadrature(lambda a, b: (a * b) ** 2, t=579.0).mean, 4)
    0.3833
"""

from distsampler.truth.coefficients import (
    LearningCoefficient,
    deep_linear,
    normal_crossing,
    reduced_rank,
    regular,
)
from distsampler.truth.copies import sample_copies
from distsampler.truth.exact import Exact, linear_regression, quadrature
from distsampler.truth.gibbs import BlockGibbs, DeepLinear, ReplicaMean, block_gibbs

__all__ = [
    "BlockGibbs",
    "DeepLinear",
    "Exact",
    "LearningCoefficient",
    "ReplicaMean",
    "block_gibbs",
    "deep_linear",
    "linear_regression",
    "normal_crossing",
    "quadrature",
    "reduced_rank",
    "regular",
    "sample_copies",
]
