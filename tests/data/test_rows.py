import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from distsampler.data.rows import as_rows
from distsampler.errors import ConfigError

ROWS = np.array([4, 0, 4])
X, Y = torch.arange(30.0).reshape(10, 3), torch.arange(10)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Squares(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        Pair(X, Y),
        (X.numpy(), Y.numpy()),
        TensorDataset(X, Y),
        Subset(TensorDataset(X.flip(0), Y.flip(0)), range(9, -1, -1)),
        Squares(),
        [(x, int(y)) for x, y in zip(X, Y, strict=True)],
        DataLoader(Squares(), batch_size=5, shuffle=True),
        DataLoader(TensorDataset(X, Y), batch_size=5),
    ],
    ids=lambda data: type(data).__name__,
)
def test_every_kind_of_data_gives_the_same_batch(data: object) -> None:
    rows = pickle.loads(pickle.dumps(as_rows(data)))
    assert len(rows) == 10
    x, y = rows.take(ROWS)
    assert torch.equal(x, X[ROWS])
    assert torch.equal(y, Y[ROWS])
    assert rows.digest() == as_rows(data).digest()


def test_dicts_and_single_tensors_keep_their_form() -> None:
    batch: Any = as_rows({"x": X, "y": Y}).take(ROWS)
    assert torch.equal(batch["y"], Y[ROWS])
    single: Any = as_rows(X).take(ROWS)
    assert torch.equal(single, X[ROWS])


def test_bfloat16_survives_numpy() -> None:
    batch: Any = as_rows(X.bfloat16()).take(ROWS)
    assert batch.dtype == torch.bfloat16
    assert torch.equal(batch, X.bfloat16()[ROWS])


def test_read_only_memory_is_read_without_a_copy_or_a_warning() -> None:
    rows: Any = as_rows(X.clone())
    array = rows._tree.array
    array.flags.writeable = False
    assert torch.equal(rows.take(ROWS), X[ROWS])
    assert rows._tensors.data_ptr() == array.ctypes.data


def test_other_data_have_another_digest() -> None:
    changed = X.clone()
    changed[9, 2] += 1
    assert as_rows(X).digest() != as_rows(changed).digest()


def test_a_sampler_that_is_not_taken_is_said() -> None:
    loader = DataLoader(Squares(), sampler=WeightedRandomSampler([1.0] * 10, 10))
    with pytest.warns(UserWarning, match="WeightedRandomSampler is not used"):
        as_rows(loader)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (Stream(), "must be map-style"),
        (DataLoader(Stream()), "must be map-style"),
        (torch.empty(0, 3), "at least one example, got none"),
        ([], "at least one example, got none"),
        ((X, Y[:3]), r"first dimensions \[10, 3\]"),
        (torch.tensor(1.0), "one row an example"),
        ((X, "labels"), "must be tensors, got str"),
        (3.5, "got float"),
    ],
)
def test_what_is_no_data_is_refused(data: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        as_rows(data)
