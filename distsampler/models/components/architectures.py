"""Where transformers have their parts, by the names of modules and parameters: a table.

A user's own architecture is described in the same words.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from distsampler.errors import ConfigError

ATTENTION = ("q", "k", "v", "qkv", "o")

Patterns = Mapping[str, str | int]


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """Return a pattern, compiled once.

    Raises:
        ConfigError: if it is no regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"components: {pattern!r} must be a regular expression: {error}"
        ) from None


@dataclass(frozen=True)
class Architecture:
    """Patterns of the parts of a model: regular expressions for names of modules or parameters.

    Those of a layer are relative to it: ``"attn.c_attn"`` names ``transformer.h.0.attn.c_attn``
    where ``layers`` is ``"h"``. Others may have anything before them that ends in a dot.
    """

    layers: str = ""  # the list of layers, without its number
    q: str = ""  # weight (heads x size, width), or transposed (Conv1D), or (heads, width, size)
    k: str = ""
    v: str = ""
    qkv: str = ""  # in place of q, k and v, where one matrix holds all three
    fused: str = "stacked"  # how: all of q, then of k, then of v; "interleaved": group by group
    o: str = ""  # weight (width, heads x size), or transposed, or (heads, size, width)
    attn: str = ""  # what else belongs to attention, such as norms of q and k
    mlp: str = ""  # with router and experts
    router: str = ""
    experts: str = ""  # tensors with experts in dimension 0, or a list of modules
    shared: str = ""  # experts that every token passes
    norm: str = ""  # norms of the residual stream
    embed: str = ""  # tokens, learned positions, and their norm
    unembed: str = ""
    heads: int = 0  # 0: read from a config
    types: tuple[str, ...] = ()  # model types of which all this is known, where q, k, v are fused

    def has(self, part: str, name: str) -> bool:
        """Return whether a part has a parameter, by its name in its layer."""
        pattern = getattr(self, part)
        return bool(pattern) and bool(compiled(rf"(?:{pattern})(?:\..*)?").fullmatch(name))

    def has_outside(self, part: str, name: str) -> bool:
        """Return whether a part that is in no layer has a parameter, by its name."""
        pattern = getattr(self, part)
        return bool(pattern) and bool(
            compiled(rf"(?:.*\.)??(?:{pattern})(?:\..*)?").fullmatch(name)
        )

    @property
    def whole_attention(self) -> tuple[str, ...]:
        """The patterns of attention that are set."""
        return tuple(part for part in ATTENTION if getattr(self, part))

    def in_layer(self, name: str) -> re.Match[str] | None:
        """Return home, number and rest of the name of a parameter in a layer."""
        pattern = rf"(?P<home>(?:.*?\.)??(?:{self.layers}))\.(?P<layer>\d+)\.(?P<rest>.+)"
        return compiled(pattern).fullmatch(name)


_LLAMA = Architecture(
    layers="layers",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    attn="self_attn",
    mlp="mlp|block_sparse_moe",
    router="(mlp|block_sparse_moe).gate",
    experts="(mlp|block_sparse_moe).experts",
    shared="mlp.shared_experts?(_gate)?",
    norm=r"\w*norm",
    embed="embed_tokens",
    unembed="lm_head",
)
_BLOOM = Architecture(
    layers="h",
    qkv="self_attention.query_key_value",
    fused="interleaved",
    o="self_attention.dense",
    attn="self_attention",
    mlp="mlp",
    norm=r"\w*layernorm|ln_attn|ln_mlp",
    embed="word_embeddings|word_embeddings_layernorm",
    unembed="lm_head",
    types=("bloom", "falcon"),
)
_GPT2 = Architecture(
    layers="h",
    qkv="attn.c_attn",
    o="attn.c_proj",
    attn="attn",
    mlp="mlp",
    norm="ln_1|ln_2",
    embed="wte|wpe",
    unembed="lm_head",
    types=("gpt2",),
)
_BERT = Architecture(
    layers="layer",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    attn="attention.self",
    mlp="intermediate|output.dense",
    norm="(attention.)?output.LayerNorm",
    embed="embeddings",
    unembed="cls.predictions|lm_head",
)

TABLE: Mapping[str, Architecture] = {
    "Llama": _LLAMA,  # Mistral, Qwen, Gemma, OLMo, StableLM; Mixtral, Qwen-MoE, OLMoE
    "Phi": replace(_LLAMA, o="self_attn.dense"),
    "Phi-3": replace(_LLAMA, q="", k="", v="", qkv="self_attn.qkv_proj", types=("phi3",)),
    "OPT": replace(
        _LLAMA,
        o="self_attn.out_proj",
        mlp="fc1|fc2",
        norm=r"\w*layer_norm",
        embed="embed_tokens|embed_positions|project_in",
        unembed="lm_head|project_out",
    ),
    "GPT-2": _GPT2,  # and nanoGPT
    "GPT-J": replace(  # and GPT-Neo
        _GPT2,
        qkv="",
        q="attn.(attention.)?q_proj",
        k="attn.(attention.)?k_proj",
        v="attn.(attention.)?v_proj",
        o="attn.(attention.)?out_proj",
        types=(),
    ),
    "GPT-NeoX": replace(
        _BLOOM,
        layers="layers",
        qkv="attention.query_key_value",
        o="attention.dense",
        attn="attention",
        embed="embed_in",
        unembed="lm_head|embed_out",
        types=("gpt_neox",),
    ),
    "BLOOM": _BLOOM,  # and Falcon
    "MPT": Architecture(
        layers="blocks",
        qkv="attn.Wqkv",
        o="attn.out_proj",
        attn="attn",
        mlp="ffn",
        norm="norm_1|norm_2",
        embed="wte|wpe",
        unembed="lm_head",
        types=("mpt",),
    ),
    "BERT": _BERT,
    "DistilBERT": replace(
        _BERT,
        q="attention.q_lin",
        k="attention.k_lin",
        v="attention.v_lin",
        o="attention.out_lin",
        attn="attention",
        mlp="ffn",
        norm="sa_layer_norm|output_layer_norm",
        unembed="vocab_transform|vocab_layer_norm|vocab_projector",
    ),
    "TransformerLens": Architecture(  # its HookedTransformer, before 4.0
        layers="blocks",
        q="attn.(W|b)_Q",
        k="attn._?(W|b)_K",
        v="attn._?(W|b)_V",
        o="attn.(W|b)_O",
        attn="attn",
        mlp="mlp",
        norm=r"ln\d(_post)?",
        embed="embed|pos_embed",
        unembed="unembed",
    ),
    "torch.nn.TransformerEncoder": Architecture(
        layers="layers",
        qkv="self_attn.in_proj_(weight|bias)",
        o="self_attn.out_proj",
        attn="self_attn",
        mlp="linear1|linear2",
        norm=r"norm\d",
    ),
}
"""Name -> architecture. One whose q, k and v are fused is known by its model type too, if any."""
