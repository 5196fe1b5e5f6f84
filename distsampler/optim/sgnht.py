"""Stochastic gradient Nose-Hoover thermostat."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks
from distsampler.optim.kernels import add_force, add_momentum, kick, settle_and_reflect
from distsampler.optim.law import STEEPEST, Bias, LocalQuadratic, QuadraticLaw
from distsampler.optim.layout import Layout, Point
from distsampler.optim.sampler import Sampler


class SGNHT(Sampler):
    """Langevin dynamics with momentum, whose friction adapts to the noise of the gradient.

    ``u <- u - lr grad U(w) - xi u + sqrt(2 lr A) N(0, I)``;
    ``w <- w + u``;
    ``xi <- xi + |u|^2 / d - lr``

    with u the momentum times sqrt(lr), A the ``diffusion_factor``, xi the thermostat (one for each
    parameter group, d its trainable entries). Start: u ~ sqrt(lr) N(0, I), xi = A.

    Source: Ding et al. 2014, reparametrised: lr = h^2 and u = h p, h their step, p the momentum.
    The documented formula of the field writes w in the friction and in the thermostat; it means u.
    This Euler form has a bias in A, not in lr: a quadratic in d dimensions returns about
    d/2 (1 - A/2) (lr only shifts energy between directions, by lr (kappa - mean kappa) / 4,
    relative). Damping after the gradient, u <- (1 - xi)(u - lr grad U) + noise, as other libraries
    do, is another first-order form: the same limit, another trajectory.

    With ``scheme="badodab"`` the step is the symmetric splitting of Leimkuhler & Shang 2016
    (kick, half drift, half thermostat, exact friction and noise, half thermostat, half drift; the
    closing half kick needs the next gradient and is taken with the opening one). It is second
    order, at the same cost in gradients.

    Args:
        params: See :class:`Sampler`, as for every option not listed here. A box reflects: the
            momentum of a coordinate that is put back on its wall changes sign.
        diffusion_factor: A, the strength of the injected noise.
        scheme: "ding" or "badodab".

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> sampler = SGNHT([w], lr=1e-4, nbeta=100.0)
        >>> loss = w.square().sum()
        >>> loss.backward()
        >>> sampler.step()
    """

    friction_option = "diffusion_factor"
    pilot_options: ClassVar[Mapping[str, object]] = {
        "diffusion_factor": 0.1,
        "scheme": "badodab",
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        diffusion_factor: float = 0.01,
        bounding_box_size: float | None = None,
        save_noise: bool = False,
        save_mala_vars: bool = False,
        nbeta: float | Callable[[int], float] = 1.0,
        localization: float = 0.0,
        weight_decay: float = 0.0,
        optimize_over: Tensor | list[Tensor | None] | None = None,
        noise_norm: bool = False,
        grad_norm: bool = False,
        weight_norm: bool = False,
        distance: bool = False,
        *,
        scheme: Literal["ding", "badodab"] = "ding",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(locals())

    @property
    def thermostat(self) -> list[Tensor]:
        """The thermostat xi of each group, 0-d."""
        heads = [group["params"][0] for group in self.param_groups]
        return [self.state[p]["thermostat"] for p in heads if "thermostat" in self.state[p]]

    def metrics(self) -> dict[str, Tensor]:
        """Return what :meth:`Sampler.metrics` does, and xi, averaged over groups: ``thermostat``.

        Returns:
            0-d tensors by name.
        """
        scalars = super().metrics()
        if xi := self.thermostat:
            scalars["thermostat"] = torch.stack(xi).mean()
        return scalars

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.positive(group, "diffusion_factor", "pass A, for example 0.01")
        checks.one_of(group, "scheme", ("ding", "badodab"))

    def _cautions(self, group: dict[str, Any]) -> list[str]:
        cautions = super()._cautions(group)
        if group["save_noise"] or group["noise_norm"]:
            cautions.append(
                "the noise of SGNHT enters the momentum, not the weights: its norm says nothing "
                "about the step; use SGLD to look at noise norms"
            )
        if group["save_mala_vars"]:
            cautions.append(
                "SGNHT is no Langevin proposal: a MALA acceptance computed from its drift has no "
                "meaning; use SGLD for that diagnostic"
            )
        return cautions

    def _begin(self, layout: Layout) -> None:
        group = layout.group
        head = self.state[group["params"][0]]
        if "thermostat" not in head:
            w = layout.weights[0] if layout.weights else group["params"][0]
            head["thermostat"] = torch.full(
                (), group["diffusion_factor"], dtype=torch.float64, device=w.device
            )
        self._start(layout, "momentum", math.sqrt(group["lr"]))
        if self._owners is not None:  # one vector, of which each chain's state has its own entry
            each = len(group["params"]) // len(self._owners.generators)
            heads = [self.state[p] for p in group["params"][::each]]
            self._xi = torch.stack([state["thermostat"] for state in heads])
            for state, entry in zip(heads, self._xi, strict=True):
                state["thermostat"] = entry

    def _step_group(self, layout: Layout) -> None:
        if layout.group["scheme"] == "badodab":
            self._step_badodab(layout)
        else:
            self._step_ding(layout)

    def _step_ding(self, layout: Layout) -> None:
        lr, a = layout.group["lr"], layout.group["diffusion_factor"]
        xi, dimension = self._thermostat(layout)
        keep = 1 - xi
        energy = torch.zeros_like(xi)
        for at in self._points(layout):
            u = at.column("momentum")
            self._draw(at, math.sqrt(2 * lr * a))  # step = sqrt(2 lr A) N(0, I)
            add_force(at, lr)  # step -= lr grad U(w)
            kick(at, u, self._spread(keep, at))  # u = (1 - xi) u + step
            add_momentum(at, u)  # w += u
            energy += self._energy(at, u)
            settle_and_reflect(at, u)
        xi += energy / dimension - lr

    def _step_badodab(self, layout: Layout) -> None:
        lr, a = layout.group["lr"], layout.group["diffusion_factor"]
        xi, dimension = self._thermostat(layout)
        energy = torch.zeros_like(xi)
        for at in self._points(layout):
            u = at.column("momentum")
            at.flat.zero_()
            add_force(at, lr)
            kick(at, u, 1.0)  # B: u -= lr grad U(w)
            add_momentum(at, u, 0.5)  # A: w += u / 2
            energy += self._energy(at, u)
        xi += (energy / dimension - lr) / 2  # D
        keep, std = torch.exp(-xi), _friction_noise(xi, lr, a)
        energy.zero_()
        for at in layout.points(self._potential(layout.group)):
            u = at.column("momentum")
            self._draw(at, 1.0)
            torch._foreach_mul_(at.step, self._spread(std, at))
            kick(at, u, self._spread(keep, at))  # O: u = exp(-xi) u + std N(0, I)
            add_momentum(at, u, 0.5)  # A: w += u / 2
            energy += self._energy(at, u)
            settle_and_reflect(at, u)
        xi += (energy / dimension - lr) / 2  # D

    # One thermostat, 0-d; or one for each of several chains that step as one.

    def _thermostat(self, layout: Layout) -> tuple[Tensor, float]:
        """Return xi, and the number of entries that each has."""
        if self._owners is None:
            return self.state[layout.group["params"][0]]["thermostat"], layout.dimension
        return self._xi, layout.dimension / len(self._xi)

    def _energy(self, at: Point, u: list[Tensor]) -> Tensor:
        """Return |u|^2 of a chunk, shaped as xi."""
        squares = torch.stack(torch._foreach_norm(u)).square()
        if self._owners is None:
            return squares.sum()
        owner = torch.tensor(self._owners.pieces(at), device=squares.device)
        return torch.zeros_like(self._xi).index_add_(0, owner, squares.double())

    def _spread(self, values: Tensor, at: Point) -> Tensor | list[Tensor]:
        """Return a number for a chunk, or, of several chains, one for each of its pieces."""
        values = values.to(at.flat.dtype)
        if self._owners is None:
            return values
        each = values.unbind()
        return [each[chain] for chain in self._owners.pieces(at)]

    @classmethod
    def law(cls, options: Mapping[str, Any]) -> QuadraticLaw:
        """Return the law for small lr kappa: ``(A + 2 u v) / xi`` times the LLC.

        xi comes to ``1 - sqrt(1 - 2 (A + 2 u mean v))`` (badodab: to ``A + 2 u mean v``, where xi
        is small), from the same at v = 0, in about A / lr steps: at the steps of large problems
        that is never.
        """
        a = float(options["diffusion_factor"])
        if options["scheme"] == "badodab":
            bias = partial(_bias, a, _badodab_friction)
            return QuadraticLaw("badodab", limit=4.0, safe=0.25, bias=bias)
        bias = partial(_bias, a, _ding_friction)
        return QuadraticLaw("sgnht", limit=4.0, safe=0.2, bias=bias, friction_bias=-0.5)


def _friction_noise(xi: Tensor, lr: float, a: float) -> Tensor:
    """sqrt(2 lr A (1 - exp(-2 xi)) / (2 xi)): the noise of friction xi over a step."""
    ratio = torch.where(xi.abs() < 1e-6, 2 - 2 * xi, -torch.expm1(-2 * xi) / xi)
    return (lr * a * ratio).sqrt()


def _badodab_friction(warmth: float) -> float:
    return warmth


def _ding_friction(warmth: float) -> float:
    return 1 - math.sqrt(1 - 2 * min(warmth, STEEPEST / 2))


def _bias(a: float, friction: Callable[[float], float], q: LocalQuadratic) -> Bias:
    """A thermostat comes to keep the mean temperature: then heat only changes direction."""
    llc, noisy = float(q.weights @ q.share), float(q.noise @ q.share)
    start = friction(a)
    alone = a / start * llc
    settled = friction(a + 2 * q.heat * max(q.mean_noise, 0.0))
    xi = start - math.expm1(-q.lr * q.steps / a) * (settled - start)
    whole = (a * llc + 2 * q.heat * noisy) / xi
    return Bias(alone - llc, whole - alone)
