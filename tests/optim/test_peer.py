"""Against devinterp 1.3.2, installed beside the project and not in it; in float64 to 1e-12."""

import importlib.util
import subprocess
import sys
import warnings
from importlib.machinery import PathFinder
from types import ModuleType

import pytest
import torch
from torch import Tensor

from distsampler.optim import SGLD, SGNHT
from distsampler.truth import discretised_laws
from tests.targets import Quadratic, parameter, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*noise_level", "ignore:.*deprecated"),
]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Its optimizers, which need torch and numpy only."""
    folder = tmp_path_factory.mktemp("peer")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*install, "devinterp==1.3.2"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"devinterp 1.3.2 cannot be had: {done.stderr.strip()[-200:]}")
    spec = PathFinder.find_spec("devinterp", [str(folder)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = package = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(package)
        return importlib.import_module("devinterp.optim")


OPTIONS = [
    {},
    {"lr": 1e-3},
    {"noise_level": 0.5},
    {"weight_decay": 2.0},
    {"localization": 3.0},
    {"nbeta": 20.0},
    {"bounding_box_size": 0.05},
    {"optimize_over": torch.arange(12).reshape(3, 4) % 2 == 0},
    {"localization": 3.0, "weight_decay": 2.0, "bounding_box_size": 0.3},
    {"save_noise": True},
    {"noise_norm": True, "grad_norm": True, "weight_norm": True, "distance": True},
    {"save_mala_vars": True, "localization": 3.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "defaults")
def test_sgld_walks_as_the_peers_does_on_the_same_noise(
    peer: ModuleType, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    chosen = {"lr": 1e-2, "nbeta": 5.0, **options}
    source = torch.Generator().manual_seed(2)
    sampler = SGLD([ours], generator=source, **{**chosen, "save_noise": True})
    other = peer.SGLD([theirs], **chosen)
    monkeypatch.setattr(torch, "normal", lambda mean, std, **_: std * sampler.noise[0][0])
    for _ in range(100):
        for p, optimizer in ((ours, sampler), (theirs, other)):
            p.grad = torch.sin(3 * p.detach())
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    if "save_mala_vars" in options:
        torch.testing.assert_close(sampler.drift[0][0], other.dws[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sampler.localization_loss, other.localization_loss)


def energy(optimizer: torch.optim.Optimizer, w: Tensor, target: Quadratic, nbeta: float) -> float:
    """Mean of nbeta L, scaled to 200 directions."""
    total, kept = 0.0, 0
    for step in range(4_000):
        run(optimizer, w, target.gradient, 1)
        if step >= 1_000 and step % 10 == 0:
            total += nbeta * float(target.loss(w.detach()))
            kept += 1
    return total / kept * 200 / w.numel()


def test_sgnht_has_the_peers_limit_and_another_first_order_law(peer: ModuleType) -> None:
    """Damping before or after the gradient: 200 directions return 95.0 or 105 at A = .1."""
    target, found = Quadratic(torch.ones(20_000)), []
    options = {"lr": 0.01, "diffusion_factor": 0.1, "nbeta": 10.0}
    source = {"generator": torch.Generator().manual_seed(0)}
    for make, extra in ((SGNHT, source), (peer.SGNHT, {})):
        w = parameter(20_000)
        torch.manual_seed(0)  # the peer's only source
        found.append(energy(make([w], **options, **extra), w, target, 10.0))
    ours, theirs = found
    before = discretised_laws.sgnht(0.01, [10.0], 0.1)[0][0] * 10
    after = discretised_laws.sgnht(0.01, [10.0], 0.1, damped_after=True)[0][0] * 10
    assert ours == pytest.approx(100 * before, abs=0.5)
    assert theirs == pytest.approx(100 * after, abs=0.5)
    assert ours < 96
    assert theirs > 104


def test_the_peers_factory_for_sgnht_is_wrong_by_its_known_factor(peer: ModuleType) -> None:
    """It applies neither momentum nor friction, and returns about 2A of the truth."""
    target, w = Quadratic(torch.ones(20_000)), parameter(20_000)
    torch.manual_seed(0)
    broken = peer.SGMCMC.sgnht([w], lr=0.01, diffusion_factor=0.01, nbeta=10.0)
    assert energy(broken, w, target, 10.0) == pytest.approx(2.05, abs=0.05)
