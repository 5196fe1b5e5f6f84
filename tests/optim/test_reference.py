"""The foreach kernels against plain loops: shapes, precisions, groups, masks, chunk sizes."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distsampler.optim import SAMPLERS, SGLD, SGNHT, Sampler
from distsampler.optim import layout as planning
from tests.optim.reference import Reference

pytestmark = pytest.mark.filterwarnings("ignore:the noise of SGNHT")

RMSPROP = {"noise_level": 1.0, "beta2": 0.9, "stability": 0.3, "freeze_after": 2}
OPTIONS = {
    "sgld": {"noise_level": 1.0},
    "lmsgld": {"noise_level": 1.0},
    "rmsprop_sgld": RMSPROP,
    "rmsprop_sgld from 1": {**RMSPROP, "initial_scale": 1.0, "bias_correction": False},
    "adam_sgld": {
        "noise_level": 1.0,
        "beta1": 0.8,
        "beta2": 0.9,
        "stability": 0.3,
        "freeze_after": 2,
    },
    "sghmc": {"friction": 0.2},
    "sgnht": {"diffusion_factor": 0.1},
}
SHAPES = [(), (1,), (3,), (2, 3), (17,), (5, 1, 4), (0,), (40,)]
STEPS = 4

group_strategy = st.fixed_dictionaries(
    {
        "shapes": st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        "localization": st.sampled_from([0.0, 3.0]),
        "weight_decay": st.sampled_from([0.0, 2.0]),
        "bounding_box_size": st.sampled_from([None, 0.3]),
        "masks": st.sampled_from(["none", "some", "all"]),
        "without_grad": st.booleans(),
        "transposed": st.booleans(),
    }
)


def random_parameter(shape: tuple[int, ...], source: torch.Generator, spec: dict) -> Tensor:
    values = torch.randn(shape, generator=source).to(spec["dtype"])
    if spec["transposed"] and len(shape) == 2:
        values = values.T.contiguous().T
    return torch.nn.Parameter(values)


def make_group(spec: dict, source: torch.Generator) -> dict:
    params = [random_parameter(shape, source, spec) for shape in spec["shapes"]]
    masks = [torch.rand(p.shape, generator=source) < 0.6 for p in params]
    if spec["masks"] == "some":
        masks = [m if i % 2 else None for i, m in enumerate(masks)]
    kept = ("localization", "weight_decay", "bounding_box_size")
    return {
        "params": params,
        "optimize_over": None if spec["masks"] == "none" else masks,
        **{name: spec[name] for name in kept},
    }


def weight(sampler: Sampler, p: Tensor) -> Tensor:
    return sampler.state[p].get("master", p).detach().double().clone()


def references(sampler: Sampler) -> list[list[Reference]]:
    sampler._current_layouts()  # draws what is drawn before the first step
    found = []
    for group in sampler.param_groups:
        masks = group["optimize_over"] or [None] * len(group["params"])
        row = []
        for p, mask in zip(group["params"], masks, strict=True):
            state = sampler.state[p]
            row.append(
                Reference(
                    weight(sampler, p),
                    state["anchor"].double().clone(),
                    mask,
                    *(
                        state.get(key, torch.zeros(p.shape)).double().clone()
                        for key in ("momentum", "last_noise")
                    ),
                    thermostat=group.get("diffusion_factor", 0.0),
                )
            )
        found.append(row)
    return found


def set_gradients(spec: dict, params: list[Tensor], source: torch.Generator) -> list[Tensor]:
    gradients = []
    for i, p in enumerate(params):
        p.grad = None
        if not (spec["without_grad"] and i % 2 == 0):
            p.grad = torch.randn(p.shape, generator=source).to(p.dtype)
        gradients.append(torch.zeros(p.shape).double() if p.grad is None else p.grad.double())
    return gradients


@pytest.mark.parametrize("title", OPTIONS)
@settings(max_examples=40, deadline=None)
@given(
    specs=st.lists(group_strategy, min_size=1, max_size=3),
    chunk_bytes=st.sampled_from([64, 256, 4 * 2**20]),
    seed=st.integers(0, 2**20),
)
def test_the_kernels_are_the_plain_loop(
    title: str, specs: list[dict], chunk_bytes: int, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    groups = [make_group(spec, source) for spec in specs]
    name, options = title.split()[0], {"lr": 0.05, "nbeta": 4.0, **OPTIONS[title]}
    with mock.patch.dict(planning.NOISE_CHUNK_BYTES, {"cpu": chunk_bytes}):
        sampler = SAMPLERS[name](groups, save_noise=True, generator=source, **options)
        loops = references(sampler)
        for _ in range(STEPS):
            gradients = [
                set_gradients(spec, group["params"], source)
                for spec, group in zip(specs, groups, strict=True)
            ]
            sampler.step()
            for group, row, found, noises in zip(
                sampler.param_groups, loops, gradients, sampler.noise, strict=True
            ):
                settings_of_group = {**options, **{k: group[k] for k in group if k != "params"}}
                for loop, g, noise in zip(row, found, noises, strict=True):
                    loop.advance(name, settings_of_group, g, noise.double().clone())
                if name == "sgnht":
                    step_thermostat(row, settings_of_group["lr"])
    for group, row in zip(sampler.param_groups, loops, strict=True):
        for p, loop in zip(group["params"], row, strict=True):
            torch.testing.assert_close(weight(sampler, p), loop.w, rtol=2e-5, atol=2e-6)


def step_thermostat(row: list[Reference], lr: float) -> None:
    entries = sum(r.w.numel() if r.mask is None else int(r.mask.sum()) for r in row)
    if not entries:
        return
    energy = sum(float(r.momentum.square().sum()) for r in row)
    for reference in row:
        reference.thermostat += energy / entries - lr


def test_without_noise_and_pull_sgld_is_sgd_with_step_lr_nbeta_over_2() -> None:
    torch.manual_seed(0)
    start = torch.randn(50, dtype=torch.float64)
    left, right = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    with pytest.warns(UserWarning, match="noise_level is 0"):
        sampler = SGLD([left], lr=0.01, nbeta=6.0, noise_level=0.0)
    descent = torch.optim.SGD([right], lr=0.03)
    for _ in range(20):
        for p, optimizer in ((left, sampler), (right, descent)):
            p.grad = p.detach() ** 3
            optimizer.step()
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)


def test_masked_entries_keep_every_bit_even_of_nan_and_negative_zero() -> None:
    special = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), 1e-45, -3.0])
    mask = torch.zeros(6, dtype=torch.bool)
    for name in [n for n in SAMPLERS if n != "mala"]:
        p = torch.nn.Parameter(torch.cat([special, torch.zeros(4)]))
        options = {"freeze_after": 2} if "sgld" in name and name not in ("sgld", "lmsgld") else {}
        if name != "sgnht":
            options["noise_norm"] = True
        sampler = SAMPLERS[name](
            [p],
            nbeta=3.0,
            localization=1.0,
            weight_decay=1.0,
            bounding_box_size=0.1,
            optimize_over=[torch.cat([mask, torch.ones(4, dtype=torch.bool)])],
            **options,
        )
        for _ in range(3):
            p.grad = torch.full_like(p, float("nan"))
            p.grad[6:] = 1.0
            sampler.step()
        bits = p.detach()[:6].view(torch.int32)
        assert torch.equal(bits, special.view(torch.int32)), name
        assert (p[6:] != 0).all()
        assert all(torch.isfinite(value) for value in sampler.metrics().values())


def test_badodab_is_the_splitting_written_out() -> None:
    lr, a, nbeta, h = 0.02, 0.2, 5.0, torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    p = torch.nn.Parameter(torch.ones(7, dtype=torch.float64))
    sampler = SGNHT([p], lr, a, nbeta=nbeta, localization=1.0, scheme="badodab", save_noise=True)
    sampler._current_layouts()
    w, u, xi = p.detach().clone(), sampler.state[p]["momentum"].clone(), a
    for _ in range(5):
        p.grad = h * p.detach()
        sampler.step()
        u = u - lr * (nbeta * h * w + (w - 1))  # B
        w = w + u / 2  # A
        xi += (float(u.square().mean()) - lr) / 2  # D
        scale = math.sqrt(lr * a * (1 - math.exp(-2 * xi)) / xi)
        u = math.exp(-xi) * u + scale * sampler.noise[0][0]  # O
        xi += (float(u.square().mean()) - lr) / 2  # D
        w = w + u / 2  # A
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-13)
    assert float(sampler.thermostat[0]) == pytest.approx(xi, rel=1e-12)
