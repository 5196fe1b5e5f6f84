"""What every sampler owes to torch.optim.Optimizer."""

import ast
import copy
import inspect
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from distsampler.errors import ConfigError
from distsampler.optim import SAMPLERS, Sampler
from distsampler.optim.noise_streams import continue_stream

NAMES = sorted(SAMPLERS)
NEEDED = {"rmsprop_sgld": {"freeze_after": 3}, "adam_sgld": {"freeze_after": 3}}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def build(name: str, params: object, **options: object) -> Sampler:
    return SAMPLERS[name](params, **{"lr": 1e-3, "nbeta": 10.0, **NEEDED.get(name, {}), **options})


def make(name: str, model: nn.Module, seed: int = 0, **options: object) -> Sampler:
    chosen = {"localization": 2.0, "generator": generator(seed), **options}
    return build(name, model.parameters(), **chosen)


def backward(model: nn.Module, step: int = 0) -> Tensor:
    source = generator(100 + step)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(16, 5, generator=source).to(dtype)
    model.zero_grad()
    loss = model(inputs).square().mean()
    loss.backward()
    return loss.detach()


def walk(model: nn.Module, sampler: Sampler, steps: range) -> None:
    for step in steps:
        sampler.step(lambda step=step: backward(model, step))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_same_seed_same_bits(name: str) -> None:
    finals = []
    for seed in (1, 1, 2):
        model = network()
        walk(model, make(name, model, seed), range(5))
        finals.append(weights(model))
    assert same(finals[0], finals[1])
    assert not same(finals[0], finals[2])


def test_the_global_generator_is_neither_read_nor_set(name: str) -> None:
    model = network()
    sampler = build(name, model.parameters())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    walk(model, sampler, range(2))
    assert torch.equal(before, torch.get_rng_state())


def test_two_samplers_without_generator_differ(name: str) -> None:
    finals = []
    for _ in range(2):
        model = network()
        walk(model, build(name, model.parameters()), range(2))
        finals.append(weights(model))
    assert not same(*finals)


DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, t) for n in NAMES for t in DTYPES if (n, t) != ("mala", torch.bfloat16)],
)
def test_a_loaded_state_continues_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    straight = network(dtype)
    walk(straight, make(name, straight), range(8))

    first = network(dtype)
    sampler = make(name, first)
    walk(first, sampler, range(4))
    saved = copy.deepcopy((first.state_dict(), sampler.state_dict()))
    second = network(dtype)
    other = make(name, second, seed=99, lr=0.5)
    second.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    walk(second, other, range(4, 8))

    assert same(weights(straight), weights(second))


def test_pickle_and_deepcopy_continue_bit_for_bit(name: str) -> None:
    model = network()
    sampler = make(name, model)
    walk(model, sampler, range(3))
    copies = [copy.deepcopy((model, sampler)), pickle.loads(pickle.dumps((model, sampler)))]
    walk(model, sampler, range(3, 6))
    for other, moved in copies:
        walk(other, moved, range(3, 6))
        assert same(weights(model), weights(other))


def test_hooks_run_and_the_closure_is_called_with_gradients(name: str) -> None:
    model = network()
    sampler = make(name, model)
    seen = []
    sampler.register_step_pre_hook(lambda *_: seen.append("before"))
    sampler.register_step_post_hook(lambda *_: seen.append("after"))
    loss = sampler.step(lambda: backward(model))
    assert seen == ["before", "after"]
    assert float(loss) == pytest.approx(float(backward(network())))


def test_a_group_added_later_is_anchored_where_it_is_then(name: str) -> None:
    early, late = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))
    sampler = build(name, [early], generator=generator())
    late.data.fill_(2.0)
    sampler.add_param_group({"params": [late], "localization": 5.0})

    def closure() -> Tensor:
        sampler.zero_grad()
        loss = early.sum() + late.sum()
        loss.backward()
        return loss.detach()

    sampler.step(closure)
    assert torch.equal(sampler.state[late]["anchor"], torch.full((4,), 2.0))
    assert sampler.param_groups[1]["localization"] == 5.0
    assert not torch.equal(late, torch.full((4,), 2.0))


def test_a_refused_group_leaves_no_trace(name: str) -> None:
    sampler = build(name, [nn.Parameter(torch.zeros(3))])
    with pytest.raises(ConfigError, match="localization must be"):
        sampler.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "localization": -1})
    assert len(sampler.param_groups) == 1


def test_a_scheduler_changes_the_step_size(name: str) -> None:
    model = network()
    sampler = make(name, model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sampler, gamma=0.5)
    walk(model, sampler, range(1))
    schedule.step()
    assert sampler.param_groups[0]["lr"] == pytest.approx(5e-4)
    walk(model, sampler, range(1, 2))


def test_anchors_given_from_outside_are_shared_and_stay_so_after_a_load(name: str) -> None:
    model = network()
    anchors = [torch.zeros_like(p) for p in model.parameters()]
    group = {"params": list(model.parameters()), "anchors": anchors}
    sampler = build(name, [group], localization=1.0)
    walk(model, sampler, range(2))
    sampler.load_state_dict(copy.deepcopy(sampler.state_dict()))
    for p, anchor in zip(model.parameters(), anchors, strict=True):
        assert sampler.state[p]["anchor"].data_ptr() == anchor.data_ptr()
        assert not anchor.any()


def test_anchors_left_out_of_a_saved_state_are_kept(name: str) -> None:
    model = network()
    sampler = make(name, model)
    walk(model, sampler, range(2))
    saved = copy.deepcopy(sampler.state_dict())
    for values in saved["state"].values():
        del values["anchor"]
    before = [sampler.state[p]["anchor"] for p in model.parameters()]
    sampler.load_state_dict(saved)
    for p, anchor in zip(model.parameters(), before, strict=True):
        assert sampler.state[p]["anchor"] is anchor


