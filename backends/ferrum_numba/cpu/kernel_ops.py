"""The six parts of KernelOps, and how each operation declares that it computes.

Shapes and errors are told in `ferrum_ref.interfaces.kernel_ops`; results have the first operand's type.
Clauses: BK-NCPU-8..17 (specs/backend_numba.md), KN-* (specs/kernels.md).
"""

from __future__ import annotations

from typing import Final

from ferrum_numba.cpu import attention, elementwise, linear, norms, sampling
from ferrum_numba.cpu.attending import KEYS_AT_A_TIME
from ferrum_numba.cpu.runtime import Runtime
from ferrum_numba.cpu.tensor import NumbaTensor
from ferrum_ref.interfaces.kernel_ops import (
    ActivationOps,
    AttentionOps,
    AttentionParams,
    Ints,
    KernelOps,
    KernelSamplingParams,
    LinearOps,
    NormOps,
    PositionOps,
    QuantScheme,
    SamplingOps,
)
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.types.algorithm import Algorithm

IN_FLOAT64: Final = frozenset({"gelu", "gelu_tanh", "sample_token"})
BY_PARTS: Final = frozenset({"attention", "paged_attention"})
EXP_ULP: Final = 1.5  # of exp32: measured at 1.01 over every float32 exponent, see BK-NCPU-17


class Part:
    """What every part has: the runtime of its backend."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime


class NumbaNormOps(Part, NormOps):
    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> NumbaTensor:
        """`x / sqrt(mean(x**2) + eps) * weight` over the last axis."""
        x = self._runtime.take("rms_norm", "input", input)
        return NumbaTensor(norms.rms_norm(x, self._runtime.take_beside("rms_norm", "weight", weight), eps))

    def rms_norm_residual(
        self, input: TensorRef, residual: TensorRef, weight: TensorRef, eps: float
    ) -> tuple[TensorRef, TensorRef]:
        """`(rms_norm(r), r)` with `r = input + residual`; the norm reads r before it is rounded (D-16)."""
        operation, beside = "rms_norm_residual", self._runtime.take_beside
        x = self._runtime.take(operation, "input", input)
        r, w = beside(operation, "residual", residual), beside(operation, "weight", weight)
        normed, total = norms.rms_norm_residual(x, r, w, eps)
        return NumbaTensor(normed), NumbaTensor(total)


class NumbaPositionOps(Part, PositionOps):
    def rotary_embedding(
        self, x: TensorRef, cos_cache: TensorRef, sin_cache: TensorRef, position_ids: Ints
    ) -> NumbaTensor:
        """Rotate pair (i, i + D/2) of every head by the angle of its token's own position (D-15)."""
        operation, beside = "rotary_embedding", self._runtime.take_beside
        data = self._runtime.take(operation, "x", x)
        cos, sin = beside(operation, "cos_cache", cos_cache), beside(operation, "sin_cache", sin_cache)
        return NumbaTensor(elementwise.rotary_embedding(data, cos, sin, position_ids))


class NumbaAttentionOps(Part, AttentionOps):
    def attention(
        self,
        q: TensorRef,
        k: TensorRef,
        v: TensorRef,
        params: AttentionParams,
        *,
        sinks: TensorRef | None = None,
    ) -> NumbaTensor:
        """`softmax(scale Q K^T + mask) V`; scale, window, soft cap and sinks are honoured, any head size (D-52)."""
        operation, beside = "attention", self._runtime.take_beside
        queries = self._runtime.take(operation, "q", q)
        keys, values = beside(operation, "k", k), beside(operation, "v", v)
        extra = None if sinks is None else beside(operation, "sinks", sinks)
        return NumbaTensor(attention.attention(queries, keys, values, params, extra))

    def paged_attention(
        self,
        q: TensorRef,
        k_cache: TensorRef,
        v_cache: TensorRef,
        block_table: Ints,
        params: AttentionParams,
        *,
        context_lens: Ints | None = None,
        sinks: TensorRef | None = None,
    ) -> NumbaTensor:
        """Attention of T new tokens over keys and values that lie in blocks (D-17)."""
        operation, beside = "paged_attention", self._runtime.take_beside
        queries = self._runtime.take(operation, "q", q)
        keys, values = beside(operation, "k_cache", k_cache), beside(operation, "v_cache", v_cache)
        extra = None if sinks is None else beside(operation, "sinks", sinks)
        return NumbaTensor(attention.paged_attention(queries, keys, values, block_table, params, context_lens, extra))

    def write_kv(self, cache: TensorRef, rows: TensorRef, slots: Ints) -> None:
        """`cache[slots[t]] = rows[t]`, in place."""
        target = self._runtime.take("write_kv", "cache", cache)
        attention.write_kv(target, self._runtime.take_beside("write_kv", "rows", rows), slots)


