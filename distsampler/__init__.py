"""Local Learning Coefficients of PyTorch models, from SGMCMC chains on a Ray cluster.

The LLC says how degenerate the loss is around trained weights: ``nbeta (E[L(w)] - L(w*))``, where w
is drawn from a posterior around them. Many chains draw; whether they may be believed is checked.

Start reading in ``sampling/sample.py``: its five steps lead everywhere else. The way of the data::

    RunConfig -> ChainSpec -> Chain -> DrawBlock -> Trace -> InferenceData
              -> Diagnosis, Verdict -> LLCEstimate

Rooms, from top to bottom; each imports only what stands below it:

``cli``         the command line
``report``      plots, HTML pages, progress of runs read from their stores (watch, ls), the guide
``sweeps``      many runs: checkpoints x restrictions x settings x data sets
``truth``       models whose LLC is known exactly, and ``certify``, which holds samplers to them
``lm``          language models: losses of their tokens, texts as data
``sampling``    sample, resume, start, calibrate: puts model, data, cluster and store together
``execution``   the driver, which alone commits; ``transition``: what it decides when an actor dies
                or a gate round is due; ``placement``: what an actor asks of the cluster; Ray
``chains``      ``chain``: replica, sampler and batches, one step after another, and its snapshot;
                the anchor pass; what is measured at a draw; packs; hopping over shards
``curvature``   Hessian and gradient noise, by Lanczos, at w* and along a chain
``models``      a user's model: its copy, what of it moves, several stacked for one call
``data``        a user's data: rows, batches, shards, tokens that count
``analysis``    from a store to numbers: R-hat, ESS, drift, verdict, LLC, its error and bias
``store``       the run directory: arrays, manifest, events, chain states, the driver's lease
``optim``       the samplers: torch optimizers, each with its step in one file; usable alone

At the door: ``config`` (what a run is), ``probes`` (how a named probe is measured), ``frozen``
(what configs have in common), ``presets`` (published settings), ``option_names`` (what others call
their options), ``schedule`` (what "auto" means in draws), ``recipe`` (YAML files), ``references``
(functions by name, masks), ``facts`` (the posterior, nbeta), ``seeding`` (randomness as a function
of seed, chain and step), ``draws`` (what is recorded), ``table`` (as text), ``redaction`` (what of
a user's is not kept), ``errors``.

Eight words:

anchor        the weights w* around which is sampled; what is measured there is ``AtAnchor``
localization  gamma, the strength of the pull back to the anchor
step, draw    a chain moves by steps; every ``thin``-th point is kept as a draw
block         draws that a place sends to the driver at once
place         a process, mostly a Ray actor with a GPU, in which chains advance; it can be lost
probe         fixed examples whose losses show, free of minibatch noise, where a chain is
gate round    when the driver judges all committed draws, and may end the run
pack          chains that advance together, their gradients computed in one call

Four laws:

1. A draw is one point: all it records is measured at the same weights.
2. The same seed gives the same bits, wherever and however often a chain was placed.
3. A draw exists once, when its commit is durable; only the driver commits.
4. No silent number: what has not converged, was lost or is biased says so wherever it is printed.

Importing this package loads neither torch nor ray nor arviz: public names, listed in
``__init__.pyi``, are resolved when they are used.
"""

import re
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

_NAMES = re.compile(r"from (\S+) import (\S+) as (\S+)")
_STUB = Path(__file__).with_suffix(".pyi").read_text("utf-8")
_HOMES = {public: (module, name) for module, name, public in _NAMES.findall(_STUB)}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'distsampler' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    if module == __name__:  # a room that is public as a whole
        return import_module(f"{module}.{attribute}")
    value: object = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
