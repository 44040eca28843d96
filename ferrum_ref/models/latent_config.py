"""Sizes of multi-head latent attention.  Clauses: LM-LATENT-1..5 (specs/decoder_families.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ferrum_ref.errors import ConfigError
from ferrum_ref.models.config_fields import finite_number, flag, size


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSettings:
    """What is projected to what.  A head's query and key are `nope_dim` plain and `rope_dim` rotated entries.

    Raises ConfigError, naming the field, on impossible sizes.
    """

    num_heads: int
    query_rank: int | None  # None: queries are projected in one step
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool  # rotary pairs are (0, 1), (2, 3), ... of the projection's rows
    softmax_scale: float
    bias: bool = False  # of the first projections and of the output's

    def __post_init__(self) -> None:
        for name in ("num_heads", "kv_rank", "nope_dim", "rope_dim", "value_dim"):
            size(getattr(self, name), name)
        if self.query_rank is not None:
            size(self.query_rank, "q_lora_rank")
        if self.rope_dim % 2:
            raise ConfigError(f"qk_rope_head_dim: got {self.rope_dim}, expected an even number (rotary pairs)")

    @property
    def query_dim(self) -> int:
        """A head's query, and its key once expanded."""
        return self.nope_dim + self.rope_dim

    @property
    def cached_dim(self) -> int:
        """What is kept of a token: the compressed key and value, and the rotated part that all heads share."""
        return self.kv_rank + self.rope_dim


def deepseek_latent(config: Mapping[str, Any]) -> LatentSettings:
    """From DeepSeek-V3's config.json.  [LM-LATENT-1, LM-LATENT-4]"""
    query_rank = config.get("q_lora_rank", 1536)
    nope = size(config.get("qk_nope_head_dim", 128), "qk_nope_head_dim")
    rope = size(config.get("qk_rope_head_dim", 64), "qk_rope_head_dim")
    num_heads = size(config.get("num_attention_heads"), "num_attention_heads")
    num_kv_heads = config.get("num_key_value_heads")
    if num_kv_heads not in (None, num_heads):
        raise ConfigError(
            f"num_key_value_heads: got {num_kv_heads!r:.40}, expected the {num_heads} query heads: every head expands "
            "the latent for itself"
        )
    return LatentSettings(
        num_heads=num_heads,
        query_rank=None if query_rank is None else size(query_rank, "q_lora_rank"),
        kv_rank=size(config.get("kv_lora_rank", 512), "kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rope,
        value_dim=size(config.get("v_head_dim", 128), "v_head_dim"),
        interleaved=flag(config.get("rope_interleave", True), "rope_interleave"),
        softmax_scale=latent_scale(nope + rope, config.get("rope_parameters") or config.get("rope_scaling")),
        bias=flag(config.get("attention_bias", False), "attention_bias"),
    )


def latent_scale(query_dim: int, rope: Mapping[str, Any] | None) -> float:
    """D**-0.5 * m**2, m = 0.1 * mscale_all_dim * ln(factor) + 1 where rotary positions are stretched.  [LM-LATENT-4]

    m = 1 without mscale_all_dim, without stretching, and for a factor of at most 1. Pure. Raises ConfigError.
    """
    scale = 1.0 / math.sqrt(query_dim)
    kind = "default" if rope is None else rope.get("rope_type", rope.get("type", "default"))
    if rope is None or kind == "default" or not rope.get("mscale_all_dim"):
        return scale
    factor = finite_number(rope.get("factor"), "rope_parameters.factor")
    all_dim = finite_number(rope["mscale_all_dim"], "rope_parameters.mscale_all_dim")
    mscale = 0.1 * all_dim * math.log(factor) + 1.0 if factor > 1 else 1.0
    return scale * mscale * mscale
