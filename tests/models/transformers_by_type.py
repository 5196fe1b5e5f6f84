"""Tiny random transformers, one of each architecture, as the library transformers ships it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

HEADS, SIZE, VOCABULARY = 4, 8, 40  # of every model: heads of a layer, entries of q in a head
COMMON = {
    "hidden_size": HEADS * SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 16}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Row:
    """An architecture, and where layer 1 of its model has the matrix o."""

    kind: str  # its ``model_type``
    o: str  # name of the module
    groups: int = HEADS  # of heads that share k and v
    options: dict[str, Any] = field(default_factory=dict)  # of its config
    causal: bool = True
    across: bool = False  # whether norms mix heads
    out: str = ""  # whose output is that of o, if it is another module
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.kind

    def model(self) -> nn.Module:
        """A model in float64, with biases and norms that are not at their beginnings."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(self.kind, **COMMON | self.options)
        kind = AutoModelForCausalLM if self.causal else AutoModelForMaskedLM
        model: nn.Module = kind.from_config(config, experts_implementation="eager").double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.3)
        return model


SELF = "model.layers.1.self_attn."
ROWS = (
    Row("gpt2", "transformer.h.1.attn.c_proj", options={"n_positions": 16}),
    Row("gpt_neox", "gpt_neox.layers.1.attention.dense", options={"intermediate_size": 48}),
    Row("llama", SELF + "o_proj", 2, GATED),
    Row("llama", SELF + "o_proj", 4, GATED | {"num_key_value_heads": 4, "attention_bias": True}, label="llama, no groups"),
    Row("mistral", SELF + "o_proj", 2, GATED | {"head_dim": SIZE}),
    Row("qwen2", SELF + "o_proj", 2, GATED),
    Row("qwen3", SELF + "o_proj", 2, GATED | {"head_dim": SIZE}),
    Row("gemma2", SELF + "o_proj", 2, GATED | {"head_dim": SIZE, "hidden_size": 24}),
    Row("gemma3_text", SELF + "o_proj", 1, GATED | {"head_dim": SIZE, "num_key_value_heads": 1}),
    Row("olmo2", SELF + "o_proj", 2, GATED, across=True),
    Row("phi", SELF + "dense", options={"intermediate_size": 48, "qk_layernorm": True}),
    Row("phi3", SELF + "o_proj", 2, GATED),
    Row("opt", "model.decoder.layers.1.self_attn.out_proj", options={"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 16}),
    Row("bloom", "transformer.h.1.self_attention.dense"),
    Row("falcon", "transformer.h.1.self_attention.dense", 1, {"multi_query": True, "alibi": False, "bias": True}, label="falcon, multi query"),
    Row("falcon", "transformer.h.1.self_attention.dense", 2, {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}, label="falcon, new"),
    Row("falcon", "transformer.h.1.self_attention.dense", 4, {"multi_query": False, "alibi": True}, label="falcon, all its own"),
    Row("stablelm", SELF + "o_proj", 2, GATED | {"qk_layernorm": True, "use_qkv_bias": True}),
    Row("mpt", "transformer.blocks.1.attn.out_proj", options={"max_seq_len": 16, "expansion_ratio": 1}),
    Row("gptj", "transformer.h.1.attn.out_proj", options={"rotary_dim": 4, "n_positions": 16}),
    Row("gpt_neo", "transformer.h.1.attn.attention.out_proj", options={"attention_types": [[["global"], 2]], "intermediate_size": 48, "max_position_embeddings": 16}),
    Row("mixtral", SELF + "o_proj", 2, GATED | {"num_local_experts": 3}),
    Row("qwen2_moe", SELF + "o_proj", 2, GATED | EXPERTS | {"shared_expert_intermediate_size": 16}),
    Row("qwen3_moe", SELF + "o_proj", 2, GATED | EXPERTS | {"head_dim": SIZE}),
    Row("olmoe", SELF + "o_proj", 2, GATED | EXPERTS, across=True),
    Row("bert", "bert.encoder.layer.1.attention.output.dense", options={"intermediate_size": 48}, causal=False),
    Row("roberta", "roberta.encoder.layer.1.attention.output.dense", options={"intermediate_size": 48}, causal=False),
    Row("distilbert", "distilbert.transformer.layer.1.attention.out_lin", options={"hidden_dim": 48}, causal=False),
)  # fmt: skip


def tokens(rows: int = 3, length: int = 6) -> Tensor:
    """Ids, none of which is padding."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def token_losses(model: nn.Module, batch: Tensor) -> Tensor:
    """A mean for each sequence."""
    logits = model(batch).logits[:, :-1].transpose(1, 2)
    return nn.functional.cross_entropy(logits, batch[:, 1:], reduction="none").mean(1)


def small_llama() -> nn.Module:
    """A model of two layers, as a run takes it."""
    return next(row for row in ROWS if row.kind == "llama").model().float()


class PlainSGD(torch.optim.SGD):
    """A sampler of a user's, which knows no masks."""

    def __init__(self, params: Any, lr: float, generator: torch.Generator | None = None) -> None:
        super().__init__(params, lr)
        self.generator = generator

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            noise = torch.empty_like(p).normal_(generator=self.generator)
            p.add_(p.grad - noise, alpha=-self.param_groups[0]["lr"])


class LensAttention(nn.Module):
    """An attention with a dimension for heads, as TransformerLens has it, in two groups."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * SIZE

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) / 4)

        self.W_Q, self.b_Q = parameter(HEADS, width, SIZE), parameter(HEADS, SIZE)
        self._W_K, self._b_K = parameter(2, width, SIZE), parameter(2, SIZE)
        self._W_V, self._b_V = parameter(2, width, SIZE), parameter(2, SIZE)
        self.W_O, self.b_O = parameter(HEADS, SIZE, width), parameter(width)
        self.hook_z = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("btm,hmd->bhtd", x, self.W_Q) + self.b_Q[:, None]
        k, v = (
            (torch.einsum("btm,hmd->bhtd", x, w) + b[:, None]).repeat_interleave(HEADS // 2, 1)
            for w, b in ((self._W_K, self._b_K), (self._W_V, self._b_V))
        )
        z = self.hook_z(((q @ k.mT / SIZE**0.5).softmax(-1) @ v).transpose(1, 2))
        out: Tensor = torch.einsum("bthd,hdm->btm", z, self.W_O) + self.b_O
        return out


class TransformerLensLike(nn.Module):
    """Two layers without anything but attention, under the names of TransformerLens."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        width = HEADS * SIZE
        self.embed, self.pos_embed, self.unembed = nn.Module(), nn.Module(), nn.Module()
        self.embed.W_E = nn.Parameter(torch.randn(VOCABULARY, width))
        self.pos_embed.W_pos = nn.Parameter(torch.randn(16, width))
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": LensAttention()}) for _ in range(2))
        self.unembed.W_U = nn.Parameter(torch.randn(width, VOCABULARY))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed.W_E[ids] + self.pos_embed.W_pos[: ids.shape[1]]
        for block in self.blocks:
            x = x + block["attn"](x)  # type: ignore[index]
        logits: Tensor = x @ self.unembed.W_U
        return logits


class Stage(nn.Module):
    """A layer of nobody's, whose experts are a list."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("query", "key", "value", "result", "choice"):
            setattr(self, name, nn.Linear(8, 2 if name == "choice" else 8))
        self.l0h1 = nn.Linear(2, 1)
        self.masters = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))


class Toy(nn.Module):
    """A transformer of nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.stages = nn.ModuleList(Stage() for _ in range(2))
