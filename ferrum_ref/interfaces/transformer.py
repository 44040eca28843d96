"""Uniform access to the weights of a pre-norm decoder: RMSNorm, grouped queries, RoPE, gated feed-forward.

Upstream: `ferrum_interfaces::transformer`. Weights are `[out, in]`, used as `x @ W.T`. H query heads, G key/value
heads, D head size, E hidden size, F feed-forward size, V vocabulary.  Clauses: TW-* in specs/transformer.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.weight_parts import DecoderMatrix, WeightPart
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.record import F32, Record, Usize


@dataclass(frozen=True, slots=True)
class TransformerConfig(Record):
    """Dimensions of a standard decoder.  [TW-CONFIG-1]"""

    num_layers: Usize
    hidden_size: Usize
    num_attention_heads: Usize
    num_kv_heads: Usize
    head_dim: Usize
    intermediate_size: Usize
    vocab_size: Usize
    max_seq_len: Usize
    rms_norm_eps: F32
    has_qk_norm: bool


class TransformerWeights(ABC):
    """Read access to all weights; one class of tensor, one element type.  [TW-WEIGHTS-1..5, TW-ROPE-1, TW-NORM-1]

    A layer outside [0, num_layers) is an InvalidParameterError (upstream panics). All methods are pure: they hand out
    the tensors themselves, not copies.
    """

    @abstractmethod
    def config(self) -> TransformerConfig:
        """Dimensions."""

    @abstractmethod
    def embed_weight(self) -> TensorRef:
        """`[V, E]`."""

    @abstractmethod
    def layer_input_norm_weight(self, layer: int) -> TensorRef:
        """`[E]`, before attention."""

    @abstractmethod
    def layer_qkv_weight(self, layer: int) -> TensorRef:
        """`[(H + 2G) * D, E]`: the rows of Q, then K, then V."""

    @abstractmethod
    def layer_q_norm_weight(self, layer: int) -> TensorRef | None:
        """`[D]`, or None without q/k norms."""

    @abstractmethod
    def layer_k_norm_weight(self, layer: int) -> TensorRef | None:
        """`[D]`, or None without q/k norms."""

    @abstractmethod
    def layer_o_weight(self, layer: int) -> TensorRef:
        """`[E, H * D]`."""

    @abstractmethod
    def layer_post_norm_weight(self, layer: int) -> TensorRef:
        """`[E]`, before the feed-forward."""

    @abstractmethod
    def layer_gate_up_weight(self, layer: int) -> TensorRef:
        """`[2 * F, E]`: the rows of gate, then up."""

    @abstractmethod
    def layer_down_weight(self, layer: int) -> TensorRef:
        """`[E, F]`."""

    @abstractmethod
    def final_norm_weight(self) -> TensorRef:
        """`[E]`."""

    @abstractmethod
    def lm_head_weight(self) -> TensorRef:
        """`[V, E]`; the embedding's own tensor when tied."""

    @abstractmethod
    def rope_cos(self) -> TensorRef:
        """`[max_seq_len, D / 2]`."""

    @abstractmethod
    def rope_sin(self) -> TensorRef:
        """`[max_seq_len, D / 2]`."""

    def layer_qkv_bias(self, layer: int) -> TensorRef | None:
        """`[(H + 2G) * D]` in the order of the rows, or None, this default body (extension, D-22).  [TW-BIAS-1]"""
        return None

    def layer_o_bias(self, layer: int) -> TensorRef | None:
        """`[E]`, or None, this default body (extension, D-22).  [TW-BIAS-1]"""
        return None

    def layer_gate_up_bias(self, layer: int) -> TensorRef | None:
        """`[2 * F]`, or None, this default body (extension, D-22).  [TW-BIAS-1]"""
        return None

    def layer_down_bias(self, layer: int) -> TensorRef | None:
        """`[E]`, or None, this default body (extension, D-22).  [TW-BIAS-1]"""
        return None

    def element_type(self) -> DataType:
        """Of logits, keys and values: this default body gives the embedding's own (extension).  [TW-PARTS-3]"""
        return self.embed_weight().dtype()

    def matrix_parts(self, matrix: DecoderMatrix, layer: int = 0) -> tuple[WeightPart, ...]:
        """The rows of a matrix as they are stored, part below part (extension).  [TW-PARTS-1..2]

        This default body gives one part, the dense matrix. `layer` counts for a layer's matrices only.
        """
        if matrix is DecoderMatrix.EMBED:
            return (WeightPart.dense(self.embed_weight()),)
        if matrix is DecoderMatrix.LM_HEAD:
            return (WeightPart.dense(self.lm_head_weight()),)
        of_layer = {
            DecoderMatrix.QKV: self.layer_qkv_weight,
            DecoderMatrix.OUTPUT: self.layer_o_weight,
            DecoderMatrix.GATE_UP: self.layer_gate_up_weight,
            DecoderMatrix.DOWN: self.layer_down_weight,
        }
        return (WeightPart.dense(of_layer[matrix](layer)),)
