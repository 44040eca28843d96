"""The six parts of KernelOps on torch, and how each operation declares that it computes.

Shapes and errors are told in `ferrum_ref.interfaces.kernel_ops`; results have the first operand's type.
Clauses: BK-TORCH-8..19 (specs/backend_torch.md), KN-* (specs/kernels.md).
"""

from __future__ import annotations

import torch

from ferrum_ref.errors import BackendError
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
from ferrum_torch import attention, elementwise, fused_attention, fusing, linear, norms, quantized, sampling
from ferrum_torch.fusing import directly
from ferrum_torch.runtime import Runtime
from ferrum_torch.tensor import TorchTensor, is_read_only

MATRIX_PRODUCTS = frozenset({"linear", "quantized_linear", "matmul", "attention", "paged_attention"})
IN_FLOAT64 = frozenset({"gelu", "gelu_tanh", "sample_token"})


class Part:
    """What every part has: the runtime of its backend."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime


class TorchNormOps(Part, NormOps):
    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> TorchTensor:
        """`x / sqrt(mean(x**2) + eps) * weight` over the last axis."""
        x = self._runtime.take("rms_norm", "input", input)
        w = self._runtime.take_beside("rms_norm", "weight", weight, x)
        return TorchTensor(norms.rms_norm(x, w, eps, run=self._runtime.run))

    def rms_norm_residual(
        self, input: TensorRef, residual: TensorRef, weight: TensorRef, eps: float
    ) -> tuple[TensorRef, TensorRef]:
        """`(rms_norm(r), r)` with `r = input + residual`; the norm reads r before it is rounded (D-16)."""
        operation, beside = "rms_norm_residual", self._runtime.take_beside
        x = self._runtime.take(operation, "input", input)
        r, w = beside(operation, "residual", residual, x), beside(operation, "weight", weight, x)
        normed, total = norms.rms_norm_residual(x, r, w, eps, self._runtime.run)
        return TorchTensor(normed), TorchTensor(total)


class TorchPositionOps(Part, PositionOps):
    def rotary_embedding(
        self, x: TensorRef, cos_cache: TensorRef, sin_cache: TensorRef, position_ids: Ints
    ) -> TorchTensor:
        """Rotate pair (i, i + D/2) of every head by the angle of its token's own position (D-15)."""
        operation, beside = "rotary_embedding", self._runtime.take_beside
        data = self._runtime.take(operation, "x", x)
        cos, sin = beside(operation, "cos_cache", cos_cache, data), beside(operation, "sin_cache", sin_cache, data)
        return TorchTensor(elementwise.rotary_embedding(data, cos, sin, position_ids, self._runtime.run))


class TorchAttentionOps(Part, AttentionOps):
    def attention(
        self, q: TensorRef, k: TensorRef, v: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None
    ) -> TorchTensor:
        """`softmax(scale Q K^T + mask) V`; scale and window are honoured, any head size (D-52)."""
        beside = self._runtime.take_beside
        queries = self._runtime.take("attention", "q", q)
        keys, values = beside("attention", "k", k, queries), beside("attention", "v", v, queries)
        extra = None if sinks is None else beside("attention", "sinks", sinks, queries)
        return TorchTensor(attention.attention(queries, keys, values, params, extra, self._runtime.sdpa))

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
    ) -> TorchTensor:
        """Attention of T new tokens over keys and values that lie in blocks (D-17)."""
        operation, beside = "paged_attention", self._runtime.take_beside
        queries = self._runtime.take(operation, "q", q)
        keys, values = beside(operation, "k_cache", k_cache, queries), beside(operation, "v_cache", v_cache, queries)
        extra = None if sinks is None else beside(operation, "sinks", sinks, queries)
        sdpa = self._runtime.sdpa
        return TorchTensor(
            attention.paged_attention(queries, keys, values, block_table, params, context_lens, extra, sdpa)
        )

    def write_kv(self, cache: TensorRef, rows: TensorRef, slots: Ints) -> None:
        """`cache[slots[t]] = rows[t]`, in place."""
        target = self._runtime.take("write_kv", "cache", cache)
        if is_read_only(cache):
            raise BackendError(
                "write_kv: cache: lies in memory that was handed over read-only, expected a tensor of the factory; "
                "copy it with from_tensor"
            )
        attention.write_kv(target, self._runtime.take_beside("write_kv", "rows", rows, target), slots)


