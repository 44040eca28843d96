"""Whisper over KernelOps and TensorOps: any ComputeBackend runs it.

    encoder   x = gelu(conv2(gelu(conv1(mel)))) + positions;  x += attention(norm(x));  x += W_2 act(W_1 norm(x));  norm
    decoder   x = words[id] + positions[p];  x += attention(norm(x)), causal;  x += attention(norm(x), encoded rows);
              x += W_2 act(W_1 norm(x));  logits = words norm(x)

Source: Radford et al. 2022; Vaswani et al. 2017 (pre-norm).  Clauses: FM-WHISPER-5..8 (specs/audio.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ModelError, ResourceExhaustedError, ShapeError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.interfaces.llm import Logits
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.audio.convolution import ConvolutionOps
from ferrum_ref.models.encoder_ops import Affine
from ferrum_ref.models.hidden_activation import hidden_activation
from ferrum_ref.models.whisper_config import WhisperConfig
from ferrum_ref.models.whisper_weights import WhisperAttention, WhisperLayer, WhisperWeights


@dataclass(slots=True)
class WhisperCache:
    """A decoder's past: per layer keys and values `[1, max_target_positions, H, D]`, the first `length` valid."""

    own: list[tuple[TensorRef, TensorRef]]
    encoded: list[tuple[TensorRef, TensorRef]] = field(default_factory=list)  # keys and values `[1, S, H, D]`
    length: int = 0


