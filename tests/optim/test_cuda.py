"""What only a GPU can show: no waiting for it, graphs, another device's stream."""

import copy

import pytest
import torch

from distsampler.optim import SAMPLERS, Sampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NAMES = [name for name in SAMPLERS if name != "mala"]
READ = {"grad_norm": True, "weight_norm": True, "distance": True}


def build(name: str, device: str, **options: object) -> tuple[Sampler, torch.nn.Parameter]:
    p = torch.nn.Parameter(torch.zeros(1_000, device=device))
    frozen = {"freeze_after": 2} if name in ("rmsprop_sgld", "adam_sgld") else {}
    source = torch.Generator(device).manual_seed(0)
    options = {"lr": 1e-3, "nbeta": 2.0, "localization": 1.0, **frozen, **options}
    p.grad = torch.ones_like(p)
    return SAMPLERS[name]([p], generator=source, **options), p


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    mask = torch.arange(1_000, device="cuda") % 2 == 0
    sampler, _ = build(name, "cuda", optimize_over=[mask], bounding_box_size=1.0, **READ)
    sampler.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            sampler.step()
            sampler.metrics()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_a_step_can_be_captured_in_a_graph(name: str) -> None:
    sampler, p = build(name, "cuda")
    for _ in range(4):
        sampler.step()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(sampler.generator)
    with torch.cuda.graph(graph):
        sampler.step()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(p.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1] - seen[0], seen[2] - seen[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_state_from_the_cpu_continues_on_the_gpu_with_the_same_law(name: str) -> None:
    here, _ = build(name, "cpu")
    here.step()
    there, p = build(name, "cuda")
    there.load_state_dict(copy.deepcopy(here.state_dict()))
    there.step()
    assert torch.isfinite(p).all()
    assert all(v.is_cuda for v in there.state[p].values())
