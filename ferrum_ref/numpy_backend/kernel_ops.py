"""The fused operations on NumpyTensors: each unwraps, calls its kernel, wraps.   Clauses: KN-*, BK-NUMPY-2..5."""

from __future__ import annotations

from ferrum_ref.errors import ShapeError
from ferrum_ref.interfaces.kernel_ops import (
    ActivationOps,
    AttentionOps,
    AttentionParams,
    Ints,
    KernelOps,
    LinearOps,
    NormOps,
    PositionOps,
    SamplingOps,
    SamplingParams,
)
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kernels.activation import gelu, silu_mul
from ferrum_ref.kernels.attention import attention, paged_attention
from ferrum_ref.kernels.cache import write_kv
from ferrum_ref.kernels.linear import embedding, linear
from ferrum_ref.kernels.norm import rms_norm, rms_norm_residual
from ferrum_ref.kernels.rope import rotary_embedding
from ferrum_ref.kernels.sampling import argmax, sample_token
from ferrum_ref.numpy_backend.tensor import NumpyTensor, array_of
from ferrum_ref.types.algorithm import Algorithm


class NumpyNormOps(NormOps):
    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> TensorRef:
        return NumpyTensor(rms_norm(array_of("rms_norm", input), array_of("rms_norm", weight), eps))

    def rms_norm_residual(
        self, input: TensorRef, residual: TensorRef, weight: TensorRef, eps: float
    ) -> tuple[TensorRef, TensorRef]:
        name = "rms_norm_residual"
        y, r = rms_norm_residual(array_of(name, input), array_of(name, residual), array_of(name, weight), eps)
        return NumpyTensor(y), NumpyTensor(r)


class NumpyPositionOps(PositionOps):
    def rotary_embedding(
        self, x: TensorRef, cos_cache: TensorRef, sin_cache: TensorRef, position_ids: Ints
    ) -> TensorRef:
        name = "rotary_embedding"
        cos, sin = array_of(name, cos_cache), array_of(name, sin_cache)
        return NumpyTensor(rotary_embedding(array_of(name, x), cos, sin, position_ids))


class NumpyAttentionOps(AttentionOps):
    def attention(self, q: TensorRef, k: TensorRef, v: TensorRef, params: AttentionParams) -> TensorRef:
        x, keys, values = array_of("attention", q), array_of("attention", k), array_of("attention", v)
        _check_heads("attention", params, x.shape, keys.shape)
        return NumpyTensor(attention(x, keys, values, params.softmax_scale, params.causal, params.sliding_window))

    def paged_attention(
        self,
        q: TensorRef,
        k_cache: TensorRef,
        v_cache: TensorRef,
        block_table: Ints,
        params: AttentionParams,
        *,
        context_lens: Ints | None = None,
    ) -> TensorRef:
        name = "paged_attention"
        x, keys, values = array_of(name, q), array_of(name, k_cache), array_of(name, v_cache)
        _check_heads(name, params, x.shape, keys.shape)
        scale, causal, window = params.softmax_scale, params.causal, params.sliding_window
        return NumpyTensor(paged_attention(x, keys, values, block_table, context_lens, scale, causal, window))

    def write_kv(self, cache: TensorRef, rows: TensorRef, slots: Ints) -> None:
        write_kv(array_of("write_kv", cache), array_of("write_kv", rows), slots)


class NumpyActivationOps(ActivationOps):
    def silu_mul(self, gate: TensorRef, up: TensorRef) -> TensorRef:
        return NumpyTensor(silu_mul(array_of("silu_mul", gate), array_of("silu_mul", up)))

    def gelu(self, input: TensorRef) -> TensorRef:
        return NumpyTensor(gelu(array_of("gelu", input)))


class NumpyLinearOps(LinearOps):
    def linear(self, input: TensorRef, weight: TensorRef) -> TensorRef:
        return NumpyTensor(linear(array_of("linear", input), array_of("linear", weight)))

    def embedding(self, table: TensorRef, ids: Ints) -> TensorRef:
        return NumpyTensor(embedding(array_of("embedding", table), ids))


class NumpySamplingOps(SamplingOps):
    def sample_token(self, logits: TensorRef, params: SamplingParams) -> int:
        return sample_token(
            array_of("sample_token", logits),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            repetition_penalty=params.repetition_penalty,
            repetition_token_ids=params.repetition_token_ids,
            repetition_token_freqs=params.repetition_token_freqs,
            rng_seed=params.rng_seed,
        )

    def argmax(self, logits: TensorRef) -> int:
        return argmax(array_of("argmax", logits))


class NumpyKernelOps(KernelOps):
    """All six parts."""

    def __init__(self) -> None:
        self._norm = NumpyNormOps()
        self._position = NumpyPositionOps()
        self._attention = NumpyAttentionOps()
        self._activation = NumpyActivationOps()
        self._linear = NumpyLinearOps()
        self._sampling = NumpySamplingOps()

    def backend_name(self) -> str:
        return "numpy"

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

    def sampling_ops(self) -> SamplingOps:
        return self._sampling

    def declared_algorithm(self, op: str) -> Algorithm:
        """float32 throughout, probabilities and residuals unrounded; gelu works in float64.  [BK-NUMPY-3]"""
        return Algorithm(accumulate="fp64") if op == "gelu" else Algorithm()


def _check_heads(operation: str, params: AttentionParams, q: tuple[int, ...], k: tuple[int, ...]) -> None:
    want = (params.num_heads, params.head_dim, params.num_kv_heads, params.head_dim)
    if (*q[-2:], *k[-2:]) != want:
        raise ShapeError(
            f"{operation}: q {q} and keys {k}, expected (..., {params.num_heads}, {params.head_dim}) and "
            f"(..., {params.num_kv_heads}, {params.head_dim}) as the parameters say"
        )
