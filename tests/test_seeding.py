import numpy as np

from distsampler.seeding import noise_seed, probe_rows


def test_no_two_of_a_million_chains_share_the_32_bits_that_torch_keeps() -> None:
    seeds = [noise_seed(3, chain) & 0xFFFFFFFF for chain in range(0, 1_000_000, 997)]
    assert len(set(seeds)) == len(seeds)
    assert noise_seed(3, 0) != noise_seed(4, 0)


def test_torch_keeps_only_32_bits_of_a_seed() -> None:
    """Why noise_seed counts upwards: were torch to change, this would say so."""
    import torch

    one, other = (torch.Generator().manual_seed(s) for s in (5, 5 + 2**32))
    assert torch.equal(torch.randn(4, generator=one), torch.randn(4, generator=other))


def test_the_probe_is_a_fixed_subset() -> None:
    rows = probe_rows(0, 1000, 256)
    assert len(np.unique(rows)) == 256
    assert np.array_equal(rows, probe_rows(0, 1000, 256))
    assert not np.array_equal(rows, probe_rows(1, 1000, 256))
    assert np.array_equal(probe_rows(0, 5, 256), np.arange(5))
