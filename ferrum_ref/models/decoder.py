"""The Llama-family decoder, written once over KernelOps and TensorOps: any ComputeBackend runs it.

    h_0 = embedding[ids]
    a_l = h_l + W_o attention(rope(q), rope(k), v),     [q; k; v] = W_qkv rms_norm(h_l)
    h_(l+1) = a_l + W_down (silu(gate) * up),           [gate; up] = W_gate_up rms_norm(a_l)
    logits = W_head rms_norm(h_L)

Source: Touvron et al. 2023 (Llama), section 2.2; grouped queries: Ainslie et al. 2023.
Clauses: LM-FORWARD-1..6 (specs/llm.md).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.forward import ForwardBatch, Ints, Observer
from ferrum_ref.interfaces.kernel_ops import (
    ActivationOps,
    AttentionParams,
    KernelOps,
    LinearOps,
    NormOps,
    PositionOps,
)
from ferrum_ref.interfaces.kv_storage import KvBatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder_rope import rope_tables
from ferrum_ref.models.decoder_weights import DecoderWeights, LayerWeights
from ferrum_ref.types.devices import DataType, Device

Part = TypeVar("Part")


class Decoder:
    """Stateless: K/V live in the `KvBatch` that `forward` is given. Safe to share between threads."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, backend: ComputeBackend, max_tokens: int | None = None
    ) -> None:
        """`max_tokens` bounds the context (default: the model's own).

        Raises UnsupportedError if the backend lacks a kernel this architecture needs.
        """
        self.config = config
        self.weights = weights
        self.backend = backend
        self.max_tokens = min(max_tokens or config.max_position_embeddings, config.max_position_embeddings)
        kernels = backend.kernel_ops() or _NoKernels()
        self._norm: NormOps = _required(kernels.norm_ops(), "norm", backend)
        self._position: PositionOps = _required(kernels.position_ops(), "rotary", backend)
        self._activation: ActivationOps = _required(kernels.activation_ops(), "activation", backend)
        self._linear: LinearOps = _required(kernels.linear_ops(), "linear", backend)
        self._tensor_ops = backend.tensor_ops()
        self._attention = AttentionParams(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            softmax_scale=config.head_dim**-0.5,
            causal=True,
        )
        factory = backend.tensor_factory()
        cos, sin = rope_tables(config.head_dim, self.max_tokens, config.rope_theta)
        self._cos, self._sin = (factory.from_numpy(table).to_dtype(self.dtype) for table in (cos, sin))

    @property
    def dtype(self) -> DataType:
        """Element type of weights, activations and K/V."""
        return self.weights.embedding.dtype()

    @property
    def device(self) -> Device:
        """Where the weights are."""
        return self.weights.embedding.device()

    def forward(
        self, batch: ForwardBatch, kv: KvBatch, observe: Observer | None = None, *, inputs: TensorRef | None = None
    ) -> TensorRef:
        """Logits `[R, V]` of batch.logit_rows, in that order. Appends the batch's K/V to `kv`.  [LM-FORWARD-1..6]

        `observe(name, tensor)` sees every intermediate: "embedding"; per layer "layers.3.attention_norm", ".qkv",
        ".attention", ".after_attention", ".ffn_norm", ".gated", ".hidden"; at the end "final_norm" and "logits". All
        rows up to the last layer's attention, the wanted rows from there on. `inputs` `[N, E]` stand in place of the
        embedding's rows, whose ids are then only checked.
        Raises InvalidParameterError (token id or row out of range) and ResourceExhaustedError (position beyond the
        context) before anything is computed or stored.
        """
        self.check(batch)
        see = observe or _ignore
        last = len(self.weights.layers) - 1
        residual = self.embed(batch.token_ids) if inputs is None else self._checked(inputs, batch)
        see("embedding", residual)
        normed = self._norm.rms_norm(residual, self.weights.layers[0].attention_norm, self.config.rms_norm_eps)
        for index, layer in enumerate(self.weights.layers):
            see(f"layers.{index}.attention_norm", normed)
            attended = self._attend(index, layer, normed, batch.positions, kv, see)
            if index == last:
                attended, residual = self._wanted(attended, batch), self._wanted(residual, batch)
            projected = self._project(attended, layer.output, layer.output_bias)
            normed, residual = self._add_and_norm(projected, residual, layer.ffn_norm)
            see(f"layers.{index}.after_attention", residual)
            update = self._feed_forward(index, layer, normed, see)
            following = self.weights.final_norm if index == last else self.weights.layers[index + 1].attention_norm
            normed, residual = self._add_and_norm(update, residual, following)
            see(f"layers.{index}.hidden", residual)
        see("final_norm", normed)
        logits = self._linear.linear(normed, self.weights.lm_head)
        see("logits", logits)
        return logits

    def embed(self, token_ids: Ints) -> TensorRef:
        """What the first layer gets for these ids: `[N, E]`. Pure.  [LM-FORWARD-6]"""
        return self._linear.embedding(self.weights.embedding, token_ids)

    def _checked(self, inputs: TensorRef, batch: ForwardBatch) -> TensorRef:
        """Raises ShapeError unless there is one row `[E]` for each token."""
        expected = (batch.num_tokens, self.config.hidden_size)
        if inputs.shape() != expected:
            raise ShapeError(f"Decoder.forward: inputs of shape {inputs.shape()}, expected {expected}")
        return inputs

    def _attend(
        self, index: int, layer: LayerWeights, normed: TensorRef, positions: Ints, kv: KvBatch, see: Observer
    ) -> TensorRef:
        """Project, rotate, store K/V, attend: `[N, E]` -> `[N, H*D]`."""
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        num_rows = len(positions)
        qkv = self._project(normed, layer.qkv, layer.qkv_bias)
        see(f"layers.{index}.qkv", qkv)
        by_head = qkv.reshape((1, num_rows, heads + 2 * kv_heads, head_dim))
        turned_heads = by_head.view((0, 0, 0, 0), (1, num_rows, heads + kv_heads, head_dim))
        turned = self._position.rotary_embedding(turned_heads, self._cos, self._sin, positions)
        turned = turned.reshape((num_rows, heads + kv_heads, head_dim))
        by_head = by_head.reshape((num_rows, heads + 2 * kv_heads, head_dim))
        kv.append(index, _heads(turned, heads, kv_heads), _heads(by_head, heads + kv_heads, kv_heads))
        attended = kv.attend(index, _heads(turned, 0, heads), self._attention)
        attended = attended.reshape((num_rows, heads * head_dim))
        see(f"layers.{index}.attention", attended)
        return attended

    def _feed_forward(self, index: int, layer: LayerWeights, normed: TensorRef, see: Observer) -> TensorRef:
        """The gated feed-forward: `[R, E]` -> `[R, E]`."""
        see(f"layers.{index}.ffn_norm", normed)
        both = self._project(normed, layer.gate_up, layer.gate_up_bias)
        num_rows, double = both.shape()
        gate, up = both.view((0, 0), (num_rows, double // 2)), both.view((0, double // 2), (num_rows, double))
        gated = self._activation.silu_mul(gate, up)
        see(f"layers.{index}.gated", gated)
        return self._project(gated, layer.down, layer.down_bias)

    def _project(self, x: TensorRef, weight: TensorRef, bias: TensorRef | None) -> TensorRef:
        y = self._linear.linear(x, weight)
        return y if bias is None else self._tensor_ops.add(y, bias)

    def _add_and_norm(self, update: TensorRef, residual: TensorRef, weight: TensorRef) -> tuple[TensorRef, TensorRef]:
        return self._norm.rms_norm_residual(update, residual, weight, self.config.rms_norm_eps)

    def _wanted(self, tensor: TensorRef, batch: ForwardBatch) -> TensorRef:
        """The rows of `[N, ...]` whose logits are wanted: the rest of the last layer needs no others."""
        rows = batch.logit_rows
        if len(rows) == batch.num_tokens and np.array_equal(rows, np.arange(batch.num_tokens)):
            return tensor
        return self._linear.embedding(tensor, rows)

    def check(self, batch: ForwardBatch) -> None:
        """What `forward` refuses before it does anything.  [LM-FORWARD-4]

        Raises InvalidParameterError (token id or row out of range), ResourceExhaustedError (beyond the context). Pure.
        """
        vocab, num_tokens = self.config.vocab_size, batch.num_tokens
        if batch.token_ids.min() < 0 or batch.token_ids.max() >= vocab:
            bad = batch.token_ids[(batch.token_ids < 0) | (batch.token_ids >= vocab)][0]
            raise InvalidParameterError(f"Decoder.forward: token id must be in [0, {vocab}), got {bad}")
        if batch.positions.max() >= self.max_tokens:
            raise ResourceExhaustedError(
                f"Decoder.forward: position {batch.positions.max()} is beyond the context of {self.max_tokens} tokens;"
                " shorten the prompt or generate less"
            )
        if len(batch.logit_rows) and (batch.logit_rows.min() < 0 or batch.logit_rows.max() >= num_tokens):
            raise InvalidParameterError(
                f"Decoder.forward: logit rows must be in [0, {num_tokens}), got {batch.logit_rows.tolist()}"
            )


def _heads(tensor: TensorRef, first: int, count: int) -> TensorRef:
    """Heads [first, first + count) of `[N, heads, D]`. Pure."""
    num_rows, _, head_dim = tensor.shape()
    return tensor.view((0, first, 0), (num_rows, first + count, head_dim))


def _ignore(_name: str, _tensor: TensorRef) -> None:
    """Nobody watches."""


class _NoKernels(KernelOps):
    """Stands for a backend without fused kernels."""

    def backend_name(self) -> str:
        return "none"


def _required(part: Part | None, kind: str, backend: ComputeBackend) -> Part:
    """The part itself.  Raises UnsupportedError if the backend has none."""
    if part is None:
        raise UnsupportedError(f"Decoder: backend {backend.name()!r} offers no {kind} kernels; choose another backend")
    return part