class WhisperModel:
    """Stateless; caches are the caller's. Safe to share between threads."""

    def __init__(self, config: WhisperConfig, weights: WhisperWeights, backend: ComputeBackend) -> None:
        """Raises UnsupportedError if the backend lacks a kernel, or the activation is unknown."""
        self.config = config
        self.weights = weights
        self.backend = backend
        self._convolutions = ConvolutionOps(backend, "WhisperModel")
        self._ops = self._convolutions.base
        self._factory = backend.tensor_factory()
        self._attention = self._ops.attention
        self._dtype = weights.words.dtype()
        self._gelu = hidden_activation("gelu", backend, self._dtype)
        self._activation = hidden_activation(config.hidden_act, backend, self._dtype)

    def encode(self, features: NDArray[np.float32]) -> TensorRef:
        """Encoded rows `[S, E]` of a log-mel picture `[bands, 2 S]`.  Pure.  [FM-WHISPER-5]

        Raises ShapeError for another shape than [num_mel_bins, 2 max_source_positions].
        """
        expected = (self.config.num_mel_bins, self.config.num_frames)
        if features.shape != expected:
            raise ShapeError(f"WhisperModel.encode: features of shape {features.shape}, expected {expected}")
        hidden = self.rows(features.T)
        for part in (self.weights.conv1, self.weights.conv2):
            hidden = self._gelu(self._convolutions.convolve(hidden, part))
        add = self._ops.tensor.add
        hidden = add(hidden, self.weights.encoder_positions)
        num_heads, length = self.config.num_encoder_heads, self.config.max_source_positions
        for layer in self.weights.encoder_layers:
            qkv = self._ops.affine(self._ops.norm(hidden, layer.self_norm), layer.qkv)
            hidden = add(hidden, self._ops.affine(self._ops.attend(qkv, [length], num_heads), layer.output))
            hidden = self._feed_forward(layer, hidden)
        return self._ops.norm(hidden, self.weights.encoder_norm)

    def new_cache(self) -> WhisperCache:
        """An empty past, with room for the whole context."""
        config = self.config
        heads = config.num_decoder_heads
        shape = (1, config.max_target_positions, heads, config.hidden_size // heads)
        words = self.weights.words
        own = [
            (
                self._factory.zeros(shape, self._dtype, words.device()),
                self._factory.zeros(shape, self._dtype, words.device()),
            )
            for _ in self.weights.decoder_layers
        ]
        return WhisperCache(own)

    def attend_to(self, cache: WhisperCache, encoded: TensorRef) -> None:
        """Keys and values of the encoded rows `[S, E]`, once for each cache; `cache` is changed.  [FM-WHISPER-6]"""
        cache.encoded = [
            self._keys_and_values(encoded, layer.cross)
            for layer in self.weights.decoder_layers
            if layer.cross is not None
        ]

    def decode(self, cache: WhisperCache, tokens: Sequence[int]) -> Logits:
        """Logits `[V]` after the last of `tokens`, which follow what the cache holds; `cache` grows.  [FM-WHISPER-6..7]

        Raises, before anything is changed: ModelError (no token), InvalidParameterError (id outside the vocabulary),
        ResourceExhaustedError (decoder context full).
        """
        self.require_tokens(cache, tokens)
        positions = np.arange(cache.length, cache.length + len(tokens))
        ids = np.asarray(tokens, dtype=np.int64)
        add = self._ops.tensor.add
        hidden = add(
            self._ops.gather(self.weights.words, ids), self._ops.gather(self.weights.decoder_positions, positions)
        )
        for index, layer in enumerate(self.weights.decoder_layers):
            hidden = add(hidden, self._attend_own(layer, hidden, cache, index, positions))
            if layer.cross is not None:
                hidden = add(hidden, self._attend_encoded(layer.cross, hidden, cache.encoded[index]))
            hidden = self._feed_forward(layer, hidden)
        cache.length += len(tokens)
        last = hidden.view((len(tokens) - 1, 0), (len(tokens), self.config.hidden_size))
        normed = self._ops.norm(last, self.weights.decoder_norm)
        logits = self._ops.affine(normed, Affine(self.weights.words, None))
        return np.asarray(logits.to_numpy(), dtype=np.float32).reshape(-1)

    def rows(self, values: NDArray[np.float32]) -> TensorRef:
        """Numbers on the backend, in the weights' type."""
        return self._factory.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to_dtype(self._dtype)

    def require_tokens(self, cache: WhisperCache, tokens: Sequence[int]) -> None:
        """Everything that `decode` refuses."""
        if not len(tokens):
            raise ModelError("WhisperModel.decode: no token, expected at least one")
        for token in tokens:
            if not 0 <= token < self.config.vocab_size:
                raise InvalidParameterError(
                    f"WhisperModel.decode: token id must be in [0, {self.config.vocab_size}), got {token}"
                )
        if cache.length + len(tokens) > self.config.max_target_positions:
            raise ResourceExhaustedError(
                f"WhisperModel.decode: {cache.length + len(tokens)} tokens, but the decoder has"
                f" {self.config.max_target_positions} positions"
            )

    def _feed_forward(self, layer: WhisperLayer, hidden: TensorRef) -> TensorRef:
        inner = self._activation(self._ops.affine(self._ops.norm(hidden, layer.norm), layer.up))
        return self._ops.tensor.add(hidden, self._ops.affine(inner, layer.down))

    def _attend_own(
        self, layer: WhisperLayer, hidden: TensorRef, cache: WhisperCache, index: int, positions: NDArray[np.int64]
    ) -> TensorRef:
        count, heads, width = len(positions), self.config.num_decoder_heads, self._head_dim
        qkv = self._ops.affine(self._ops.norm(hidden, layer.self_norm), layer.qkv)
        by_head = qkv.reshape((count, 3 * heads, width))
        q, k, v = (by_head.view((0, first, 0), (count, first + heads, width)) for first in (0, heads, 2 * heads))
        past = []
        for rows, store in ((k, cache.own[index][0]), (v, cache.own[index][1])):
            self._attention.write_kv(store, rows, positions)
            past.append(store.view((0, 0, 0, 0), (1, int(positions[-1]) + 1, heads, width)))
        attended = self._attention.attention(q.reshape((1, count, heads, width)), past[0], past[1], self._params(True))
        return self._ops.affine(attended.reshape((count, heads * width)), layer.output)

    def _attend_encoded(
        self, cross: WhisperAttention, hidden: TensorRef, encoded: tuple[TensorRef, TensorRef]
    ) -> TensorRef:
        count, heads, width = hidden.shape()[0], self.config.num_decoder_heads, self._head_dim
        q = self._ops.affine(self._ops.norm(hidden, cross.norm), cross.query).reshape((1, count, heads, width))
        attended = self._attention.attention(q, encoded[0], encoded[1], self._params(False))
        return self._ops.affine(attended.reshape((count, heads * width)), cross.output)

    def _keys_and_values(self, encoded: TensorRef, cross: WhisperAttention) -> tuple[TensorRef, TensorRef]:
        length, heads, width = encoded.shape()[0], self.config.num_decoder_heads, self._head_dim
        both = self._ops.affine(encoded, cross.key_value).reshape((1, length, 2 * heads, width))
        k, v = (both.view((0, 0, first, 0), (1, length, first + heads, width)) for first in (0, heads))
        return k, v

    @property
    def _head_dim(self) -> int:
        return self.config.hidden_size // self.config.num_decoder_heads

    def _params(self, causal: bool) -> AttentionParams:
        heads = self.config.num_decoder_heads
        return AttentionParams(heads, heads, self._head_dim, self._head_dim**-0.5, causal=causal)
