"""What a family calls the tensors of its dense parts, and how it lays them out.

Names are those of the Hugging Face files; a matrix is [out, in] unless `transposed`.  Clause: MD-NAMES-1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from ferrum_ref.errors import ConfigError

if TYPE_CHECKING:
    from ferrum_ref.models.config import DecoderConfig

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Names without ".weight" and ".bias"; those of a layer without its prefix.

    `qkv`: q, k and v, or one matrix of the rows of all three; `gate_up`: gate and up, one matrix of both, or up alone
    where nothing gates. `transposed`: the layers' matrices lie [in, out]. `by_head`: the rows of the one matrix are q,
    k, v of the first head, then those of the next.
    """

    embedding: str = "model.embed_tokens"
    positions: str = ""
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    layer: str = "model.layers."
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    output: str = "self_attn.o_proj"
    attention_post_norm: str = ""
    ffn_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    ffn_post_norm: str = ""
    transposed: bool = False
    by_head: bool = False

    def prefix(self, layer: int) -> str:
        """What the names of a layer begin with.  Pure."""
        return f"{self.layer}{layer}."


_LLAMA = TensorLayout()
_GPT2 = TensorLayout(
    embedding="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    layer="transformer.h.",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    output="attn.c_proj",
    ffn_norm="ln_2",
    gate_up=("mlp.c_fc",),
    down="mlp.c_proj",
    transposed=True,
)
_GPT_NEOX = TensorLayout(
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    layer="gpt_neox.layers.",
    qkv=("attention.query_key_value",),
    output="attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    by_head=True,
)
LAYOUTS: Final[Mapping[str, TensorLayout]] = MappingProxyType(
    {
        "llama": _LLAMA,
        "gemma": replace(
            _LLAMA,
            attention_post_norm="post_attention_layernorm",
            ffn_norm="pre_feedforward_layernorm",
            ffn_post_norm="post_feedforward_layernorm",
        ),
        "phi3": replace(_LLAMA, qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
        "gpt2": _GPT2,
        "gpt2-rows": replace(_GPT2, transposed=False),  # as GGUF has it
        "gpt_neox": _GPT_NEOX,
        "gpt_neox-rows": replace(_GPT_NEOX, by_head=False),  # as GGUF has it
    }
)


def layout_of(config: DecoderConfig) -> TensorLayout:
    """The layout that the configuration names.  Pure.  Raises ConfigError for one that there is not."""
    if config.tensor_layout not in LAYOUTS:
        raise ConfigError(f"tensor_layout: got {config.tensor_layout!r:.40}, expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[config.tensor_layout]


def has_output_bias(config: DecoderConfig) -> bool:
    """Whether the attention's output projection has a bias.  Pure."""
    return config.attention_bias if config.attention_output_bias is None else config.attention_output_bias


def norm_tensors(config: DecoderConfig, name: str) -> Shapes:
    """Weight, and bias where norms have one.  Pure."""
    yield f"{name}.weight", (config.hidden_size,)
    if config.norm == "layer":
        yield f"{name}.bias", (config.hidden_size,)


def attention_tensors(config: DecoderConfig, layer: int) -> Shapes:
    """Name and shape of the tensors of grouped-query attention, without the norms around it.  Pure.  [MD-NAMES-1]"""
    names = layout_of(config)
    prefix, hidden = names.prefix(layer), config.hidden_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = (query, key, key) if len(names.qkv) == 3 else (query + 2 * key,)
    for name, num_rows in zip(names.qkv, rows, strict=True):
        yield from _matrix(names, prefix + name, num_rows, hidden, config.attention_bias)
    if config.qk_norm:
        yield f"{prefix}{names.q_norm}.weight", (config.head_dim,)
        yield f"{prefix}{names.k_norm}.weight", (config.head_dim,)
    if config.attention_sinks:
        yield prefix + names.sinks, (config.num_heads,)
    yield from _matrix(names, prefix + names.output, hidden, query, has_output_bias(config))


def feed_forward_tensors(config: DecoderConfig, layer: int) -> Shapes:
    """Name and shape of the tensors of a dense feed-forward, without the norms around it.  Pure.  [MD-NAMES-1]"""
    names = layout_of(config)
    prefix, hidden, inner = names.prefix(layer), config.hidden_size, config.intermediate_size
    num_rows = 2 * inner if config.gated and len(names.gate_up) == 1 else inner
    for name in names.gate_up:
        yield from _matrix(names, prefix + name, num_rows, hidden, config.mlp_bias)
    yield from _matrix(names, prefix + names.down, hidden, inner, config.mlp_bias)


def _matrix(names: TensorLayout, name: str, rows: int, columns: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (columns, rows) if names.transposed else (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)
