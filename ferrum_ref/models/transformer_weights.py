"""`TransformerWeights` of a loaded decoder or of an opened checkpoint.   Clauses: TW-* (specs/transformer.md)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerConfig, TransformerWeights
from ferrum_ref.interfaces.weight_parts import DecoderMatrix, WeightPart
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_rope import rope_tables
from ferrum_ref.models.decoder_weights import DecoderWeights, LayerWeights, element_type, read_decoder_weights
from ferrum_ref.models.matrix import PackedWeight, Weight, weight_parts
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.parity_mode import ParityMode

Array = npt.NDArray[Any]


class NamedTensors(Protocol):
    """An opened checkpoint: its configuration, the names it holds, and its tensors `[out, in]`."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def tensors(self) -> Collection[str]: ...

    def read(self, name: str, dtype: Any = np.float32, out: Array | None = None) -> Array: ...


@dataclass(frozen=True, slots=True)
class QkNorms:
    """The per-head norms of one layer's queries and keys, `[D]` each."""

    query: TensorRef
    key: TensorRef


class DecoderTransformerWeights(TransformerWeights):
    """Hands out a decoder's own tensors: nothing is copied.  [TW-WEIGHTS-1..5, TW-ROPE-1, TW-BIAS-1; D-22]"""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        backend: ComputeBackend,
        *,
        max_tokens: int | None = None,
        qk_norms: tuple[QkNorms, ...] = (),
        parity_mode: ParityMode = ParityMode.REFERENCE,
    ) -> None:
        """`max_tokens` bounds the context (default: the model's own); `qk_norms`: none, or one for each layer.

        Under UPSTREAM there are no biases, whatever the model has (D-22).
        Raises InvalidParameterError for another number of norms or layers; UnsupportedError, naming the fields, for a
        decoder that computes more than this interface can say.
        """
        _check(config, weights, qk_norms)
        self._weights = weights
        self._qk_norms = qk_norms or _own_norms(weights)
        self._has_biases = parity_mode is ParityMode.REFERENCE
        max_seq_len = min(max_tokens or config.max_position_embeddings, config.max_position_embeddings)
        self._config = TransformerConfig(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_seq_len=max_seq_len,
            rms_norm_eps=config.rms_norm_eps,
            has_qk_norm=bool(self._qk_norms),
        )
        factory, dtype = backend.tensor_factory(), weights.embedding.dtype()
        tables = rope_tables(config.head_dim, max_seq_len, config.rope_theta)
        self._cos, self._sin = (factory.from_numpy(table).to_dtype(dtype) for table in tables)

    @classmethod
    def of_decoder(cls, decoder: Decoder) -> DecoderTransformerWeights:
        """The weights of a loaded decoder, shared with it.  [TW-WEIGHTS-1]"""
        return cls(decoder.config, decoder.weights, decoder.backend, max_tokens=decoder.max_tokens)

    @classmethod
    def of_checkpoint(
        cls,
        source: NamedTensors,
        backend: ComputeBackend,
        dtype: DataType = DataType.FP32,
        *,
        max_tokens: int | None = None,
    ) -> DecoderTransformerWeights:
        """Read, fuse and hand out; with per-head q/k norms where the checkpoint has them.  [TW-WEIGHTS-1, TW-NORM-1]

        Raises what `read_decoder_weights` raises.
        """
        weights = read_decoder_weights(source, backend, dtype)
        norms = () if source.config.qk_norm else _read_norms(source, backend, dtype)
        return cls(source.config, weights, backend, max_tokens=max_tokens, qk_norms=norms)

    def config(self) -> TransformerConfig:
        return self._config

    def embed_weight(self) -> TensorRef:
        return _dense("embed_weight", self._weights.embedding)

    def layer_input_norm_weight(self, layer: int) -> TensorRef:
        return self._layer("layer_input_norm_weight", layer).attention_norm

    def layer_qkv_weight(self, layer: int) -> TensorRef:
        return _dense("layer_qkv_weight", self._layer("layer_qkv_weight", layer).qkv)

    def layer_q_norm_weight(self, layer: int) -> TensorRef | None:
        self._layer("layer_q_norm_weight", layer)
        return self._qk_norms[layer].query if self._qk_norms else None

    def layer_k_norm_weight(self, layer: int) -> TensorRef | None:
        self._layer("layer_k_norm_weight", layer)
        return self._qk_norms[layer].key if self._qk_norms else None

    def layer_o_weight(self, layer: int) -> TensorRef:
        return _dense("layer_o_weight", self._layer("layer_o_weight", layer).output)

    def layer_post_norm_weight(self, layer: int) -> TensorRef:
        return self._layer("layer_post_norm_weight", layer).ffn_norm

    def layer_gate_up_weight(self, layer: int) -> TensorRef:
        return _dense("layer_gate_up_weight", self._layer("layer_gate_up_weight", layer).gate_up)

    def layer_down_weight(self, layer: int) -> TensorRef:
        return _dense("layer_down_weight", self._layer("layer_down_weight", layer).down)

    def final_norm_weight(self) -> TensorRef:
        return self._weights.final_norm

    def lm_head_weight(self) -> TensorRef:
        return _dense("lm_head_weight", self._weights.lm_head)

    def rope_cos(self) -> TensorRef:
        return self._cos

    def rope_sin(self) -> TensorRef:
        return self._sin

    def layer_qkv_bias(self, layer: int) -> TensorRef | None:
        bias = self._layer("layer_qkv_bias", layer).qkv_bias
        return bias if self._has_biases else None

    def layer_o_bias(self, layer: int) -> TensorRef | None:
        bias = self._layer("layer_o_bias", layer).output_bias
        return bias if self._has_biases else None

    def layer_gate_up_bias(self, layer: int) -> TensorRef | None:
        bias = self._layer("layer_gate_up_bias", layer).gate_up_bias
        return bias if self._has_biases else None

    def layer_down_bias(self, layer: int) -> TensorRef | None:
        bias = self._layer("layer_down_bias", layer).down_bias
        return bias if self._has_biases else None

    def element_type(self) -> DataType:
        return self._weights.embedding.dtype()

    def matrix_parts(self, matrix: DecoderMatrix, layer: int = 0) -> tuple[WeightPart, ...]:
        """As stored, packed ones too: nothing is unpacked or copied.  [TW-PARTS-1..3]"""
        return weight_parts(self._matrix(matrix, layer))

    def _matrix(self, matrix: DecoderMatrix, layer: int) -> Weight:
        """Raises UnsupportedError for a matrix that is not there."""
        if matrix is DecoderMatrix.EMBED:
            return self._weights.embedding
        if matrix is DecoderMatrix.LM_HEAD:
            found: Weight | None = self._weights.lm_head
        else:
            of_layer = self._layer("matrix_parts", layer)
            found = {
                DecoderMatrix.QKV: of_layer.qkv,
                DecoderMatrix.OUTPUT: of_layer.output,
                DecoderMatrix.GATE_UP: of_layer.gate_up,
                DecoderMatrix.DOWN: of_layer.down,
            }[matrix]
        if found is None:
            raise UnsupportedError(f"matrix_parts: {matrix.value} of layer {layer}: this decoder has none")
        return found

    def _layer(self, operation: str, layer: int) -> LayerWeights:
        """Raises InvalidParameterError outside [0, num_layers); a negative index does not count from the end."""
        if not 0 <= layer < self._config.num_layers:
            raise InvalidParameterError(f"{operation}: layer must be in [0, {self._config.num_layers}), got {layer}")
        return self._weights.layers[layer]


