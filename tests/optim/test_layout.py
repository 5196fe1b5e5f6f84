"""Memory: one small buffer however large the model, and no hidden copies."""

import pytest
import torch
from torch import Tensor

from distsampler.errors import ConfigError
from distsampler.optim import SAMPLERS, SGLD
from distsampler.optim import layout as layouts


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def test_every_chunk_of_every_group_shares_one_buffer_below_the_limit() -> None:
    groups = [{"params": parameters((3_000_000,), (5,), (7, 11))}, {"params": parameters((900, 3))}]
    sampler = SGLD(groups, nbeta=2.0)
    sampler.step()
    chunks = [chunk for layout in sampler._current_layouts() for chunk in layout.chunks]
    assert len(chunks) == 4
    assert len({chunk.flat.data_ptr() for chunk in chunks}) == 1
    assert (
        max(c.flat.untyped_storage().nbytes() for c in chunks) <= layouts.NOISE_CHUNK_BYTES["cpu"]
    )
    assert layouts.CHUNK_BYTES_ELSEWHERE < 64_000_000


def test_a_cut_parameter_moves_in_every_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layouts.NOISE_CHUNK_BYTES, "cpu", 4 * 10)
    (p,) = parameters((7, 9))
    sampler = SGLD([p], nbeta=2.0, save_noise=True)
    sampler.step()
    assert (p != 0).all()
    torch.testing.assert_close(p.detach(), 0.1 * sampler.noise[0][0])


def test_precisions_may_be_mixed_in_a_group() -> None:
    params = parameters((3,)) + parameters((3,), dtype=torch.float64)
    params += parameters((3,), dtype=torch.bfloat16)
    sampler = SGLD(params, nbeta=2.0, localization=1.0, bounding_box_size=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    sampler.step()
    assert all((p != 0).all() for p in params)


def test_a_step_allocates_less_than_the_parameters() -> None:
    params = parameters((2_000_000,), (1_000_000,))
    for p in params:
        p.grad = torch.ones_like(p)
    sampler = SGLD(params, nbeta=2.0, localization=1.0, weight_decay=1.0)
    sampler.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        sampler.step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < 10_000


def test_weights_replaced_behind_the_samplers_back_are_followed() -> None:
    """vector_to_parameters and Module.to rebind ``p.data``: no stale memory may be written."""
    (p,) = parameters((6,))
    sampler = SGLD([p], lr=1e-4, nbeta=2.0)
    sampler.step()
    p.data = torch.full((6,), 5.0)
    sampler.step()
    assert ((p - 5).abs() < 0.1).all()
    assert (p != 5).all()


def test_a_changed_mask_takes_effect_at_once() -> None:
    (p,) = parameters((6,))
    sampler = SGLD([p], nbeta=2.0)
    sampler.step()
    sampler.param_groups[0]["optimize_over"] = [torch.arange(6) < 3]
    before = p.detach().clone()
    sampler.step()
    assert torch.equal(p != before, torch.arange(6) < 3)


@pytest.mark.filterwarnings("ignore:freeze_after is None")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_parameter_frozen_after_the_first_step_stays_until_it_is_freed(name: str) -> None:
    params = parameters((3,), (4,))
    sampler = SAMPLERS[name](params, lr=1e-4, nbeta=2.0)

    def loss() -> Tensor:
        sampler.zero_grad()
        found = torch.stack([p.square().sum() for p in params]).sum()
        found.backward()
        return found

    for free in (True, False, True):
        params[1].requires_grad_(free)
        before = [p.detach().clone() for p in params]
        sampler.step(loss)
        moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
        assert moved == [True, free]


def test_a_parameter_masked_out_whole_costs_no_noise() -> None:
    left, right = parameters((4,), (5,))
    sampler = SGLD([left, right], nbeta=2.0, optimize_over=[None, torch.zeros(5).bool()])
    sampler.step()
    (layout,) = sampler._current_layouts()
    assert layout.dimension == layout.chunks[0].flat.numel() == 4
    assert not right.any()


def test_a_group_without_anything_to_move_is_harmless() -> None:
    (p,) = parameters((4,))
    mask = torch.zeros(4).bool()
    sampler = SGLD([p], nbeta=2.0, optimize_over=mask, save_noise=True, weight_norm=True)
    sampler.step()
    assert not p.any()
    assert not sampler.noise[0][0].any()


def test_a_model_converted_after_the_sampler_was_made_is_refused() -> None:
    model = torch.nn.Linear(3, 2)
    sampler = SGLD(model.parameters(), nbeta=2.0)
    sampler.step()
    model.bfloat16()
    with pytest.raises(ConfigError, match="keep their precision"):
        sampler.step()
