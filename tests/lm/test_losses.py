"""Losses of language models: those that the models of transformers compute themselves."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import distsampler as ds
from distsampler.errors import ConfigError, StoreError
from distsampler.lm import sequence_losses, token_losses
from distsampler.sampling import fingerprint
from tests.problems import config

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = SMALL | {"num_attention_heads": 2, "intermediate_size": 32}
# Where each kind takes the places of tokens from: learned, rotary, biases by distance, the mask.
CONFIGS: dict[str, Any] = {
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": HEADS,
    "gpt_neox": HEADS,
    "bloom": {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mpt": {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32},
    "opt": SMALL
    | {"ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    | {"max_position_embeddings": 32},
}
IDS = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(0))
LENGTHS = (9, 5, 2, 7)


def language_model(kind: str) -> nn.Module:
    """A small model whose weights are large enough for places to matter."""
    kinds = transformers.AutoConfig
    made = kinds.for_model(kind, **CONFIGS[kind], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(made).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)
    return model


def padded(side: str) -> dict[str, Tensor]:
    """The ids cut to unequal lengths, and filled up at one side."""
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        place = slice(9 - length, 9) if side == "left" else slice(length)
        ids[row, place], mask[row, place] = IDS[row, :length], 1
    return {"input_ids": ids, "attention_mask": mask}


class Returns(nn.Module):
    """A model that sees one token back, and wraps its logits."""

    def __init__(self, wrap: Any = lambda logits: logits) -> None:
        super().__init__()
        self.wrap, self.logits = wrap, nn.Embedding(40, 40)
        nn.init.normal_(self.logits.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, input_ids: Tensor) -> Any:
        return self.wrap(self.logits(input_ids))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_mean_over_tokens_is_the_loss_that_a_model_computes_itself(
    kind: str, side: str
) -> None:
    model, batch = language_model(kind), padded(side)
    mask = batch["attention_mask"]
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    labels[0, 4] = -100  # left out by the label alone
    if side == "left":  # it would predict the first real token from padding
        labels.scatter_(1, mask.argmax(1, keepdim=True), -100)
    # What ours derives, transformers' own models need from the user (generate() makes it as well).
    places = (mask.cumsum(1) - 1).clamp_min(0)
    given = {} if kind in ("bloom", "mpt") else {"position_ids": places}
    own = model(**batch, **given, labels=labels).loss
    losses = token_losses(model, {**batch, "labels": labels})
    assert losses.dtype == torch.float32
    assert losses.isnan().sum() == 4 * 8 - (sum(LENGTHS) - 4 - 1)
    torch.testing.assert_close(losses.nanmean(), own)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_neither_losses_nor_gradient(kind: str, side: str) -> None:
    model = language_model(kind)
    together = token_losses(model, padded(side))
    alone = [token_losses(model, IDS[row : row + 1, :n])[0] for row, n in enumerate(LENGTHS)]
    for row, own in enumerate(alone):
        torch.testing.assert_close(together[row][~together[row].isnan()], own)
    means = sequence_losses(model, padded(side))
    torch.testing.assert_close(means, torch.stack([own.mean() for own in alone]))
    torch.stack([own.mean() for own in alone]).mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    means.mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected.get(name), rtol=1e-3, atol=1e-5)


def test_places_that_a_batch_gives_are_used() -> None:
    model, batch = language_model("gpt2"), {"input_ids": IDS}
    later = token_losses(model, {**batch, "position_ids": torch.arange(9).expand(4, 9) + 3})
    assert not torch.allclose(later, token_losses(model, batch))
    assert torch.equal(token_losses(model, IDS), token_losses(model, batch))


@pytest.mark.parametrize("kind", ["bloom", "user's own"])
def test_places_that_a_model_would_ignore_are_refused_where_they_are_others(kind: str) -> None:
    model = Returns() if kind == "user's own" else language_model(kind)
    counted = torch.arange(9).expand(4, 9)
    plain = token_losses(model, IDS)
    assert torch.equal(token_losses(model, {"input_ids": IDS, "position_ids": counted}), plain)
    with pytest.raises(ConfigError, match="must take position_ids where a batch has them"):
        token_losses(model, {"input_ids": IDS, "position_ids": counted % 4})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: (logits, "more"),
        lambda logits: [logits],
        lambda logits: {"loss": None, "logits": logits},
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits),
    ],
    ids=["tuple", "list", "dict", "namespace", "ModelOutput"],
)
def test_logits_are_found_in_what_a_model_returns(wrap: Any) -> None:
    assert torch.equal(token_losses(Returns(wrap), IDS), token_losses(Returns(), IDS))


def test_a_model_keeps_no_cache_and_takes_what_it_names() -> None:
    taken = list[dict[str, Any]]()

    class Asked(Returns):
        def forward(self, input_ids: Tensor, use_cache: bool = True, **more: Any) -> Any:
            taken.append({"use_cache": use_cache, **more})
            return super().forward(input_ids)

    token_losses(Asked(), padded("right"))
    assert taken == [{"use_cache": False}]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_wrapped_around_a_model_hands_on_mask_and_places(kind: str) -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **options: Any) -> Any:
            return self.inner(*args, **options)

    model, batch = language_model(kind), padded("left")
    expected = token_losses(model, batch)
    for wrapped in (Around(model), torch.compile(model, backend="eager")):
        torch.testing.assert_close(token_losses(wrapped, batch), expected, equal_nan=True)


def test_a_model_that_takes_no_mask_must_not_read_padding_as_text() -> None:
    assert token_losses(Returns(), padded("right")).isnan().any()
    with pytest.raises(ConfigError, match=r"must take attention_mask .* pad on the right, or let"):
        token_losses(Returns(), padded("left"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_ids_may_be_narrow(dtype: torch.dtype) -> None:
    assert torch.equal(token_losses(Returns(), IDS.to(dtype)), token_losses(Returns(), IDS))


def test_losses_of_low_precision_are_those_of_their_logits_in_float32() -> None:
    low = Returns(lambda logits: logits.bfloat16())
    losses = token_losses(low, IDS)
    rounded = token_losses(Returns(lambda logits: logits.bfloat16().float()), IDS)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, rounded)
    assert token_losses(Returns().double(), IDS).dtype == torch.float64


def test_the_first_token_and_what_follows_padding_do_not_count() -> None:
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    batch["attention_mask"][0, 3] = 0
    missing = token_losses(language_model("llama"), batch).isnan()
    assert missing[0].nonzero().flatten().tolist() == [2, 3]
    assert not missing[1:].any()


def test_labels_may_be_other_tokens_than_those_that_are_read() -> None:
    labels = IDS.flip(1).contiguous()
    losses = token_losses(Returns(), {"input_ids": IDS, "labels": labels})
    logits = Returns()(IDS)[:, :-1].log_softmax(-1)
    torch.testing.assert_close(losses, -logits.gather(2, labels[:, 1:, None])[..., 0])


def test_a_sequence_of_which_nothing_counts_has_no_loss() -> None:
    batch = padded("right")
    batch["attention_mask"][2] = 0
    assert sequence_losses(Returns(), batch).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (IDS.float(), "got a Tensor of torch.float32 and shape"),
        (IDS > 9, "got a Tensor of torch.bool and shape"),
        (IDS[0], "must be a tensor of token ids, .*give the data as ds.lm.blocks"),
        ({"ids": IDS}, "got a dict of 'ids'"),
        ((IDS, IDS), "got a tuple"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels must be a tensor with the shape of"),
    ],
)
def test_a_batch_of_another_form_is_a_sentence(batch: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        token_losses(Returns(), batch)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda logits: logits[0], r"logits of shape \(batch, length, vocabulary\)"),
        (lambda logits: {"hidden": logits}, "got dict with hidden: give the model with its head"),
        (lambda logits: logits[:, 1:], r"got \(4, 8, 40\)"),
    ],
)
def test_a_model_that_returns_no_logits_is_a_sentence(wrap: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        token_losses(Returns(wrap), IDS)


def small_run(
    store: Path, attention: str = "eager", resume: Any = "never", **fields: Any
) -> ds.Run:
    """A run of a language model with dropout, in mode "eval", whose curvature is watched."""
    model = language_model("gpt2")
    model.set_attn_implementation(attention)
    settings = config(
        **{"draws": 4, "burn_in": 0, "thin": 1, "batch_size": 8, "probe": 8, **fields}
    )
    ids = torch.randint(40, (24, 6), generator=torch.Generator().manual_seed(2))
    return ds.sample(
        model, {"input_ids": ids}, sequence_losses, settings, store=store, pool=ds.SerialPool(),
        resume=resume, quiet=True,
    )  # fmt: skip


def test_a_run_is_continued_with_the_attention_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"watch": False, "draws": 2}
    first = small_run(tmp_path / "run", **fields)
    assert first.manifest.fingerprint["attention"] == "eager"
    with pytest.raises(StoreError, match="attention: stored 'eager', now 'sdpa'"):
        small_run(tmp_path / "run", "sdpa", "must", **fields)
    with monkeypatch.context() as before:  # the key was there
        before.setattr(fingerprint, "_attention", lambda _: "")
        assert "attention" not in small_run(tmp_path / "old", **fields).manifest.fingerprint
    longer = small_run(tmp_path / "old", "eager", "must", **fields | {"draws": 4})
    assert longer.posterior.sizes["draw"] == 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_curvature_is_watched_with_either_attention(attention: str, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", attention)
    assert run.manifest.config.watch
    assert "curvature" in {each.name for each in run.manifest.variables}
