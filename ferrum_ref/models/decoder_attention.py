"""Grouped-query attention with what the dense families add to it: norms of heads, partly turned heads, windows, capped
scores, sinks.  Clauses: LM-LAYER-2, LM-LAYER-4 (specs/llm.md).

    [q; k; v] = W_qkv x + b,     o = W_o attention(turn(norm(q)), turn(norm(k)), v) + b_o
"""

from __future__ import annotations

from ferrum_ref.interfaces.forward import Ints
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.interfaces.kv_storage import KvBatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder_ops import DecoderOps, RmsNorm, Tables
from ferrum_ref.models.decoder_parts import See
from ferrum_ref.models.decoder_weights import LayerWeights
from ferrum_ref.models.matrix import Weight


class DenseAttention:
    """An `Attention` of decoder_parts. Stateless."""

    def __init__(self, ops: DecoderOps, config: DecoderConfig, layer: int, weights: LayerWeights) -> None:
        self._ops = ops
        self._weights = weights
        self._qkv: Weight = weights.dense("qkv")
        self._output: Weight = weights.dense("output")
        self._heads, self._kv_heads, self._head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._params = attention_params(config, layer)
        self._tables = None if config.learned_positions else ops.tables(config, layer)
        eps = config.rms_norm_eps
        self._q_norm = None if weights.q_norm is None else RmsNorm(ops, weights.q_norm, eps)
        self._k_norm = None if weights.k_norm is None else RmsNorm(ops, weights.k_norm, eps)

    def attend(
        self, normed: TensorRef, positions: Ints, kv: KvBatch, layer: int, see: See, rows: Tables | None = None
    ) -> TensorRef:
        """normed `[N, E]` -> `[N, H*D]`. Appends to `kv`. `rows`: tables by row, in place of those by position."""
        heads, kv_heads, num_rows = self._heads, self._kv_heads, len(positions)
        qkv = self._ops.project(normed, self._qkv, self._weights.qkv_bias)
        see("qkv", qkv)
        by_head = qkv.reshape((num_rows, heads + 2 * kv_heads, self._head_dim))
        query, key = self._turned(by_head, positions, rows)
        kv.append(layer, key, take_heads(by_head, heads + kv_heads, kv_heads))
        if self._weights.sinks is None:
            attended = kv.attend(layer, query, self._params)
        else:
            attended = kv.attend(layer, query, self._params, sinks=self._weights.sinks)
        attended = attended.reshape((num_rows, heads * self._head_dim))
        see("attention", attended)
        return attended

    def project(self, attended: TensorRef) -> TensorRef:
        """`[R, H*D]` -> `[R, E]`. Pure."""
        return self._ops.project(attended, self._output, self._weights.output_bias)

    def _turned(self, by_head: TensorRef, positions: Ints, rows: Tables | None) -> tuple[TensorRef, TensorRef]:
        """Queries `[N, H, D]` and keys `[N, G, D]`, normed and turned; in one call where norms do not part them."""
        heads, kv_heads = self._heads, self._kv_heads
        if self._q_norm is None or self._k_norm is None:
            turned = self._turn(take_heads(by_head, 0, heads + kv_heads), positions, rows)
            return take_heads(turned, 0, heads), take_heads(turned, heads, kv_heads)
        query, key = self._q_norm(take_heads(by_head, 0, heads)), self._k_norm(take_heads(by_head, heads, kv_heads))
        return self._turn(query, positions, rows), self._turn(key, positions, rows)

    def _turn(self, x: TensorRef, positions: Ints, rows: Tables | None) -> TensorRef:
        """The first entries of every head of `[N, heads, D]`, as many as the tables have angles for."""
        if self._tables is None:
            return x
        cos, sin = self._tables if rows is None else rows
        at: Ints | range = positions if rows is None else range(len(positions))
        num_rows, num_heads, head_dim = x.shape()
        rotary_dim = 2 * cos.shape()[1]
        whole = x.reshape((1, num_rows, num_heads, head_dim))
        if rotary_dim == head_dim:
            turned = self._ops.position.rotary_embedding(whole, cos, sin, at)
            return turned.reshape((num_rows, num_heads, head_dim))
        first = whole.view((0, 0, 0, 0), (1, num_rows, num_heads, rotary_dim))
        rest = x.view((0, 0, rotary_dim), (num_rows, num_heads, head_dim))
        turned = self._ops.position.rotary_embedding(first, cos, sin, at)
        return self._ops.tensor.concat([turned.reshape((num_rows, num_heads, rotary_dim)), rest], 2)


def attention_params(config: DecoderConfig, layer: int) -> AttentionParams:
    """What the attention kernel of this layer is told.  Pure.  [LM-LAYER-4]"""
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    return AttentionParams(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        softmax_scale=scale / (layer + 1) if config.scale_by_layer else scale,
        causal=True,
        sliding_window=config.window_of(layer),
        logit_softcap=config.attention_softcap,
    )


def take_heads(tensor: TensorRef, first: int, count: int) -> TensorRef:
    """Heads [first, first + count) of `[N, heads, D]`. Pure."""
    num_rows, _, head_dim = tensor.shape()
    return tensor.view((0, first, 0), (num_rows, first + count, head_dim))
