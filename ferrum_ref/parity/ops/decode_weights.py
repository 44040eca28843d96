"""A small decoder's weights as arrays, as a backend's tensors, and its forward in any arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerConfig, TransformerWeights
from ferrum_ref.kernels.activation import silu_mul
from ferrum_ref.kernels.attention import attention
from ferrum_ref.kernels.linear import linear as kernel_linear
from ferrum_ref.kernels.norm import rms_norm
from ferrum_ref.kernels.rope import rotary_embedding
from ferrum_ref.parity.units import Array

EPS = 1e-5
Linear = Callable[[Array, Array], Array]
LAYER_PARTS = ("input_norm", "qkv", "o", "post_norm", "gate_up", "down")


class ArrayWeights(TransformerWeights):
    """`TransformerWeights` over tensors by name; `layers.N.part` for what each layer has."""

    def __init__(self, config: TransformerConfig, tensors: Mapping[str, TensorRef]) -> None:
        self._config, self._tensors = config, tensors

    def config(self) -> TransformerConfig:
        return self._config

    def _layer(self, layer: int, part: str) -> TensorRef:
        if not 0 <= layer < self._config.num_layers:
            raise InvalidParameterError(f"layer: got {layer}, expected [0, {self._config.num_layers})")
        return self._tensors[f"layers.{layer}.{part}"]

    def _optional(self, layer: int, part: str) -> TensorRef | None:
        return self._layer(layer, part) if f"layers.0.{part}" in self._tensors else None

    def embed_weight(self) -> TensorRef:
        return self._tensors["embed"]

    def layer_input_norm_weight(self, layer: int) -> TensorRef:
        return self._layer(layer, "input_norm")

    def layer_qkv_weight(self, layer: int) -> TensorRef:
        return self._layer(layer, "qkv")

    def layer_q_norm_weight(self, layer: int) -> TensorRef | None:
        return self._optional(layer, "q_norm")

    def layer_k_norm_weight(self, layer: int) -> TensorRef | None:
        return self._optional(layer, "k_norm")

    def layer_o_weight(self, layer: int) -> TensorRef:
        return self._layer(layer, "o")

    def layer_post_norm_weight(self, layer: int) -> TensorRef:
        return self._layer(layer, "post_norm")

    def layer_gate_up_weight(self, layer: int) -> TensorRef:
        return self._layer(layer, "gate_up")

    def layer_down_weight(self, layer: int) -> TensorRef:
        return self._layer(layer, "down")

    def layer_qkv_bias(self, layer: int) -> TensorRef | None:
        return self._optional(layer, "qkv_bias")

    def final_norm_weight(self) -> TensorRef:
        return self._tensors["final_norm"]

    def lm_head_weight(self) -> TensorRef:
        return self._tensors["head"]

    def rope_cos(self) -> TensorRef:
        return self._tensors["cos"]

    def rope_sin(self) -> TensorRef:
        return self._tensors["sin"]


def linear_reversed(x: Array, weight: Array) -> Array:
    """x @ weight.T with the sum running backwards."""
    return kernel_linear(np.ascontiguousarray(x[..., ::-1]), np.ascontiguousarray(weight[:, ::-1]))


def decoded(
    config: TransformerConfig,
    arrays: Mapping[str, Array],
    tokens: Array,
    start: int,
    linear: Linear = kernel_linear,
    residual_dtype: np.dtype[np.float32] | None = None,
) -> Array:
    """Logits (steps, V) of one token after another behind `start` cached positions, in the arrays' own type.

    Every operation rounds once to that type; with `residual_dtype` the residual stream stays in float32. The arrays
    hold the cache of the prefill as `layers.N.k` and `.v`, (S, G, D). Pure.
    """
    keys = [arrays[f"layers.{layer}.k"][:start] for layer in range(config.num_layers)]
    values = [arrays[f"layers.{layer}.v"][:start] for layer in range(config.num_layers)]
    rows = []
    for step, token in enumerate(tokens.tolist()):
        x = arrays["embed"][token : token + 1]
        dtype = x.dtype
        x = x if residual_dtype is None else x.astype(residual_dtype)
        for layer in range(config.num_layers):
            part = {name: arrays[f"layers.{layer}.{name}"] for name in LAYER_PARTS}
            normed = rms_norm(x, part["input_norm"].astype(x.dtype), EPS).astype(dtype)
            mixed = _attended(config, arrays, layer, linear(normed, part["qkv"]), start + step, keys, values)
            x = x + linear(mixed, part["o"]).astype(x.dtype)
            normed = rms_norm(x, part["post_norm"].astype(x.dtype), EPS).astype(dtype)
            gate, up = np.split(linear(normed, part["gate_up"]), 2, axis=-1)
            x = x + linear(silu_mul(gate, up), part["down"]).astype(x.dtype)
        rows.append(linear(rms_norm(x, arrays["final_norm"].astype(x.dtype), EPS).astype(dtype), arrays["head"]))
    return np.concatenate(rows) if rows else np.zeros((0, config.vocab_size), dtype=arrays["embed"].dtype)


def _attended(
    config: TransformerConfig,
    arrays: Mapping[str, Array],
    layer: int,
    qkv: Array,
    position: int,
    keys: list[Array],
    values: list[Array],
) -> Array:
    """One token's attention over its layer's cache, which grows by one row."""
    heads, kv_heads, size = config.num_attention_heads, config.num_kv_heads, config.head_dim
    if f"layers.{layer}.qkv_bias" in arrays:
        qkv = qkv + arrays[f"layers.{layer}.qkv_bias"]
    by_head = qkv.reshape(1, 1, heads + 2 * kv_heads, size)
    q, k, v = np.split(by_head, [heads, heads + kv_heads], axis=2)
    if f"layers.{layer}.q_norm" in arrays:
        q = rms_norm(q, arrays[f"layers.{layer}.q_norm"], EPS)
        k = rms_norm(k, arrays[f"layers.{layer}.k_norm"], EPS)
    q, k = (rotary_embedding(one, arrays["cos"], arrays["sin"], [position]) for one in (q, k))
    keys[layer] = np.concatenate([keys[layer], k[0]])
    values[layer] = np.concatenate([values[layer], v[0]])
    mixed = attention(q, keys[layer][None], values[layer][None], size**-0.5, True)
    return mixed.reshape(1, heads * size)
