"""The six parts of KernelOps, and how each operation declares that it computes.  Clauses: BK-CUPY-7..14, KN-*."""

from __future__ import annotations

from ferrum_cupy import attention, launches, linear, sampling
from ferrum_cupy.runtime import Runtime
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import ShapeError
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

_PRODUCTS = frozenset({"linear", "matmul"})
_ATTENTION = frozenset({"attention", "paged_attention"})
_FAST_DIVISION = frozenset({"silu", "silu_mul"})  # by 1 to 2, where it errs by 2 ulp at most
_IN_FLOAT64 = frozenset({"gelu", "gelu_tanh", "sample_token"})


class Part:
    """What every part has: the runtime of its backend."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def _float(self, operation: str, argument: str, tensor: TensorRef) -> CupyTensor:
        return self._runtime.float_of(operation, argument, self._runtime.take(operation, argument, tensor))


class CupyNormOps(Part, NormOps):
    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> CupyTensor:
        """`x / sqrt(mean(x**2) + eps) * weight` over the last axis."""
        return launches.rms_norm(self._runtime, "rms_norm", self._float("rms_norm", "input", input), weight, eps)

    def rms_norm_residual(
        self, input: TensorRef, residual: TensorRef, weight: TensorRef, eps: float
    ) -> tuple[TensorRef, TensorRef]:
        """`(rms_norm(r), r)` with `r = input + residual`; the norm reads r before it is rounded (D-16)."""
        x = self._float("rms_norm_residual", "input", input)
        return launches.rms_norm_residual(self._runtime, x, residual, weight, eps)


class CupyPositionOps(Part, PositionOps):
    def rotary_embedding(
        self, x: TensorRef, cos_cache: TensorRef, sin_cache: TensorRef, position_ids: Ints
    ) -> CupyTensor:
        """Rotate pair (i, i + D/2) of every head by the angle of its token's own position (D-15)."""
        data = self._float("rotary_embedding", "x", x)
        return launches.rotary(self._runtime, data, cos_cache, sin_cache, position_ids)


class CupyAttentionOps(Part, AttentionOps):
    def attention(
        self, q: TensorRef, k: TensorRef, v: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None
    ) -> CupyTensor:
        """`softmax(scale Q K^T + mask) V`; scale, window, soft-cap and sinks are honoured (D-52)."""
        return attention.attention(self._runtime, self._float("attention", "q", q), k, v, params, sinks)

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
    ) -> CupyTensor:
        """Attention of T new tokens over keys and values that lie in blocks (D-17)."""
        queries = self._float("paged_attention", "q", q)
        return attention.paged_attention(
            self._runtime, queries, k_cache, v_cache, block_table, params, context_lens, sinks
        )

    def write_kv(self, cache: TensorRef, rows: TensorRef, slots: Ints) -> None:
        """`cache[slots[t]] = rows[t]`, in place."""
        attention.write_kv(self._runtime, self._runtime.take("write_kv", "cache", cache), rows, slots)


class CupyActivationOps(Part, ActivationOps):
    def silu_mul(self, gate: TensorRef, up: TensorRef) -> CupyTensor:
        """`gate * sigmoid(gate) * up`, rounded once. Raises ShapeError for unequal shapes."""
        g = self._float("silu_mul", "gate", gate)
        u = self._runtime.float_of("silu_mul", "up", up)
        if g.shape() != u.shape():
            raise ShapeError(f"silu_mul: gate {g.shape()} and up {u.shape()}, expected equal shapes")
        return launches.pointwise(self._runtime, "silu_mul", g, u)

    def gelu(self, input: TensorRef) -> CupyTensor:
        """`x * Phi(x)`, the exact erf form (D-14)."""
        return launches.pointwise(self._runtime, "gelu", self._float("gelu", "input", input))


class CupyLinearOps(Part, LinearOps):
    def linear(self, input: TensorRef, weight: TensorRef) -> CupyTensor:
        """`input @ weight.T` (D-01), leading axes folded (D-51)."""
        return linear.linear(self._runtime, self._float("linear", "input", input), weight)

    def quantized_linear(self, input: TensorRef, packed_weight: TensorRef, scheme: QuantScheme) -> CupyTensor:
        """The same product with ggml blocks, q4_0 or q8_0, unpacked in registers."""
        return linear.quantized_linear(
            self._runtime, self._float("quantized_linear", "input", input), packed_weight, scheme
        )

    def embedding(self, table: TensorRef, ids: Ints) -> CupyTensor:
        """Rows `table[ids]`, exact."""
        return linear.embedding(self._runtime, self._runtime.take("embedding", "table", table), ids)


class CupySamplingOps(Part, SamplingOps):
    def sample_token(self, logits: TensorRef, params: KernelSamplingParams) -> int:
        """Penalty, temperature, top-k, top-p, draw, in this order (D-18)."""
        return sampling.sample_token(self._runtime, self._float("sample_token", "logits", logits), params)

    def argmax(self, logits: TensorRef) -> int:
        """Index of the first maximum (D-03)."""
        return sampling.argmax(self._runtime, self._float("argmax", "logits", logits))


class CupyKernelOps(KernelOps):
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._norm = CupyNormOps(runtime)
        self._position = CupyPositionOps(runtime)
        self._attention = CupyAttentionOps(runtime)
        self._activation = CupyActivationOps(runtime)
        self._linear = CupyLinearOps(runtime)
        self._sampling = CupySamplingOps(runtime)

    def backend_name(self) -> str:
        return "cupy"

    def norm_ops(self) -> CupyNormOps:
        return self._norm

    def position_ops(self) -> CupyPositionOps:
        return self._position

    def attention_ops(self) -> CupyAttentionOps:
        return self._attention

    def activation_ops(self) -> CupyActivationOps:
        return self._activation

    def linear_ops(self) -> CupyLinearOps:
        return self._linear

    def sampling_ops(self) -> CupySamplingOps:
        return self._sampling

    def declared_algorithm(self, op: str) -> Algorithm:
        """float32 sums; gelu and sampling in float64; attention online, 32 keys or one at a time; cuBLAS may cut sums.

        [BK-CUPY-14]
        """
        if op in _IN_FLOAT64:
            return Algorithm(accumulate="fp64")
        if op in _ATTENTION:
            return Algorithm(key_block=1)
        if op in _FAST_DIVISION:
            return Algorithm(div_ulp=2.0)
        if op in _PRODUCTS:
            return Algorithm(truncates=self._runtime.machine.truncates)
        return Algorithm()
