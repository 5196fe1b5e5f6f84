"""A sampler of one's own: a right one runs, a wrong one says before the run what it lacks."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import distsampler as ds
from distsampler.chains.chain import Chain
from distsampler.errors import ConfigError
from distsampler.optim import SAMPLERS
from distsampler.sampling.prepare import prepare
from tests.assertions import assert_same
from tests.problems import anchored, both, config, regression, squared_error


class Momentum(torch.optim.Optimizer):
    """A plain one, with state of its own and something to tell."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        nbeta: float = 1.0,
        friction: float = 0.1,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "nbeta": nbeta, "friction": friction})
        self.generator = generator
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum"] = torch.zeros_like(p, requires_grad=False)
            self.state[p]["anchor"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        for p in group["params"]:
            u, lr = self.state[p]["momentum"], group["lr"]
            noise = torch.randn(p.shape, generator=self.generator, device=p.device)
            u.mul_(1 - group["friction"]).add_(self.gradient(p), alpha=-lr * group["nbeta"])
            u.add_(noise, alpha=(2 * lr * group["friction"]) ** 0.5)
            p.add_(u)

    def gradient(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        return p.grad

    def metrics(self) -> dict[str, Tensor]:
        entries = [entry["momentum"].norm() for entry in self.state.values()]
        return {"momentum_norm": torch.stack(entries).norm()}


class NoGenerator(torch.optim.SGD):
    pass


class NoOptimizer:
    def __init__(self, params: Any, generator: Any = None) -> None: ...


class NeedsClosure(Momentum):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class NoStep(torch.optim.Optimizer):
    def __init__(self, params: Any, generator: Any = None) -> None:
        super().__init__(params, {})


class Silent(Momentum):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.param_groups[0]["params"][0].sub_(1e-3)


class Global(Momentum):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        p = self.param_groups[0]["params"][0]
        p.add_(torch.randn(p.shape))


class Still(Momentum):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.randn(3, generator=self.generator)


class Replacing(Momentum):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        p = self.param_groups[0]["params"][0]
        p.data = p.data + torch.randn(p.shape, generator=self.generator)


class OddState(Momentum):
    def __init__(self, params: Any, generator: Any = None) -> None:
        super().__init__(params, generator=generator)
        self.state[self.param_groups[0]["params"][0]]["path"] = Path("here")


class Forgetful(Momentum):
    """Counts its steps where state_dict does not look."""

    steps = 0

    def gradient(self, p: Tensor) -> Tensor:
        self.steps += 1
        return p.grad / self.steps  # type: ignore[operator]


class Loud(Momentum):
    def metrics(self) -> dict[str, Tensor]:
        return {"loss": torch.zeros(())}


class Demanding(torch.optim.Optimizer):
    def __init__(self, params: Any, temperature: float, *, generator: torch.Generator) -> None:
        super().__init__(params, {"temperature": temperature})
        self.generator = generator

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn(p.shape, generator=self.generator), alpha=1e-4)


def name(kind: type) -> str:
    return f"{__name__}:{kind.__qualname__}"


def spec(kind: type, restrict_to: Any = None, **options: Any) -> Any:
    model, data = regression()
    sampler = ds.SamplerConfig(name=name(kind), **options)
    return prepare(model, data, squared_error, config(sampler=sampler, restrict_to=restrict_to))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (NoGenerator, "must take generator=, the torch.Generator of its noise"),
        (NoOptimizer, "must name a torch.optim.Optimizer"),
        (NeedsClosure, "without closure, but it raised TypeError"),
        (NoStep, "but it raised NotImplementedError"),
        (Silent, "must draw its noise from generator="),
        (Global, "it drew from torch's global generator: pass generator= to torch.randn"),
        (Still, "must move its parameters, but step() left them"),
        (Replacing, "must move its parameters in place"),
        (OddState, "must hold all that the next step depends on, as tensors, numbers"),
        (Forgetful, "but one that was restored from it goes elsewhere"),
        (Loud, "metrics() must not be named like a readout, got 'loss'"),
        (Demanding, "missing 1 required positional argument: 'temperature'"),
    ],
)
def test_a_wrong_sampler_fails_before_the_run_and_names_what_is_missing(
    tmp_path: Path, kind: type, sentence: str
) -> None:
    model, data = regression()
    step = {"lr": 1e-3} if "lr" in inspect.signature(kind).parameters else {}
    wrong = config(sampler=ds.SamplerConfig(name=name(kind), **step))
    with pytest.raises(ConfigError) as caught:
        ds.sample(model, data, squared_error, wrong, store=tmp_path / "run", quiet=True)
    assert sentence in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("no_such_package:Sampler", "ModuleNotFoundError"),
        ("tests.problems:Sampler", "AttributeError"),
        ("momentum", "one of your own is 'package.module:Class'"),
    ],
)
def test_a_sampler_that_is_not_there_is_named(kind: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(*regression(), squared_error, config(sampler=ds.SamplerConfig(name=kind)))  # type: ignore[call-arg]
    assert sentence in str(caught.value)


def test_its_options_are_those_of_its_signature() -> None:
    with pytest.raises(ConfigError, match="did you mean 'friction'"):
        spec(Momentum, frictoin=0.2)
    assert spec(Demanding, temperature=2.0).sampler is Demanding
    recipe = spec(Momentum, friction=0.3)
    (group,) = Chain(recipe, 0, anchored(recipe)).sampler.param_groups
    assert group["friction"] == 0.3
    assert group["nbeta"] == pytest.approx(300 / np.log(300))


def test_masks_need_a_sampler_that_knows_them() -> None:
    with pytest.raises(ConfigError, match="masks need a sampler with the option optimize_over="):
        spec(Momentum, restrict_to={"weight": [[True, False, True, True, True]]})


def test_it_goes_on_to_the_bit_and_what_it_tells_is_recorded() -> None:
    recipe = spec(Momentum, lr=1e-5)
    found = anchored(recipe)
    first, other = Chain(recipe, 0, found), Chain(recipe, 0, found)
    block = first.advance(6)
    assert np.all(block.values["momentum_norm"] > 0)
    other.restore(block.state)
    one, two = first.advance(5), other.advance(5)
    assert one.state == two.state
    assert all(np.array_equal(one.values[name], two.values[name]) for name in one.values)


@pytest.mark.ray
def test_on_ray_it_gives_the_bits_of_one_process(ray_cluster: None, tmp_path: Path) -> None:
    settings = config(sampler=ds.SamplerConfig(name=name(Momentum), lr=1e-5), chains=2)
    serial, ray = both(settings, tmp_path)
    assert_same(serial, ray)


MASK = {"restrict_to": {"weight": [[True, True, True, True, False]]}}


@pytest.mark.ray
@pytest.mark.parametrize(
    ("actors", "sampler", "fields"),
    [
        (1, {"name": "lmsgld", "correct_heat": True}, {}),
        (2, {"name": "lmsgld", "correct_heat": True}, {}),
        (2, {"name": "rmsprop_sgld", "correct_heat": True}, MASK),
        (2, {"name": "sgld", "save_mala_vars": True}, {}),
        (1, {"name": "mala"}, {"batch_size": 300}),
    ],
    ids=["heat", "heat by two", "heat, preconditioner and mask", "acceptance", "mala"],
)
def test_one_and_two_actors_give_the_bits_of_one_process(
    ray_cluster: None, tmp_path: Path, sampler: dict[str, Any], fields: dict[str, Any], actors: int
) -> None:
    chosen = ds.SamplerConfig(lr=1e-4, localization=10.0, **sampler)
    placement = ds.PlacementConfig(chains_per_actor=2 // actors)
    settings = config(sampler=chosen, placement=placement, **fields)
    serial, ray = both(settings, tmp_path)
    assert len({e["pid"] for e in ray.events if e["event"] == "started"}) == actors
    assert_same(serial, ray)
    variance = [run._trace.constants.array("gradient_variance") for run in (serial, ray)]
    assert np.array_equal(*variance) if chosen.correct_heat else variance == [None, None]


@pytest.mark.parametrize("kind", list(SAMPLERS))
def test_every_sampler_of_the_table_can_be_named_in_a_config(kind: str) -> None:
    model, data = regression()
    size = 300 if kind == "mala" else 16
    settings = config(sampler=ds.SamplerConfig(name=kind, lr=1e-4), batch_size=size)
    recipe = prepare(model, data, squared_error, settings)
    block = Chain(recipe, 0, anchored(recipe)).advance(2)
    assert np.isfinite(block.values["loss"]).all()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"optimize_over": torch.ones(5).bool()}, "give boolean masks by parameter name"),
        ({"gradient_variance": [torch.ones(5)]}, "pass a number, or correct_heat=True"),
        ({"name": "lmsgld", "preconditioner": [torch.ones(5)]}, "must be left out of a run"),
    ],
)
def test_options_that_hold_tensors_say_what_a_run_has_instead(
    option: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(*regression(), squared_error, config(sampler=ds.SamplerConfig(**option)))  # type: ignore[call-arg]
    assert sentence in str(caught.value)
