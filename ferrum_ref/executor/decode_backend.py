"""A `DecodeBackend` over `TransformerWeights`: any ComputeBackend decodes one token of one sequence at a time.

    h = embedding[id]
    a = h + W_o attention(rope(norm_q(q)), K, V) + b_o,     [q; k; v] = W_qkv rms_norm(h) + b_qkv
    h' = a + W_down (silu(gate) * up) + b_down,             [gate; up] = W_gate_up rms_norm(a) + b_gate_up
    logits = W_head rms_norm(h_L)

Clauses: DB-* (specs/decode_backend.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.executor.decode_backend_cache import SequenceCache, rows_of
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.decode_sequences import SequenceDecodeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionOps, AttentionParams, KernelOpsDispatch, PositionOps
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerWeights

Part = TypeVar("Part")
LayerKv = list[tuple[TensorRef, TensorRef]]


class TransformerDecodeBackend(SequenceDecodeBackend[SequenceCache]):
    """Keeps K/V by key; a call that raises has changed nothing.  [DB-STEP-1..6, DB-INIT-1..4]

    Norms, activation and products use the backend's fused kernels, or its TensorOps where it has none; rotary positions
    and attention must be there.
    """

    def __init__(self, weights: TransformerWeights, backend: ComputeBackend, *, max_tokens: int | None = None) -> None:
        """`max_tokens` bounds the context below that of the weights.

        Raises UnsupportedError if the backend has no rotary or attention kernel.
        """
        super().__init__(weights.config(), weights.embed_weight().dtype(), max_tokens)
        self._weights = weights
        self._backend = backend
        kernels = backend.kernel_ops()
        self._dispatch = KernelOpsDispatch(kernels, backend.tensor_ops())
        self._linear = kernels.linear_ops() if kernels is not None else None
        self._position: PositionOps = _required(kernels.position_ops() if kernels else None, "rotary", backend)
        self._attention: AttentionOps = _required(kernels.attention_ops() if kernels else None, "attention", backend)
        config = self._config
        self._params = AttentionParams(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            softmax_scale=config.head_dim**-0.5,
            causal=True,
        )

    def name(self) -> str:
        return f"transformer on {self._backend.name()}"

    def _begun(self, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> SequenceCache:
        cache = self._new_cache()
        cache.reserve(max(1, prefill_len))
        for layer, (k, v) in enumerate(kv_data):
            cache.store(layer, rows_of(k, 0, prefill_len), rows_of(v, 0, prefill_len))
        cache.num_tokens = prefill_len
        return cache

    def _stepped(self, sequence: SequenceCache, token_id: int, position: int) -> TensorRef:
        sequence.reserve(position + 1)
        return self._forward(sequence, token_id, position).reshape((1, 1, self._config.vocab_size))

    def _forward(self, cache: SequenceCache, token_id: int, position: int) -> TensorRef:
        weights, config = self._weights, self._config
        residual = self._embedded(token_id)
        normed = self._dispatch.rms_norm(residual, weights.layer_input_norm_weight(0), config.rms_norm_eps)
        for layer in range(config.num_layers):
            attended = self._attend(cache, layer, normed, position)
            update = self._project(attended, weights.layer_o_weight(layer), weights.layer_o_bias(layer))
            normed, residual = self._add_and_norm(update, residual, weights.layer_post_norm_weight(layer))
            update = self._feed_forward(layer, normed)
            last = layer + 1 == config.num_layers
            following = weights.final_norm_weight() if last else weights.layer_input_norm_weight(layer + 1)
            normed, residual = self._add_and_norm(update, residual, following)
        return self._dispatch.linear(normed, weights.lm_head_weight())

    def _embedded(self, token_id: int) -> TensorRef:
        """`[1, E]`."""
        table = self._weights.embed_weight()
        if self._linear is not None:
            try:
                return self._linear.embedding(table, [token_id])
            except UnsupportedError:
                pass  # the backend gathers no rows: show the one row instead
        return rows_of(table, token_id, token_id + 1)

    def _attend(self, cache: SequenceCache, layer: int, normed: TensorRef, position: int) -> TensorRef:
        """Project, norm and rotate q and k, cache k and v, attend: `[1, E]` -> `[1, H * D]`."""
        weights, config = self._weights, self._config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_kv_heads, config.head_dim
        qkv = self._project(normed, weights.layer_qkv_weight(layer), weights.layer_qkv_bias(layer))
        by_head = qkv.reshape((heads + 2 * kv_heads, head_dim))
        q = self._turned(rows_of(by_head, 0, heads), weights.layer_q_norm_weight(layer), position)
        k = self._turned(rows_of(by_head, heads, heads + kv_heads), weights.layer_k_norm_weight(layer), position)
        v = rows_of(by_head, heads + kv_heads, heads + 2 * kv_heads).reshape((1, kv_heads, head_dim))
        cache.store(layer, k.reshape((1, kv_heads, head_dim)), v)
        keys, values = cache.read(layer, position + 1)
        return self._attention.attention(q, keys, values, self._params).reshape((1, heads * head_dim))

    def _turned(self, heads: TensorRef, norm: TensorRef | None, position: int) -> TensorRef:
        """`[n, D]` -> `[1, 1, n, D]`, normed per head where there is a norm, and rotated."""
        if norm is not None:
            heads = self._dispatch.rms_norm(heads, norm, self._config.rms_norm_eps)
        heads = heads.reshape((1, 1, *heads.shape()))
        return self._position.rotary_embedding(heads, self._weights.rope_cos(), self._weights.rope_sin(), [position])

    def _feed_forward(self, layer: int, normed: TensorRef) -> TensorRef:
        weights, inner = self._weights, self._config.intermediate_size
        both = self._project(normed, weights.layer_gate_up_weight(layer), weights.layer_gate_up_bias(layer))
        gated = self._dispatch.silu_mul(both.view((0, 0), (1, inner)), both.view((0, inner), (1, 2 * inner)))
        return self._project(gated, weights.layer_down_weight(layer), weights.layer_down_bias(layer))

    def _project(self, x: TensorRef, weight: TensorRef, bias: TensorRef | None) -> TensorRef:
        y = self._dispatch.linear(x, weight)
        return y if bias is None else self._dispatch.tensor_ops().add(y, bias)

    def _add_and_norm(self, update: TensorRef, residual: TensorRef, weight: TensorRef) -> tuple[TensorRef, TensorRef]:
        return self._dispatch.rms_norm_residual(update, residual, weight, self._config.rms_norm_eps)

    def _new_cache(self) -> SequenceCache:
        device = self._weights.embed_weight().device()
        factory, ops = self._backend.tensor_factory(), self._backend.tensor_ops()
        return SequenceCache(self._config, self._element, device, factory, ops, self._attention)


class ReadableKv(Protocol):
    """Block storage whose rows can be read back (`kv_cache.storage_paged`)."""

    def read(self, layer: int, block_ids: Sequence[int], num_tokens: int) -> tuple[TensorRef, TensorRef]:
        """The first tokens' K and V of a block table, `[num_tokens, G, D]` each."""


def kv_of_blocks(storage: ReadableKv, block_ids: Sequence[int], num_layers: int, num_tokens: int) -> LayerKv:
    """What an executor's prefill left in its blocks, in the form `init_kv_cache` takes. Pure.  [DB-INIT-2]"""
    return [storage.read(layer, block_ids, num_tokens) for layer in range(num_layers)]


def _required(part: Part | None, kind: str, backend: ComputeBackend) -> Part:
    """The part itself.  Raises UnsupportedError if the backend has none."""
    if part is None:
        raise UnsupportedError(
            f"TransformerDecodeBackend: backend {backend.name()!r} offers no {kind} kernels; choose another backend"
        )
    return part
