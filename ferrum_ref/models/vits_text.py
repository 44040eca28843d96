"""VITS's text encoder: a transformer whose attention knows how far apart two letters are.

    score_ij = (q_i . k_j + q_i . K_(j-i)) / sqrt(D)        K, V: tables for -w <= j - i <= w, nothing beyond
    o_i      = sum_j p_ij (v_j + V_(j-i))

Source: Shaw et al. 2018; Kim et al. 2021.  Clause: FM-VITS-5 (specs/audio.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.audio.convolution import ConvolutionOps
from ferrum_ref.models.hidden_activation import hidden_activation
from ferrum_ref.models.vits_config import VitsConfig
from ferrum_ref.models.vits_weights import TextLayer, VitsWeights


class TextEncoder:
    """Stateless."""

    def __init__(self, config: VitsConfig, weights: VitsWeights, backend: ComputeBackend, ops: ConvolutionOps) -> None:
        self._config = config
        self._weights = weights
        self._ops = ops
        self._activation = hidden_activation(config.hidden_act, backend, weights.words.dtype())
        self._scale = ops.rows(np.array([math.sqrt(config.hidden_size)]))
        self._shrink = ops.rows(np.array([(config.hidden_size // config.num_attention_heads) ** -0.5]))

    def encode(self, ids: Sequence[int]) -> tuple[TensorRef, NDArray[np.float64], NDArray[np.float64]]:
        """Rows `[T, E]`, and of each its prior's mean and log deviation `[T, flow_size]`.  Pure.  [FM-VITS-5]"""
        base, tensor = self._ops.base, self._ops.tensor
        hidden = tensor.mul(base.gather(self._weights.words, np.asarray(ids, dtype=np.int64)), self._scale)
        for layer in self._weights.text_layers:
            attended = base.affine(self._attend(base.affine(hidden, layer.qkv), layer), layer.output)
            hidden = base.norm(tensor.add(hidden, attended), layer.norm)
            inner = self._activation(self._ops.convolve(hidden, layer.up))
            hidden = base.norm(tensor.add(hidden, self._ops.convolve(inner, layer.down)), layer.final_norm)
        statistics = self._ops.host(base.affine(hidden, self._weights.statistics))
        return hidden, statistics[:, : self._config.flow_size], statistics[:, self._config.flow_size :]

    def _attend(self, qkv: TensorRef, layer: TextLayer) -> TensorRef:
        tensor, heads = self._ops.tensor, self._config.num_attention_heads
        length, width = qkv.shape()[0], self._config.hidden_size // heads
        by_head = tensor.permute(qkv.reshape((length, 3 * heads, width)), (1, 0, 2))
        q, k, v = (by_head.view((first, 0, 0), (first + heads, length, width)) for first in (0, heads, 2 * heads))
        q = tensor.mul(q, self._shrink)
        near_keys, near_values = self._near(layer.near_keys, length), self._near(layer.near_values, length)
        by_distance = tensor.matmul(q, tensor.transpose(near_keys, 0, 1))
        scores = tensor.add(tensor.matmul(q, tensor.transpose(k, 1, 2)), self._by_place(by_distance))
        shares = tensor.softmax(scores, -1)
        mixed = tensor.add(tensor.matmul(shares, v), tensor.matmul(self._by_distance(shares), near_values))
        return tensor.permute(mixed, (1, 0, 2)).reshape((length, heads * width))

    def _near(self, table: NDArray[np.float32], length: int) -> TensorRef:
        """Rows for the distances -(T - 1) .. T - 1: the table's, and zeros beyond its window."""
        window = self._config.window_size
        rows = np.zeros((2 * length - 1, table.shape[1]), np.float32)
        reach = min(window, length - 1)
        rows[length - 1 - reach : length + reach] = table[window - reach : window + reach + 1]
        return self._ops.rows(rows)

    def _by_place(self, x: TensorRef) -> TensorRef:
        """`[H, T, 2T - 1]` by distance -> `[H, T, T]` by place: each row shifted one further to the left."""
        heads, length, width = x.shape()
        flat = self._with_zeros(x, 1, behind=True).reshape((heads, length * (width + 1)))
        flat = self._with_zeros(flat, length - 1, behind=True)
        return flat.reshape((heads, length + 1, width)).view((0, 0, length - 1), (heads, length, width))

    def _by_distance(self, x: TensorRef) -> TensorRef:
        """`[H, T, T]` by place -> `[H, T, 2T - 1]` by distance."""
        heads, length, _ = x.shape()
        flat = self._with_zeros(x, length - 1, behind=True).reshape((heads, length * (2 * length - 1)))
        flat = self._with_zeros(flat, length, behind=False)
        return flat.reshape((heads, length, 2 * length)).view((0, 0, 1), (heads, length, 2 * length))

    def _with_zeros(self, x: TensorRef, count: int, *, behind: bool) -> TensorRef:
        """`count` zeros more on the last axis."""
        if not count:
            return x
        zeros = self._ops.rows(np.zeros((*x.shape()[:-1], count)))
        return self._ops.tensor.concat([x, zeros] if behind else [zeros, x], x.ndim() - 1)
