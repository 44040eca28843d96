"""One expert: a gated feed-forward, plain (SwiGLU) or with clipped inputs, and how it is read from a checkpoint.

    y = W_down act(g, u) + b_down,      [g; u] = W_gate_up x + b_gate_up
    plain     act = g sigmoid(g) u
    clipped   act = g' sigmoid(alpha g') (u' + 1),   g' = min(g, L),  u' = max(-L, min(u, L))

Clauses: LM-MOE-4, LM-MOE-8 (specs/decoder_families.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ferrum_ref.errors import InvalidFormatError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import KernelOpsDispatch, LinearOps
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef
from ferrum_ref.models.matrix import PackedWeight, Weight, apply_matrix
from ferrum_ref.models.matrix_reader import MatrixReader
from ferrum_ref.models.moe_config import MoeSettings
from ferrum_ref.types.devices import DataType


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """gate_up `[2F, E]`: the rows of gate, then up; down `[E, F]`; biases `[2F]` and `[E]`, or None."""

    gate_up: Weight
    gate_up_bias: TensorRef | None
    down: Weight
    down_bias: TensorRef | None

    def tensors(self) -> list[Weight]:
        """Those that there are."""
        return [part for part in (self.gate_up, self.gate_up_bias, self.down, self.down_bias) if part is not None]


def read_expert(reader: MatrixReader, prefix: str, bias: bool = False) -> ExpertWeights:
    """`<prefix>gate_proj`, `up_proj` and `down_proj` of a checkpoint.  [LM-MOE-4]  Its errors pass through."""

    def both(kind: str) -> list[str]:
        return [f"{prefix}{part}_proj.{kind}" for part in ("gate", "up")]

    return ExpertWeights(
        gate_up=reader.stacked(both("weight")),
        gate_up_bias=_ends_joined(reader, both("bias")) if bias else None,
        down=reader.stacked([f"{prefix}down_proj.weight"]),
        down_bias=reader.tensor(f"{prefix}down_proj.bias") if bias else None,
    )


class ExpertKernel:
    """Runs experts of one activation on one backend. Stateless."""

    def __init__(
        self, backend: ComputeBackend, linear: LinearOps, limit: float | None = None, alpha: float = 1.0
    ) -> None:
        self._ops = backend.tensor_ops()
        self._linear = linear
        self._dispatch = KernelOpsDispatch(backend.kernel_ops(), self._ops)
        self._clip = None if limit is None else _Clip(backend, limit, alpha)

    def __call__(self, x: TensorRef, weights: ExpertWeights) -> TensorRef:
        """`[R, E]` -> `[R, E]`. Pure."""
        both = self._project(x, weights.gate_up, weights.gate_up_bias)
        num_rows, double = both.shape()
        gate, up = both.view((0, 0), (num_rows, double // 2)), both.view((0, double // 2), (num_rows, double))
        if self._clip is None:
            gated = self._dispatch.silu_mul(gate, up)
        else:
            gated = self._dispatch.silu_mul(*self._clip(gate, up)).to_dtype(x.dtype())
        return self._project(gated, weights.down, weights.down_bias)

    def _project(self, x: TensorRef, weight: Weight, bias: TensorRef | None) -> TensorRef:
        y = apply_matrix(self._linear, x, weight)
        return y if bias is None else self._ops.add(y, bias)


class _Clip:
    """(g, u) -> (alpha g', (u' + 1) / alpha) in float32, of which silu_mul makes the clipped activation.  [LM-MOE-8]

    min(g, L) = g / (1 + relu(g/L - 1)) and the like for both sides: exact up to L, beyond it within three roundings.
    """

    def __init__(self, backend: ComputeBackend, limit: float, alpha: float) -> None:
        self._ops: TensorOps = backend.tensor_ops()
        factory = backend.tensor_factory()
        self._limit, self._minus_limit, self._alpha, self._one = (
            factory.from_numpy(np.array([value], dtype=np.float32)) for value in (limit, -limit, alpha, 1.0)
        )

    def __call__(self, gate: TensorRef, up: TensorRef) -> tuple[TensorRef, TensorRef]:
        ops = self._ops
        gate, up = gate.to_dtype(DataType.FP32), up.to_dtype(DataType.FP32)
        gate = ops.div(gate, ops.add(self._over(gate, self._limit), self._one))
        both_sides = ops.add(self._over(up, self._limit), self._over(up, self._minus_limit))
        up = ops.div(up, ops.add(both_sides, self._one))
        return ops.mul(gate, self._alpha), ops.div(ops.add(up, self._one), self._alpha)

    def _over(self, x: TensorRef, limit: TensorRef) -> TensorRef:
        """By what share of the limit x exceeds it, 0 below: relu(x/L - 1)."""
        return self._ops.relu(self._ops.sub(self._ops.div(x, limit), self._one))


def expert_kernel(backend: ComputeBackend, linear: LinearOps, settings: MoeSettings) -> ExpertKernel:
    """The kernel of a model's routed experts."""
    return ExpertKernel(backend, linear, settings.clip_limit, settings.clip_alpha)


def _ends_joined(reader: MatrixReader, names: list[str]) -> TensorRef:
    """Vectors end to end.  Raises InvalidFormatError for one that is stored packed."""
    joined = reader.stacked(names)
    if isinstance(joined, PackedWeight):
        raise InvalidFormatError(f"read tensor {names[0]}: got a packed matrix, expected a vector of numbers")
    return joined
