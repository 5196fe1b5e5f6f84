"""What all samplers share: anchors, masks, masters, noise, readings, saved state."""

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from distsampler.optim import anchors as landmarks
from distsampler.optim import checks, kernels
from distsampler.optim.kernels import Potential
from distsampler.optim.layout import Chunk, Plan, Point, make_plans
from distsampler.optim.noise_streams import Owners, continue_stream, fresh_generator
from distsampler.optim.readouts import Readings


def _uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of torch without its guard against torch.compile, while nobody compiles.

    The guard's first call imports all of torch._dynamo: two seconds of every actor's start.
    """
    return method if "torch._dynamo" in sys.modules else getattr(method, "__wrapped__", method)


class Sampler(Optimizer):
    """A torch optimizer whose step leaves a posterior invariant instead of descending.

    Target density: ``p(w) ~ exp(-U(w))``, ``U = nbeta L(w) + gamma/2 |w - w*|^2 + lam/2 |w|^2``,
    with L the mean loss whose minibatch gradient lies in ``p.grad``, gamma ``localization``, lam
    ``weight_decay`` and w* the anchor: the weights at the moment their group was added, or those
    given under the group's key ``anchors`` (a list of tensors, shared, never written to).

    Every sampler has these options; they may differ between parameter groups:

    Args:
        params: Parameters, named parameters or parameter groups, as for any torch optimizer. A
            parameter without gradient still feels localisation, decay and noise; one that does
            not require a gradient is left alone.
        lr: Step size epsilon, per step.
        nbeta: Inverse temperature times the number of examples, or a callable of the number of
            steps that the group has made.
        localization: gamma, the strength of the pull to w*.
        weight_decay: lam, the precision of a Gaussian prior around 0.
        bounding_box_size: Half width of a box around w* that no coordinate leaves; None: no box.
        optimize_over: Boolean masks, one a parameter of the group (or None for "all of it"), in a
            list, or a single tensor for a single parameter. Entries outside stay bit-identical.
        save_noise: Keep the noise of the last step, unscaled, in :attr:`noise`.
        save_mala_vars: Keep grad U and the localisation energy at the weights that the last step
            left, in :attr:`drift` and :attr:`localization_loss`.
        noise_norm: L2 norm of the unscaled noise of the last step.
        grad_norm: L2 norm of the minibatch gradient, |g|.
        weight_norm: L2 norm of the weights, |w|.
        distance: L2 norm of the way from the anchor, |w - w*|.
        generator: The source of all randomness; None: its own, seeded from the system's entropy.
            The global generator is never used.

    The four norms run over the trainable entries of the groups that ask for them. They are taken
    before the step moves the weights: gradient, weights and distance belong to the weights that
    the step left, the noise to the step. They are read as attributes and by :meth:`metrics`.

    Half-precision parameters have an fp32 master in ``state[p]["master"]``: state, drift and noise
    are fp32, and the parameter is the master rounded. Write to such a parameter only through
    ``load_state_dict``.

    Raises:
        ConfigError: An option is outside its range, a parameter is complex or sparse, or lies on
            another device than the generator. It is a ValueError.
    """

    needs_closure = False
    """Whether a step evaluates loss and gradients itself, and is right with those of all data."""

    _owners: Owners | None = None

    def __init__(
        self, params: ParamsT, defaults: dict[str, object], generator: torch.Generator | None
    ) -> None:
        self._generator = generator
        self._forget()
        super().__init__(params, defaults)
        cautions = [text for group in self.param_groups for text in self._cautions(group)]
        for text in dict.fromkeys(cautions):
            warnings.warn(text, UserWarning, stacklevel=3)

    # The contract of torch.optim.Optimizer

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every group once, from the gradients in ``p.grad``.

        Args:
            closure: Recomputes loss and gradients first, with gradients enabled.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.move()
        return loss

    @torch.no_grad()
    def move(self) -> None:
        """:meth:`step` alone: no closure, no hooks, no mark for the profiler."""
        self._move()
        self._count()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its anchors are its present weights, or those under ``anchors``.

        Args:
            param_group: ``params`` and any of the sampler's options.

        Raises:
            ConfigError: As for the constructor.
        """
        _uncompiled(Optimizer.add_param_group)(self, param_group)
        try:
            self._admit(self.param_groups[-1])
        except Exception:
            del self.param_groups[-1]
            raise

    def state_dict(self) -> StateDict:
        """The state as torch has it, and the generator's state under ``generator``."""
        return {**_uncompiled(Optimizer.state_dict)(self), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from a saved state: on the same kind of device, bit for bit.

        State keeps its own precision (torch would round fp32 masters to the parameter's). Anchors
        that the saved state leaves out, or that equal the present ones, stay the present tensors:
        chains that share them go on sharing. On another kind of device the generator's state has
        no meaning; a new stream is then derived from it, and only the law is the same.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        final: StateDict = {}
        anchors = {p: s["anchor"] for p, s in self.state.items() if "anchor" in s}
        # Last of the pre-hooks, first of the post-hooks: users' hooks see what they would expect.
        before = self.register_load_state_dict_pre_hook(lambda _, saved: final.update(saved))
        after = self.register_load_state_dict_post_hook(
            lambda _: self._restore(final, anchors), prepend=True
        )
        try:
            _uncompiled(Optimizer.load_state_dict)(self, state_dict)
        finally:
            before.remove()
            after.remove()

    # What a chain asks for

    def chain_state(self) -> StateDict:
        """Return what a chain saves: :meth:`state_dict` without what its recipe gives again.

        Left out are the anchors, the generator, and the options that hold a tensor a parameter.
        """
        saved = {key: value for key, value in self.state_dict().items() if key != "generator"}
        saved["state"] = {
            p: {name: value for name, value in entry.items() if name != "anchor"}
            for p, entry in saved["state"].items()
        }
        for group in saved["param_groups"]:
            group.update(dict.fromkeys(self._tensor_options(group)))
        return saved

    def restore_chain_state(self, state: StateDict) -> None:
        """Continue from a chain's state; what it leaves out stays as it is.

        Args:
            state: What :meth:`chain_state` returned.
        """
        kept = [{key: g[key] for key in self._tensor_options(g)} for g in self.param_groups]
        self.load_state_dict(state)
        for group, options in zip(self.param_groups, kept, strict=True):
            group.update(options)

    @torch.no_grad()
    def move_to(self, weights: Iterable[Tensor]) -> None:
        """Put the parameters to other weights; the anchors stay.

        Args:
            weights: One tensor for each parameter of all groups, of its shape.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        for p, w in zip(params, weights, strict=True):
            p.copy_(w)
            if "master" in self.state[p]:
                self.state[p]["master"].copy_(w)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks and buffers."""
        return {**super().__getstate__(), "_generator": self._generator}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def join(self, owners: Owners) -> None:
        """Parts the parameters of the only group among several chains; see ``joint``."""
        self._owners = owners

    # Readings

    @property
    def generator(self) -> torch.Generator:
        """The source of all randomness of this sampler."""
        if self._generator is None:
            params = [p for group in self.param_groups for p in group["params"]]
            self._generator = fresh_generator(params[0].device if params else torch.device("cpu"))
        return self._generator

    def metrics(self) -> dict[str, Tensor]:
        """All scalars that were asked for, of the last step.

        Returns:
            0-d tensors by name: the norms, ``localization_loss`` with ``save_mala_vars``, and what
            the sampler adds. Reading one waits for the device; this call does not.
        """
        return self._readings.totals()

    @property
    def noise(self) -> list[list[Tensor]]:
        """Unscaled noise of the last step, a list per group of a tensor per parameter."""
        return self._readings.tensors("noise", self.param_groups)

    @property
    def drift(self) -> list[list[Tensor]]:
        """Grad U at the weights that the last step left, as :attr:`noise` is laid out."""
        return self._readings.tensors("drift", self.param_groups)

    @property
    def localization_loss(self) -> Tensor:
        """gamma/2 |w - w*|^2 at the weights that the last step left; 0-d."""
        return self._readings.total("localization_loss")

    @property
    def noise_norm(self) -> Tensor:
        """|N|, 0-d."""
        return self._readings.total("noise_norm")

    @property
    def grad_norm(self) -> Tensor:
        """|g|, 0-d."""
        return self._readings.total("grad_norm")

    @property
    def weight_norm(self) -> Tensor:
        """|w|, 0-d."""
        return self._readings.total("weight_norm")

    @property
    def distance(self) -> Tensor:
        """|w - w*|, 0-d."""
        return self._readings.total("distance")

    # For subclasses

    def _move(self) -> None:
        """Move every group once, from the gradients that are there."""
        plans = self._current_plans()
        self._readings.clear(self.param_groups)
        for group, plan in zip(self.param_groups, plans, strict=True):
            if plan.params:
                self._step_group(group, plan)

    def _count(self) -> None:
        """One step more."""
        for group in self.param_groups:
            group["steps"] += 1

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ConfigError if an option of the group is wrong; subclasses add their own."""
        checks.check_common(group)

    def _cautions(self, group: dict[str, Any]) -> list[str]:
        """Sentences to warn with at construction: what is legal but probably not meant."""
        if group["nbeta"] == 1.0:
            return [
                "nbeta is 1: the posterior is that of a single example, and learning coefficients "
                "read from it are not those of the data set; pass nbeta=n / log(n)"
            ]
        return []

    def _begin(self, group: dict[str, Any], plan: Plan) -> None:
        """Make the state that is still missing, before a group's first step."""

    def _std(self, group: dict[str, Any]) -> float:
        """Standard deviation of the noise that the chunks' buffers are filled with."""
        return 1.0

    def _increment(
        self, group: dict[str, Any], plan: Plan, chunk: Chunk, at: Point, u: Potential
    ) -> None:
        """Leave in the chunk's buffer, which holds the noise, what w moves by."""
        raise NotImplementedError

    def _step_group(self, group: dict[str, Any], plan: Plan) -> None:
        """Move one group: chunk by chunk read, draw noise, sum the increment, add it to w."""
        grads, u = plan.grads(), self._potential(group)
        anchors = plan.column(self.state, "anchor")
        for chunk in plan.chunks:
            at = plan.point(chunk, grads, anchors)
            self._readings.point(group, plan, chunk, at, u)
            self._draw(group, plan, chunk)
            self._increment(group, plan, chunk, at, u)
            chunk.freeze()
            kernels.move(at.weights, chunk.views)
            self._settle(group, plan, chunk, at)

    def _potential(self, group: dict[str, Any]) -> Potential:
        """The coefficients of U at this step."""
        nbeta = checks.nbeta_at(group["nbeta"], group["steps"])
        return Potential(nbeta, group["localization"], group["weight_decay"])

    def _draw(self, group: dict[str, Any], plan: Plan, chunk: Chunk) -> None:
        """Fill the chunk's buffer with noise."""
        std = self._std(group)
        if self._owners is None:
            chunk.flat.normal_(0.0, std, generator=self._generator)
        else:
            self._owners.fill(plan, chunk, std)
        self._readings.noise(group, plan, chunk, std)

    def _settle(self, group: dict[str, Any], plan: Plan, chunk: Chunk, at: Point) -> None:
        """After the move: keep the weights in the box, write masters back rounded."""
        if group["bounding_box_size"] is not None:
            kernels.confine(chunk, at, group["bounding_box_size"])
        if plan.rounded:
            torch._foreach_copy_(chunk.part(plan.params), at.weights)

    def _start(self, plan: Plan, name: str, std: float) -> None:
        """Give ``std N`` to the state tensors of this name that are missing; zero where frozen."""
        for i, p, w in zip(plan.positions, plan.params, plan.weights, strict=True):
            if name not in self.state[p]:
                start = torch.zeros_like(w, requires_grad=False)
                if std:
                    start.normal_(0.0, std, generator=self._generator)
                if plan.masks is not None and (mask := plan.masks[i]) is not None:
                    start.masked_fill_(~mask, 0.0)
                self.state[p][name] = start

    # Inside

    def _forget(self) -> None:
        """Drop everything that is derived from the state."""
        self._plans: list[Plan] | None = None
        self._readings = Readings()

    def _admit(self, group: dict[str, Any]) -> None:
        """Check a new group and take its anchors."""
        params = group["params"]
        anchors = checks.per_parameter(group.pop("anchors", None), params, "anchors")
        self._check(group)
        self._normalise(group)
        for p in params:
            checks.check_parameter(p)
            checks.check_device(p, self.generator)
        for p, anchor in zip(params, anchors or [None] * len(params), strict=True):
            self.state[p].update(landmarks.of(p, anchor))
        group.setdefault("steps", 0)
        self._plans = None

    def _normalise(self, group: dict[str, Any]) -> None:
        """Bring options that hold tensors into one form, on the parameters' device."""
        group["optimize_over"] = checks.masks(group["optimize_over"], group["params"])

    def _restore(self, saved: StateDict, anchors: dict[Tensor, Tensor]) -> None:
        """After torch's own loading: precision, shared anchors, masks, the random stream."""
        landmarks.restore(self, saved, anchors)
        for group in self.param_groups:
            self._normalise(group)
        if "generator" in saved:
            continue_stream(self.generator, saved["generator"])

    def _tensor_options(self, group: dict[str, Any]) -> set[str]:
        """Options of the group that may hold one tensor a parameter."""
        return {"gradient_variance", "optimize_over"} & group.keys()

    def _current_plans(self) -> list[Plan]:
        """The plans of all groups, made anew when something they rest on has changed."""
        plans = self._plans
        if plans is None or not all(
            plan.fits(group) for plan, group in zip(plans, self.param_groups, strict=True)
        ):
            self._plans = plans = self._make_plans()
        return plans

    def _make_plans(self) -> list[Plan]:
        plans = make_plans(self.param_groups, self.state)
        for group, plan in zip(self.param_groups, plans, strict=True):
            self._begin(group, plan)
        self._dimension = sum(plan.dimension for plan in plans)
        return plans
