import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import distsampler as ds
from distsampler.data.shards import ShardedRows, cut
from distsampler.errors import ConfigError
from distsampler.seeding import probe_rows
from tests import problems
from tests.assertions import assert_same

X, Y = torch.arange(60.0).reshape(20, 3), torch.arange(20)


class Numbers(Dataset[tuple[torch.Tensor, int]]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return X[index], int(Y[index])


def hop(**fields: Any) -> ds.RunConfig:
    return problems.config(**{"data_mode": "hop", "hop_every": 2, **fields})


def numbers(rows: ShardedRows, asked: Any) -> list[int]:
    """Which of the original rows come, seen by their second tensor."""
    batch: Any = rows.take(np.asarray(asked))
    assert torch.equal(batch[0], X[batch[1]])
    return [int(y) for y in batch[1]]


@pytest.mark.parametrize("data", [(X, Y), Numbers()], ids=["tensors", "dataset"])
def test_rows_are_dealt_to_shards_once_and_by_the_seed(data: object) -> None:
    rows = cut(data, hop(shards=3))
    assert rows.shard_sizes == (7, 7, 6)
    assert rows.dealt
    everything = numbers(rows, np.arange(20))
    assert sorted(everything) == list(range(20))
    assert everything != list(range(20))
    assert numbers(cut(data, hop(shards=3)), np.arange(20)) == everything
    assert numbers(cut(data, hop(shards=3, seed=1)), np.arange(20)) != everything


def test_given_shards_are_taken_as_they_are_unequal_ones_too() -> None:
    data = [(X[:5], Y[:5]), TensorDataset(X[5:6], Y[5:6]), (X[6:], Y[6:])]
    rows = cut(data, hop())
    assert (rows.shard_sizes, rows.spans) == ((5, 1, 14), ((0, 5), (5, 6), (6, 20)))
    assert not rows.dealt
    assert numbers(rows, [19, 0, 5, 4, 19]) == [19, 0, 5, 4, 19]


def test_a_process_holds_one_shard_at_a_time() -> None:
    loads: list[int] = []

    def make(index: int, count: int) -> object:
        loads.append(index)
        assert count == 4
        return X[5 * index : 5 * index + 5], Y[5 * index : 5 * index + 5]

    rows = cut(make, hop(shards=4, probe=8))
    assert loads == [0, 1, 2, 3] * 2  # sizes, then the examples that are kept
    loads.clear()
    kept = probe_rows(0, 20, 8)
    assert numbers(rows, kept) == kept.tolist()
    assert numbers(rows, [1, 0]) == [1, 0]
    assert loads == []  # neither the probe nor the first rows need a shard
    for asked in ([5, 9], [8, 8], [11, 12], [6, 7]):
        assert numbers(rows, asked) == asked
    assert loads == [1, 2, 1]


def test_shards_do_not_travel_with_a_recipe_that_keeps_them_elsewhere() -> None:
    big = [(torch.zeros(1000, 100), torch.zeros(1000, dtype=torch.long)) for _ in range(3)]
    rows = cut(big, hop())
    elsewhere: list[object] = []
    located = rows.located(lambda shard: elsewhere.append(shard) or _Place(len(elsewhere) - 1))
    assert len(elsewhere) == 3
    assert len(pickle.dumps(located)) < 200_000 < len(pickle.dumps(rows))
    assert located.digest() == rows.digest()


class _Place:
    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self) -> Any:
        raise AssertionError("nothing was asked for")


def test_digests_tell_other_data_and_another_deal() -> None:
    given = [(X[:5], Y[:5]), (X[5:], Y[5:])]
    digests = {
        cut((X, Y), hop(shards=2)).digest(),
        cut((X, Y), hop(shards=2, seed=1)).digest(),
        cut((X + 1, Y), hop(shards=2)).digest(),
        cut((X, Y), hop(shards=3)).digest(),
        cut(given, hop()).digest(),
        cut(given[::-1], hop()).digest(),
    }
    assert len(digests) == 6
    assert cut(Numbers(), hop(shards=2)).digest() != cut(Numbers(), hop(shards=2, seed=1)).digest()


