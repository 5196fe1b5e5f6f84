"""The demo's user code: real digits, a seeded network, a per-example loss, a minimum."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distsampler.references import find_callable


@pytest.fixture(scope="module")
def mnist() -> SimpleNamespace:
    """The callables as a config file finds them."""
    folder = Path(__file__).parents[2] / "scripts/examples"
    names = ("accuracy", "data", "gradient_norm", "loss", "network", "trained_network")
    return SimpleNamespace(**{n: find_callable("model", f"mnist.py:{n}", folder) for n in names})


def test_the_digits_are_split_into_4000_and_1000_that_share_none(mnist: SimpleNamespace) -> None:
    images, targets = mnist.data("train")
    held_out, held_out_targets = mnist.data("test")
    assert images.shape == (4000, 1, 28, 28)
    assert held_out.shape == (1000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(
        torch.bincount(torch.cat([targets, held_out_targets])), torch.full((10,), 500)
    )
    rows = torch.cat([images, held_out]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 5000


def test_the_network_is_a_function_of_the_seed_and_leaves_the_global_generator(
    mnist: SimpleNamespace,
) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (mnist.network(seed)[0].weight for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert sum(p.numel() for p in mnist.network().parameters()) == 5702


def test_the_loss_is_one_value_per_example(mnist: SimpleNamespace) -> None:
    images, targets = mnist.data("test")
    model = mnist.network()
    losses = mnist.loss(model, (images[:7], targets[:7]))
    alone = [mnist.loss(model, (images[i : i + 1], targets[i : i + 1])) for i in range(7)]
    torch.testing.assert_close(losses, torch.cat(alone))


@pytest.mark.slow
def test_training_finds_a_minimum_and_keeps_the_threads(
    mnist: SimpleNamespace, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    weights = tmp_path / "weights.pt"
    model = mnist.trained_network(weights)
    assert torch.get_num_threads() == threads
    assert mnist.accuracy(model) > 0.93
    mean_loss, gradient = mnist.gradient_norm(model)
    assert mean_loss < 0.02
    assert gradient < 0.03
    again = mnist.trained_network(weights)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