class TorchActivationOps(Part, ActivationOps):
    def silu_mul(self, gate: TensorRef, up: TensorRef) -> TorchTensor:
        """`gate * sigmoid(gate) * up`, rounded once."""
        g = self._runtime.take("silu_mul", "gate", gate)
        u = self._runtime.take_beside("silu_mul", "up", up, g)
        return TorchTensor(elementwise.silu_mul(g, u, self._runtime.run))

    def gelu(self, input: TensorRef) -> TorchTensor:
        """`x * Phi(x)`, the exact erf form (D-14)."""
        return TorchTensor(elementwise.gelu(self._runtime.take("gelu", "input", input), run=self._runtime.run))


class TorchLinearOps(Part, LinearOps):
    def linear(self, input: TensorRef, weight: TensorRef) -> TorchTensor:
        """`input @ weight.T` (D-01), leading axes folded (D-51)."""
        x = self._runtime.take("linear", "input", input)
        return TorchTensor(linear.linear(x, self._runtime.take_beside("linear", "weight", weight, x)))

    def quantized_linear(self, input: TensorRef, packed_weight: TensorRef, scheme: QuantScheme) -> TorchTensor:
        """The same product with a weight in any packed form of the contract, unpacked to float32 on the way."""
        x = self._runtime.take("quantized_linear", "input", input)
        packed = self._runtime.take_beside("quantized_linear", "packed_weight", packed_weight, x)

        def beside(name: str, tensor: TensorRef) -> torch.Tensor:
            return self._runtime.take_beside("quantized_linear", name, tensor, x)

        return TorchTensor(quantized.quantized_linear(x, packed, scheme, beside, self._runtime.run))

    def embedding(self, table: TensorRef, ids: Ints) -> TorchTensor:
        """Rows `table[ids]`, exact."""
        return TorchTensor(linear.embedding(self._runtime.take("embedding", "table", table), ids))


class TorchSamplingOps(Part, SamplingOps):
    def sample_token(self, logits: TensorRef, params: KernelSamplingParams) -> int:
        """Penalty, temperature, top-k, top-p, draw, in this order (D-18)."""
        return sampling.sample_token(self._runtime.take("sample_token", "logits", logits), params)

    def argmax(self, logits: TensorRef) -> int:
        """Index of the first maximum (D-03)."""
        return sampling.argmax(self._runtime.take("argmax", "logits", logits))


class TorchKernelOps(KernelOps):
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._norm = TorchNormOps(runtime)
        self._position = TorchPositionOps(runtime)
        self._attention = TorchAttentionOps(runtime)
        self._activation = TorchActivationOps(runtime)
        self._linear = TorchLinearOps(runtime)
        self._sampling = TorchSamplingOps(runtime)

    def backend_name(self) -> str:
        return "torch"

    def norm_ops(self) -> TorchNormOps:
        return self._norm

    def position_ops(self) -> TorchPositionOps:
        return self._position

    def attention_ops(self) -> TorchAttentionOps:
        return self._attention

    def activation_ops(self) -> TorchActivationOps:
        return self._activation

    def linear_ops(self) -> TorchLinearOps:
        return self._linear

    def sampling_ops(self) -> TorchSamplingOps:
        return self._sampling

    def declared_algorithm(self, op: str) -> Algorithm:
        """float32 sums in an order of torch's choosing; matrix products as torch's own precision switch has it; gelu in
        float64.  [BK-TORCH-19, BK-TORCH-34, BK-TORCH-37]

        A GPU's tensor cores may cut where a sum should be rounded. Reads the switch at every call; changes nothing.
        """
        on_gpu = self._runtime.torch_device.type == "cuda"
        if op in IN_FLOAT64:
            return Algorithm(accumulate="fp64")
        if op not in MATRIX_PRODUCTS:
            return fusing.declared(Algorithm(), on_gpu) if self._runtime.run is not directly else Algorithm()
        settings = torch.backends.cuda if on_gpu else torch.backends.mkldnn
        chosen = getattr(getattr(settings, "matmul", None), "fp32_precision", "none")
        plain = Algorithm(accumulate=chosen if chosen in ("tf32", "bf16") else "fp32", truncates=on_gpu)
        fused = self._runtime.sdpa and op in ("attention", "paged_attention")
        return fused_attention.declared(plain, on_gpu) if fused else plain