@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        ((X, Y), {}, "needs shards"),
        ((X, Y), {"shards": 21}, "at most the 20 examples, got 21"),
        ([(X, Y), (X, Y)], {"shards": 3}, "a list of 2 shards, and shards=3"),
        ([(X, Y), (X[:0], Y[:0])], {}, "at least one example"),
        ([(X, Y), [(1.0, "a")]], {}, "made of tensors, got a str in it"),
        (lambda index, count: (X, Y), {}, "needs shards"),
    ],
)
def test_shards_that_cannot_be_are_refused(data: object, fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cut(data, hop(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shards": 2}, "shards belongs to data_mode='hop'"),
        ({"hop_every": 2}, "hop_every belongs to data_mode='hop'"),
        (
            {"data_mode": "hop", "shards": 2, "batches": "epoch"},
            "batches='epoch' walks through all",
        ),
        (
            {"data_mode": "hop", "sampler": ds.SamplerConfig(correct_heat=True)},
            "correct_heat needs batches from all data",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ds.RunConfig(**fields)


def test_pinned_chains_are_refused_with_their_bias() -> None:
    config = problems.config(data_mode="pinned", shards=16)
    model, data = problems.regression(n=1000)
    with pytest.raises(ConfigError, match=r"217% too large on all data"):  # 15 / log 1000
        ds.sample(model, data, problems.squared_error, config, pool=ds.SerialPool())


def test_a_run_that_hops_is_the_same_however_it_is_cut(tmp_path: Path) -> None:
    model, data = problems.regression(n=400)
    runs = []
    for block in (3, 50):
        config = hop(shards=5, placement={"block": block})
        store = tmp_path / str(block)
        args = (model, data, problems.squared_error, config)
        runs.append(ds.sample(*args, store=store, pool=ds.SerialPool(), quiet=True))
    assert_same(*runs)


def test_one_shard_is_the_data(tmp_path: Path) -> None:
    """Its anchor is that of the data; only which rows come when differs."""
    model, data = problems.regression(n=3000)
    both = [
        ds.sample(model, data, problems.squared_error, config, pool=ds.SerialPool(), quiet=True)
        for config in (problems.config(), hop(shards=1))
    ]
    assert both[1].facts["init_loss"] == pytest.approx(both[0].facts["init_loss"], rel=1e-12)
    assert both[1].facts["hop_bias"] == 0.0


def test_a_run_is_not_continued_on_other_shards(tmp_path: Path) -> None:
    model, data = problems.regression(n=400)
    args = (tmp_path, model, data, problems.squared_error)
    ds.sample(*args[1:], hop(shards=5), store=tmp_path, pool=ds.SerialPool(), quiet=True)
    with pytest.raises(ds.StoreError, match=r"config\.shards: stored 5, now 4"):
        ds.sample(
            *args[1:],
            hop(shards=4),
            store=tmp_path,
            resume="must",
            pool=ds.SerialPool(),
            quiet=True,
        )


def test_batch_means_hop_too() -> None:
    model, data = problems.regression(n=2500)
    args = (model, data, problems.mean_squared_error)
    fields: Any = {"draws": 400, "sampler": ds.SamplerConfig(lr=2e-4, localization=10.0)}
    hopping, whole = (
        ds.sample(*args, config, pool=ds.SerialPool(), quiet=True)
        for config in (hop(shards=2, **fields), problems.config(**fields))
    )
    assert hopping.facts["init_loss"] == pytest.approx(whole.facts["init_loss"], rel=1e-6)
    excess = [
        float(run.posterior["probe_loss"].mean()) - run.facts["probe_init_loss"]
        for run in (hopping, whole)
    ]
    assert excess[0] == pytest.approx(excess[1], rel=0.3)
