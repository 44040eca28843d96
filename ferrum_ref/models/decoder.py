"""The decoder, written once over KernelOps and TensorOps: any ComputeBackend runs it.

    h_0 = embedding[ids]
    a_l = h_l + attention_l(norm(h_l)),     h_(l+1) = a_l + feed_forward_l(norm(a_l))
    logits = W_head norm(h_L)

What the parts are, and what a family adds to this, its `DecoderConfig` says; `decoder_attention` and
`decoder_feed_forward` hold the dense parts.
Source: Touvron et al. 2023 (Llama), section 2.2; grouped queries: Ainslie et al. 2023.
Clauses: LM-FORWARD-1..8, LM-LAYER-1..4 (specs/llm.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.forward import ForwardBatch, Ints, Observer
from ferrum_ref.interfaces.kv_storage import KvBatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder_attention import DenseAttention
from ferrum_ref.models.decoder_feed_forward import GatedFeedForward, PlainFeedForward
from ferrum_ref.models.decoder_ops import DecoderOps, LayerNorm, Norm, RmsNorm, Tables, rope_by_type
from ferrum_ref.models.decoder_parts import Attention, FeedForward, See
from ferrum_ref.models.decoder_weights import DecoderWeights, LayerWeights
from ferrum_ref.models.matrix import matrix_rows
from ferrum_ref.models.rope_config import RopeSettings
from ferrum_ref.models.tensor_names import family_of
from ferrum_ref.types.devices import DataType, Device


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's parts; the norms after a part are None where there are none."""

    attention_norm: Norm
    attention: Attention
    attention_post_norm: Norm | None
    ffn_norm: Norm
    feed_forward: FeedForward
    ffn_post_norm: Norm | None


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
        self.max_tokens = min(max_tokens or config.context_tokens, config.context_tokens)
        known = config if config.rope is None else replace(config, rope=config.rope.with_stored(weights.rope_factors))
        self._ops = DecoderOps(backend, self.dtype, known, self.max_tokens)
        self._growing = _growing(known)
        self._layers = [self._build(known, index, each) for index, each in enumerate(weights.layers)]
        self._final_norm = self._normed_by(weights.final_norm, weights.final_norm_bias)
        scale = config.embedding_scale
        self._embedding_scale = None if scale == 1.0 else self._ops.constant(scale)

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
        """Logits `[R, V]` of batch.logit_rows, in that order. Appends the batch's K/V to `kv`.  [LM-FORWARD-1..8]

        `observe(name, tensor)` sees every intermediate: "embedding"; per layer "layers.3.attention_norm", ".qkv",
        ".attention", ".after_attention", ".ffn_norm", ".gated", ".hidden"; at the end "final_norm" and "logits". All
        rows up to the last layer's attention, the wanted rows from there on. `inputs` `[N, E]` stand in place of the
        embedding's rows, whose ids are then only checked.
        Raises InvalidParameterError (token id or row out of range) and ResourceExhaustedError (position beyond the
        context) before anything is computed or stored.
        """
        self.check(batch)
        see = observe or _ignore
        last = len(self._layers) - 1
        residual = self.embed(batch.token_ids) if inputs is None else self._checked(inputs, batch)
        if self.weights.positions is not None:
            at = self._ops.linear.embedding(self.weights.positions, batch.positions)
            residual = self._ops.tensor.add(residual, at)
        see("embedding", residual)
        rows = self._row_tables(batch)
        normed = self._layers[0].attention_norm(residual)
        for index, layer in enumerate(self._layers):
            see(f"layers.{index}.attention_norm", normed)
            watch = _ignore if observe is None else _prefixed(observe, index)
            if rows is None or not isinstance(layer.attention, DenseAttention):
                attended = layer.attention.attend(normed, batch.positions, kv, index, watch)
            else:
                attended = layer.attention.attend(normed, batch.positions, kv, index, watch, rows)
            if index == last:
                attended, residual = self._wanted(attended, batch), self._wanted(residual, batch)
            update = layer.attention.project(attended)
            if layer.attention_post_norm is not None:
                update = layer.attention_post_norm(update)
            if self.config.parallel_residual:
                normed, residual = layer.ffn_norm(residual), self._ops.tensor.add(update, residual)
            else:
                normed, residual = layer.ffn_norm.after_add(update, residual)
            see(f"layers.{index}.after_attention", residual)
            see(f"layers.{index}.ffn_norm", normed)
            update = layer.feed_forward(normed, watch)
            if layer.ffn_post_norm is not None:
                update = layer.ffn_post_norm(update)
            following = self._final_norm if index == last else self._layers[index + 1].attention_norm
            normed, residual = following.after_add(update, residual)
            see(f"layers.{index}.hidden", residual)
        see("final_norm", normed)
        logits = self._ops.project(normed, self.weights.lm_head, None)
        if self.config.final_softcap:
            logits = self._ops.capped(logits, self.config.final_softcap)
        see("logits", logits)
        return logits

    def embed(self, token_ids: Ints) -> TensorRef:
        """What the first layer gets for these ids, but for learned positions: `[N, E]`. Pure.  [LM-FORWARD-6]"""
        rows = matrix_rows(self._ops.linear, self.weights.embedding, token_ids)
        return rows if self._embedding_scale is None else self._ops.tensor.mul(rows, self._embedding_scale)

    def _build(self, config: DecoderConfig, index: int, weights: LayerWeights) -> Layer:
        family = family_of(config)
        attention, feed_forward = family.attention(config, index), family.feed_forward(config, index)
        if attention is not None and self._growing is not None:
            raise UnsupportedError(
                f"Decoder: rope_type {self._growing.kind!r} with the attention of {config.architecture!r}: its tables"
                " would depend on the sequence's length, which that attention does not know"
            )
        dense = GatedFeedForward if config.gated else PlainFeedForward
        post, ffn_post = weights.attention_post_norm, weights.ffn_post_norm
        return Layer(
            attention_norm=self._normed_by(weights.attention_norm, weights.attention_norm_bias),
            attention=DenseAttention(self._ops, config, index, weights)
            if attention is None
            else attention.build(self._ops, config, index, weights.attention_part),
            attention_post_norm=None if post is None else self._normed_by(post, None),
            ffn_norm=self._normed_by(weights.ffn_norm, weights.ffn_norm_bias),
            feed_forward=dense(self._ops, config, weights)
            if feed_forward is None
            else feed_forward.build(self._ops, config, index, weights.feed_forward_part),
            ffn_post_norm=None if ffn_post is None else self._normed_by(ffn_post, None),
        )

    def _normed_by(self, weight: TensorRef, bias: TensorRef | None) -> Norm:
        if self.config.norm == "layer":
            return LayerNorm(self._ops, weight, bias, self.config.rms_norm_eps)
        return RmsNorm(self._ops, weight, self.config.rms_norm_eps)

    def _row_tables(self, batch: ForwardBatch) -> Tables | None:
        """Rotary tables by row, where a sequence of the batch has outgrown those by position.  [LM-ROPE-5, LM-ROPE-8]

        A sequence's length is that after this forward.
        """
        rope = self._growing
        if rope is None or batch.positions.max() < rope.original_positions:
            return None
        ends = np.cumsum(batch.lengths)
        lengths = np.repeat(batch.positions[ends - 1] + 1, batch.lengths)
        return self._ops.row_tables(rope, batch.positions, lengths)

    def _checked(self, inputs: TensorRef, batch: ForwardBatch) -> TensorRef:
        """Raises ShapeError unless there is one row `[E]` for each token."""
        expected = (batch.num_tokens, self.config.hidden_size)
        if inputs.shape() != expected:
            raise ShapeError(f"Decoder.forward: inputs of shape {inputs.shape()}, expected {expected}")
        return inputs

    def _wanted(self, tensor: TensorRef, batch: ForwardBatch) -> TensorRef:
        """The rows of `[N, ...]` whose logits are wanted: the rest of the last layer needs no others."""
        rows = batch.logit_rows
        if len(rows) == batch.num_tokens and np.array_equal(rows, np.arange(batch.num_tokens)):
            return tensor
        return self._ops.linear.embedding(tensor, rows)

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


def _growing(config: DecoderConfig) -> RopeSettings | None:
    """The settings whose tables depend on a sequence's length.  Raises UnsupportedError where only some layers' do."""
    ropes = list(rope_by_type(config).values())
    found = [rope for rope in ropes if rope.grows]
    if found and any(rope != found[0] for rope in ropes):
        raise UnsupportedError(f"Decoder: rope_type {found[0].kind!r} of some layers only, expected it of all or none")
    return found[0] if found else None


def _prefixed(observe: Observer, layer: int) -> See:
    """Shows a part's intermediates under the layer's name."""

    def see(name: str, tensor: TensorRef) -> None:
        observe(f"layers.{layer}.{name}", tensor)

    return see


def _ignore(_name: str, _tensor: TensorRef) -> None:
    """Nobody watches."""
