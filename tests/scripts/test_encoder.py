"""The encoder example's user code, with a tiny encoder in place of the shipped one."""

from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

import distsampler as ds
from distsampler.references import find_callable

NAMES = ("loss", "sentences", "squared_gradients", "triplets")


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    """The example's functions, as a config file finds them."""
    folder = Path(__file__).parents[2] / "scripts/examples"
    return SimpleNamespace(
        **{name: find_callable("model", f"encoder.py:{name}", folder) for name in NAMES}
    )


def tiny_encoder(folder: Path | None = None) -> BertModel:
    """Six layers, as the shipped one has, of width 8; a folder gets its files, as of a package."""
    pieces = (start + letter for start in ("", "##") for letter in ascii_lowercase)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=6, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False).eval()
    if folder:
        model.save_pretrained(folder)
        BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def encoder() -> BertModel:
    return tiny_encoder()


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    """Six triplets of ids, the sentences of each filled up with 0."""
    ids = torch.randint(1, 57, (6, 3, 10), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([3, 10, 5]).view(1, 3, 1)
    return ids * (torch.arange(10) < lengths)


def test_positives_are_the_next_sentence_of_the_topic_and_negatives_are_of_another(
    example: SimpleNamespace,
) -> None:
    by_topic = example.sentences()
    topic_of = {line: topic for topic, lines in by_topic.items() for line in lines}
    assert sum(map(len, by_topic.values())) == len(topic_of)  # none is in two topics
    made = example.triplets(by_topic)
    assert len(made) == 480
    neighbours = {pair for lines in by_topic.values() for pair in pairwise(lines)}
    for anchor, positive, negative in made:
        assert (anchor, positive) in neighbours
        assert topic_of[negative] != topic_of[anchor]
    assert made == example.triplets(example.sentences())


def test_the_loss_of_a_triplet_depends_on_no_other_and_not_on_padding(
    example: SimpleNamespace, encoder: BertModel, batch: torch.Tensor
) -> None:
    losses = example.loss(encoder, batch)
    assert losses.shape == (6,)
    alone = torch.cat([example.loss(encoder, row[None]) for row in batch])
    torch.testing.assert_close(losses, alone)
    longer = torch.cat([batch[:1, :, :3], torch.zeros(1, 3, 4, dtype=torch.long)], dim=-1)
    torch.testing.assert_close(
        example.loss(encoder, longer), example.loss(encoder, batch[:1, :, :3])
    )


def test_the_loss_is_minus_the_log_probability_of_the_positive_by_cosine(
    example: SimpleNamespace, encoder: BertModel, batch: torch.Tensor
) -> None:
    (anchor, positive, negative) = (
        encoder(input_ids=ids[ids != 0][None]).last_hidden_state[0].mean(0) for ids in batch[0]
    )
    cosines = [torch.cosine_similarity(anchor, other, dim=0) for other in (positive, negative)]
    expected = -torch.log_softmax(20 * torch.stack(cosines), dim=0)[0]
    torch.testing.assert_close(example.loss(encoder, batch[:1])[0], expected)


def test_the_parts_are_all_of_the_encoder_and_their_squared_gradients_sum_to_the_models(
    example: SimpleNamespace, encoder: BertModel, batch: torch.Tensor
) -> None:
    parts = example.squared_gradients(encoder, batch)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    components = ds.components(encoder)
    assert sum(components[part].count for part in parts) == components["full"].count
    gradients = torch.autograd.grad(example.loss(encoder, batch).mean(), [*encoder.parameters()])
    assert sum(parts.values()) == pytest.approx(sum(g.square().sum().item() for g in gradients))
