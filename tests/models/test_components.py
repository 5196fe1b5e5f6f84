"""A component is what its name says: moved alone, nothing else of the attention moves."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distsampler as ds
from distsampler.errors import ConfigError
from distsampler.models.components.listing import Components
from distsampler.models.restriction import selected
from tests.models.transformers_by_type import (
    GATED,
    HEADS,
    ROWS,
    SIZE,
    Row,
    Toy,
    TransformerLensLike,
    small_llama,
    tokens,
)
from tests.problems import config

GQA = {each.kind: each for each in ROWS}["llama"]
MIXTURES = [each for each in ROWS if "experts" in str(each.options)]


@pytest.fixture(scope="module", params=ROWS, ids=str)
def row(request: pytest.FixtureRequest) -> Row:
    row: Row = request.param
    return row


@pytest.fixture(scope="module")
def model(row: Row) -> nn.Module:
    return row.model()


@pytest.fixture(scope="module")
def parts(model: nn.Module) -> Components:
    return ds.components(model)


@torch.no_grad()
def around(model: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
    """What goes into o of layer 1, (batch, token, heads x size), and what comes out."""
    seen: dict[str, Tensor] = {}
    into, out = row.o, row.out or row.o
    hooks = [
        model.get_submodule(into).register_forward_pre_hook(
            lambda _, inputs: seen.update(into=inputs[0].flatten(2).clone())
        ),
        model.get_submodule(out).register_forward_hook(
            lambda _, __, result: seen.update(out=result.clone())
        ),
    ]
    model(tokens())
    for hook in hooks:
        hook.remove()
    return seen["into"], seen["out"]


class moved:
    """A model with other values where masks are True."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(7)
        named = dict(model.named_parameters())
        self._pairs = [
            (named[name], torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask)
            for name, mask in masks.items()
        ]
        self._before = [p.detach().clone() for p, _ in self._pairs]

    @torch.no_grad()
    def __enter__(self) -> None:
        for p, change in self._pairs:
            p.add_(change.to(p.dtype))

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for (p, _), before in zip(self._pairs, self._before, strict=True):
            p.copy_(before)


