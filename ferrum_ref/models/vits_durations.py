"""VITS's stochastic duration predictor: noise through splines, backwards, to the logarithm of each letter's length.

Projections and convolutions run on the backend, the splines in float64 on the host.
Clauses: FM-VITS-6..7 (specs/audio.md).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.audio.convolution import ConvolutionOps
from ferrum_ref.models.vits_config import VitsConfig
from ferrum_ref.models.vits_spline import inverse_spline
from ferrum_ref.models.vits_weights import SeparableStack, SplineFlow, VitsWeights


class DurationPredictor:
    """Stateless."""

    def __init__(self, config: VitsConfig, weights: VitsWeights, ops: ConvolutionOps) -> None:
        self._config = config
        self._weights = weights
        self._ops = ops

    def predict(self, hidden: TensorRef, noise: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log durations `[T]` of rows `[T, E]`, from scaled noise `[2, T]`.  Pure.  [FM-VITS-6]"""
        condition = self._ops.base.affine(hidden, self._weights.duration_before)
        condition = self._stack(condition, self._weights.duration_stack)
        condition = self._ops.base.affine(condition, self._weights.duration_after)
        kept, changed = noise[0], noise[1]
        for flow in reversed(self._weights.splines):
            kept, changed = changed, kept
            changed = self._inverse(flow, kept, changed, condition)
        last = changed  # the halves change places once more, and the first one is the answer
        return np.asarray((last - self._weights.translate[0, 0]) * np.exp(-self._weights.log_scale[0, 0]))

    def _inverse(
        self, flow: SplineFlow, kept: NDArray[np.float64], changed: NDArray[np.float64], condition: TensorRef
    ) -> NDArray[np.float64]:
        """The half `kept`, with the condition, says which splines undo `changed`."""
        base = self._ops.base
        hidden = self._ops.tensor.add(base.affine(self._ops.rows(kept[:, None]), flow.before), condition)
        raw = self._ops.host(base.affine(self._stack(hidden, flow.stack), flow.after))
        bins = self._config.duration_predictor_flow_bins
        root = math.sqrt(self._config.hidden_size)
        widths, heights, slopes = raw[:, :bins] / root, raw[:, bins : 2 * bins] / root, raw[:, 2 * bins :]
        return inverse_spline(changed, widths, heights, slopes, self._config.duration_predictor_tail_bound)

    def _stack(self, hidden: TensorRef, stack: SeparableStack) -> TensorRef:
        """x += gelu(norm(W gelu(norm(conv(x))))), layer by layer."""
        base, tensor = self._ops.base, self._ops.tensor
        for along, first, across, second in stack.layers:
            inner = tensor.gelu(base.norm(self._ops.depthwise(hidden, along), first))
            inner = tensor.gelu(base.norm(base.affine(inner, across), second))
            hidden = tensor.add(hidden, inner)
        return hidden