def test_a_state_dict_passes_through_torch_save_with_weights_only(
    name: str, tmp_path: object
) -> None:
    model = network()
    sampler = make(name, model)
    walk(model, sampler, range(2))
    torch.save(sampler.state_dict(), f"{tmp_path}/state.pt")
    saved = torch.load(f"{tmp_path}/state.pt", weights_only=True)
    other = copy.deepcopy(model)
    twin = make(name, other)
    twin.load_state_dict(saved)
    walk(model, sampler, range(2, 4))
    walk(other, twin, range(2, 4))
    assert same(weights(model), weights(other))


def test_sparse_and_complex_are_refused_by_name(name: str) -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    sampler = make(name, embedding)

    def closure() -> Tensor:
        loss = embedding(torch.tensor([1])).sum()
        loss.backward()
        return loss.detach()

    with pytest.raises(ConfigError, match="sparse"):
        sampler.step(closure)
    with pytest.raises(ConfigError, match="complex64"):
        build(name, [nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0.0),
        ("lr", math.inf),
        ("lr", True),
        ("nbeta", -1.0),
        ("nbeta", math.nan),
        ("localization", -1.0),
        ("weight_decay", math.nan),
        ("bounding_box_size", -1.0),
        ("optimize_over", torch.ones(2, 2, dtype=torch.bool)),
        ("optimize_over", torch.ones(3)),
        ("optimize_over", [None, None]),
    ],
)
def test_a_wrong_option_is_refused_before_anything_moves(
    name: str, option: str, value: object
) -> None:
    group = {"params": [nn.Parameter(torch.zeros(3))], option: value}
    with pytest.raises(ConfigError, match=option):
        build(name, [group])


def test_nbeta_left_at_one_warns(name: str) -> None:
    with pytest.warns(UserWarning, match="nbeta is 1"):
        build(name, [nn.Parameter(torch.zeros(3))], nbeta=1.0)


def test_a_parameter_that_needs_no_gradient_is_left_alone_until_it_does(name: str) -> None:
    model = network()
    last = list(model.parameters())[-1]
    last.requires_grad_(False)
    start = last.detach().clone()
    sampler = make(name, model)
    walk(model, sampler, range(2))
    assert torch.equal(last, start)
    last.requires_grad_(True)
    walk(model, sampler, range(2, 4))
    assert not torch.equal(last, start)


def test_an_anchor_that_is_the_parameter_itself_is_copied(name: str) -> None:
    p = nn.Parameter(torch.zeros(3))
    sampler = build(name, [{"params": [p], "anchors": [p]}])
    p.data.fill_(1.0)
    assert not sampler.state[p]["anchor"].any()


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        (
            "sgld",
            "params, lr=0.01, noise_level=1.0, weight_decay=0.0, localization=0.0, nbeta=1.0, "
            "bounding_box_size=None, save_noise=False, save_mala_vars=False, optimize_over=None, "
            "noise_norm=False, grad_norm=False, weight_norm=False, distance=False",
        ),
        (
            "sgnht",
            "params, lr=0.01, diffusion_factor=0.01, bounding_box_size=None, save_noise=False, "
            "save_mala_vars=False, nbeta=1.0",
        ),
    ],
)
def test_a_signature_begins_with_the_reference_one(name: str, reference: str) -> None:
    """SCIENCE section 1: the same names, order and defaults, positional too; ours come after."""
    literal: list[inspect.Parameter] = []
    for item in reference.split(", "):
        option, _, default = item.partition("=")
        value = ast.literal_eval(default) if default else inspect.Parameter.empty
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        literal.append(inspect.Parameter(option, kind, default=value))
    found = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(SAMPLERS[name]).parameters.values()
    ]
    assert found[: len(literal)] == literal


def test_every_option_of_every_sampler_is_kept_in_its_groups(name: str) -> None:
    """Hyper-parameters are declared once, in the signature; a scheduler finds them all."""
    signature = inspect.signature(SAMPLERS[name].__init__).parameters
    declared = set(signature) - {"self", "params", "generator"}
    sampler = build(name, [nn.Parameter(torch.zeros(3))])
    extra = {"params", "steps", "adapted", "bounding_box_size"}
    assert declared | extra >= set(sampler.param_groups[0]) >= declared


def test_a_stream_from_another_kind_of_device_becomes_a_new_one_derived_from_it() -> None:
    state = torch.arange(16, dtype=torch.uint8)
    draws = []
    for saved in (state, state, state + 1):
        target = generator()
        continue_stream(target, saved)
        draws.append(torch.randn(4, generator=target))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], torch.randn(4, generator=generator()))


def test_a_sampler_does_not_drag_in_the_compiler() -> None:
    code = """
import sys, warnings, torch, distsampler as ds
sampler = ds.SGLD([torch.zeros(3, requires_grad=True)], lr=0.1, nbeta=2.0)
sampler.step()
sampler.load_state_dict(sampler.state_dict())
print("torch._dynamo" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_a_state_that_is_older_than_an_option_is_continued_with_its_value() -> None:
    first, second = network(), network()
    one, other = make("rmsprop_sgld", first), make("rmsprop_sgld", second, seed=1)
    walk(first, one, range(2))
    saved = one.state_dict()
    for group in saved["param_groups"]:
        del group["initial_scale"], group["bias_correction"]  # as 0.1.0 saved it
    other.move_to(weights(first))
    other.load_state_dict(saved)
    for model, sampler in ((first, one), (second, other)):
        walk(model, sampler, range(2, 5))
    assert same(weights(first), weights(second))
