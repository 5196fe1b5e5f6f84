"""Stochastic gradient Nose-Hoover thermostat."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsampler.optim import checks, kernels
from distsampler.optim.layout import Chunk, Plan, Point
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

    Raises:
        ConfigError: See :class:`Sampler`.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> sampler = SGNHT([w], lr=1e-4, nbeta=100.0)
        >>> loss = w.square().sum()
        >>> loss.backward()
        >>> sampler.step()
    """

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
        defaults: dict[str, object] = {
            "lr": lr,
            "diffusion_factor": diffusion_factor,
            "bounding_box_size": bounding_box_size,
            "save_noise": save_noise,
            "save_mala_vars": save_mala_vars,
            "nbeta": nbeta,
            "localization": localization,
            "weight_decay": weight_decay,
            "optimize_over": optimize_over,
            "noise_norm": noise_norm,
            "grad_norm": grad_norm,
            "weight_norm": weight_norm,
            "distance": distance,
            "scheme": scheme,
        }
        super().__init__(params, defaults, generator)

    @property
    def thermostat(self) -> list[Tensor]:
        """The thermostat xi of each group, 0-d."""
        heads = [group["params"][0] for group in self.param_groups]
        return [self.state[p]["thermostat"] for p in heads if "thermostat" in self.state[p]]

    def metrics(self) -> dict[str, Tensor]:
        """As :meth:`Sampler.metrics`, and ``thermostat``: xi, averaged over the groups.

        Returns:
            0-d tensors by name.
        """
        found = super().metrics()
        if xi := self.thermostat:
            found["thermostat"] = torch.stack(xi).mean()
        return found

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.positive(group, "diffusion_factor", "pass A, for example 0.01")
        checks.one_of(group, "scheme", ("ding", "badodab"))

    def _cautions(self, group: dict[str, Any]) -> list[str]:
        found = super()._cautions(group)
        if group["save_noise"] or group["noise_norm"]:
            found.append(
                "the noise of SGNHT enters the momentum, not the weights: its norm says nothing "
                "about the step; use SGLD to look at noise norms"
            )
        if group["save_mala_vars"]:
            found.append(
                "SGNHT is no Langevin proposal: a MALA acceptance computed from its drift has no "
                "meaning; use SGLD for that diagnostic"
            )
        return found

    def _begin(self, group: dict[str, Any], plan: Plan) -> None:
        head = self.state[group["params"][0]]
        if "thermostat" not in head:
            w = plan.weights[0] if plan.weights else group["params"][0]
            head["thermostat"] = torch.full(
                (), group["diffusion_factor"], dtype=torch.float64, device=w.device
            )
        self._start(plan, "momentum", math.sqrt(group["lr"]))
        if self._owners is not None:  # one vector, of which each chain's state has its own entry
            heads = [self.state[p] for p in group["params"][:: self._each(group)]]
            self._xi = torch.stack([state["thermostat"] for state in heads])
            for state, entry in zip(heads, self._xi, strict=True):
                state["thermostat"] = entry

    def _std(self, group: dict[str, Any]) -> float:
        if group["scheme"] == "badodab":
            return 1.0
        return math.sqrt(2 * group["lr"] * group["diffusion_factor"])

    def _step_group(self, group: dict[str, Any], plan: Plan) -> None:
        if group["scheme"] == "badodab":
            self._step_badodab(group, plan)
        else:
            self._step_ding(group, plan)

    def _step_ding(self, group: dict[str, Any], plan: Plan) -> None:
        lr, u = group["lr"], self._potential(group)
        xi, dimension = self._friction(group, plan)
        keep = 1 - xi
        grads, anchors = plan.grads(), plan.column(self.state, "anchor")
        energy = torch.zeros_like(xi)
        for chunk in plan.chunks:
            at = plan.point(chunk, grads, anchors)
            momentum = chunk.part(plan.column(self.state, "momentum"))
            self._readings.point(group, plan, chunk, at, u)
            self._draw(group, plan, chunk)
            kernels.add_force(chunk.views, at, u, lr)
            kernels.kick(chunk, momentum, self._spread(keep, plan, chunk))
            kernels.carry(chunk, at.weights, momentum)
            energy += self._energy(plan, chunk, momentum)
            self._settle_momentum(group, plan, chunk, at, momentum)
        xi += energy / dimension - lr

    def _step_badodab(self, group: dict[str, Any], plan: Plan) -> None:
        lr, u, a = group["lr"], self._potential(group), group["diffusion_factor"]
        xi, dimension = self._friction(group, plan)
        grads, anchors = plan.grads(), plan.column(self.state, "anchor")
        momenta = plan.column(self.state, "momentum")
        energy = torch.zeros_like(xi)
        for chunk in plan.chunks:  # B, A
            at, momentum = plan.point(chunk, grads, anchors), chunk.part(momenta)
            self._readings.point(group, plan, chunk, at, u)
            chunk.flat.zero_()
            kernels.add_force(chunk.views, at, u, lr)
            kernels.kick(chunk, momentum, 1.0)
            kernels.carry(chunk, at.weights, momentum, 0.5)
            energy += self._energy(plan, chunk, momentum)
        xi += (energy / dimension - lr) / 2  # D
        keep, std = torch.exp(-xi), kernels.friction_noise(xi, lr, a)
        energy.zero_()
        for chunk in plan.chunks:  # O, A
            at, momentum = plan.point(chunk, grads, anchors), chunk.part(momenta)
            self._draw(group, plan, chunk)
            torch._foreach_mul_(chunk.views, self._spread(std, plan, chunk))
            kernels.kick(chunk, momentum, self._spread(keep, plan, chunk))
            kernels.carry(chunk, at.weights, momentum, 0.5)
            energy += self._energy(plan, chunk, momentum)
            self._settle_momentum(group, plan, chunk, at, momentum)
        xi += (energy / dimension - lr) / 2  # D

    def _friction(self, group: dict[str, Any], plan: Plan) -> tuple[Tensor, float]:
        """xi, 0-d, or one for each of several chains; and the entries that each has."""
        if self._owners is None:
            return self.state[group["params"][0]]["thermostat"], plan.dimension
        return self._xi, plan.dimension / len(self._xi)

    def _energy(self, plan: Plan, chunk: Chunk, momentum: list[Tensor]) -> Tensor:
        """|u|^2 of a chunk, shaped as xi."""
        squares = kernels.kinetic(momentum)
        if self._owners is None:
            return squares.sum()
        owner = torch.tensor(self._owners.pieces(plan, chunk), device=squares.device)
        return torch.zeros_like(self._xi).index_add_(0, owner, squares.double())

    def _spread(self, values: Tensor, plan: Plan, chunk: Chunk) -> Tensor | list[Tensor]:
        """A number for a chunk, or, of several chains, for each of its pieces."""
        values = values.to(chunk.flat.dtype)
        if self._owners is None:
            return values
        each = values.unbind()
        return [each[chain] for chain in self._owners.pieces(plan, chunk)]

    def _each(self, group: dict[str, Any]) -> int:
        """Parameters of each of several chains."""
        assert self._owners is not None
        return len(group["params"]) // len(self._owners.generators)

    def _settle_momentum(
        self, group: dict[str, Any], plan: Plan, chunk: Chunk, at: Point, momentum: list[Tensor]
    ) -> None:
        if group["bounding_box_size"] is not None:
            kernels.turn_at_wall(chunk, at, momentum, group["bounding_box_size"])
        self._settle(group, plan, chunk, at)
