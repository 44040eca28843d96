"""One decode step of a whole transformer as a function of tensors only: nothing in it waits for the device.

    h = embedding[id]
    a = h + W_o attention(rope(norm_q(q)), K, V) + b_o,     [q; k; v] = W_qkv rms_norm(h) + b_qkv
    h' = a + W_down (silu(gate) * up) + b_down,             [gate; up] = W_gate_up rms_norm(a) + b_gate_up
    logits = W_head rms_norm(h_L)

Clauses: BK-TORCH-22..24 (specs/backend_torch.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerConfig, TransformerWeights
from ferrum_torch.tensor import TorchTensor


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """One layer's weights, by `TransformerWeights`' layout; None where the model has none."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class DecodeStep:
    """The weights of a transformer as torch tensors, and the step over them."""

    def __init__(self, weights: TransformerWeights) -> None:
        """Raises BackendError for weights of another backend."""
        config = weights.config()
        self.config: TransformerConfig = config
        self.embedding = _tensor(weights.embed_weight())
        self.final_norm = _tensor(weights.final_norm_weight())
        self.head = _tensor(weights.lm_head_weight())
        self.cos, self.sin = _tensor(weights.rope_cos()), _tensor(weights.rope_sin())
        self.layers = tuple(
            LayerTensors(
                _tensor(weights.layer_input_norm_weight(layer)),
                _tensor(weights.layer_qkv_weight(layer)),
                _optional(weights.layer_qkv_bias(layer)),
                _optional(weights.layer_q_norm_weight(layer)),
                _optional(weights.layer_k_norm_weight(layer)),
                _tensor(weights.layer_o_weight(layer)),
                _optional(weights.layer_o_bias(layer)),
                _tensor(weights.layer_post_norm_weight(layer)),
                _tensor(weights.layer_gate_up_weight(layer)),
                _optional(weights.layer_gate_up_bias(layer)),
                _tensor(weights.layer_down_weight(layer)),
                _optional(weights.layer_down_bias(layer)),
            )
            for layer in range(config.num_layers)
        )

    def __call__(
        self,
        token_id: torch.Tensor,
        position: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Logits `[1, V]` after one token.  [BK-TORCH-22]

        token_id and position: one int64 each, on the device. keys, values: `[capacity, G, D]` a layer, position <
        capacity; the token's own rows are written into them, the rows after it are not read.
        """
        visible = (torch.arange(keys[0].shape[0], device=position.device) <= position).view(1, 1, 1, -1)
        cos, sin = self.cos.index_select(0, position), self.sin.index_select(0, position)
        residual = functional.embedding(token_id, self.embedding)
        for layer, k_cache, v_cache in zip(self.layers, keys, values, strict=True):
            normed = self._norm(residual, layer.input_norm)
            attended = self._attend(layer, normed, position, (cos, sin), k_cache, v_cache, visible)
            residual = residual + functional.linear(attended, layer.output, layer.output_bias)
            normed = self._norm(residual, layer.post_norm)
            gate, up = functional.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            gated = (functional.silu(gate.float()) * up.float()).to(up.dtype)
            residual = residual + functional.linear(gated, layer.down, layer.down_bias)
        return functional.linear(self._norm(residual, self.final_norm), self.head)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """rms_norm in float32, rounded once."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def _attend(
        self,
        layer: LayerTensors,
        normed: torch.Tensor,
        position: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        visible: torch.Tensor,
    ) -> torch.Tensor:
        """Project, rotate, store, attend: `[1, E]` -> `[1, H*D]`."""
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_kv_heads
        qkv = functional.linear(normed, layer.qkv, layer.qkv_bias).view(heads + 2 * kv_heads, config.head_dim)
        q, k, v = qkv[:heads], qkv[heads : heads + kv_heads], qkv[heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        q, k = _rotate(q, *angles), _rotate(k, *angles)
        k_cache.index_copy_(0, position, k.unsqueeze(0))
        v_cache.index_copy_(0, position, v.unsqueeze(0))
        mixed = functional.scaled_dot_product_attention(
            q.view(1, heads, 1, config.head_dim),
            k_cache.transpose(0, 1).unsqueeze(0),
            v_cache.transpose(0, 1).unsqueeze(0),
            attn_mask=visible,
            enable_gqa=heads != kv_heads,
        )
        return mixed.reshape(1, heads * config.head_dim)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pair (i, i + D/2) of every head by one angle; x `[heads, D]`, cos and sin `[1, D/2]`. In float32."""
    first, second = x.float().chunk(2, -1)
    c, s = cos.float(), sin.float()
    return torch.cat((first * c - second * s, second * c + first * s), -1).to(x.dtype)


def _tensor(tensor: TensorRef) -> torch.Tensor:
    if not isinstance(tensor, TorchTensor):
        raise BackendError(
            f"TorchDecodeBackend: got weights of {type(tensor).__name__}, expected tensors of the torch backend; "
            "read the weights with that backend"
        )
    return tensor.data


def _optional(tensor: TensorRef | None) -> torch.Tensor | None:
    return None if tensor is None else _tensor(tensor)
