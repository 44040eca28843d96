"""Which tensors a decoder of a given configuration consists of, and what a GGUF file calls them.

Canonical names and orientations are Hugging Face's: a linear weight is [out, in].  Clauses: MD-NAMES-1, MD-NAMES-2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from ferrum_ref.models.config import DecoderConfig

EMBEDDING: Final = "model.embed_tokens.weight"
LM_HEAD: Final = "lm_head.weight"
FINAL_NORM: Final = "model.norm.weight"

_GGUF_OUTER: Final[Mapping[str, str]] = MappingProxyType(
    {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": LM_HEAD}
)
_GGUF_LAYER: Final[Mapping[str, str]] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_GGUF_BLOCK: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.([a-z_]+)\.(weight|bias)")


def expected_tensors(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the forward pass; lazy, so a lying layer count costs nothing.

    [MD-NAMES-1]  E hidden, F feed-forward, H heads, G kv heads, D head size, V vocabulary.
    """
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield EMBEDDING, (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        for part, (rows, columns) in (
            ("q_proj", (query, hidden)),
            ("k_proj", (key, hidden)),
            ("v_proj", (key, hidden)),
            ("o_proj", (hidden, query)),
        ):
            yield f"{prefix}self_attn.{part}.weight", (rows, columns)
            if config.attention_bias:
                yield f"{prefix}self_attn.{part}.bias", (rows,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for part, (rows, columns) in (
            ("gate_proj", (feed_forward, hidden)),
            ("up_proj", (feed_forward, hidden)),
            ("down_proj", (hidden, feed_forward)),
        ):
            yield f"{prefix}mlp.{part}.weight", (rows, columns)
            if config.mlp_bias:
                yield f"{prefix}mlp.{part}.bias", (rows,)
    yield FINAL_NORM, (hidden,)
    if not config.tie_word_embeddings:
        yield LM_HEAD, (config.vocab_size, hidden)


def canonical_name(gguf_name: str) -> str | None:
    """The canonical name of a GGUF tensor of architecture "llama", None for one it does not have.  [MD-NAMES-2]"""
    if gguf_name in _GGUF_OUTER:
        return _GGUF_OUTER[gguf_name]
    match = _GGUF_BLOCK.fullmatch(gguf_name)
    if match is None or match[2] not in _GGUF_LAYER:
        return None
    return f"model.layers.{match[1]}.{_GGUF_LAYER[match[2]]}.{match[3]}"
