"""Primitive and fused operations on wide tensors: the kernels that the oracle uses.   Clause: PA-WIDE-2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.kernel_ops import (
    ActivationOps,
    AttentionOps,
    AttentionParams,
    Ints,
    KernelOps,
    LinearOps,
    NormOps,
    PositionOps,
    QuantScheme,
)
from ferrum_ref.interfaces.quant_schemes import QuantQ4_0, QuantQ8_0, QuantRows
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef
from ferrum_ref.kernels import activation, attention, linear, norm, rope, softmax
from ferrum_ref.kernels.quant_matrix import RowMatrix
from ferrum_ref.parity.units import Array
from ferrum_ref.parity.wide.arithmetic import Arithmetic
from ferrum_ref.parity.wide.tensor import WideTensor, array_of

_BLOCK_ELEMENTS: Final = 1 << 20  # of a packed weight, decoded at a time


class WideTensorOps(TensorOps):
    """Stateless but for the arithmetic."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic

    def _of(self, operation: str, tensor: TensorRef) -> Array:
        return self._arithmetic.of(array_of(operation, tensor))

    def matmul(self, a: TensorRef, b: TensorRef) -> TensorRef:
        return WideTensor(np.matmul(self._of("matmul", a), self._of("matmul", b)))

    def add(self, a: TensorRef, b: TensorRef) -> TensorRef:
        return WideTensor(self._of("add", a) + self._of("add", b))

    def sub(self, a: TensorRef, b: TensorRef) -> TensorRef:
        return WideTensor(self._of("sub", a) - self._of("sub", b))

    def mul(self, a: TensorRef, b: TensorRef) -> TensorRef:
        return WideTensor(self._of("mul", a) * self._of("mul", b))

    def div(self, a: TensorRef, b: TensorRef) -> TensorRef:
        with np.errstate(divide="ignore", invalid="ignore"):
            return WideTensor(self._of("div", a) / self._of("div", b))

    def softmax(self, tensor: TensorRef, dim: int) -> TensorRef:
        return WideTensor(softmax.softmax(self._of("softmax", tensor), dim))

    def layer_norm(self, input: TensorRef, weight: TensorRef, bias: TensorRef | None, eps: float) -> TensorRef:
        offset = None if bias is None else self._of("layer_norm", bias)
        return WideTensor(norm.layer_norm(self._of("layer_norm", input), self._of("layer_norm", weight), offset, eps))

    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> TensorRef:
        return WideTensor(norm.rms_norm(self._of("rms_norm", input), self._of("rms_norm", weight), eps))

    def relu(self, tensor: TensorRef) -> TensorRef:
        return WideTensor(activation.relu(self._of("relu", tensor)))

    def gelu(self, tensor: TensorRef, *, approximate: str = "none") -> TensorRef:
        return WideTensor(activation.gelu(self._of("gelu", tensor), approximate))

    def silu(self, tensor: TensorRef) -> TensorRef:
        return WideTensor(activation.silu(self._of("silu", tensor)))

    def concat(self, tensors: Sequence[TensorRef], dim: int) -> TensorRef:
        return WideTensor(np.concatenate([array_of("concat", tensor) for tensor in tensors], axis=dim))

    def split(self, tensor: TensorRef, sizes: Sequence[int], dim: int) -> list[TensorRef]:
        pieces = np.split(array_of("split", tensor), np.cumsum(sizes)[:-1], axis=dim)
        return [WideTensor(piece) for piece in pieces]

    def transpose(self, tensor: TensorRef, dim0: int, dim1: int) -> TensorRef:
        return WideTensor(array_of("transpose", tensor).swapaxes(dim0, dim1))

    def permute(self, tensor: TensorRef, dims: Sequence[int]) -> TensorRef:
        return WideTensor(array_of("permute", tensor).transpose(dims))


class _Norm(WideTensorOps, NormOps):
    def rms_norm_residual(
        self, input: TensorRef, residual: TensorRef, weight: TensorRef, eps: float
    ) -> tuple[TensorRef, TensorRef]:
        total = self.add(input, residual)
        return self.rms_norm(total, weight, eps), total


class _Position(PositionOps):
    def __init__(self, arithmetic: Arithmetic) -> None:
        self._of = arithmetic.of

    def rotary_embedding(
        self, x: TensorRef, cos_cache: TensorRef, sin_cache: TensorRef, position_ids: Ints
    ) -> TensorRef:
        turned, cos, sin = (self._of(array_of("rotary_embedding", one)) for one in (x, cos_cache, sin_cache))
        return WideTensor(rope.rotary_embedding(turned, cos, sin, position_ids))


class _Attention(AttentionOps):
    def __init__(self, arithmetic: Arithmetic) -> None:
        self._of = arithmetic.of

    def attention(
        self, q: TensorRef, k: TensorRef, v: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None
    ) -> TensorRef:
        x, keys, values = (self._of(array_of("attention", one)) for one in (q, k, v))
        extra = None if sinks is None else self._of(array_of("attention", sinks))
        scale, causal, window = params.softmax_scale, params.causal, params.sliding_window
        cap = params.logit_softcap
        return WideTensor(attention.attention(x, keys, values, scale, causal, window, softcap=cap, sinks=extra))


class _Activation(WideTensorOps, ActivationOps):
    def silu_mul(self, gate: TensorRef, up: TensorRef) -> TensorRef:
        return WideTensor(activation.silu_mul(self._of("silu_mul", gate), self._of("silu_mul", up)))


class _Linear(LinearOps):
    def __init__(self, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic

    def linear(self, input: TensorRef, weight: TensorRef) -> TensorRef:
        return WideTensor(self._arithmetic.linear(array_of("linear", input), array_of("linear", weight)))

    def quantized_linear(self, input: TensorRef, packed_weight: TensorRef, scheme: QuantScheme) -> TensorRef:
        """Rows of a named format, decoded a few at a time: the weights stay in the file's memory."""
        if not isinstance(scheme, QuantQ4_0 | QuantQ8_0 | QuantRows):
            raise UnsupportedError(f"quantized_linear: {scheme.kind} in a float64 run; read such weights dense")
        x = array_of("quantized_linear", input)
        matrix = RowMatrix(array_of("quantized_linear", packed_weight), scheme.kind.upper())
        num_rows, num_columns = matrix.shape
        step = max(1, _BLOCK_ELEMENTS // max(1, num_columns))
        parts = [
            self._arithmetic.linear(x, matrix.rows(start, min(start + step, num_rows)))
            for start in range(0, num_rows, step)
        ]
        return WideTensor(np.concatenate(parts, axis=-1))

    def embedding(self, table: TensorRef, ids: Ints) -> TensorRef:
        return WideTensor(linear.embedding(array_of("embedding", table), ids))


class WideKernelOps(KernelOps):
    """What a decoder needs; nothing that samples."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self._norm, self._position, self._attention = _Norm(arithmetic), _Position(arithmetic), _Attention(arithmetic)
        self._activation, self._linear = _Activation(arithmetic), _Linear(arithmetic)

    def backend_name(self) -> str:
        return "float64 run"

    def norm_ops(self) -> NormOps:
        return self._norm

    def position_ops(self) -> PositionOps:
        return self._position

    def attention_ops(self) -> AttentionOps:
        return self._attention

    def activation_ops(self) -> ActivationOps:
        return self._activation

    def linear_ops(self) -> LinearOps:
        return self._linear