def _check(config: DecoderConfig, weights: DecoderWeights, qk_norms: tuple[QkNorms, ...]) -> None:
    if len(weights.layers) != config.num_layers or len(qk_norms) not in (0, config.num_layers):
        raise InvalidParameterError(
            f"DecoderTransformerWeights: got {len(weights.layers)} layers and {len(qk_norms)} q/k norms, "
            f"expected {config.num_layers} layers and no norms or as many"
        )
    beyond = [name for name in config.beyond_llama() if name != "qk_norm"]
    if config.rope_scaling is not None:
        beyond.append("rope_scaling")
    if beyond:
        raise UnsupportedError(
            f"DecoderTransformerWeights: {config.architecture!r} with {', '.join(beyond)}: these weights are those of "
            "a plain gated decoder with rotary positions; run this model through the decoder"
        )


def _own_norms(weights: DecoderWeights) -> tuple[QkNorms, ...]:
    """Those that the decoder itself runs with."""
    found = [(layer.q_norm, layer.k_norm) for layer in weights.layers]
    return tuple(QkNorms(query, key) for query, key in found if query is not None and key is not None)


def _dense(operation: str, weight: Weight | None) -> TensorRef:
    """Raises UnsupportedError for a matrix that is packed, or not there."""
    if weight is None or isinstance(weight, PackedWeight):
        raise UnsupportedError(
            f"{operation}: got a packed matrix or none, expected a dense one; read the model dense, or "
            "take matrix_parts"
        )
    return weight


def _read_norms(source: NamedTensors, backend: ComputeBackend, dtype: DataType) -> tuple[QkNorms, ...]:
    names = [f"model.layers.{index}.self_attn." for index in range(source.config.num_layers)]
    if f"{names[0]}q_norm.weight" not in source.tensors:
        return ()
    factory, element = backend.tensor_factory(), element_type(dtype)

    def norm(name: str) -> TensorRef:
        return factory.from_numpy(source.read(name, element))

    return tuple(QkNorms(norm(f"{name}q_norm.weight"), norm(f"{name}k_norm.weight")) for name in names)
