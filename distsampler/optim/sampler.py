"""What all samplers share: options, anchors, masks, masters, noise, readouts, saved state."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from distsampler.optim import anchors as anchoring
from distsampler.optim import checks
from distsampler.optim.law import QuadraticLaw
from distsampler.optim.layout import Layout, Point, Potential, make_layouts
from distsampler.optim.noise_streams import Owners, continue_stream, fresh_generator
from distsampler.optim.readouts import Readouts, Scalar


def _uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of torch without its guard against torch.compile, while nobody compiles.

    The guard's first call imports all of torch._dynamo: two seconds of every actor's start.
    """
    return method if "torch._dynamo" in sys.modules else getattr(method, "__wrapped__", method)


class Sampler(Optimizer):
    """A torch optimizer whose step leaves a posterior invariant instead of descending.

    Target density: ``p(w) ~ exp(-U(w))``, ``U = nbeta L(w) + gamma/2 |w - w*|^2 + lam/2 |w|^2``,
    with L the mean loss whose minibatch gradient lies in ``p.grad``, gamma ``localization``, lam
    ``weight_decay`` and w* the anchor: the weights at the moment their group was added, or those
    given under the group's key ``anchors`` (a list of tensors, shared, never written to).

    A subclass is a sampler: its constructor has the options as its signature, its ``_step_group``
    is the equation, and its class attributes and ``law`` say what is known about it. Every sampler
    has these options; they may differ between parameter groups:

    Args:
        params: Parameters, named parameters or parameter groups, as for any torch optimizer. A
            parameter without gradient still feels localization, decay and noise; one that does
            not require a gradient is left alone.
        lr: Step size epsilon, per step.
        nbeta: Inverse temperature times the number of examples, or a callable of the number of
            steps that the group has made.
        localization: gamma, the strength of the pull to w*.
        weight_decay: lam, the precision of a Gaussian prior around 0.
        noise_level: sigma, of samplers without momentum; at any value other than 1 the law is not
            the posterior, and a warning says so.
        bounding_box_size: Half width of a box around w* that no coordinate leaves; None: no box.
        optimize_over: Boolean masks, one a parameter of the group (or None for "all of it"), in a
            list, or a single tensor for a single parameter. Entries outside stay bit-identical.
        save_noise: Keep the noise of the last step, unscaled, in :attr:`noise`.
        save_mala_vars: Keep grad U and the localization energy at the weights that the last step
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

    needs_closure: ClassVar[bool] = False
    """Whether a step evaluates loss and gradients itself, and is right with those of all data."""
    has_side: ClassVar[bool] = False
    """Whether ``side`` gives the two ends of a step for ``mala_acceptance``."""
    hop_bias_known: ClassVar[bool] = False
    """Whether the chain is a recursion of w alone, whose bias over shards can be predicted."""
    friction_option: ClassVar[str | None] = None
    """Name of the option that is the friction; None: there is no momentum."""
    pilot_options: ClassVar[Mapping[str, object]] = {}
    """Options with which calibration first tries the sampler."""
    tensor_options: ClassVar[Mapping[str, str]] = {
        "optimize_over": "give boolean masks by parameter name to restrict_to of the run"
    }
    """Options that hold a tensor a parameter, and what to do in a run, which has plain values."""
    counters: ClassVar[tuple[str, ...]] = ("steps",)
    """Entries of a group that count its steps."""

    _owners: Owners | None = None

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Make a sampler from what its constructor was called with.

        Args:
            arguments: ``locals()`` of the subclass's constructor: ``params``, ``generator`` and the
                options, which become the defaults of the groups.
        """
        self._generator: torch.Generator | None = arguments["generator"]
        self._forget()
        options: dict[str, Any] = {}
        for name, value in arguments.items():
            if name not in ("self", "__class__", "params", "generator"):
                options[name] = value
            if name == "nbeta":
                options.setdefault("bounding_box_size", None)  # there is a sampler without a box
        super().__init__(arguments["params"], options)
        cautions = [text for group in self.param_groups for text in self._cautions(group)]
        for text in dict.fromkeys(cautions):
            warnings.warn(text, UserWarning, stacklevel=3)

    @classmethod
    def law(cls, options: Mapping[str, Any]) -> QuadraticLaw | None:
        """Return the law of the chain on a quadratic, with all options given; None: not known."""
        return None

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
        """Move every group once: :meth:`step` without closure, hooks and the profiler's mark."""
        self._move()
        self._count()

    def _count(self) -> None:
        for group in self.param_groups:
            group["steps"] += 1

    def _move(self) -> None:
        layouts = self._current_layouts()
        self._readouts.clear(self.param_groups)
        for layout in layouts:
            if layout.params:
                self._step_group(layout)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its anchors are its present weights, or those under ``anchors``.

        Args:
            param_group: ``params`` and any of the sampler's options.
        """
        _uncompiled(Optimizer.add_param_group)(self, param_group)
        try:
            self._admit(self.param_groups[-1])
        except Exception:
            del self.param_groups[-1]
            raise

    def state_dict(self) -> StateDict:
        """Return the state as torch has it, and the generator's state under ``generator``."""
        return {**_uncompiled(Optimizer.state_dict)(self), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from a saved state: on the same kind of device, bit for bit.

        State keeps its own precision (torch would round fp32 masters to the parameter's). Anchors
        that the saved state leaves out, or that equal the present ones, stay the present tensors:
        chains that share them continue to. An option that the saved state is older than keeps its
        present value. On another kind of device the generator's state has no meaning; a new stream
        is then derived from it, and only the law is the same.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        final: StateDict = {}
        anchors = {p: s["anchor"] for p, s in self.state.items() if "anchor" in s}
        groups = [dict(group) for group in self.param_groups]
        # Last of the pre-hooks, first of the post-hooks: users' hooks see what they would expect.
        before = self.register_load_state_dict_pre_hook(lambda _, saved: final.update(saved))
        after = self.register_load_state_dict_post_hook(
            lambda _: self._restore(final, anchors, groups), prepend=True
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
            group.update(dict.fromkeys(self.tensor_options))
        return saved

    def restore_chain_state(self, state: StateDict) -> None:
        """Continue from what :meth:`chain_state` returned; what it leaves out stays as it is."""
        kept = [{key: g[key] for key in self.tensor_options} for g in self.param_groups]
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
        """Return everything but hooks and buffers."""
        return {**super().__getstate__(), "_generator": self._generator}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    # Readouts

    @property
    def generator(self) -> torch.Generator:
        """The source of all randomness."""
        if self._generator is None:
            params = [p for group in self.param_groups for p in group["params"]]
            self._generator = fresh_generator(params[0].device if params else torch.device("cpu"))
        return self._generator

    def metrics(self) -> dict[str, Tensor]:
        """Return all scalars of the last step that were asked for.

        Returns:
            0-d tensors by name: the norms, ``localization_loss`` with ``save_mala_vars``, and what
            the sampler adds. Reading one waits for the device; this call does not.
        """
        return self._readouts.totals()

    @property
    def noise(self) -> list[list[Tensor]]:
        """Unscaled noise of the last step, a list per group of a tensor per parameter."""
        return self._readouts.tensors("noise", self.param_groups)

    @property
    def drift(self) -> list[list[Tensor]]:
        """Grad U at the weights that the last step left, as :attr:`noise` is laid out."""
        return self._readouts.tensors("drift", self.param_groups)

    localization_loss = Scalar()
    """gamma/2 |w - w*|^2 at the weights that the last step left."""
    noise_norm, grad_norm, weight_norm, distance = Scalar(), Scalar(), Scalar(), Scalar()

    # For subclasses

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ConfigError if an option of the group is wrong; subclasses add their own."""
        checks.check_common(group)

    def _cautions(self, group: dict[str, Any]) -> list[str]:
        """Return sentences to warn with at construction: what is legal but probably not meant."""
        cautions = []
        if group["nbeta"] == 1.0:
            cautions.append(
                "nbeta is 1: the posterior is that of a single example, and learning coefficients "
                "read from it are not those of the data set; pass nbeta=n / log(n)"
            )
        if (level := group.get("noise_level", 1.0)) != 1.0:
            cautions.append(
                f"noise_level is {level}: only at 1 does the chain sample the posterior"
            )
        return cautions

    def _begin(self, layout: Layout) -> None:
        """Make the state that is still missing, before a group's first step."""

    def _step_group(self, layout: Layout) -> None:
        """Move one group once."""
        raise NotImplementedError

    def _points(self, layout: Layout) -> Iterator[Point]:
        """Yield the chunks of a group at the present weights, where what was asked for is read."""
        for at in layout.points(self._potential(layout.group)):
            self._readouts.take(at)
            yield at

    def _draw(self, at: Point, std: float) -> None:
        """Step <- std N(0, I)."""
        if self._owners is None:
            at.flat.normal_(0.0, std, generator=self._generator)
        else:
            self._owners.fill(at, std)
        self._readouts.take_noise(at, std)

    def _potential(self, group: dict[str, Any]) -> Potential:
        """Return the coefficients of U at this step."""
        nbeta = checks.nbeta_at(group["nbeta"], group["steps"])
        return Potential(nbeta, group["localization"], group["weight_decay"])

    def _start(self, layout: Layout, name: str, std: float) -> None:
        """Give ``std N`` to the state tensors of this name that are missing; zero where frozen."""
        for i, p, w in zip(layout.positions, layout.params, layout.weights, strict=True):
            if name not in self.state[p]:
                start = torch.zeros_like(w, requires_grad=False)
                if std:
                    start.normal_(0.0, std, generator=self._generator)
                if layout.masks is not None and (mask := layout.masks[i]) is not None:
                    start.masked_fill_(~mask, 0.0)
                self.state[p][name] = start

    # Inside

    def _forget(self) -> None:
        """Drop everything that is derived from the state."""
        self._layouts: list[Layout] | None = None
        self._readouts = Readouts()

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
            self.state[p].update(anchoring.of(p, anchor))
        for counter in self.counters:
            group.setdefault(counter, 0)
        self._layouts = None

    def _normalise(self, group: dict[str, Any]) -> None:
        """Bring options that hold tensors into one form, on the parameters' device."""
        group["optimize_over"] = checks.masks(group["optimize_over"], group["params"])

    def _restore(
        self, saved: StateDict, anchors: dict[Tensor, Tensor], before: list[dict[str, Any]]
    ) -> None:
        """After torch's own loading: precision, anchors, new options, masks, the random stream."""
        anchoring.restore(self, saved, anchors)
        for group, own in zip(self.param_groups, before, strict=True):
            newer = [option for option in own if option in self.defaults and option not in group]
            group.update({option: own[option] for option in newer})  # than what was saved
            self._normalise(group)
        if "generator" in saved:
            continue_stream(self.generator, saved["generator"])

    def _current_layouts(self) -> list[Layout]:
        """Return the layouts of all groups, made again when something they rest on has changed."""
        layouts = self._layouts
        if layouts is None or not all(
            layout.fits(group) for layout, group in zip(layouts, self.param_groups, strict=True)
        ):
            layouts = make_layouts(self.param_groups, self.state)
            for layout in layouts:
                self._begin(layout)
            self._layouts = layouts
        return layouts
