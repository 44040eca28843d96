"""The fused operations on NumpyTensors: each unwraps, calls its kernel, wraps.   Clauses: KN-*, BK-NUMPY-2..5."""

from __future__ import annotations

import math

from ferrum_ref.errors import ShapeError, UnsupportedError
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
    SamplingOps,
    SamplingParams,
)
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kernels.activation import gelu, silu_mul
from ferrum_ref.kernels.attention import attention, paged_attention
from ferrum_ref.kernels.cache import write_kv
from ferrum_ref.kernels.linear import embedding, linear
from ferrum_ref.kernels.norm import rms_norm, rms_norm_residual
from ferrum_ref.kernels.quantized_linear import packed_linear, quantized_linear
from ferrum_ref.kernels.rope import rotary_embedding
from ferrum_ref.kernels.sampling import argmax, sample_token
from ferrum_ref.numpy_backend.quantized import matrix_of
from ferrum_ref.numpy_backend.tensor import NumpyTensor, PackedTensor, array_of, wrap
from ferrum_ref.types.algorithm import Algorithm
from ferrum_ref.types.parity_mode import ParityMode

UPSTREAM_HEAD_DIM = 128  # beyond it upstream's attention kernel reads and writes outside its tiles


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
    """UPSTREAM: positions count on from the first (D-15).  [KN-ROPE-7]"""

    def __init__(self, parity_mode: ParityMode = ParityMode.REFERENCE) -> None:
        self._parity_mode = parity_mode

    def rotary_embedding(
        self, x: TensorRef, cos_cache: TensorRef, sin_cache: TensorRef, position_ids: Ints
    ) -> TensorRef:
        name = "rotary_embedding"
        cos, sin = array_of(name, cos_cache), array_of(name, sin_cache)
        mode = self._parity_mode
        return NumpyTensor(rotary_embedding(array_of(name, x), cos, sin, position_ids, parity_mode=mode))


class NumpyAttentionOps(AttentionOps):
    """UPSTREAM: `attention` scales by 1/sqrt(D) and has no window, as upstream's CUDA kernel (D-52).  [KN-ATTN-9]

    Upstream knows neither score caps nor sinks: under UPSTREAM they are refused.  [KN-ATTN-12]
    """

    def __init__(self, parity_mode: ParityMode = ParityMode.REFERENCE) -> None:
        self._parity_mode = parity_mode

    def attention(
        self, q: TensorRef, k: TensorRef, v: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None
    ) -> TensorRef:
        x, keys, values = array_of("attention", q), array_of("attention", k), array_of("attention", v)
        _check_heads("attention", params, x.shape, keys.shape)
        scale, window = params.softmax_scale, params.sliding_window
        if self._parity_mode is ParityMode.UPSTREAM:
            if params.head_dim > UPSTREAM_HEAD_DIM:
                raise UnsupportedError(
                    f"attention: parity_mode UPSTREAM with head_dim={params.head_dim}, expected at most "
                    f"{UPSTREAM_HEAD_DIM}; upstream's kernel has no defined result beyond"
                )
            if params.logit_softcap or sinks is not None:
                raise UnsupportedError(
                    "attention: parity_mode UPSTREAM with logit_softcap or sinks, expected neither; upstream has none"
                )
            scale, window = 1.0 / math.sqrt(params.head_dim), 0
        cap, extra = params.logit_softcap, None if sinks is None else array_of("attention", sinks)
        return NumpyTensor(attention(x, keys, values, scale, params.causal, window, softcap=cap, sinks=extra))

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
    ) -> TensorRef:
        name = "paged_attention"
        x, keys, values = array_of(name, q), array_of(name, k_cache), array_of(name, v_cache)
        _check_heads(name, params, x.shape, keys.shape)
        scale, causal, window = params.softmax_scale, params.causal, params.sliding_window
        cap, extra = params.logit_softcap, None if sinks is None else array_of(name, sinks)
        return NumpyTensor(
            paged_attention(x, keys, values, block_table, context_lens, scale, causal, window, softcap=cap, sinks=extra)
        )

    def write_kv(self, cache: TensorRef, rows: TensorRef, slots: Ints) -> None:
        new = array_of("write_kv", rows)
        if not isinstance(cache, PackedTensor):
            write_kv(array_of("write_kv", cache), new, slots)
            return
        cells = cache.unpacked()
        write_kv(cells, new, slots)
        cache.store(cells)


class NumpyActivationOps(ActivationOps):
    def silu_mul(self, gate: TensorRef, up: TensorRef) -> TensorRef:
        return NumpyTensor(silu_mul(array_of("silu_mul", gate), array_of("silu_mul", up)))

    def gelu(self, input: TensorRef) -> TensorRef:
        return NumpyTensor(gelu(array_of("gelu", input)))


class NumpyLinearOps(LinearOps):
    def linear(self, input: TensorRef, weight: TensorRef) -> TensorRef:
        return NumpyTensor(linear(array_of("linear", input), array_of("linear", weight)))

    def quantized_linear(self, input: TensorRef, packed_weight: TensorRef, scheme: QuantScheme) -> TensorRef:
        x = array_of("quantized_linear", input)
        if isinstance(scheme, QuantScheme.Q4_0 | QuantScheme.Q8_0):
            packed = array_of("quantized_linear", packed_weight)
            return NumpyTensor(quantized_linear(x, packed, scheme.kind.upper(), scheme.group_size))
        return NumpyTensor(packed_linear(x, matrix_of(packed_weight, scheme)))

    def embedding(self, table: TensorRef, ids: Ints) -> TensorRef:
        return wrap(embedding(array_of("embedding", table), ids))


class NumpySamplingOps(SamplingOps):
    """UPSTREAM: `sample_token` ignores its parameters and takes the argmax (D-18).  [KN-SAMPLE-9]"""

    def __init__(self, parity_mode: ParityMode = ParityMode.REFERENCE) -> None:
        self._parity_mode = parity_mode

    def sample_token(self, logits: TensorRef, params: SamplingParams) -> int:
        if self._parity_mode is ParityMode.UPSTREAM:
            return argmax(array_of("sample_token", logits))
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
    """All six parts; `parity_mode` is handed to those in which upstream gives another result."""

    def __init__(self, parity_mode: ParityMode = ParityMode.REFERENCE) -> None:
        self._norm = NumpyNormOps()
        self._position = NumpyPositionOps(parity_mode)
        self._attention = NumpyAttentionOps(parity_mode)
        self._activation = NumpyActivationOps()
        self._linear = NumpyLinearOps()
        self._sampling = NumpySamplingOps(parity_mode)

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
