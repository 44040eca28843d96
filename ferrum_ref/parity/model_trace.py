"""A decoder run beside itself in float64 and in float32, from the same stored weights.

An independent, plain forward over the kernels: no cache, no backend, one layer's weights in memory at a time. The
float64 run is the oracle of a whole model; the float32 runs, in two orders of summation, are the noise floor that any
float32 implementation lives on.  Clauses: PA-MODEL-1..2.  Source: Touvron et al. 2023 (Llama), section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.kernels.activation import silu_mul
from ferrum_ref.kernels.attention import attention
from ferrum_ref.kernels.linear import linear
from ferrum_ref.kernels.norm import rms_norm
from ferrum_ref.kernels.rope import rotary_embedding
from ferrum_ref.parity.units import Array


class DecoderShape(Protocol):
    """What is needed of a model's configuration."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def attention_bias(self) -> bool: ...
    @property
    def mlp_bias(self) -> bool: ...


class Weights(Protocol):
    """An opened model: tensors by Hugging Face names, `[out, in]`, exact in float64."""

    @property
    def config(self) -> DecoderShape: ...

    def read(self, name: str, dtype: Any = np.float32) -> Array: ...


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """One way to run the model: its element type, and whether sums over features run backwards."""

    dtype: type[np.floating[Any]]
    reversed_sums: bool = False

    def linear(self, x: Array, weight: Array) -> Array:
        """x @ weight.T with the terms in this order."""
        if self.reversed_sums:
            return linear(np.ascontiguousarray(x[..., ::-1]), np.ascontiguousarray(weight[:, ::-1]))
        return linear(x, weight)


WIDE = Arithmetic(np.float64)
FLOOR = (Arithmetic(np.float32), Arithmetic(np.float32, reversed_sums=True))


def trace_model(
    weights: Weights,
    token_ids: Sequence[int],
    tables: tuple[Array, Array],
    arithmetics: Sequence[Arithmetic],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, list[Array]]]:
    """Every named intermediate, one array for each of `arithmetics`: "embedding", "layers.0.qkv", ..., "logits".

    token_ids T; tables: the rotary cosines and sines (at least T, D/2), inputs like the weights. Rows are tokens. The
    names are those that a decoder's observer uses. Pure. Raises UnsupportedError for biases.
    """
    config = weights.config
    if config.attention_bias or config.mlp_bias:
        raise UnsupportedError("parity: a float64 run of a decoder with biases is not offered")
    rows = weights.read("model.embed_tokens.weight", np.float64)
    streams = [rows[np.asarray(token_ids)].astype(one.dtype) for one in arithmetics]
    yield "embedding", list(streams)
    for index in range(config.num_layers):
        layer = _read_layer(weights, index)
        traces = [_layer(config, layer, one, x, tables) for one, x in zip(arithmetics, streams, strict=True)]
        for name in traces[0]:
            yield f"layers.{index}.{name}", [trace[name] for trace in traces]
        streams = [trace["hidden"] for trace in traces]
        if progress is not None:
            progress(index + 1, config.num_layers)
    gain = weights.read("model.norm.weight", np.float64)
    head = rows if config.tie_word_embeddings else weights.read("lm_head.weight", np.float64)
    normed = [
        rms_norm(x, gain.astype(one.dtype), config.rms_norm_eps) for one, x in zip(arithmetics, streams, strict=True)
    ]
    yield "final_norm", normed
    yield "logits", [one.linear(x, head.astype(one.dtype)) for one, x in zip(arithmetics, normed, strict=True)]


def _read_layer(weights: Weights, index: int) -> dict[str, Array]:
    parts = {
        "attention_norm": ["input_layernorm"],
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "output": ["self_attn.o_proj"],
        "ffn_norm": ["post_attention_layernorm"],
        "gate": ["mlp.gate_proj"],
        "up": ["mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    return {
        name: np.concatenate([weights.read(f"model.layers.{index}.{part}.weight", np.float64) for part in found])
        for name, found in parts.items()
    }


def _layer(
    config: DecoderShape, layer: Mapping[str, Array], one: Arithmetic, x: Array, tables: tuple[Array, Array]
) -> dict[str, Array]:
    """One decoder layer; the keys are its observed intermediates."""
    weights = {name: weight.astype(one.dtype, copy=False) for name, weight in layer.items()}
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    seen = {"attention_norm": rms_norm(x, weights["attention_norm"], config.rms_norm_eps)}
    seen["qkv"] = one.linear(seen["attention_norm"], weights["qkv"])
    by_head = seen["qkv"].reshape(1, x.shape[0], heads + 2 * kv_heads, size)
    cos, sin = (table.astype(one.dtype) for table in tables)
    turned = rotary_embedding(by_head[:, :, : heads + kv_heads], cos, sin, np.arange(x.shape[0]))
    mixed = attention(turned[:, :, :heads], turned[:, :, heads:], by_head[:, :, heads + kv_heads :], size**-0.5, True)
    seen["attention"] = mixed.reshape(x.shape[0], heads * size)
    seen["after_attention"] = x + one.linear(seen["attention"], weights["output"])
    seen["ffn_norm"] = rms_norm(seen["after_attention"], weights["ffn_norm"], config.rms_norm_eps)
    gate, up = (one.linear(seen["ffn_norm"], weights[name]) for name in ("gate", "up"))
    seen["gated"] = silu_mul(gate, up)
    seen["hidden"] = seen["after_attention"] + one.linear(seen["gated"], weights["down"])
    return seen
