"""Answers that are known: what a sampler and an estimate are to be held against.

Three kinds, from the limit to the finite problem:

``coefficients``  learning coefficients lambda and multiplicities m, the limit of infinite data
``exact``         ``t E[K]`` at finite t: in closed form for a linear regression, by quadrature in
                  one and two dimensions
``gibbs``         the same for deep linear networks of any depth, by a sampler without step size

``targets`` and ``networks`` make problems of them: models at w*, with data and loss, ready for
``distsampler.sample``; ``certify`` puts samplers through them by the ordinary road. ``laws`` has
what discretised chains return on a quadratic. ``copies`` runs any torch optimizer that samples on
many copies of a network at once, and so measures its error against Gibbs. ``strata`` tells what a
chain finds that has not left w*.

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
    >>> truth.deep_linear_1k(seed=12).coefficient.value
    23.5
"""

from distsampler.truth.codimension import codimension
from distsampler.truth.coefficients import (
    LearningCoefficient,
    deep_linear,
    normal_crossing,
    reduced_rank,
    regular,
)
from distsampler.truth.gibbs import BlockGibbs, DeepLinear, ReplicaMean, block_gibbs
from distsampler.truth.many_copies import sample_copies
from distsampler.truth.networks import (
    Network,
    deep_linear_1k,
    deep_linear_10k,
    network,
    rescaled,
    unit_network,
    with_dead_weights,
)
from distsampler.truth.quadrature import Exact, linear_regression, quadrature
from distsampler.truth.targets import Known, Quadratic, Target, quadratic

__all__ = [
    "BlockGibbs",
    "DeepLinear",
    "Exact",
    "Known",
    "LearningCoefficient",
    "Network",
    "Quadratic",
    "ReplicaMean",
    "Target",
    "block_gibbs",
    "codimension",
    "deep_linear",
    "deep_linear_1k",
    "deep_linear_10k",
    "linear_regression",
    "network",
    "normal_crossing",
    "quadratic",
    "quadrature",
    "reduced_rank",
    "regular",
    "rescaled",
    "sample_copies",
    "unit_network",
    "with_dead_weights",
]