def split(masks: Mapping[str, Tensor], row: Row) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks of q, k and v, and those of o."""
    of_o = {name for name in masks if name.startswith(row.o) or name.endswith("W_O")}
    return (
        {name: mask for name, mask in masks.items() if name not in of_o},
        {name: mask for name, mask in masks.items() if name in of_o},
    )


def slices(row: Row) -> Iterator[tuple[str, slice]]:
    """Each head and group of layer 1, and where it is in what goes into o."""
    for head in range(HEADS):
        yield f"l1h{head}", slice(head * SIZE, (head + 1) * SIZE)
    width = HEADS // row.groups * SIZE
    for group in range(row.groups if row.groups < HEADS else 0):
        yield f"l1g{group}", slice(group * width, (group + 1) * width)


def change_there_only(
    model: nn.Module, row: Row, masks: Mapping[str, Tensor], where: slice
) -> bool:
    """Whether moving q, k and v changes all of a slice of what goes into o, and no other bit."""
    before, _ = around(model, row)
    with moved(model, split(masks, row)[0]):
        after, _ = around(model, row)
    changed = (before != after).any(0).any(0)
    expected = torch.zeros_like(changed)
    expected[where] = True
    return torch.equal(changed, expected)


def test_q_k_and_v_of_a_head_or_group_change_its_slice_only(
    row: Row, model: nn.Module, parts: Components
) -> None:
    names = [name for name, _ in slices(row)]
    assert [name for name in parts if name[:3] in ("l1h", "l1g")] == names
    for name, where in slices(row):
        alone = change_there_only(model, row, parts[name].masks, where)
        assert alone != row.across, name
        assert ("mix heads" in parts[name].note) == row.across


def test_columns_of_o_change_its_output_by_the_slice_times_the_change(
    row: Row, model: nn.Module, parts: Components
) -> None:
    into, before = around(model, row)
    for name, where in slices(row):
        of_o = split(parts[name].masks, row)[1]
        ((parameter, _),) = of_o.items()
        weight = model.get_parameter(parameter)
        with moved(model, of_o):
            change = weight.detach().clone()
            _, after = around(model, row)
        change -= weight.detach()
        assert change.count_nonzero() == parts[name].regions[parameter].count
        if change.ndim == 3:
            change = change.flatten(0, 1)
        elif type(model.get_submodule(parameter.rpartition(".")[0])).__name__ != "Conv1D":
            change = change.T
        part = torch.zeros_like(into)
        part[..., where] = into[..., where]
        torch.testing.assert_close(after - before, part @ change, rtol=1e-9, atol=1e-9)


def test_heads_groups_and_what_is_of_no_head_cover_attention(row: Row, parts: Components) -> None:
    attention = parts["l1.attn"]
    heads = [parts[f"l1h{head}"].masks for head in range(HEADS)]
    groups = [parts[f"l1g{g}"].masks for g in range(row.groups)] if row.groups < HEADS else []
    for name, mask in attention.masks.items():
        assert mask.all()
        for members in (heads, groups):
            shared = sum(masks[name].int() for masks in members if name in masks)
            assert torch.as_tensor(shared).max() <= 1, name
        covered = torch.zeros_like(mask)
        for masks in (*heads, *groups):
            covered |= masks.get(name, covered)
        beside = attention.note.removeprefix("of no head: ").split(", ") if attention.note else []
        assert covered.all() != any(name.endswith(each) for each in beside), name
        assert covered.all() or not covered.any()
    assert {name for masks in (*heads, *groups) for name in masks} <= attention.masks.keys()


def test_everything_is_somewhere(model: nn.Module, parts: Components) -> None:
    named = dict(model.named_parameters())
    assert parts["full"].count == sum(p.numel() for p in named.values())
    apart = [each for name, each in parts.items() if name in ("embed", "l0", "l1", "other")]
    of_their_own = {name for each in apart for name in each.regions}
    assert of_their_own | parts["unembed"].regions.keys() == named.keys()
    assert sum(each.count for each in apart) == sum(named[name].numel() for name in of_their_own)
    for part in ("l1.attn", "l1.mlp", "l1.norm"):
        assert parts[part].regions.items() <= parts["l1"].regions.items()
    assert parts["l1"].count == sum(
        each.count for name, each in parts.items() if name in ("l1.attn", "l1.mlp", "l1.norm")
    )


def test_the_next_head_is_another() -> None:
    model = GQA.model()
    parts = ds.components(model)
    for head in range(HEADS):
        where = slice(head * SIZE, (head + 1) * SIZE)
        other = parts[f"l1h{(head + 1) % HEADS}"].masks
        assert not change_there_only(model, GQA, other, where)


def test_a_fused_matrix_that_is_read_in_the_wrong_order_is_noticed() -> None:
    neox = next(each for each in ROWS if each.kind == "gpt_neox")
    model = neox.model()
    wrong = ds.components(model, {"fused": "stacked"})
    assert not all(
        change_there_only(model, neox, wrong[name].masks, where) for name, where in slices(neox)
    )


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
@torch.no_grad()
def test_an_expert_moves_its_own_output_only(mixture: Row) -> None:
    model = mixture.model()
    parts, experts = ds.components(model), model.get_submodule("model.layers.1.mlp.experts")
    hidden = torch.randn(5, HEADS * SIZE, generator=torch.Generator().manual_seed(2)).double()

    def output(expert: int) -> Tensor:
        """What an expert makes of all tokens."""
        result: Tensor = experts(hidden, torch.full((5, 1), expert), torch.ones(5, 1).double())
        return result

    names = [name for name in parts if name.startswith("l1e")]
    assert names == ["l1e0", "l1e1", "l1e2"]
    for number, name in enumerate(names):
        before = [output(expert) for expert in range(3)]
        with moved(model, parts[name].masks):
            changed = [bool((output(expert) != before[expert]).any()) for expert in range(3)]
        assert changed == [expert == number for expert in range(3)]
    assert parts["l1.router"].shapes == {"model.layers.1.mlp.gate.weight": f"3x{HEADS * SIZE}"}
    assert ("l1.shared" in parts) == (mixture.kind == "qwen2_moe")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_components_and_heads_stay_where_they_were() -> None:
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model: nn.Module = get_peft_model(small_llama(), adapters)
    parts = ds.components(model)
    lora = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(lora) == 8
    assert set(parts["lora"].regions) == lora
    assert set(selected(model, config(restrict_to="l1.lora"))) == {
        name for name in lora if ".layers.1." in name
    }
    assert parts["l0h1"].note.endswith("frozen: does not move")
    of_base = "base_model.model.model.layers.0.self_attn."
    assert parts["l0h1"].shapes == {
        f"{of_base}q_proj.base_layer.weight": f"{SIZE}x{HEADS * SIZE}",
        f"{of_base}o_proj.weight": f"{HEADS * SIZE}x{SIZE}",
    }
    with pytest.raises(ConfigError, match="'l0h1' must have a parameter with requires_grad=True"):
        selected(model, config(restrict_to="l0h1"))
    assert selected(model, config(restrict_to="l0h1+lora")).keys() == lora


OWN = {
    "layers": "stages",
    "heads": 2,
    "q": "query",
    "k": "key",
    "v": "value",
    "o": "result",
    "mlp": "choice|masters",
    "router": "choice",
    "experts": "masters",
    "embed": "tokens",
}


def test_an_unknown_architecture_is_shown_patterns_made_of_its_own_names() -> None:
    with pytest.raises(ConfigError) as caught:
        selected(Toy(), config(restrict_to="l0h1"))
    for words in (
        "restrict_to: 'l0h1'",
        "components=",
        "'layers': 'stages'",
        "'q': 'query'",
        "'embed': 'tokens'",
    ):
        assert words in str(caught.value)


def test_patterns_describe_ones_own_architecture() -> None:
    toy = Toy()
    parts = ds.components(toy, OWN)
    assert parts["l1h1"].shapes == {
        **{f"stages.1.{part}.weight": "4x8" for part in ("query", "key", "value")},
        **{f"stages.1.{part}.bias": "4" for part in ("query", "key", "value")},
        "stages.1.result.weight": "8x4",
    }
    assert parts["l1"].note == "in none of its parts: l0h1.weight, l0h1.bias"
    assert set(parts["l0e1"].regions) == {"stages.0.masters.1.weight", "stages.0.masters.1.bias"}
    assert set(parts["embed"].regions) == {"tokens.weight"}
    chosen = config(restrict_to="l0h1", components=OWN)
    assert selected(toy, chosen)["stages.0.result.weight"].count == 32
    named = config(restrict_to="stages.0.l0h1.bias", components=OWN)
    assert set(selected(toy, named)) == {"stages.0.l0h1.bias"}


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        (OWN | {"head": "x"}, "unknown part 'head': did you mean 'heads'"),
        (OWN | {"heads": "two"}, "heads must be of type int, got 'two'"),
        (OWN | {"q": "(query"}, "'(query' must be a regular expression"),
        (OWN | {"k": "nothing"}, "k: 'nothing' must match a module or parameter; there are query.weight"),
        (OWN | {"layers": "floors"}, "no parameter is called like floors.0.weight; they are tokens.weight"),
        (OWN | {"fused": "plaited"}, "fused must be 'stacked' or 'interleaved', got 'plaited'"),
    ],
)  # fmt: skip
def test_a_wrong_pattern_is_named(patterns: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ds.components(Toy(), patterns)
    assert sentence in str(caught.value)


def test_a_name_is_no_model() -> None:
    with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module, got str"):
        ds.components("gpt2")  # type: ignore[arg-type]


def test_many_layers_and_heads_have_a_row_for_those_alike() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        sizes = {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16}
        model = LlamaForCausalLM(
            LlamaConfig(
                **GATED | sizes, hidden_size=64, vocab_size=40, eos_token_id=0, pad_token_id=0
            )
        )
    parts = ds.components(model)
    assert sum(name[0] == "l" and "h" in name for name in parts) == 24 * 16
    assert str(parts).count("\n") == 24 * 5 + 4


def test_the_layout_of_transformer_lens_is_known() -> None:
    model = TransformerLensLike().double().eval()
    row = Row("", "blocks.1.attn.hook_z", groups=2, out="blocks.1.attn")
    parts = ds.components(model)
    for name, where in slices(row):
        assert change_there_only(model, row, parts[name].masks, where), name
    test_columns_of_o_change_its_output_by_the_slice_times_the_change(row, model, parts)
    test_heads_groups_and_what_is_of_no_head_cover_attention(row, parts)
    assert set(parts["embed"].regions) == {"embed.W_E", "pos_embed.W_pos"}
    assert parts["l1h2"].shapes["blocks.1.attn.W_Q"] == f"1x{HEADS * SIZE}x{SIZE}"
