"""The dense feed-forwards.  Clause: LM-LAYER-3 (specs/llm.md).

gated:  W_down (act(gate) * up),  [gate; up] = W_gate_up x        plain:  W_down act(W_up x)
"""

from __future__ import annotations

from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder_ops import DecoderOps
from ferrum_ref.models.decoder_parts import See
from ferrum_ref.models.decoder_weights import LayerWeights


class GatedFeedForward:
    """A `FeedForward` of decoder_parts. Stateless."""

    def __init__(self, ops: DecoderOps, config: DecoderConfig, weights: LayerWeights) -> None:
        self._ops = ops
        self._gate = ops.gate(config.hidden_act)
        self._weights = weights
        self._gate_up, self._down = weights.dense("gate_up"), weights.dense("down")

    def __call__(self, normed: TensorRef, see: See) -> TensorRef:
        """`[R, E]` -> `[R, E]`; shows "gated". Pure."""
        both = self._ops.project(normed, self._gate_up, self._weights.gate_up_bias)
        num_rows, double = both.shape()
        gate, up = both.view((0, 0), (num_rows, double // 2)), both.view((0, double // 2), (num_rows, double))
        gated = self._gate(gate, up)
        see("gated", gated)
        return self._ops.project(gated, self._down, self._weights.down_bias)


class PlainFeedForward:
    """A `FeedForward` of decoder_parts. Stateless."""

    def __init__(self, ops: DecoderOps, config: DecoderConfig, weights: LayerWeights) -> None:
        self._ops = ops
        self._activate = ops.activate(config.hidden_act)
        self._weights = weights
        self._up, self._down = weights.dense("gate_up"), weights.dense("down")

    def __call__(self, normed: TensorRef, see: See) -> TensorRef:
        """`[R, E]` -> `[R, E]`; shows "gated", the activated rows. Pure."""
        active = self._activate(self._ops.project(normed, self._up, self._weights.gate_up_bias))
        see("gated", active)
        return self._ops.project(active, self._down, self._weights.down_bias)
