import numpy as np
import pytest

from distsampler.data.batches import BatchStream, HopStream


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


def test_every_example_is_as_likely_at_every_step() -> None:
    """Of unequal shards: one example of each batch, once a visit, is a uniform one."""
    sizes, visits = (1, 3, 8), 60_000
    stream = HopStream(0, 0, sizes, 1, hop_every=2)
    rows = [int(stream.indices(2 * visit + 1)[0]) for visit in range(visits)]
    counts = np.bincount(rows, minlength=12)
    error = np.sqrt(visits / 12 * 11 / 12)
    assert np.abs(counts - visits / 12).max() < 5 * error
    assert len(counts) == 12


def test_a_visit_lasts_hop_every_steps_and_batches_stay_in_its_shard() -> None:
    stream = HopStream(3, 1, (10, 20, 30), 8, hop_every=7)
    again = HopStream(3, 1, (10, 20, 30), 8, hop_every=7)
    shards = [stream.shard(step) for step in range(700)]
    assert [again.shard(step) for step in range(699, -1, -1)] == shards[::-1]
    assert all(len({*shards[at : at + 7]}) == 1 for at in range(0, 700, 7))
    assert {*shards} == {0, 1, 2}
    for step in range(200):
        start, stop = stream.span(step)
        rows = stream.indices(step)
        assert start <= rows.min() <= rows.max() < stop
        assert np.array_equal(again.indices(step), rows)
    other = HopStream(3, 2, (10, 20, 30), 8, hop_every=7)
    assert [other.shard(step) for step in range(700)] != shards
