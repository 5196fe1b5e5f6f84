"""Every kind of data works as the plain tensors do, in every path, or ends in one sentence."""

import pickle
import warnings
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import distsampler as ds
from distsampler.data.kinds import as_rows
from distsampler.data.shards import cut
from distsampler.data.trees import tensors_of, to_device
from distsampler.errors import ConfigError
from tests.problems import config, regression, squared_error

N = 24
X, Y = torch.arange(3.0 * N).reshape(N, 3), torch.arange(N)
x, y = X.numpy(), Y.numpy()
ROWS = np.array([4, 0, 4])
HOP = ds.RunConfig(data_mode="hop", shards=2, probe=8)


class Pair(NamedTuple):
    x: object
    y: object


class Encoding(UserDict[str, object]):
    """As the BatchEncoding of tokenizers: a mapping that is no dict, whose keys are attributes."""

    def __getattr__(self, name: str) -> object:
        if name in self.__dict__.get("data", {}):
            return self.data[name]
        raise AttributeError(name)


@dataclass
class Example:
    x: object
    y: object


class Items(Dataset[Any]):
    """A dataset of what a function gives at an index."""

    def __init__(self, item: Any, n: Any = N) -> None:
        self.item, self.n = item, n

    def __len__(self) -> int:
        return self.n  # type: ignore[no-any-return]

    def __getitem__(self, index: Any) -> Any:
        return ITEMS[self.item](index)


ITEMS: dict[str, Any] = {
    "tensors": lambda i: (X[i], Y[i]),
    "numbers": lambda i: (X[i], int(Y[i])),
    "numpy": lambda i: (x[i], y[i]),
    "named": lambda i: Pair(X[i], Y[i]),
    "encoding": lambda i: Encoding(x=X[i], y=Y[i]),
    "gradient": lambda i: (X[i].clone().requires_grad_(), Y[i]),
    "none": lambda i: {"x": X[i], "mask": None},
    "lengths": lambda i: X[i][: 2 + i % 2],
    "example": lambda i: Example(X[i], Y[i]),
    "text": lambda i: ("no" * i, int(Y[i])),
    "backwards": lambda i: x[i][::-1],
    "fails at 17": lambda i: (X[[i for i in range(N) if i != 17].index(i)], Y[i]),
}


class Column(Items):
    """As a datasets.Dataset: examples by number, columns by name, many by a list or a slice."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return {"x": X, "y": Y}[index]
        return {"x": X[index], "y": Y[index]}

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Shifted(TensorDataset):
    """Tensors whose examples are not their rows."""

    def __getitem__(self, index: Any) -> Any:
        first, second = super().__getitem__(index)
        return first - 1, second


class Frame:
    """As a data frame or a series of a library that may not be installed."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape = array, array.shape

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, name: str) -> Any:
        raise KeyError(name)

    def to_numpy(self) -> Any:
        return self.array


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def pairs(examples: list[Any]) -> Encoding:
    """A collate_fn that makes what tokenizers make."""
    return Encoding(
        x=torch.stack([e[0] for e in examples]), y=torch.stack([e[1] for e in examples])
    )


def odd_strides(first: int) -> Tensor:
    """One column, of which no step ever leads to the next: any stride is allowed there."""
    return torch.as_strided(X.clone(), (N, 1), (first, 100))


def expanded() -> Tensor:
    return torch.ones(1, 3).expand(N, 3)


def big_endian(array: Any) -> Any:
    return array.astype(array.dtype.newbyteorder(">"))


def packed() -> Any:
    """X as a field that does not lie at a multiple of its size."""
    array = np.zeros(N, dtype=[("flag", "i1"), ("x", "f4", 3), ("y", "i8")])
    array["x"], array["y"] = x, y
    return array["x"], array["y"]


def masked(*entries: int) -> Any:
    return np.ma.array(x[:, 0], mask=[i in entries for i in range(N)])


