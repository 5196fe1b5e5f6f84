"""Texts and token ids as rows: cut right, kept narrow, read where they lie."""

import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn

import distsampler as ds
from distsampler.data.rows import Rows
from distsampler.data.token_rows import TokenRows
from distsampler.errors import ConfigError
from distsampler.execution.ray_pool import RayPool
from distsampler.lm import blocks, sequence_losses
from tests.assertions import digest
from tests.problems import config

WORDS = ["end", *"abcdefgh"]
TEXTS = ["a b c", "d", "", "e f g h a"]
STREAM = [1, 2, 3, 0, 4, 0, 0, 5, 6, 7, 8, 1]  # with the end between two
IDS = np.random.default_rng(0).integers(0, 9, 1003).astype(np.uint16)


def tokenizer(end: str | None = "end") -> Any:
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "end")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end)


def ids_of(rows: Rows) -> Any:
    batch: Any = rows.take(np.arange(len(rows)))
    assert list(batch) == ["input_ids"]
    assert batch["input_ids"].dtype == torch.int64
    return batch["input_ids"].numpy()


class Pairs(nn.Module):
    """A language model that sees one token back."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(9, 9)
        nn.init.normal_(self.logits.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.logits(input_ids)
        return logits


def sampled(data: Any, store: Path | None = None, pool: Any = None, **fields: Any) -> ds.Run:
    model, probes = Pairs(), fields.pop("named", None)
    settings = config(**{"draws": 8, "burn_in": 2, "thin": 1, "watch": False, **fields})
    return ds.sample(
        model, data, sequence_losses, settings, store=store, pool=pool or ds.SerialPool(),
        quiet=True, probes=probes,
    )  # fmt: skip


@pytest.fixture
def mapped(tmp_path: Path) -> Any:
    IDS.tofile(tmp_path / "ids.bin")
    return np.memmap(tmp_path / "ids.bin", np.uint16, "r")


def as_dataset(columns: dict[str, Any], form: str | None = None) -> Any:
    return datasets.Dataset.from_dict(columns).with_format(form)


@pytest.mark.parametrize(
    "data",
    [
        TEXTS,
        as_dataset({"text": TEXTS, "source": ["x"] * 4}),
        as_dataset({"content": TEXTS, "number": [1, 2, 3, 4]}),
        as_dataset({"text": TEXTS}, "torch"),
        as_dataset({"input_ids": [STREAM[:5], STREAM[5:]]}),
        as_dataset({"input_ids": [STREAM[:5], STREAM[5:]], "n": [5, 7]}, "numpy"),
        as_dataset(
            {
                "input_ids": [[*STREAM[:5], 0, 0], STREAM[5:]],
                "attention_mask": [[1] * 5 + [0, 0], [1] * 7],
            }
        ),
        np.array(STREAM),
        np.array(STREAM, ">u4"),
        torch.tensor(STREAM),
        STREAM,
        np.array(STREAM).reshape(2, 6).reshape(-1),
    ],
)
def test_documents_are_joined_and_cut(data: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "distsampler"):
        rows = blocks(data, tokenizer(), 5)
    assert ids_of(rows).tolist() == [STREAM[:5], STREAM[5:10]]
    assert "the last 2 of 12 tokens fill no row" in caplog.text


def test_a_text_needs_no_end_and_many_texts_are_one_stream() -> None:
    assert ids_of(blocks("a b c d", tokenizer(None), 2)).tolist() == [[1, 2], [3, 4]]
    many = ids_of(blocks(["a"] * 1500, tokenizer(), 2))
    assert many.tolist() == [[1, 0]] * 1499


def test_rows_stay_as_they_are() -> None:
    assert np.array_equal(ids_of(blocks(IDS[:1000].reshape(100, 10))), IDS[:1000].reshape(100, 10))
    assert len(blocks(IDS[:1000].reshape(100, 10), length=10)) == 100


def test_ids_in_memory_stay_narrow_and_travel_without_a_copy() -> None:
    buffers = list[pickle.PickleBuffer]()
    rows = blocks(IDS, length=10)
    sent = pickle.dumps(rows, protocol=5, buffer_callback=buffers.append)
    assert len(sent) < 1000
    assert sum(buffer.raw().nbytes for buffer in buffers) == 2000
    assert np.array_equal(ids_of(pickle.loads(sent, buffers=buffers)), ids_of(rows))
    assert sum(len(pickle.dumps(blocks(t, tokenizer(), 50))) for t in ("a " * 5000,)) < 11_000


@pytest.mark.parametrize("kind", ["whole", "slice", "rows", "npy"])
def test_a_file_is_sent_by_name_and_opened_where_it_is_read(
    kind: str, mapped: Any, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    data, expected = {
        "whole": (mapped, IDS),
        "slice": (mapped[37:737], IDS[37:737]),
        "rows": (mapped[3:1003].reshape(100, 10), IDS[3:1003]),
        "npy": (np.load(tmp_path / "ids.npy", mmap_mode="r"), IDS),
    }[kind]
    rows = blocks(data, length=10)
    sent = pickle.dumps(rows)
    assert len(sent) < 1000
    there = pickle.loads(sent)
    assert np.array_equal(ids_of(there), expected[: len(rows) * 10].reshape(-1, 10))
    assert there.digest() == rows.digest()
    assert isinstance(there._ids, np.memmap)


def test_a_file_is_never_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(2**36)  # a hole of 64 GB
    large = np.memmap(tmp_path / "large.bin", np.uint32, "r")
    rows = pickle.loads(pickle.dumps(blocks(large, length=1024)))
    assert len(rows) == 2**24
    assert rows.take(np.array([5, 2**24 - 1]))["input_ids"].shape == (2, 1024)


def test_another_file_on_a_node_is_noticed(mapped: Any, tmp_path: Path) -> None:
    sent, path = pickle.dumps(blocks(mapped, length=10)), tmp_path / "ids.bin"
    other = IDS.copy()
    other[:10] += 1
    for change, said in [
        (lambda: other.tofile(path), "it holds other ids: put the file where all nodes see it"),
        (lambda: IDS[:500].tofile(path), "ValueError"),
        (path.unlink, "FileNotFoundError"),
    ]:
        change()
        with pytest.raises(ConfigError, match=f"must be on every node as they were .*{said}"):
            ids_of(pickle.loads(sent))


def test_digests_tell_ids_and_lengths_apart(mapped: Any) -> None:
    digests = [
        blocks(IDS, length=10).digest(),
        blocks(IDS[::-1], length=10).digest(),
        blocks(IDS, length=20).digest(),
        blocks(mapped, length=10).digest(),
        blocks(mapped[1:], length=10).digest(),
    ]
    assert len(set(digests)) == 5
    assert blocks(IDS.astype(np.int64), length=10).digest() == digests[0]


@pytest.mark.parametrize(
    ("data", "tokens", "length", "said"),
    [
        (IDS, None, None, "a stream needs length="),
        (IDS, None, 2000, "1003 token ids fill no row of 2000"),
        (IDS, None, 1, "length must be an integer of at least 2"),
        (IDS[:1000].reshape(100, 10), None, 5, r"give ids.reshape\(-1\)"),
        (IDS.astype(float), None, 5, "must be an array of integers, got 1003 values of float64"),
        (torch.arange(9).bfloat16(), None, 5, "must be an array of integers"),
        (np.array([1, -100, 2]), None, 2, "must not be negative, got -100"),
        ([[1, 2], [3]], None, 2, "lists of unequal lengths make none"),
        (TEXTS, None, 5, "needs the tokenizer of the model for texts"),
        (TEXTS, tokenizer(None), 5, "set tokenizer.eos_token"),
        (["", ""], tokenizer(), 5, "2 token ids fill no row|1 token ids fill no row"),
        ("", tokenizer(), 5, "must hold a token"),
        (as_dataset({"a": ["x"], "b": ["y"]}), tokenizer(), 5, "it has 'a', 'b': rename one"),
        (as_dataset({"text": TEXTS}).to_iterable_dataset(), tokenizer(), 5, "must have a length"),
        (datasets.DatasetDict({"train": as_dataset({"text": TEXTS})}), None, 5, "'train': give"),
        (3, None, 5, "got a int"),
    ],
)  # fmt: skip
def test_what_makes_no_rows_is_a_sentence(data: Any, tokens: Any, length: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        blocks(data, tokens, length)


def test_a_strided_map_is_a_sentence(mapped: Any) -> None:
    with pytest.raises(ConfigError, match="a stretch of its file"):
        blocks(mapped[::2], length=10)


def test_changes_of_a_copied_map_are_kept(tmp_path: Path) -> None:
    IDS.tofile(tmp_path / "ids.bin")
    changed = np.memmap(tmp_path / "ids.bin", np.uint16, "c")
    changed[0] = 77
    assert ids_of(pickle.loads(pickle.dumps(blocks(changed, length=10))))[0, 0] == 77


def test_runs_take_rows_everywhere(mapped: Any, tmp_path: Path) -> None:
    memory, file = blocks(IDS, length=10), blocks(mapped, length=10)
    one, other = sampled(memory), sampled(file)
    assert digest(one) == digest(other)
    assert one.facts["n"] == 100
    fields: dict[str, Any] = {"named": {"p": file}, "probes": {"p": {"rows": 20}}}
    assert sampled(memory, pack=2, **fields).losses_of("p").sizes["example"] == 20
    hop = {"data_mode": "hop", "shards": 2, "hop_every": 3}
    assert digest(sampled(memory, **hop)) == digest(sampled(file, **hop))
    store = tmp_path / "run"
    whole = sampled(file, store)
    longer = ds.resume(
        store, Pairs(), file, sequence_losses, draws=12, pool=ds.SerialPool(), quiet=True
    )
    assert longer.posterior.sizes["draw"] == 12
    assert np.array_equal(longer.posterior.loss[:, :8], whole.posterior.loss)


def test_a_dataset_is_data_whatever_its_format() -> None:
    rows = IDS[:1000].reshape(100, 10).astype(np.int64)
    columns = {"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()}
    expected = digest(sampled({name: torch.tensor(v) for name, v in columns.items()}))
    runs = [sampled(as_dataset(columns, form)) for form in (None, "torch", "numpy")]
    assert {digest(run) for run in runs} == {expected}
    assert len({run.manifest.fingerprint["data"] for run in runs}) == 1


def test_a_dataset_of_unequal_lists_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="must be tensors, arrays or numbers of one shape each"):
        sampled(as_dataset({"input_ids": [[1, 2], [3]] * 20}))


def test_numbers_of_a_dataset_keep_their_type() -> None:
    from distsampler.data.kinds import as_rows

    batch: Any = as_rows(as_dataset({"x": [0.5, 1.5], "ids": [[1], [2]], "t": ["a", "b"]})).take(
        np.array([1, 0])
    )
    assert batch["x"].dtype == torch.float64
    assert batch["ids"].tolist() == [[2], [1]]
    assert batch["t"] == ["b", "a"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_actors_read_datasets_and_files_as_one_process_does(mapped: Any) -> None:
    dataset = as_dataset({"input_ids": IDS[:1000].reshape(100, 10).tolist()})
    named = {"named": {"p": dataset}, "probes": {"p": {"every": 4}}}
    file = blocks(mapped, length=10)
    assert isinstance(file, TokenRows)
    ray = sampled(file, pool=RayPool(ds.PlacementConfig()), **named)
    assert digest(ray) == digest(sampled(file, **named))