class NumbaActivationOps(Part, ActivationOps):
    def silu_mul(self, gate: TensorRef, up: TensorRef) -> NumbaTensor:
        """`gate * sigmoid(gate) * up`, rounded once."""
        g = self._runtime.take("silu_mul", "gate", gate)
        return NumbaTensor(elementwise.silu_mul(g, self._runtime.take_beside("silu_mul", "up", up)))

    def gelu(self, input: TensorRef) -> NumbaTensor:
        """`x * Phi(x)`, the exact erf form (D-14)."""
        return NumbaTensor(elementwise.gelu(self._runtime.take("gelu", "input", input)))


class NumbaLinearOps(Part, LinearOps):
    def linear(self, input: TensorRef, weight: TensorRef) -> NumbaTensor:
        """`input @ weight.T` (D-01), leading axes folded (D-51)."""
        x = self._runtime.take("linear", "input", input)
        return NumbaTensor(linear.linear(x, self._runtime.take_beside("linear", "weight", weight)))

    def quantized_linear(self, input: TensorRef, packed_weight: TensorRef, scheme: QuantScheme) -> NumbaTensor:
        """The same product with packed rows, ggml's blocks or plain numbers, unpacked in registers.  [BK-NCPU-22]"""
        operation = "quantized_linear"
        x = self._runtime.take(operation, "input", input)
        packed = self._runtime.take_beside(operation, "packed_weight", packed_weight)
        return NumbaTensor(linear.quantized_linear(x, packed, scheme))

    def row_scaled_linear(self, input: TensorRef, weight: TensorRef, scales: TensorRef) -> NumbaTensor:
        """The same product with int8 weights, one float32 scale for each output (extension).  [BK-NCPU-13]"""
        operation, beside = "row_scaled_linear", self._runtime.take_beside
        x = self._runtime.take(operation, "input", input)
        quanta, factors = beside(operation, "weight", weight), beside(operation, "scales", scales)
        return NumbaTensor(linear.row_scaled_linear(x, quanta, factors))

    def embedding(self, table: TensorRef, ids: Ints) -> NumbaTensor:
        """Rows `table[ids]`, exact."""
        return NumbaTensor(linear.embedding(self._runtime.take("embedding", "table", table), ids))


class NumbaSamplingOps(Part, SamplingOps):
    def sample_token(self, logits: TensorRef, params: KernelSamplingParams) -> int:
        """Penalty, temperature, top-k, top-p, draw, in this order (D-18)."""
        return sampling.sample_token(self._runtime.take("sample_token", "logits", logits), params)

    def argmax(self, logits: TensorRef) -> int:
        """Index of the first maximum (D-03)."""
        return sampling.argmax(self._runtime.take("argmax", "logits", logits))


class NumbaKernelOps(KernelOps):
    def __init__(self, runtime: Runtime) -> None:
        self._norm = NumbaNormOps(runtime)
        self._position = NumbaPositionOps(runtime)
        self._attention = NumbaAttentionOps(runtime)
        self._activation = NumbaActivationOps(runtime)
        self._linear = NumbaLinearOps(runtime)
        self._sampling = NumbaSamplingOps(runtime)

    def backend_name(self) -> str:
        return "numba-cpu"

    def norm_ops(self) -> NumbaNormOps:
        return self._norm

    def position_ops(self) -> NumbaPositionOps:
        return self._position

    def attention_ops(self) -> NumbaAttentionOps:
        return self._attention

    def activation_ops(self) -> NumbaActivationOps:
        return self._activation

    def linear_ops(self) -> NumbaLinearOps:
        return self._linear

    def sampling_ops(self) -> NumbaSamplingOps:
        return self._sampling

    def declared_algorithm(self, op: str) -> Algorithm:
        """float32 sums in an order of the compiler's choosing; attention by parts of the keys; gelu and sample_token in
        float64.  [BK-NCPU-17]  Pure.
        """
        if op in IN_FLOAT64:
            return Algorithm(accumulate="fp64")
        if op in BY_PARTS:
            return Algorithm(key_block=KEYS_AT_A_TIME, exp_ulp=EXP_ULP)
        return Algorithm(exp_ulp=EXP_ULP)
