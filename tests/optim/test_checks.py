"""One row an option: what it changes, measured."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distsampler.errors import ConfigError
from distsampler.optim import (
    LMSGLD,
    MALA,
    SAMPLERS,
    SGHMC,
    SGLD,
    SGNHT,
    AdamSGLD,
    RMSPropSGLD,
    Sampler,
)

D = 4_000


def step(sampler: Sampler, p: Tensor, gradient: float | None, steps: int = 1) -> Tensor:
    """Take steps with a constant gradient; where the parameter has gone."""
    start = p.detach().clone()
    for _ in range(steps):
        p.grad = None if gradient is None else torch.full_like(p, gradient)
        sampler.step()
    return p.detach() - start


def fresh(make: type[Sampler], start: float = 0.0, **options: object) -> tuple[Sampler, Tensor]:
    p = torch.nn.Parameter(torch.full((D,), start))
    chosen = {"lr": 1e-2, "nbeta": 10.0, "generator": torch.Generator().manual_seed(0), **options}
    return make([p], **chosen), p


def quiet(start: float = 0.0, **options: object) -> tuple[Sampler, Tensor]:
    """SGLD without noise: the drift alone."""
    return fresh(SGLD, start, noise_level=0.0, **options)


def close(got: Tensor, expected: float, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(got, torch.full_like(got, expected), rtol=rtol, atol=1e-9)


def spread(move: Tensor, expected: float) -> None:
    """Root mean square within 5 standard errors (relative 1/sqrt(2 D))."""
    assert abs(float(move.square().mean().sqrt()) / expected - 1) < 5 / math.sqrt(2 * D)


def lr() -> None:
    sampler, p = fresh(SGLD, lr=4e-4)
    spread(step(sampler, p, None), 0.02)
    sampler, p = quiet(lr=4e-4)
    close(step(sampler, p, 3.0), -2e-4 * 10 * 3)


def noise_level() -> None:
    sampler, p = fresh(SGLD, noise_level=2.0)
    spread(step(sampler, p, None), 0.2)


def weight_decay() -> None:
    sampler, p = quiet(start=2.0, weight_decay=5.0)
    close(step(sampler, p, None), -0.005 * 5 * 2)


def localization() -> None:
    sampler, p = quiet(start=2.0, localization=5.0)
    close(step(sampler, p, None), 0.0)
    p.data.fill_(2.5)
    close(step(sampler, p, None), -0.005 * 5 * 0.5)


def nbeta() -> None:
    sampler, p = quiet(nbeta=30.0)
    close(step(sampler, p, 2.0), -0.005 * 30 * 2)


def nbeta_callable() -> None:
    sampler, p = quiet(nbeta=lambda t: 10.0 * (t + 1))
    close(step(sampler, p, 2.0), -0.005 * 10 * 2)
    close(step(sampler, p, 2.0), -0.005 * 20 * 2)


def bounding_box_size() -> None:
    sampler, p = fresh(SGLD, start=1.0, bounding_box_size=0.05)
    step(sampler, p, None, steps=20)
    away = (p.detach() - 1).abs()
    assert float(away.max()) <= 0.05 + 1e-6
    assert float((away > 0.0499).float().mean()) > 0.1


def save_noise() -> None:
    sampler, p = fresh(SGLD, save_noise=True, noise_level=3.0)
    move = step(sampler, p, None)
    torch.testing.assert_close(sampler.noise[0][0] * 0.3, move)
    spread(sampler.noise[0][0], 1.0)


def save_mala_vars() -> None:
    sampler, p = fresh(SGLD, 2.0, save_mala_vars=True, localization=4.0, weight_decay=3.0)
    p.data.fill_(2.5)
    step(sampler, p, 7.0)
    close(sampler.drift[0][0], 10 * 7 + 4 * 0.5 + 3 * 2.5)
    assert float(sampler.localization_loss) == pytest.approx(4 / 2 * D * 0.25, rel=1e-5)
    assert "localization_loss" in sampler.metrics()


def optimize_over() -> None:
    mask = torch.arange(D) % 3 == 0
    sampler, p = fresh(SGLD, optimize_over=mask, localization=1.0)
    move = step(sampler, p, 1.0)
    assert torch.equal(move != 0, mask)


def noise_norm() -> None:
    sampler, p = fresh(SGLD, noise_norm=True, save_noise=True)
    step(sampler, p, None)
    norm = float(sampler.noise[0][0].norm())
    assert float(sampler.noise_norm) == pytest.approx(norm, rel=1e-5)
    assert norm == pytest.approx(math.sqrt(D), rel=0.1)


def grad_norm() -> None:
    sampler, p = fresh(SGLD, grad_norm=True)
    step(sampler, p, 3.0)
    assert float(sampler.grad_norm) == pytest.approx(3 * math.sqrt(D), rel=1e-5)


def weight_norm() -> None:
    sampler, p = fresh(SGLD, start=2.0, weight_norm=True)
    step(sampler, p, 3.0)
    assert float(sampler.weight_norm) == pytest.approx(2 * math.sqrt(D), rel=1e-5)


def distance() -> None:
    sampler, p = fresh(SGLD, start=2.0, distance=True)
    p.data.fill_(2.5)
    step(sampler, p, 3.0)
    assert float(sampler.distance) == pytest.approx(0.5 * math.sqrt(D), rel=1e-5)


def generator() -> None:
    moves = [
        step(*fresh(SGLD, generator=torch.Generator().manual_seed(s)), None) for s in (1, 1, 2)
    ]
    assert torch.equal(moves[0], moves[1])
    assert not torch.equal(moves[0], moves[2])


def gradient_variance() -> None:
    half = torch.where(torch.arange(D) < D // 2, 0.0, 3.0)
    sampler, p = fresh(SGLD, gradient_variance=[half], batch_size=1)
    move = step(sampler, p, None)
    heat = 1e-2 * 10**2 * 3.0 / 4
    torch.testing.assert_close(heat, 0.75)
    spread(move[: D // 2], 0.1)
    spread(move[D // 2 :], 0.1 * 0.5)
    assert float(sampler.noise_clipped) == 0.0


def gradient_variance_too_large_for_the_step() -> None:
    variances = torch.where(torch.arange(D) < D // 4, 5.0, 0.0)
    sampler, p = fresh(SGLD, gradient_variance=[variances], batch_size=1)
    move = step(sampler, p, None)
    assert not move[: D // 4].any()
    assert float(sampler.noise_clipped) == pytest.approx(0.25)
    sampler.param_groups[0]["gradient_variance"] = 0.0
    assert step(sampler, p, None).all()


def batch_size() -> None:
    sampler, p = fresh(SGLD, gradient_variance=3.0, batch_size=3)
    spread(step(sampler, p, None), 0.1 * math.sqrt(0.75))


def sgnht_lr() -> None:
    sampler, p = fresh(SGNHT, lr=1e-4, diffusion_factor=1e-9)
    spread(step(sampler, p, None), 1e-2)


def sgnht_diffusion_factor() -> None:
    sampler, p = fresh(SGNHT, diffusion_factor=0.5)
    sampler._current_layouts()
    sampler.state[p]["momentum"].zero_()
    spread(step(sampler, p, None), 0.1)
    assert float(fresh_thermostat(0.5)) == 0.5


def fresh_thermostat(diffusion: float) -> Tensor:
    sampler, _ = fresh(SGNHT, diffusion_factor=diffusion)
    sampler._current_layouts()
    return sampler.thermostat[0]


def sgnht_bounding_box_size() -> None:
    sampler, p = fresh(SGNHT, bounding_box_size=1e-3)
    before = sampler._current_layouts()[0].column("momentum")[0].clone()
    step(sampler, p, 0.0)
    after = sampler.state[p]["momentum"]
    walled = p.detach().abs() == p.detach().abs().max()
    assert float(p.detach().abs().max()) <= 1e-3 + 1e-9
    assert float(walled.float().mean()) > 0.9
    sure = walled & (before.abs() > 0.1)
    assert sure.any()
    assert (after[sure].sign() == -before[sure].sign()).all()


def sgnht_nbeta() -> None:
    moves = []
    for value in (10.0, 30.0):
        sampler, p = fresh(SGNHT, nbeta=value)
        moves.append(step(sampler, p, 1.0))
    close(moves[1] - moves[0], -1e-2 * 20, rtol=1e-4)


def sgnht_localization() -> None:
    moves = []
    for value in (0.0, 3.0):
        sampler, p = fresh(SGNHT, localization=value)
        p.data.fill_(0.5)
        moves.append(step(sampler, p, None))
    close(moves[1] - moves[0], -1e-2 * 3 * 0.5, rtol=1e-4)


def sgnht_weight_decay() -> None:
    moves = []
    for value in (0.0, 3.0):
        sampler, p = fresh(SGNHT, start=2.0, weight_decay=value)
        moves.append(step(sampler, p, None))
    close(moves[1] - moves[0], -1e-2 * 3 * 2, rtol=1e-4)


def sgnht_optimize_over() -> None:
    mask = torch.arange(D) % 3 == 0
    sampler, p = fresh(SGNHT, optimize_over=[mask])
    assert torch.equal(step(sampler, p, 1.0) != 0, mask)


def sgnht_scheme() -> None:
    moves = [step(*fresh(SGNHT, scheme=scheme), 1.0) for scheme in ("ding", "badodab")]
    assert not torch.equal(*moves)


def sgnht_save_noise() -> None:
    sampler, p = fresh(SGNHT, save_noise=True)
    step(sampler, p, 1.0)
    spread(sampler.noise[0][0], 1.0)


def sgnht_save_mala_vars() -> None:
    sampler, p = fresh(SGNHT, save_mala_vars=True, weight_decay=2.0, start=1.0)
    step(sampler, p, 3.0)
    close(sampler.drift[0][0], 32.0)


def sgnht_norms() -> None:
    sampler, p = fresh(SGNHT, 2.0, noise_norm=True, grad_norm=True, weight_norm=True, distance=True)
    p.data.fill_(2.5)
    step(sampler, p, 3.0)
    root = math.sqrt(D)
    found = {name: float(value) / root for name, value in sampler.metrics().items()}
    assert found.pop("noise_norm") == pytest.approx(1.0, rel=5 / math.sqrt(2 * D))
    del found["thermostat"]
    assert found == pytest.approx({"grad_norm": 3.0, "weight_norm": 2.5, "distance": 0.5}, rel=1e-5)


def sghmc_friction() -> None:
    for friction in (0.1, 0.4):
        sampler, p = fresh(SGHMC, friction=friction)
        sampler._current_layouts()
        sampler.state[p]["momentum"].fill_(1.0)
        move = step(sampler, p, None)
        spread(move - (1 - friction), math.sqrt(2 * 1e-2 * friction))


def adaptive(make: type[Sampler], **options: object) -> list[Tensor]:
    """Two steps without noise, along gradients 3 and 1."""
    chosen = {"beta2": 0.5, "stability": 0.1, "freeze_after": 5, **options}
    sampler, p = fresh(make, noise_level=0.0, **chosen)
    return [step(sampler, p, gradient) for gradient in (3.0, 1.0)]


def rmsprop_sgld_beta2() -> None:
    first, second = adaptive(RMSPropSGLD)
    close(first, -0.005 * 10 * 3 / (3 + 0.1))
    close(second, -0.005 * 10 / (math.sqrt((0.25 * 9 + 0.5) / 0.75) + 0.1))
    close(adaptive(RMSPropSGLD, beta2=0.0)[1], -0.005 * 10 / 1.1)


def rmsprop_sgld_stability() -> None:
    close(adaptive(RMSPropSGLD, stability=2.0)[0], -0.005 * 10 * 3 / (3 + 2))


def rmsprop_sgld_freeze_after() -> None:
    close(adaptive(RMSPropSGLD, freeze_after=1)[1], -0.005 * 10 / (3 + 0.1))


def rmsprop_sgld_bias_correction() -> None:
    """As devinterp 1.3.2 and 2.0.1 have it."""
    first, second = adaptive(RMSPropSGLD, bias_correction=False)
    close(first, -0.005 * 10 * 3 / (math.sqrt(0.5 * 9) + 0.1))
    close(second, -0.005 * 10 / (math.sqrt(0.25 * 9 + 0.5) + 0.1))


def rmsprop_sgld_initial_scale() -> None:
    """As Hitchcock & Hoogland have it, and with another v."""
    for start in (1.0, 4.0):
        form = {"initial_scale": start, "bias_correction": False}
        first, second = adaptive(RMSPropSGLD, **form)
        close(first, -0.005 * 10 * 3 / (math.sqrt(0.5 * start + 0.5 * 9) + 0.1))
        close(second, -0.005 * 10 / (math.sqrt(0.25 * start + 0.25 * 9 + 0.5) + 0.1))


def adam_sgld_beta1() -> None:
    mean = (0.25 * 3 + 0.5) / 0.75
    close(adaptive(AdamSGLD, beta1=0.5, beta2=0.0)[1], -0.005 * 10 * mean / 1.1)
    close(adaptive(AdamSGLD, beta1=0.0, beta2=0.0)[1], -0.005 * 10 / 1.1)


def lmsgld_preconditioner() -> None:
    scale = torch.where(torch.arange(D) < D // 2, 1.0, 4.0)
    sampler, p = fresh(LMSGLD, noise_level=0.0, preconditioner=[scale])
    torch.testing.assert_close(step(sampler, p, 3.0), -0.005 * 10 * 3 * scale)
    sampler, p = fresh(LMSGLD, preconditioner=[scale])
    spread(step(sampler, p, None)[D // 2 :], math.sqrt(1e-2 * 4 / 2))


ROWS = [
    lr,
    noise_level,
    weight_decay,
    localization,
    nbeta,
    nbeta_callable,
    bounding_box_size,
    save_noise,
    save_mala_vars,
    optimize_over,
    noise_norm,
    grad_norm,
    weight_norm,
    distance,
    generator,
    gradient_variance,
    gradient_variance_too_large_for_the_step,
    batch_size,
    sgnht_lr,
    sgnht_diffusion_factor,
    sgnht_bounding_box_size,
    sgnht_nbeta,
    sgnht_localization,
    sgnht_weight_decay,
    sgnht_optimize_over,
    sgnht_scheme,
    sgnht_save_noise,
    sgnht_save_mala_vars,
    sgnht_norms,
    sghmc_friction,
    rmsprop_sgld_beta2,
    rmsprop_sgld_stability,
    rmsprop_sgld_freeze_after,
    rmsprop_sgld_bias_correction,
    rmsprop_sgld_initial_scale,
    adam_sgld_beta1,
    lmsgld_preconditioner,
]


@pytest.mark.filterwarnings("ignore:noise_level|the noise of SGNHT|SGNHT is no Langevin")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_an_option_does_what_it_says(row: Callable[[], None]) -> None:
    row()


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_option_has_a_row(name: str) -> None:
    """One of its own, or that of the sampler which shares the code."""
    rows = {row.__name__ for row in ROWS}
    options = set(inspect.signature(SAMPLERS[name]).parameters) - {"params"}
    ends = {option for option in options if any(row.endswith(f"_{option}") for row in rows)}
    assert options - rows - ends == set()


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (SGLD, {"nbeta": 1.0}, "nbeta is 1"),
        (SGLD, {"noise_level": 0.5}, "noise_level is 0.5"),
        (SGNHT, {"nbeta": 1.0}, "nbeta is 1"),
        (SGNHT, {"save_noise": True}, "use SGLD to look at noise norms"),
        (SGNHT, {"noise_norm": True}, "use SGLD to look at noise norms"),
        (SGNHT, {"save_mala_vars": True}, "use SGLD for that diagnostic"),
        (RMSPropSGLD, {}, "freeze_after is None"),
    ],
)
def test_what_is_legal_but_hardly_meant_warns_once(
    make: type[Sampler], options: dict[str, object], sentence: str
) -> None:
    with pytest.warns(UserWarning, match=sentence) as caught:
        fresh(make, **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (SGLD, {"noise_level": -1.0}, "noise_level must be"),
        (SGLD, {"gradient_variance": 1.0}, "batch_size must be"),
        (SGLD, {"gradient_variance": -1.0, "batch_size": 2}, "gradient_variance must be"),
        (SGLD, {"gradient_variance": [torch.ones(3)], "batch_size": 2}, "parameter's shape"),
        (SGLD, {"optimize_over": "layer1"}, "optimize_over must hold"),
        (SGLD, {"optimize_over": [3]}, "optimize_over must have"),
        (SGNHT, {"diffusion_factor": 0.0}, "diffusion_factor must be"),
        (SGNHT, {"scheme": "euler"}, "'ding' or 'badodab'"),
        (RMSPropSGLD, {"freeze_after": 0}, "freeze_after must be a whole number"),
        (RMSPropSGLD, {"freeze_after": 3, "beta2": 1.0}, "beta2 must lie in"),
        (RMSPropSGLD, {"freeze_after": 3, "initial_scale": 1.0}, "pass bias_correction=False"),
        (RMSPropSGLD, {"freeze_after": 3, "initial_scale": -1.0}, "initial_scale must be"),
        (RMSPropSGLD, {"freeze_after": 3, "bias_correction": 1}, "must be True or False; got 1"),
        (LMSGLD, {"preconditioner": [torch.zeros(D)]}, "preconditioner must be positive"),
        (LMSGLD, {"nbeta": lambda _: math.nan}, r"nbeta\(step\) must be"),
    ],
)
def test_options_of_single_samplers_are_checked(
    make: type[Sampler], options: dict[str, object], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        step(*fresh(make, **options), 1.0)


def test_what_was_not_asked_for_is_not_there() -> None:
    sampler, p = fresh(SGLD)
    step(sampler, p, 1.0)
    assert sampler.metrics() == {}
    for name in ("noise", "drift", "noise_norm", "localization_loss"):
        with pytest.raises(AttributeError, match="from the first step on"):
            getattr(sampler, name)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "mala"])
def test_reading_changes_no_bit(name: str) -> None:
    finals = []
    frozen = {"freeze_after": 2} if name in ("rmsprop_sgld", "adam_sgld") else {}
    for asked in ({}, {"grad_norm": True, "weight_norm": True, "distance": True}):
        sampler, p = fresh(SAMPLERS[name], localization=2.0, **frozen, **asked)
        step(sampler, p, 1.0, steps=4)
        finals.append(p.detach().clone())
    assert torch.equal(*finals)


def test_reading_noise_and_drift_changes_no_bit() -> None:
    finals = []
    for asked in ({}, {"save_noise": True, "noise_norm": True, "save_mala_vars": True}):
        sampler, p = fresh(SGLD, localization=2.0, **asked)
        step(sampler, p, 1.0, steps=4)
        finals.append(p.detach().clone())
    assert torch.equal(*finals)


def test_norms_run_over_the_trainable_entries_of_the_groups_that_ask() -> None:
    params = [torch.nn.Parameter(torch.full((2,), float(v))) for v in (1, 2, 4)]
    groups = [
        {"params": params[:1], "weight_norm": True},
        {"params": params[1:2]},
        {"params": params[2:], "weight_norm": True, "optimize_over": torch.tensor([True, False])},
    ]
    sampler = SGLD(groups, nbeta=2.0)
    sampler.step()
    assert float(sampler.weight_norm) == pytest.approx(math.sqrt(1 + 1 + 16))


def test_mala_needs_a_closure_and_single_precision() -> None:
    with pytest.raises(ConfigError, match="needs a closure"):
        fresh(MALA)[0].step()
    with pytest.raises(ConfigError, match="half precision"):
        MALA([torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], nbeta=2.0)
    with pytest.raises(ConfigError, match="no box"):
        MALA(
            [{"params": [torch.nn.Parameter(torch.zeros(3))], "bounding_box_size": 1.0}], nbeta=2.0
        )


def test_an_acceptance_is_refused_where_the_step_is_no_langevin_proposal() -> None:
    for options in ({"bounding_box_size": 1.0}, {"nbeta": lambda _: 2.0}):
        sampler, p = fresh(SGLD, **options)
        p.grad = torch.zeros_like(p)
        with pytest.raises(ConfigError, match="plain Langevin"):
            sampler.side(torch.tensor(0.0))
