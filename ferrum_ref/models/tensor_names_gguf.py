"""What a GGUF file calls a decoder's tensors, and whose rows it stores in another order.  Clause: MD-NAMES-2."""

from __future__ import annotations

import re
from typing import Final

from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.tensor_layout import TensorLayout, layout_of

PERMUTED_FAMILIES: Final = frozenset({"llama"})  # llama.cpp pairs neighbours there, and halves elsewhere
_BLOCK: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.([a-z_]+)\.(weight|bias)")
_OUTER: Final = re.compile(r"(token_embd|position_embd|output_norm|output)\.(weight|bias)")


def canonical_gguf_name(stored: str, config: DecoderConfig) -> str | None:
    """The canonical name of a GGUF tensor, None for one that this decoder does not have.  Pure.  [MD-NAMES-2]"""
    names = layout_of(config)
    if config.rope is not None and stored in config.rope.stored_tensors():
        return stored
    outer = _OUTER.fullmatch(stored)
    if outer:
        part = {
            "token_embd": names.embedding,
            "position_embd": names.positions,
            "output_norm": names.final_norm,
            "output": names.lm_head,
        }[outer[1]]
        return f"{part}.{outer[2]}" if part else None
    match = _BLOCK.fullmatch(stored)
    part = _block_names(names).get(match[2], "") if match else ""
    return f"{names.prefix(int(match[1]))}{part}.{match[3]}" if match and part else None


def has_permuted_rows(config: DecoderConfig) -> bool:
    """Whether q and k lie with the pairs of a turn beside each other.  Pure.  [MD-NAMES-2]"""
    return config.architecture in PERMUTED_FAMILIES


def _block_names(names: TensorLayout) -> dict[str, str]:
    """GGUF's name of a layer's tensor -> the layout's, "" where it has none."""
    found = {
        "attn_norm": names.attention_norm,
        "attn_q_norm": names.q_norm,
        "attn_k_norm": names.k_norm,
        "attn_output": names.output,
        "post_attention_norm": names.attention_post_norm,
        "ffn_norm": names.ffn_norm,
        "ffn_up": names.gate_up[-1],
        "ffn_down": names.down,
        "post_ffw_norm": names.ffn_post_norm,
    }
    if len(names.gate_up) == 2:
        found["ffn_gate"] = names.gate_up[0]
    if len(names.qkv) == 3:
        return {**found, **dict(zip(("attn_q", "attn_k", "attn_v"), names.qkv, strict=True))}
    return {**found, "attn_qkv": names.qkv[0]}
