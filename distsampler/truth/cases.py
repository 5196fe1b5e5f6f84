"""The cases of ``certify``: targets of every kind, and how each is sampled."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from distsampler.config import RunConfig, SamplerConfig
from distsampler.data.kinds import as_rows
from distsampler.models import sampler as by_name
from distsampler.optim import SAMPLERS
from distsampler.truth import networks, targets
from distsampler.truth.targets import Target

LAWS = ("sgld", "lmsgld")  # whose chain has a law on the quadratic, minibatches and all
CASE_STEPS: dict[str, tuple[float, dict[str, Any]]] = {
    # a step in units of SGLD's, and options; a large `stability` makes a preconditioner mild
    "lmsgld": (3.0, {}),
    "rmsprop_sgld": (1.0, {"stability": 1.0}),
    "adam_sgld": (1.0, {"stability": 1.0, "beta1": 0.5}),
    "sghmc": (0.5, {"friction": 0.2}),
    "sgnht": (0.5, {"diffusion_factor": 0.02}),
}
SEEDS = 3  # of the whole table


@dataclass(frozen=True)
class Case:
    """A target and how it is sampled: one row of the table."""

    target: Target  # target that is sampled
    config: RunConfig  # config of the run
    # relative error that the sampler's bias may make, where its law is not known
    allowed: float = 0.05

    @property
    def name(self) -> str:
        """Name of the target."""
        return self.target.name


@dataclass(frozen=True)
class Course:
    """How long a target is sampled, and with what step; its chains advance together."""

    lr: float  # step at which SGLD's bias is a few per cent
    burn_in: int  # number of draws that are burnt in
    draws: int  # number of draws after those
    thin: int  # steps per draw
    batch_size: int  # examples per step
    chains: int = 4  # number of chains
    probe: int = 256  # number of examples that the gate reads

    def config(
        self, target: Target, sampler: str, *, seed: int = 0, correct_heat: bool = False
    ) -> RunConfig:
        """Return the run of a target: its nbeta and localization, the sampler's own step.

        Args:
            target: target that is sampled.
            sampler: name of the sampler.
            seed: seed of the run.
            correct_heat: whether the noise is reduced by the heat of the minibatches.
        """
        factor, options = CASE_STEPS.get(sampler, (1.0, {}))
        full = by_name.ours(sampler).needs_closure
        return RunConfig(
            sampler=SamplerConfig(
                name=sampler,
                correct_heat=correct_heat,
                lr=factor * self.lr,
                nbeta=target.nbeta,
                localization=target.localization,
                **options,
            ),
            chains=self.chains,
            draws=self.draws,
            burn_in=self.burn_in,
            thin=self.thin,
            batch_size=len(as_rows(target.data)) if full else self.batch_size,
            probe=self.probe,
            seed=seed,
            device="cpu",
            pack=self.chains if sampler in SAMPLERS and not full else 1,
        )


QUADRATIC = Course(lr=6e-5, burn_in=120, draws=400, thin=10, batch_size=64, probe=4096)
POWER = Course(lr=1.3e-4, burn_in=40, draws=150, thin=60, batch_size=1, chains=2)
PRODUCT = Course(lr=2e-4, burn_in=50, draws=200, thin=80, batch_size=1, chains=2)
SMALL_NET = Course(lr=3e-5, burn_in=100, draws=300, thin=50, batch_size=256, chains=2)


def cases(sampler: str | None, quick: bool) -> Iterator[Case]:
    """Yield the cases of the table, each made when it is asked for.

    Args:
        sampler: sampler of every row; None: SGLD and LMSGLD where they have laws, else LMSGLD.
        quick: whether there are a few rows of every kind; else more of them, and three seeds.

    Raises:
        ConfigError: there is no such sampler.
    """
    if sampler is not None:
        by_name.resolve(sampler)
    for seed in range(1 if quick else SEEDS):
        yield from _quadratics(LAWS if sampler is None else (sampler,), seed)
        for target, course in _singular(quick):
            yield Case(target, course.config(target, sampler or "lmsgld", seed=seed))


def _quadratics(samplers: tuple[str, ...], seed: int) -> Iterator[Case]:
    for sampler in samplers:
        noisy = sampler in LAWS
        target = targets.quadratic(np.logspace(-1, 1, 100), variance=1.0 * noisy)
        for corrected in (False, True) if noisy else (False,):
            config = QUADRATIC.config(target, sampler, seed=seed, correct_heat=corrected)
            yield Case(target, config)


def _singular(quick: bool) -> Iterator[tuple[Target, Course]]:
    """Yield crossings and deep linear networks, localised so strongly that short runs relax."""
    yield targets.normal_crossing((2,), copies=1_000), POWER
    yield targets.normal_crossing((1, 1), localization=5.0, copies=1_000), PRODUCT
    net = networks.unit_network((3, 2, 3), 1, localization=5.0, copies=20)
    yield net, SMALL_NET
    yield networks.unit_network((3, 3, 3, 3), 1, localization=5.0, copies=20), SMALL_NET
    yield networks.with_dead_weights(net, 1_000), SMALL_NET
    yield networks.rescaled(net, 2.0), SMALL_NET
    if not quick:
        yield targets.normal_crossing((3,), copies=1_000), POWER
        yield targets.normal_crossing((1, 1), localization=5.0, anchor=(1.0, 0.0)), PRODUCT
        yield targets.normal_crossing((2, 2), localization=5.0), PRODUCT
        for sizes, rank in (((4, 2, 5), 1), ((2, 2, 6), 1), ((6, 2, 2), 1), ((2, 5, 2), 1)):
            yield networks.unit_network(sizes, rank, localization=5.0, copies=20), SMALL_NET
