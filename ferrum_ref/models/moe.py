"""The sparse feed-forward of a layer: a router, the experts it chooses, and a shared expert for every token.

    y_r = sum over the chosen experts e of w_re expert_e(x_r)  +  shared(x_r)

Clauses: LM-MOE-1..4 (specs/decoder_families.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import LinearOps
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.decoder_ops import host_float
from ferrum_ref.models.decoder_parts import See
from ferrum_ref.models.experts import ExpertKernel, ExpertWeights, expert_kernel, read_expert
from ferrum_ref.models.matrix import Weight
from ferrum_ref.models.matrix_reader import MatrixReader, TensorSource
from ferrum_ref.models.moe_config import MoeSettings
from ferrum_ref.models.moe_routing import Routing, route
from ferrum_ref.types.devices import DataType


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """router `[n, E]` in FP32; its bias and correction `[n]` stay on the host, where routing happens."""

    router: TensorRef
    router_bias: NDArray[Any] | None
    correction: NDArray[Any] | None
    experts: tuple[ExpertWeights, ...]
    shared: ExpertWeights | None

    def tensors(self) -> list[Weight]:
        """All that lie with the backend."""
        parts = [*self.experts, *([self.shared] if self.shared else [])]
        return [self.router, *(tensor for part in parts for tensor in part.tensors())]


def read_moe(
    source: TensorSource, reader: MatrixReader, backend: ComputeBackend, prefix: str, moe: MoeSettings
) -> MoeWeights:
    """The tensors `<prefix>gate`, `experts.i` and `shared_experts` of a checkpoint.  [LM-MOE-4]  Its errors pass."""
    return MoeWeights(
        router=backend.tensor_factory().from_numpy(source.read(f"{prefix}gate.weight", np.float32)),
        router_bias=source.read(f"{prefix}gate.bias", np.float32) if moe.router_bias else None,
        correction=source.read(f"{prefix}gate.e_score_correction_bias", np.float32) if moe.has_correction else None,
        experts=tuple(
            read_expert(reader, f"{prefix}experts.{index}.", moe.expert_bias) for index in range(moe.num_experts)
        ),
        shared=read_expert(reader, f"{prefix}shared_experts.") if moe.shared_size else None,
    )


class MoeFeedForward:
    """A `FeedForward` of decoder_parts. Stateless.  [LM-MOE-1..4]"""

    def __init__(self, backend: ComputeBackend, linear: LinearOps, settings: MoeSettings, weights: MoeWeights) -> None:
        self._settings = settings
        self._weights = weights
        self._linear = linear
        self._ops = backend.tensor_ops()
        self._factory = backend.tensor_factory()
        self._expert = expert_kernel(backend, linear, settings)
        self._shared = ExpertKernel(backend, linear)

    def __call__(self, normed: TensorRef, see: See) -> TensorRef:
        """`[R, E]` -> `[R, E]`; shows "router", "routed" and "shared". Pure."""
        if normed.shape()[0] == 0:
            return normed
        logits = self._linear.linear(normed.to_dtype(DataType.FP32), self._weights.router)
        see("router", logits)
        values = logits.to_numpy()
        mixed = self._routed(normed, self._route(values), host_float(values))
        see("routed", mixed)
        if self._weights.shared is None:
            return mixed
        shared = self._shared(normed, self._weights.shared)
        see("shared", shared)
        return self._ops.add(mixed, shared)

    def _route(self, logits: NDArray[Any]) -> Routing:
        values = logits.astype(np.float64)
        if self._weights.router_bias is not None:
            values = values + self._weights.router_bias
        return route(values, self._settings, self._weights.correction)

    def _routed(self, normed: TensorRef, routing: Routing, host: np.dtype[Any]) -> TensorRef:
        """Every expert runs once, over its rows; each row then collects its k outputs in the experts' order."""
        outputs, weights = [], []
        for expert, rows in routing.by_expert():
            whole = len(rows) == normed.shape()[0]
            x = normed if whole else self._linear.embedding(normed, rows)
            outputs.append(self._expert(x, self._weights.experts[expert]))
            weights.append(routing.weights[rows][routing.experts[rows] == expert])
        weighted = self._ops.mul(
            self._concat(outputs), self._column(np.concatenate(weights).astype(host), normed.dtype())
        )
        order = routing.order()
        mixed = self._linear.embedding(weighted, order[:, 0])
        for slot in range(1, order.shape[1]):
            mixed = self._ops.add(mixed, self._linear.embedding(weighted, order[:, slot]))
        return mixed

    def _concat(self, parts: Sequence[TensorRef]) -> TensorRef:
        return parts[0] if len(parts) == 1 else self._ops.concat(parts, 0)

    def _column(self, values: NDArray[Any], dtype: DataType) -> TensorRef:
        return self._factory.from_numpy(values[:, None]).to_dtype(dtype)