def quiet(make: Callable[[], Any]) -> Any:
    """What is made, without torch's word that it is a beta or deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def object_of(array: Any) -> Any:
    return array.astype(object)


LOADER = {"batch_size": 5}
WORKS: dict[str, Any] = {
    "tuple of tensors": (X, Y),
    "named tuple": Pair(X, Y),
    "dict": {"x": X, "y": Y},
    "OrderedDict": OrderedDict(x=X, y=Y),
    "UserDict": UserDict({"x": X, "y": Y}),
    "BatchEncoding of tensors": Encoding(x=X, y=Y),
    "BatchEncoding of arrays": Encoding(x=x, y=y),
    "read-only mapping": MappingProxyType({"x": X, "y": Y}),
    "arrays": (x, y),
    "negative strides": (x[::-1][::-1].copy()[::-1][::-1], y[::-1].copy()[::-1]),
    "negative stride of one column": (np.flip(np.flip(x, 1).copy(), 1), y),
    "unaligned arrays": packed(),
    "every second row": (np.repeat(x, 2, 0)[::2], np.repeat(y, 2)[::2]),
    "Fortran order": (np.asfortranarray(x), y),
    "big-endian arrays": (big_endian(x), big_endian(y)),
    "masked array without masked entries": (np.ma.array(x), y),
    "data frames": (Frame(x), Frame(y)),
    "dict of data frames": {"x": Frame(x), "y": Frame(y)},
    "not contiguous": (X.t().contiguous().t(), Y),
    "requires a gradient": (X.clone().requires_grad_(), Y),
    "inference tensors": torch.inference_mode()(lambda: (X.clone(), Y.clone()))(),
    "TensorDataset": TensorDataset(X, Y),
    "subclass of TensorDataset": Shifted(X + 1, Y),
    "Subset of a TensorDataset": Subset(TensorDataset(X.flip(0), Y.flip(0)), range(N)[::-1]),
    "Subset by an array": Subset(TensorDataset(X, Y), np.arange(N)),  # type: ignore[arg-type]
    "Subset of a Subset": Subset(Subset(Items("tensors"), range(N)), list(range(N))),
    "ConcatDataset": ConcatDataset(
        [TensorDataset(X[:9], Y[:9]), Subset(Items("tensors"), range(9, N))]
    ),
    "StackDataset": StackDataset(X, Y),
    "items of tensors": Items("tensors"),
    "items with numbers": Items("numbers"),
    "items of arrays and numpy scalars": Items("numpy"),
    "items that are named tuples": Items("named"),
    "items that are mappings": Items("encoding"),
    "items that require a gradient": Items("gradient"),
    "as a datasets.Dataset": Column("tensors"),
    "list of examples": [(a, int(b)) for a, b in zip(X, Y, strict=True)],
    "DataLoader": DataLoader(Items("tensors"), **LOADER),
    "DataLoader of tensors, shuffled": DataLoader(TensorDataset(X, Y), shuffle=True, **LOADER),
    "DataLoader with drop_last": DataLoader(Items("tensors"), drop_last=True, **LOADER),
    "DataLoader whose collate_fn gives a BatchEncoding": DataLoader(
        Items("tensors"), collate_fn=pairs, **LOADER
    ),
}


def columns(batch: Any) -> tuple[Tensor, Tensor]:
    first, second = batch.values() if isinstance(batch, Mapping) else batch
    return first, second


@pytest.mark.parametrize("kind", WORKS)
def test_a_kind_of_data_gives_what_plain_tensors_give(kind: str) -> None:
    data = WORKS[kind]
    here = as_rows(data)
    for rows in (here, pickle.loads(pickle.dumps(here))):
        first, second = columns(rows.take(ROWS))
        assert torch.equal(first, X[ROWS])
        assert first.dtype == torch.float32
        assert torch.equal(second, Y[ROWS])
        assert not first.requires_grad
    assert len(here) == N
    assert here.digest() == pickle.loads(pickle.dumps(here)).digest()
    if isinstance(data, tuple):
        assert here.digest() == as_rows((X, Y)).digest()


@pytest.mark.parametrize("kind", [kind for kind, data in WORKS.items() if type(data) is not list])
def test_a_kind_of_data_may_be_cut_into_shards(kind: str) -> None:
    rows = pickle.loads(pickle.dumps(cut(WORKS[kind], HOP)))
    first, second = columns(rows.take(np.arange(N)))
    assert torch.equal(first, X[second])
    assert torch.equal(second.sort().values, Y)


@pytest.mark.parametrize(
    "column",
    [
        odd_strides(1),
        odd_strides(3),
        expanded(),
        X[::2].repeat_interleave(2, 0),
        torch.zeros(N, 0),
        torch.complex(X, X).conj(),
        torch.complex(X, X).to(torch.complex64).imag,
        *(X.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn)),
        *(
            Y.to(dtype)
            for dtype in (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
        ),
    ],
    ids=lambda column: f"{column.dtype}, strides {column.stride()}",
)
def test_strides_and_types_of_tensors_change_no_bit(column: Tensor) -> None:
    plain = torch.empty(column.shape, dtype=column.dtype).copy_(column)
    rows = pickle.loads(pickle.dumps(as_rows((column, Y))))
    batch, wanted = rows.take(ROWS)[0], plain[torch.from_numpy(ROWS)]
    assert batch.dtype == column.dtype
    assert batch.stride() == wanted.stride()
    assert bytes(batch.view(torch.uint8).numpy()) == bytes(wanted.view(torch.uint8).numpy())
    assert rows.digest() == as_rows((plain, Y)).digest()
    dataset = TensorDataset(column, Y)
    assert as_rows(Subset(dataset, range(N))).digest() == rows.digest()


def test_a_single_row_of_any_stride_is_a_row() -> None:
    row = torch.as_strided(X.clone(), (1, 1), (7, 256))
    assert as_rows(row).digest() == as_rows(row.clone()).digest()
    assert as_rows([row[0]]).digest() == as_rows([row[0].clone()]).digest()


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8", "f2", "?", "c8", ">u2", "<i2", "f8"])
def test_arrays_of_every_number_keep_their_values(dtype: str) -> None:
    array = (y % 2).astype(dtype)
    (taken,) = as_rows((array[::-1],)).take(ROWS)  # type: ignore[misc]
    assert np.array_equal(taken.numpy(), array[::-1][ROWS])
    frozen = array.copy()
    frozen.flags.writeable = False
    assert len(as_rows(np.broadcast_to(frozen[:1], (N, 2)))) == len(as_rows(frozen)) == N


REFUSED: list[tuple[str, Any, list[str]]] = [
    ("columns in a list", [X, Y], ["list", "give a tuple, such as (X, y)", "torch.stack(data)"]),
    ("arrays in a list", [x, y], ["give a tuple"]),
    ("frames in a list", [Frame(x), Frame(y)], ["give a tuple"]),
    ("one tensor in a list", [X], ["give a tuple"]),
    ("None in items", Items("none"), ["'mask': None", "leave out", "collate_fn"]),
    ("None in a dict", {"x": X, "mask": None}, ["got NoneType at data['mask']: leave it out"]),
    ("items of unequal lengths", Items("lengths"), ["Tensor(2,), another Tensor(3,)", "collate_fn"]),
    ("items that are dataclasses", Items("example"), ["an example is Example", "collate_fn"]),
    ("items of negative strides", Items("backwards"), ["negative", "collate_fn"]),
    ("object array", object_of(x), ["data must hold numbers, got an array of object", "astype"]),
    ("object array in a dict", {"x": X, "y": object_of(y)}, ["data['y'] must hold numbers"]),
    ("array of texts", (X, y.astype(str)), ["data[1] must hold numbers", "encode the texts"]),
    ("array of times", (X, y.astype("M8[s]")), ["numbers", "astype('int64')"]),
    ("structured array", np.zeros(N, "i4,f4"), ["fields as a dict of arrays"]),
    ("long doubles", x.astype("longdouble"), ["numbers that torch has", "astype('float32')"]),
    ("masked entries", masked(3), ["masked entries", ".filled(value)"]),
    ("sparse tensor", (X.to_sparse(), Y), ["data[0] must be a dense tensor", ".to_dense()"]),
    ("nested tensor", quiet(lambda: torch.nested.nested_tensor([X, X], layout=torch.jagged)), ["pad it"]),
    ("quantised tensor", quiet(lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)), [".dequantize()"]),
    ("tensor without values", X.to("meta"), ["'meta'", "load it"]),
    ("0-d tensor", (X, torch.tensor(1.0)), ["data[1] has no dimension"]),
    ("unequal first dimensions", (X, Y[:3]), ["data[0] has 24, data[1] has 3"]),
    ("unequal in a dict", {"x": X, "y": Y[:3]}, ["data['x'] has 24, data['y'] has 3"]),
    ("empty tensors", (X[:0], Y[:0]), ["at least one example, got none"]),
    ("empty list", [], ["at least one example, got none"]),
    ("empty dict", {}, ["got an empty dict"]),
    ("empty Subset", Subset(TensorDataset(X), []), ["at least one example, got none"]),
    ("Subset by a mask", Subset(TensorDataset(X), Y > 3), ["booleans", "mask.nonzero()"]),  # type: ignore[arg-type]
    ("numbers in a tuple", (X, Y.tolist()), ["got int at data[1][0]", "torch.tensor(...)"]),
    ("datasets in a dict", {"train": Items("tensors")}, ["data['train']", "given by itself"]),
    ("iterable dataset", Stream(), ["must be map-style"]),
    ("DataLoader of a stream", DataLoader(Stream()), ["must be map-style"]),
    ("DataLoader without batches", DataLoader(Items("tensors"), batch_size=None), ["batch_size=None", "give its dataset"]),
    ("__len__ too large", Items("tensors", 99), ["their 99 examples", "IndexError at index"]),
    ("__len__ that raises", Items("tensors", 2.5), ["__len__", "TypeError"]),
    ("negative __len__", Items("tensors", -1), ["__len__", "ValueError"]),
    ("an example that raises", Items("fails at 17"), ["Items raised ValueError at index 17"]),
    ("a class", Items, ["the class Items: give an object"]),
    ("a path as text", "train.pt", ["'train.pt': load what it names"]),
    ("a path", Path("train.pt"), ["load what it names"]),
    ("a function", pairs, ["call it, or set data_mode='hop'"]),
    ("a generator", (i for i in range(3)), ["can be read once: give list(data)"]),
    ("a number", 3.5, ["data must be a map-style Dataset", "got float"]),
]  # fmt: skip


@pytest.mark.parametrize(("data", "words"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_is_no_data_is_one_sentence_that_says_what_to_do(data: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        as_rows(data).digest()
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("kind", ["UserDict", "negative strides", "items that are mappings"])
def test_a_run_has_the_bits_of_plain_tensors(kind: str) -> None:
    model, _ = regression()
    plain = {
        name: (torch.linspace(0, 1, 5 * N).view(N, 5), torch.linspace(0, 1, N)[:, None])[i]
        for i, name in enumerate("xy")
    }

    def loss(model: Any, batch: Any) -> Tensor:
        return squared_error(model, tuple(batch.values()))

    data: dict[str, Any] = {
        "UserDict": UserDict(plain),
        "negative strides": {k: np.flip(np.flip(v.numpy(), 0).copy(), 0) for k, v in plain.items()},
        "items that are mappings": [
            Encoding(x=a, y=b) for a, b in zip(*plain.values(), strict=True)
        ],
    }
    runs = [
        ds.sample(
            model,
            d,
            loss,
            config(draws=3, burn_in=0, batch_size=4, probe=8),
            pool=ds.SerialPool(),
            quiet=True,
        )
        for d in (plain, data[kind])
    ]
    first, second = (run.inference_data["posterior"]["loss"].values for run in runs)
    assert np.array_equal(first, second)


def test_columns_in_a_list_are_no_shards() -> None:
    with pytest.raises(ConfigError, match=r"batches of all shards must be alike .* got Tensor\("):
        cut([X, Y], ds.RunConfig(data_mode="hop", probe=8))
    with pytest.raises(ConfigError, match="shard 0: data in tuples and dicts must be tensors"):
        cut([(X[0], 3)], ds.RunConfig(data_mode="hop", probe=8))


def test_what_a_loader_does_that_is_not_done_is_said() -> None:
    dataset = Items("tensors")
    with pytest.warns(UserWarning, match=r"SubsetRandomSampler is not used.*Subset\(dataset, ind"):
        as_rows(DataLoader(dataset, sampler=SubsetRandomSampler([1, 2])))
    with pytest.warns(UserWarning, match="sampler list is not used"):
        rows = as_rows(DataLoader(dataset, batch_sampler=[[0, 1], [2]]))
    assert rows.batch_size is None
    with pytest.warns(UserWarning, match="worker_init_fn is not called"):
        assert as_rows(DataLoader(dataset, worker_init_fn=print, batch_size=5)).batch_size == 5


def test_a_sampler_that_weighs_examples_is_said() -> None:
    loader = DataLoader(Items("tensors"), sampler=WeightedRandomSampler([1.0] * 10, 10))
    with pytest.warns(UserWarning, match="WeightedRandomSampler is not used"):
        as_rows(loader)


def test_other_texts_have_another_digest() -> None:
    texts = ["one", "two", "six"]
    assert as_rows(texts).digest() != as_rows(["one", "two", "ten"]).digest()
    assert as_rows(texts).take(np.array([2, 0])) == ["six", "one"]


def test_a_batch_keeps_its_types_on_a_device() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([X[0], X[1][:2]], enforce_sorted=False)
    batch = {"a": Encoding(x=X), "b": [Example(Y, "text"), Pair(X, None)], "c": packed}
    moved: Any = to_device(batch, torch.device("meta"))
    assert moved["a"].x.is_meta
    assert moved["b"][0].x.is_meta
    assert moved["b"][0].y == "text"
    assert moved["b"][1].y is None
    assert moved["c"].data.is_meta
    assert not any(tensor.is_meta for tensor in tensors_of(batch))


def test_data_frames_of_pandas_are_columns() -> None:
    frame = pandas.DataFrame({"a": x[:, 0], "b": x[:, 1], "label": y, "name": ["n"] * N})
    first, second = as_rows((frame[["a", "b"]], frame["label"])).take(ROWS)  # type: ignore[misc]
    assert torch.equal(first, X[ROWS, :2])
    assert torch.equal(second, Y[ROWS])
    assert torch.equal(as_rows(frame["label"]).take(ROWS), second)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="data must hold numbers, got an array of object"):
        as_rows(frame)
