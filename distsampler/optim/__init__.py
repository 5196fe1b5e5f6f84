"""Samplers as torch optimizers.

A sampler is a torch.optim.Optimizer whose step does not descend: it leaves a posterior invariant.
Everything a training loop does with an optimizer works, so a sampling loop is a training loop::

    sampler = SGLD(model.parameters(), lr=1e-5, nbeta=n / math.log(n), localization=100.0)
    for inputs, targets in batches:
        sampler.zero_grad()
        loss = cross_entropy(model(inputs), targets)     # mean over the batch
        loss.backward()
        sampler.step()

The loss that belongs to the weights of a draw is the one computed before the step that leaves them.
Target: p(w) ~ exp(-nbeta L(w) - gamma/2 |w - w*|^2 - lam/2 |w|^2), gamma the localization. "Bias"
below is the relative error of the variance on a quadratic of curvature kappa, at step size lr.

============== ==================================== ============================ ==============
name           dynamics                             bias                         state, in w
============== ==================================== ============================ ==============
sgld           overdamped Langevin                  lr kappa / 4                 1 (w*)
lmsgld         the same, two noises averaged        none                         2
rmsprop_sgld   sgld, a step size per coordinate     lr P kappa / 4, once frozen  3
adam_sgld      rmsprop_sgld with a mean gradient    (1+beta1)/(1-beta1) times it 4
sghmc          Langevin with momentum               lr kappa / 4                 2
sgnht          sghmc with an adaptive friction      A / 2; "badodab": none       2
mala           sgld, accepted or refused            none; full gradients only    1 and copies
============== ==================================== ============================ ==============

A sampler is one file, with its options as its signature, its step as its equation, and its law.
Reading order: ``sgld``, the plainest; ``kernels``, the terms of the equations; ``sampler``, what
all of them share; ``lmsgld``, ``sghmc``, ``sgnht``, ``rmsprop_sgld``, ``adam_sgld``, ``mala``, the
others. What they are made of:

==================== ===========================================================================
``layout``           the tensors of a parameter group, in chunks with one buffer for a step
``adaptive``         step sizes by coordinate, learnt from squared gradients
``heat_correction``  less noise where minibatches bring some
``metropolis_ratio`` the Metropolis ratio of a Langevin step
``law``              what is known of a chain on a quadratic, from which its bias is predicted
``readouts``         norms, noise and drift of a step
``anchors``          w*, and fp32 masters of half precision
``noise_streams``    where random numbers come from
``checks``           what options must be
``joint``            samplers of several chains that step as one
==================== ===========================================================================
"""

from distsampler.optim.adam_sgld import AdamSGLD
from distsampler.optim.lmsgld import LMSGLD
from distsampler.optim.mala import MALA
from distsampler.optim.metropolis_ratio import Side, mala_acceptance
from distsampler.optim.rmsprop_sgld import RMSPropSGLD
from distsampler.optim.sampler import Sampler
from distsampler.optim.sghmc import SGHMC
from distsampler.optim.sgld import SGLD
from distsampler.optim.sgnht import SGNHT

SAMPLERS: dict[str, type[Sampler]] = {
    "sgld": SGLD,
    "lmsgld": LMSGLD,
    "rmsprop_sgld": RMSPropSGLD,
    "adam_sgld": AdamSGLD,
    "sghmc": SGHMC,
    "sgnht": SGNHT,
    "mala": MALA,
}
"""The samplers by the names that a configuration uses."""

__all__ = [
    "LMSGLD",
    "MALA",
    "SAMPLERS",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "AdamSGLD",
    "RMSPropSGLD",
    "Sampler",
    "Side",
    "mala_acceptance",
]
