"""HiFi-GAN: rows become samples, stage by stage longer and narrower.

Clauses: FM-VITS-10 (specs/audio.md).  Source: Kong, Kim, Bae 2020.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.audio.convolution import Convolution, ConvolutionOps
from ferrum_ref.models.vits_config import VitsConfig
from ferrum_ref.models.vits_weights import VitsWeights

_LAST_SLOPE: Final = 0.01  # the published models' last activation, whatever leaky_relu_slope is


class Vocoder:
    """Stateless."""

    def __init__(self, config: VitsConfig, weights: VitsWeights, ops: ConvolutionOps) -> None:
        self._weights = weights
        self._ops = ops
        self._slope = ops.rows(np.array([config.leaky_relu_slope]))
        self._last_slope = ops.rows(np.array([_LAST_SLOPE]))
        self._share = ops.rows(np.array([1 / len(config.resblock_kernel_sizes)]))

    def samples(self, rows: TensorRef) -> NDArray[np.float32]:
        """`[T, C]` -> T * product(rates) samples: tanh of the last convolution.  Pure.  [FM-VITS-10]"""
        ops = self._ops
        hidden = ops.convolve(rows, self._weights.vocoder_before)
        for stage in self._weights.stages:
            hidden = ops.upsample(ops.leaky_relu(hidden, self._slope), stage.up)
            hidden = self._mean([self._block(hidden, block) for block in stage.blocks])
        hidden = ops.convolve(ops.leaky_relu(hidden, self._last_slope), self._weights.vocoder_after)
        return np.tanh(ops.host(hidden)).astype(np.float32).reshape(-1)

    def _block(self, hidden: TensorRef, block: tuple[tuple[Convolution, Convolution | None], ...]) -> TensorRef:
        """x += conv(lrelu(x)), or x += conv'(lrelu(conv(lrelu(x)))), for each dilation."""
        ops = self._ops
        for dilated, plain in block:
            inner = ops.convolve(ops.leaky_relu(hidden, self._slope), dilated)
            if plain is not None:
                inner = ops.convolve(ops.leaky_relu(inner, self._slope), plain)
            hidden = ops.tensor.add(hidden, inner)
        return hidden

    def _mean(self, found: list[TensorRef]) -> TensorRef:
        total = found[0]
        for each in found[1:]:
            total = self._ops.tensor.add(total, each)
        return self._ops.tensor.mul(total, self._share)
