"""Multi-head latent attention: a token's keys and values of all heads are expanded from one short vector, which is
all that the cache keeps.

    c, r = rms_norm(first C of W_a x), rope(rest of W_a x)              cached: [c; r]
    q_n, q_r = W_q x or W_qb rms_norm(W_qa x), by head;  q_r = rope(q_r)
    score = scale (q_n . (U_h c) + q_r . r),    value = V_h c,    [U_h; V_h] = W_b of head h

Computed in the absorbed form: q_n . (U_h c) = (U_h^T q_n) . c, and sum_j p_j V_h c_j = V_h sum_j p_j c_j. So attention
runs on the cached vectors as they are: one key/value head of size C + D_rope, whose values are its keys.
Clauses: LM-LATENT-1..5 (specs/decoder_families.md).  Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ferrum_ref.errors import ShapeError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.forward import Ints
from ferrum_ref.interfaces.kernel_ops import AttentionParams, LinearOps, NormOps, PositionOps
from ferrum_ref.interfaces.kv_storage import KvBatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.decoder_parts import See
from ferrum_ref.models.latent_config import LatentSettings
from ferrum_ref.models.matrix import Weight, apply_matrix
from ferrum_ref.models.matrix_reader import MatrixReader, TensorSource, float_element
from ferrum_ref.types.devices import DataType


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """C kv_rank, Q query_rank, Dn nope_dim, Dr rope_dim, Dv value_dim.  [LM-LATENT-2]

    query_a `[Q, E]` and query_norm `[Q]`, None where queries are projected in one step; query_b `[H*(Dn+Dr), Q or E]`;
    kv_a `[C+Dr, E]`; kv_norm `[C]`; expand_key `[H, Dn, C]`; expand_value `[H, C, Dv]`; output `[E, H*Dv]`.
    """

    query_a: Weight | None
    query_a_bias: TensorRef | None
    query_norm: TensorRef | None
    query_b: Weight
    kv_a: Weight
    kv_a_bias: TensorRef | None
    kv_norm: TensorRef
    expand_key: TensorRef
    expand_value: TensorRef
    output: Weight
    output_bias: TensorRef | None

    def tensors(self) -> list[Weight]:
        """Those that there are."""
        return [part for part in (getattr(self, name) for name in LatentWeights.__slots__) if part is not None]


def read_latent(
    source: TensorSource,
    reader: MatrixReader,
    backend: ComputeBackend,
    prefix: str,
    settings: LatentSettings,
    dtype: DataType,
) -> LatentWeights:
    """The tensors of one layer's attention, by their Hugging Face names.  [LM-LATENT-2]  Errors pass through."""
    stepwise, bias = settings.query_rank is not None, settings.bias
    whole = source.read(f"{prefix}kv_b_proj.weight", float_element(dtype))
    by_head = whole.reshape(settings.num_heads, settings.nope_dim + settings.value_dim, settings.kv_rank)
    key, value = np.split(by_head, [settings.nope_dim], axis=1)
    put = backend.tensor_factory().from_numpy
    return LatentWeights(
        query_a=reader.stacked([f"{prefix}q_a_proj.weight"]) if stepwise else None,
        query_a_bias=reader.tensor(f"{prefix}q_a_proj.bias") if stepwise and bias else None,
        query_norm=reader.tensor(f"{prefix}q_a_layernorm.weight") if stepwise else None,
        query_b=reader.stacked([f"{prefix}{'q_b_proj' if stepwise else 'q_proj'}.weight"]),
        kv_a=reader.stacked([f"{prefix}kv_a_proj_with_mqa.weight"]),
        kv_a_bias=reader.tensor(f"{prefix}kv_a_proj_with_mqa.bias") if bias else None,
        kv_norm=reader.tensor(f"{prefix}kv_a_layernorm.weight"),
        expand_key=put(np.ascontiguousarray(key)),
        expand_value=put(np.ascontiguousarray(value.swapaxes(1, 2))),
        output=reader.stacked([f"{prefix}o_proj.weight"]),
        output_bias=reader.tensor(f"{prefix}o_proj.bias") if bias else None,
    )


@dataclass(frozen=True, slots=True)
class LatentKernels:
    """The backend's parts, and the rotary tables `[P, Dr/2]`."""

    backend: ComputeBackend
    linear: LinearOps
    norm: NormOps
    position: PositionOps
    cos: TensorRef
    sin: TensorRef


