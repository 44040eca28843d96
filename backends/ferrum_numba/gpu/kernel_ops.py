"""The six parts of KernelOps, and how each operation declares that it computes.

Shapes and errors are told in `ferrum_ref.interfaces.kernel_ops`; results have the first operand's type.
Clauses: BK-NCUDA-8..19 (specs/backend_numba_cuda.md), KN-* (specs/kernels.md).
"""

from __future__ import annotations

from ferrum_numba.gpu import attention, elementwise, linear, norms, sampling
from ferrum_numba.gpu.operands import beside, take
from ferrum_numba.gpu.runtime import Runtime
from ferrum_numba.gpu.tensor import NumbaTensor
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

KEY_BLOCK = 2  # at least: a lane's maximum is renewed every four keys; lanes, warps and splits are joined thereafter
FAST_DIVISION = ("silu", "silu_mul", "gelu_tanh")  # by the GPU's approximate reciprocal


class Part:
    """What every part has: the runtime of its backend."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def _take(self, operation: str, argument: str, tensor: TensorRef) -> NumbaTensor:
        return take(self._runtime, operation, argument, tensor)

    def _beside(self, operation: str, argument: str, tensor: TensorRef) -> NumbaTensor:
        return beside(self._runtime, operation, argument, tensor)


class NumbaNormOps(Part, NormOps):
    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> NumbaTensor:
        """`x / sqrt(mean(x**2) + eps) * weight` over the last axis."""
        x = self._take("rms_norm", "input", input)
        return norms.rms_norm(x, self._beside("rms_norm", "weight", weight), eps)

    def rms_norm_residual(
        self, input: TensorRef, residual: TensorRef, weight: TensorRef, eps: float
    ) -> tuple[TensorRef, TensorRef]:
        """`(rms_norm(r), r)` with `r = input + residual`; the norm reads r before it is rounded (D-16)."""
        operation = "rms_norm_residual"
        x, r = self._take(operation, "input", input), self._beside(operation, "residual", residual)
        return norms.rms_norm_residual(x, r, self._beside(operation, "weight", weight), eps)


class NumbaPositionOps(Part, PositionOps):
    def rotary_embedding(
        self, x: TensorRef, cos_cache: TensorRef, sin_cache: TensorRef, position_ids: Ints
    ) -> NumbaTensor:
        """Rotate pair (i, i + D/2) of every head by the angle of its token's own position (D-15)."""
        operation = "rotary_embedding"
        data = self._take(operation, "x", x)
        cos, sin = self._beside(operation, "cos_cache", cos_cache), self._beside(operation, "sin_cache", sin_cache)
        return elementwise.rotary_embedding(data, cos, sin, position_ids)


class NumbaAttentionOps(Part, AttentionOps):
    def attention(
        self, q: TensorRef, k: TensorRef, v: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None
    ) -> NumbaTensor:
        """`softmax(scale Q K^T + mask) V`; scale, window, soft-cap and sinks are honoured (D-52)."""
        operation = "attention"
        queries = self._take(operation, "q", q)
        keys, values = self._beside(operation, "k", k), self._beside(operation, "v", v)
        return attention.attention(queries, keys, values, params, self._sinks(operation, sinks))

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
        operation = "paged_attention"
        queries = self._take(operation, "q", q)
        keys, values = self._beside(operation, "k_cache", k_cache), self._beside(operation, "v_cache", v_cache)
        logits = self._sinks(operation, sinks)
        return attention.paged_attention(queries, keys, values, block_table, params, context_lens, logits)

    def write_kv(self, cache: TensorRef, rows: TensorRef, slots: Ints) -> None:
        """`cache[slots[t]] = rows[t]`, in place."""
        attention.write_kv(self._take("write_kv", "cache", cache), self._beside("write_kv", "rows", rows), slots)

    def _sinks(self, operation: str, sinks: TensorRef | None) -> NumbaTensor | None:
        return None if sinks is None else self._beside(operation, "sinks", sinks)


class NumbaActivationOps(Part, ActivationOps):
    def silu_mul(self, gate: TensorRef, up: TensorRef) -> NumbaTensor:
        """`gate * sigmoid(gate) * up`, rounded once."""
        return elementwise.silu_mul(self._take("silu_mul", "gate", gate), self._beside("silu_mul", "up", up))

    def gelu(self, input: TensorRef) -> NumbaTensor:
        """`x * Phi(x)`, the exact erf form (D-14)."""
        return elementwise.unary("gelu", self._take("gelu", "input", input))


class NumbaLinearOps(Part, LinearOps):
    def linear(self, input: TensorRef, weight: TensorRef) -> NumbaTensor:
        """`input @ weight.T` (D-01), leading axes folded (D-51)."""
        return linear.linear(self._take("linear", "input", input), self._beside("linear", "weight", weight))

    def quantized_linear(self, input: TensorRef, packed_weight: TensorRef, scheme: QuantScheme) -> NumbaTensor:
        """The same product with ggml blocks, q4_0 or q8_0, read as they lie."""
        operation = "quantized_linear"
        x, packed = self._take(operation, "input", input), self._beside(operation, "packed_weight", packed_weight)
        return linear.quantized_linear(x, packed, scheme)

    def embedding(self, table: TensorRef, ids: Ints) -> NumbaTensor:
        """Rows `table[ids]`, exact."""
        return linear.embedding(self._take("embedding", "table", table), ids)


class NumbaSamplingOps(Part, SamplingOps):
    def sample_token(self, logits: TensorRef, params: KernelSamplingParams) -> int:
        """Penalty, temperature, top-k, top-p, draw, in this order (D-18)."""
        return sampling.sample_token(self._take("sample_token", "logits", logits), params)

    def argmax(self, logits: TensorRef) -> int:
        """Index of the first maximum (D-03)."""
        return sampling.argmax(self._take("argmax", "logits", logits))


class NumbaKernelOps(KernelOps):
    def __init__(self, runtime: Runtime) -> None:
        self._norm = NumbaNormOps(runtime)
        self._position = NumbaPositionOps(runtime)
        self._attention = NumbaAttentionOps(runtime)
        self._activation = NumbaActivationOps(runtime)
        self._linear = NumbaLinearOps(runtime)
        self._sampling = NumbaSamplingOps(runtime)

    def backend_name(self) -> str:
        return "numba-cuda"

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
        """float32 sums and CUDA's own float32 functions; attention online; sample_token in float64.  [BK-NCUDA-19]

        Where the last axis of a sum has partial sums in lanes, warps and blocks, any order of its terms is declared.
        """
        if op == "sample_token":
            return Algorithm(accumulate="fp64")
        if op in ("attention", "paged_attention"):
            return Algorithm(key_block=KEY_BLOCK)
        if op in FAST_DIVISION:
            return Algorithm(div_ulp=2.0)
        return Algorithm()
