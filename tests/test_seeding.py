import numpy as np
import pytest

from distsampler.seeding import BatchStream, noise_seed, probe_rows


def test_no_two_of_a_million_chains_share_the_32_bits_that_torch_keeps() -> None:
    seeds = [noise_seed(3, chain) & 0xFFFFFFFF for chain in range(0, 1_000_000, 997)]
    assert len(set(seeds)) == len(seeds)
    assert noise_seed(3, 0) != noise_seed(4, 0)


def test_torch_keeps_only_32_bits_of_a_seed() -> None:
    """Why noise_seed counts upwards: were torch to change, this would say so."""
    import torch

    one, other = (torch.Generator().manual_seed(s) for s in (5, 5 + 2**32))
    assert torch.equal(torch.randn(4, generator=one), torch.randn(4, generator=other))


@pytest.mark.parametrize("epochs", [False, True])
def test_batches_are_a_function_of_the_step(epochs: bool) -> None:
    forwards = BatchStream(0, 1, 1000, 16, epochs=epochs)
    backwards = BatchStream(0, 1, 1000, 16, epochs=epochs)
    steps = range(200)
    there = [forwards.indices(step).copy() for step in steps]
    back = [backwards.indices(step).copy() for step in reversed(steps)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(there, back, strict=True))


def test_chains_draw_their_own_batches() -> None:
    one, other = (BatchStream(0, chain, 1000, 64, epochs=False) for chain in (0, 1))
    assert not np.array_equal(one.indices(0), other.indices(0))


def test_an_epoch_visits_no_example_twice() -> None:
    stream = BatchStream(0, 0, 100, 16, epochs=True)
    epoch = np.concatenate([stream.indices(step) for step in range(6)])
    assert len(np.unique(epoch)) == 96
    next_epoch = np.concatenate([stream.indices(step) for step in range(6, 12)])
    assert not np.array_equal(epoch, next_epoch)


def test_batches_with_replacement_are_uniform() -> None:
    stream = BatchStream(0, 0, 10, 100, epochs=False)
    counts = np.bincount(np.concatenate([stream.indices(s) for s in range(1000)]), minlength=10)
    assert np.abs(counts - 10_000).max() < 5 * np.sqrt(10_000 * 0.9)


def test_the_probe_is_a_fixed_subset() -> None:
    rows = probe_rows(0, 1000, 256)
    assert len(np.unique(rows)) == 256
    assert np.array_equal(rows, probe_rows(0, 1000, 256))
    assert not np.array_equal(rows, probe_rows(1, 1000, 256))
    assert np.array_equal(probe_rows(0, 5, 256), np.arange(5))
