"""VITS's flow, backwards: each step takes from one half of the channels what the other half says.

The gate tanh(a) sigmoid(b) runs in float64 on the host, everything else on the backend.
Clause: FM-VITS-10 (specs/audio.md).  Source: van den Oord et al. 2016 (gated units); Kim et al. 2021.
"""

from __future__ import annotations

import numpy as np

from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.audio.convolution import ConvolutionOps
from ferrum_ref.models.vits_config import VitsConfig
from ferrum_ref.models.vits_weights import CouplingFlow, VitsWeights


class CouplingFlows:
    """Stateless."""

    def __init__(self, config: VitsConfig, weights: VitsWeights, ops: ConvolutionOps) -> None:
        self._config = config
        self._flows = weights.couplings
        self._ops = ops

    def inverse(self, latent: TensorRef) -> TensorRef:
        """`[T, C]` -> `[T, C]`, step by step from the last: channels reversed, then x_b - f(x_a). Pure. [FM-VITS-10]"""
        tensor, half = self._ops.tensor, self._config.flow_size // 2
        for flow in reversed(self._flows):
            turned = self._ops.rows(np.asarray(latent.to_numpy())[:, ::-1])
            kept, changed = tensor.split(turned, [half, half], 1)
            latent = tensor.concat([kept, tensor.sub(changed, self._mean(kept, flow))], 1)
        return latent

    def _mean(self, kept: TensorRef, flow: CouplingFlow) -> TensorRef:
        base, tensor, width = self._ops.base, self._ops.tensor, self._config.hidden_size
        hidden = base.affine(kept, flow.before)
        total: TensorRef | None = None
        for index, (inner, outer) in enumerate(flow.wave):
            gated = base.affine(self._gate(self._ops.convolve(hidden, inner)), outer)
            if index < len(flow.wave) - 1:
                onward, gated = tensor.split(gated, [width, width], 1)
                hidden = tensor.add(hidden, onward)
            total = gated if total is None else tensor.add(total, gated)
        return base.affine(hidden if total is None else total, flow.after)

    def _gate(self, x: TensorRef) -> TensorRef:
        """tanh of the first half of the channels times the logistic function of the second."""
        values = self._ops.host(x)
        width = self._config.hidden_size
        logistic = 0.5 * (1 + np.tanh(0.5 * values[:, width:]))
        return self._ops.rows(np.tanh(values[:, :width]) * logistic)