class LatentAttention:
    """An `Attention` of decoder_parts. Stateless.  [LM-LATENT-1..5]"""

    def __init__(self, kernels: LatentKernels, settings: LatentSettings, weights: LatentWeights, eps: float) -> None:
        """`eps` is that of both inner norms."""
        self._kernels = kernels
        self._settings = settings
        self._weights = weights
        self._eps = eps
        self._ops = kernels.backend.tensor_ops()
        self._params = AttentionParams(
            num_heads=settings.num_heads,
            num_kv_heads=1,
            head_dim=settings.cached_dim,
            softmax_scale=settings.softmax_scale,
            causal=True,
        )

    def attend(self, normed: TensorRef, positions: Ints, kv: KvBatch, layer: int, see: See) -> TensorRef:
        """normed `[N, E]` -> `[N, H*Dv]`. Appends the N latents to `kv`, as `[N, 1, C+Dr]`."""
        query, latent = self._query(normed, positions, see), self._latent(normed, positions)
        see("latent", latent)
        kv.append(layer, latent, latent)
        attended = self._expanded(kv.attend(layer, query, self._params))
        see("attention", attended)
        return attended

    def project(self, attended: TensorRef) -> TensorRef:
        """`[R, H*Dv]` -> `[R, E]`. Pure."""
        return self._apply(attended, self._weights.output, self._weights.output_bias)

    def _query(self, normed: TensorRef, positions: Ints, see: See) -> TensorRef:
        """The absorbed queries `[N, H, C+Dr]`."""
        settings, weights = self._settings, self._weights
        if weights.query_a is not None and weights.query_norm is not None:
            normed = self._apply(normed, weights.query_a, weights.query_a_bias)
            normed = self._kernels.norm.rms_norm(normed, weights.query_norm, self._eps)
        flat = self._apply(normed, weights.query_b, None)
        see("query", flat)
        num_rows, heads, nope = len(positions), settings.num_heads, settings.nope_dim
        by_head = flat.reshape((num_rows, heads, settings.query_dim))
        plain, turning = self._ops.split(by_head, (nope, settings.rope_dim), 2)
        absorbed = self._ops.matmul(self._ops.transpose(plain, 0, 1), weights.expand_key)
        turned = self._rotated(turning, positions)
        return self._ops.concat([self._ops.transpose(absorbed, 0, 1), turned], 2)

    def _latent(self, normed: TensorRef, positions: Ints) -> TensorRef:
        """What is cached: `[N, 1, C+Dr]`."""
        settings = self._settings
        both = self._apply(normed, self._weights.kv_a, self._weights.kv_a_bias)
        compressed, turning = self._ops.split(both, (settings.kv_rank, settings.rope_dim), 1)
        compressed = self._kernels.norm.rms_norm(compressed, self._weights.kv_norm, self._eps)
        turned = self._rotated(turning.reshape((len(positions), 1, settings.rope_dim)), positions)
        return self._ops.concat([compressed.reshape((len(positions), 1, settings.kv_rank)), turned], 2)

    def _rotated(self, x: TensorRef, positions: Ints) -> TensorRef:
        """`[N, heads, Dr]`, rotated; adjacent pairs are first sorted into halves, alike for queries and keys."""
        num_rows, heads, dim = x.shape()
        if self._settings.interleaved:
            pairs = x.reshape((num_rows * heads, dim // 2, 2))
            x = self._ops.transpose(pairs, 1, 2)
        kernels = self._kernels
        turned = kernels.position.rotary_embedding(
            x.reshape((1, num_rows, heads, dim)), kernels.cos, kernels.sin, positions
        )
        return turned.reshape((num_rows, heads, dim))

    def _expanded(self, attended: TensorRef) -> TensorRef:
        """Mixtures of latents `[N, H, C+Dr]` -> values `[N, H*Dv]`."""
        settings = self._settings
        num_rows, heads, cached = attended.shape()
        if (heads, cached) != (settings.num_heads, settings.cached_dim):
            raise ShapeError(
                f"LatentAttention: the cache gave {attended.shape()}, "
                f"expected {(num_rows, settings.num_heads, settings.cached_dim)}"
            )
        mixed = attended.view((0, 0, 0), (num_rows, heads, settings.kv_rank))
        values = self._ops.matmul(self._ops.transpose(mixed, 0, 1), self._weights.expand_value)
        return self._ops.transpose(values, 0, 1).reshape((num_rows, heads * settings.value_dim))

    def _apply(self, x: TensorRef, weight: Weight, bias: TensorRef | None) -> TensorRef:
        y = apply_matrix(self._kernels.linear, x, weight)
        return y if bias is None else self._ops.add(y, bias)
