"""The language example's user code: its text, its probes, its model."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

import distsampler as ds
from distsampler.references import find_callable

NAMES = ("code_and_docstrings", "gpt", "ids", "picked", "shuffled", "title", "tokenizer", "train")


@pytest.fixture(scope="module")
def language() -> SimpleNamespace:
    """The callables as a config file finds them."""
    folder = Path(__file__).parents[2] / "scripts/examples"
    return SimpleNamespace(
        **{name: find_callable("model", f"language.py:{name}", folder) for name in NAMES}
    )


@pytest.fixture(scope="module")
def sequences() -> np.ndarray:
    return np.random.default_rng(0).integers(2_048, size=(40, 32))


def test_code_is_without_comments_and_docstrings_which_are_prose(language: SimpleNamespace) -> None:
    code, docstrings = language.code_and_docstrings()
    assert len(code) > 100
    assert len(docstrings) > 1_000
    (queue,) = [text for text in code if "class LifoQueue" in text]
    assert "def qsize(self)" in queue
    assert "approximate size" not in queue
    assert "# " not in queue
    assert any("approximate size of the queue" in text for text in docstrings)
    for text in code[::10]:
        compile(text, "module", "exec", dont_inherit=True)


def test_the_tokenizer_keeps_every_character(language: SimpleNamespace) -> None:
    lines = ["def f(x):\n    return 'naïve'\n", "Prose, of course. " * 20]
    encode = language.tokenizer(lines)
    for line in [*lines, "something else: \t✓"]:
        assert encode.decode(encode(line, add_special_tokens=False)["input_ids"]) == line


def test_the_shuffled_probe_has_the_tokens_of_each_sequence_in_another_order(
    language: SimpleNamespace, sequences: np.ndarray
) -> None:
    moved = language.shuffled(sequences)
    assert np.array_equal(np.sort(moved, axis=1), np.sort(sequences, axis=1))
    assert (moved != sequences).any(axis=1).all()
    assert np.array_equal(moved, language.shuffled(sequences))


def test_sequences_are_picked_without_repetition(
    language: SimpleNamespace, sequences: np.ndarray
) -> None:
    rows = language.picked(sequences, 10)
    assert len(np.unique(rows, axis=0)) == 10
    assert {tuple(row) for row in rows} < {tuple(row) for row in sequences}


def test_training_keeps_the_checkpoints_that_were_asked_for_and_they_differ(
    language: SimpleNamespace, sequences: np.ndarray, tmp_path: Path
) -> None:
    model = language.gpt(width=32)
    files = {step: tmp_path / f"step{step}.pt" for step in (1, 8)}
    language.train(model, sequences, files, batch_size=8)
    batch = torch.from_numpy(sequences)
    losses = []
    for file in files.values():
        model.load_state_dict(torch.load(file, weights_only=True))
        losses.append(ds.lm.sequence_losses(model, batch).mean().item())
    assert losses[1] < losses[0]


def test_the_names_of_its_components_are_there_and_sum_to_the_layers(
    language: SimpleNamespace,
) -> None:
    components = ds.components(language.gpt(width=32))
    for layer in ("l0", "l1"):
        heads = sum(components[f"{layer}h{head}"].count for head in range(4))
        rest = components[layer].count - components[f"{layer}.attn"].count
        assert heads + 32 == components[f"{layer}.attn"].count  # the output's bias is of no head
        assert rest == components[f"{layer}.mlp"].count + components[f"{layer}.norm"].count


@pytest.mark.parametrize(
    ("code", "prose", "expected"),
    [(3.0, 2.0, "l0h0:  code = 1.5 x prose"), (1.0, 4.0, "l0h0:  prose = 4.0 x code"),
     (2.2, 2.0, "l0h0"), (-1.0, 2.0, "l0h0"), (np.nan, 2.0, "l0h0")],
)  # fmt: skip
def test_a_panel_says_where_a_component_shows_more_if_the_errors_allow_it(
    language: SimpleNamespace, code: float, prose: float, expected: str
) -> None:
    read = {"llc": ("text", [code, prose, 9.0]), "se": ("text", [0.1, 0.1, 0.1])}
    cell = xr.Dataset(read, {"text": ["code", "prose", "shuffled"]})
    assert language.title("l0h0", cell) == expected
