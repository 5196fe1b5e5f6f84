"""Every sampler on a quadratic, beside the exact law of its discretised chain.

One vector of 100,000 independent coordinates at five curvatures is as many chains, so that the
standard error of their variance is 0.45 %.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distsampler.facts import Posterior
from distsampler.optim import SAMPLERS, Sampler
from distsampler.truth import discretised_laws as laws

LEVELS, EACH = (0.3, 0.7, 1.0, 1.5, 2.0), 20_000  # curvatures, and coordinates of each
POSTERIOR = Posterior(nbeta=10.0, localization=2.0, weight_decay=1.0)
KAPPAS = [POSTERIOR.kappa(h) for h in LEVELS]


def spread(levels: list[float]) -> Tensor:
    """Return one number per coordinate, float64, from one per curvature."""
    return torch.tensor(levels, dtype=torch.float64).repeat_interleave(EACH)


CURVATURES = spread([*LEVELS]).float()


def frozen_preconditioner(sampler: Sampler) -> Tensor:
    """Return P of each coordinate, float64."""
    return sampler._current_layouts()[0].columns["root"][0].double().square()


@dataclass(frozen=True)
class LawCase:
    """A sampler whose chain has a known law on the quadratic."""

    sampler: str  # name of the sampler
    steps: int  # number of steps after which the chain is stationary
    options: dict[str, Any]  # options of the sampler, the step among them

    def sample(self, **changes: object) -> tuple[Tensor, Sampler]:
        """Return the weights after the steps and the sampler, run with some options changed."""
        w = torch.nn.Parameter(torch.zeros(len(CURVATURES)))
        options = {**vars(POSTERIOR), **self.options, **changes}
        source = torch.Generator().manual_seed(0)
        make: Callable[..., Sampler] = SAMPLERS[self.sampler]
        sampler = make([w], generator=source, **options)
        for _ in range(self.steps):
            w.grad = CURVATURES * w.detach()
            sampler.step()
        return w.detach(), sampler

    def variance(self, sampler: Sampler) -> Tensor:
        """Return the law's variance of each coordinate, given a preconditioner that was frozen."""
        o = self.options
        match self.sampler, o.get("scheme"):
            case "sgld" | "lmsgld" as name, _:
                return spread([getattr(laws, name)(o["lr"], kappa) for kappa in KAPPAS])
            case "sghmc", _:
                return spread([laws.sghmc(o["lr"], kappa, o["friction"]) for kappa in KAPPAS])
            case "sgnht", "badodab":
                return spread(laws.badodab(o["lr"], KAPPAS, o["diffusion_factor"])[0])
            case "sgnht", _:
                return spread(laws.sgnht(o["lr"], KAPPAS, o["diffusion_factor"])[0])
            case "rmsprop_sgld", _:  # each coordinate is an SGLD chain with step lr P
                kappa = spread(KAPPAS)
                steps: Tensor = o["lr"] * frozen_preconditioner(sampler)
                return 1 / (kappa * (1 - steps * kappa / 4))
            case "adam_sgld", _:  # a large stability makes P constant: the memory of m is left
                lr = o["lr"] * float(frozen_preconditioner(sampler)[0])
                nbeta, prior = POSTERIOR.nbeta, POSTERIOR.kappa(0.0)
                return spread([laws.adam_sgld(lr, nbeta, h, prior, o["beta1"]) for h in LEVELS])
        raise ValueError(f"no law is known of {self.sampler}")


_SGNHT = {"lr": 0.01, "diffusion_factor": 0.1}
_RMSPROP = {"lr": 0.05, "freeze_after": 30, "stability": 0.3}
_FROM_ONE = {**_RMSPROP, "initial_scale": 1.0, "bias_correction": False}
_ADAM = {"lr": 2.0, "freeze_after": 1, "stability": 100.0, "beta1": 0.9}
CASES = {
    "sgld": LawCase("sgld", 150, {"lr": 0.05}),
    "lmsgld": LawCase("lmsgld", 120, {"lr": 0.08}),
    "rmsprop_sgld": LawCase("rmsprop_sgld", 400, _RMSPROP),
    "rmsprop_sgld from 1": LawCase("rmsprop_sgld", 400, _FROM_ONE),
    "adam_sgld": LawCase("adam_sgld", 1500, _ADAM),
    "sghmc": LawCase("sghmc", 150, {"lr": 0.02, "friction": 0.3}),
    "sgnht": LawCase("sgnht", 600, _SGNHT),
    "sgnht badodab": LawCase("sgnht", 600, {**_SGNHT, "scheme": "badodab"}),
}
"""By title: a sampler's name, with its form where that is not the default."""
