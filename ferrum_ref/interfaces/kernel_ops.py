"""The fused operations of a language model, in six optional parts, and a dispatcher that falls back to TensorOps.

Upstream: `ferrum_interfaces::kernel_ops`, with documented extensions: `write_kv`, `embedding`, `context_lens`,
`sliding_window`, `declared_algorithm`. Dims: B batch, T new tokens, S cached positions, H query heads, G kv heads,
D head size, E hidden size, V vocabulary.  Clauses: KN-* in specs/kernels.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, UnsupportedError
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef
from ferrum_ref.types.algorithm import Algorithm

Ints: TypeAlias = Sequence[int] | NDArray[Any]
"""Positions, ids, slots, block numbers: a sequence of ints or an integer ndarray."""


@dataclass(frozen=True, slots=True)
class RoPEConfig:
    """Parameters of a rotary table.  [KN-PARAMS-1]

    Raises BackendError unless head_dim is even and positive, max_seq_len >= 0 and theta > 0.
    """

    head_dim: int
    max_seq_len: int
    theta: float

    def __post_init__(self) -> None:
        if self.head_dim <= 0 or self.head_dim % 2:
            raise BackendError(f"RoPEConfig: head_dim is {self.head_dim}, expected an even number above 0")
        if self.max_seq_len < 0:
            raise BackendError(f"RoPEConfig: max_seq_len is {self.max_seq_len}, expected at least 0")
        if not self.theta > 0:
            raise BackendError(f"RoPEConfig: theta is {self.theta}, expected a number above 0 (usually 10000)")


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What one attention call needs beside its tensors.  [KN-PARAMS-2]

    `softmax_scale` multiplies Q K^T and is honoured whatever it is (D-52). `sliding_window` (extension) w > 0 limits a
    causal query at position p to the keys p-w+1 .. p; 0 is off; a backend without windows raises UnsupportedError.
    Raises BackendError unless num_kv_heads divides num_heads and all counts are positive.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    causal: bool
    sliding_window: int = 0

    def __post_init__(self) -> None:
        if self.num_heads <= 0 or self.num_kv_heads <= 0 or self.head_dim <= 0:
            raise BackendError(
                f"AttentionParams: num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
                f"head_dim={self.head_dim}; expected all above 0"
            )
        if self.num_heads % self.num_kv_heads:
            raise BackendError(
                f"AttentionParams: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.sliding_window < 0 or (self.sliding_window and not self.causal):
            raise BackendError(
                f"AttentionParams: sliding_window={self.sliding_window} with causal={self.causal}; "
                "expected 0, or a positive window together with causal=True"
            )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """A sampling request for the device; alias KernelSamplingParams. Domains are checked by `sample_token`."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    repetition_token_ids: list[int]
    repetition_token_freqs: list[int]
    rng_seed: int


KernelSamplingParams: TypeAlias = SamplingParams


class QuantScheme:
    """How packed weights are laid out: `QuantScheme.Q4_0(group_size=32)` or `QuantScheme.Q8_0(group_size=32)`."""

    __slots__ = ()

    Q4_0: ClassVar[type[QuantQ4_0]]
    Q8_0: ClassVar[type[QuantQ8_0]]


@dataclass(frozen=True, slots=True)
class QuantQ4_0(QuantScheme):
    """4 bits a weight, one scale for `group_size` weights (32 in ggml)."""

    group_size: int


@dataclass(frozen=True, slots=True)
class QuantQ8_0(QuantScheme):
    """8 bits a weight, one scale for `group_size` weights (32 in ggml)."""

    group_size: int


QuantScheme.Q4_0 = QuantQ4_0
QuantScheme.Q8_0 = QuantQ8_0


class NormOps(ABC):
    """Normalisations over the last axis."""

    @abstractmethod
    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> TensorRef:
        """`x / sqrt(mean(x**2) + eps) * weight`, accumulated in float32.  [KN-RMSNORM-1..4]

        input (..., E), weight (E,). Raises BackendError for other shapes.
        """

    def rms_norm_residual(
        self, input: TensorRef, residual: TensorRef, weight: TensorRef, eps: float
    ) -> tuple[TensorRef, TensorRef]:
        """`(rms_norm(r), r)` with `r = input + residual` (D-16).  [KN-RMSNORM-5..6]

        This default adds with the tensors' own `+` (so r is rounded to its storage type before the norm).
        Raises UnsupportedError if the tensor class has no `+`; KernelOpsDispatch then adds through TensorOps.
        """
        add = getattr(input, "__add__", None)
        total: Any = NotImplemented if add is None else add(residual)
        if total is NotImplemented:
            raise UnsupportedError(
                f"rms_norm_residual: {type(input).__name__} has no '+'; "
                "implement rms_norm_residual in the backend or call KernelOpsDispatch.rms_norm_residual"
            )
        return self.rms_norm(total, weight, eps), total


class PositionOps(ABC):
    """Rotary position embedding."""

    @abstractmethod
    def rotary_embedding(
        self, x: TensorRef, cos_cache: TensorRef, sin_cache: TensorRef, position_ids: Ints
    ) -> TensorRef:
        """Rotate pair (i, i + D/2) of every head by the angle of its token's position.  [KN-ROPE-1..5]

        x (B, T, H, D); caches (P, D/2); position_ids T ints, each one indexes the caches on its own (D-15).
        Raises BackendError if len(position_ids) != T; InvalidParameterError for a position outside [0, P).
        """


class AttentionOps(ABC):
    """Attention over contiguous and over paged keys and values."""

    @abstractmethod
    def attention(self, q: TensorRef, k: TensorRef, v: TensorRef, params: AttentionParams) -> TensorRef:
        """`softmax(scale Q K^T + mask) V`, softmax in float32.  [KN-ATTN-1..8]

        q (B, Sq, H, D), k and v (B, Skv, G, D) -> (B, Sq, H, D). Head h uses kv head h // (H/G). Causal: query i sees
        keys j <= Skv - Sq + i. A query that sees no key gives zeros.
        """

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
        """Attention of T new tokens over keys and values that lie in blocks (D-17).  [KN-PAGED-1..7]

        q (B, H, D) for T = 1 or (B, T, H, D); caches (num_blocks, block_size, G, D); block_table flat for B = 1 or
        (B, max_blocks); context_lens (B,): valid positions of each sequence, its T new ones included. Query t of
        sequence b sits at position context_lens[b] - T + t and, if causal, sees positions up to its own. Without
        context_lens every covered slot is valid. Result has q's shape.
        Raises UnsupportedError (this default body); BackendError for bad shapes, tables and lengths.
        """
        raise UnsupportedError("paged_attention: this backend has none; gather the blocks and call attention")

    def write_kv(self, cache: TensorRef, rows: TensorRef, slots: Ints) -> None:
        """`cache[slots[t]] = rows[t]`, in place: the one mutating operation (extension).  [KN-WRITEKV-1..3]

        cache (..., G, D) seen as (N, G, D); rows (T, G, D); slots T ints. A negative slot skips its row; of equal
        slots the last row stays. Raises UnsupportedError (this default body); BackendError, before anything is
        written, if a slot is N or more or shapes or element types differ.
        """
        raise UnsupportedError("write_kv: this backend has none; it cannot hold a key/value cache")


class ActivationOps(ABC):
    """Activations."""

    @abstractmethod
    def silu_mul(self, gate: TensorRef, up: TensorRef) -> TensorRef:
        """`gate * sigmoid(gate) * up`, equal shapes.  [KN-SILU-1..3]"""

    @abstractmethod
    def gelu(self, input: TensorRef) -> TensorRef:
        """`x * Phi(x)`, the exact erf form (D-14).  [KN-GELU-1..3]"""


class LinearOps(ABC):
    """Projections and the embedding table."""

    @abstractmethod
    def linear(self, input: TensorRef, weight: TensorRef) -> TensorRef:
        """`input @ weight.T`; input (..., in) of any rank >= 1, weight (out, in) -> (..., out).  [KN-LINEAR-1..3]"""

    def quantized_linear(self, input: TensorRef, packed_weight: TensorRef, scheme: QuantScheme) -> TensorRef:
        """The same product with weights packed as `scheme` says. Raises UnsupportedError (this default body)."""
        raise UnsupportedError(f"quantized_linear: this backend has none ({scheme}); dequantise and call linear")

    def embedding(self, table: TensorRef, ids: Ints) -> TensorRef:
        """Rows `table[ids]`: table (V, E), ids T ints -> (T, E) (extension).  [KN-EMBED-1..2]

        Raises UnsupportedError (this default body); InvalidParameterError for an id outside [0, V).
        """
        raise UnsupportedError("embedding: this backend has none; it cannot look up token rows")


class SamplingOps(ABC):
    """Choosing a token on the device."""

    @abstractmethod
    def sample_token(self, logits: TensorRef, params: SamplingParams) -> int:
        """Penalty, temperature, top-k, top-p, draw, in this order (D-18).  [KN-SAMPLE-1..8]

        logits (V,) or (1, V). Raises InvalidParameterError for a parameter outside its domain; BackendError for NaN,
        +inf, or no candidate.
        """

    @abstractmethod
    def argmax(self, logits: TensorRef) -> int:
        """Index of the first maximum.  [KN-ARGMAX-1..2]

        logits (V,) or (1, V). Raises BackendError for an empty row, a NaN, or -inf everywhere.
        """


class KernelOps(ABC):
    """The six parts; each is None where the backend offers nothing."""

    @abstractmethod
    def backend_name(self) -> str:
        """Whose kernels these are, e.g. "numpy"."""

    def norm_ops(self) -> NormOps | None:
        return None

    def position_ops(self) -> PositionOps | None:
        return None

    def attention_ops(self) -> AttentionOps | None:
        return None

    def activation_ops(self) -> ActivationOps | None:
        return None

    def linear_ops(self) -> LinearOps | None:
        return None

    def sampling_ops(self) -> SamplingOps | None:
        return None

    def declared_algorithm(self, op: str) -> Algorithm:
        """How this backend computes operation `op`; the parity judge derives its bound from it (extension).

        The default is float32 accumulation in any order that a sequential bound covers.  [KN-DISPATCH-4]
        """
        return Algorithm()


class KernelOpsDispatch:
    """Takes KernelOps where there are some, and TensorOps otherwise.  [KN-DISPATCH-1..3]"""

    __slots__ = ("_kernel_ops", "_tensor_ops")

    def __init__(self, kernel_ops: KernelOps | None, tensor_ops: TensorOps) -> None:
        self._kernel_ops = kernel_ops
        self._tensor_ops = tensor_ops

    @classmethod
    def new(cls, kernel_ops: KernelOps | None, tensor_ops: TensorOps) -> KernelOpsDispatch:
        """Upstream's constructor."""
        return cls(kernel_ops, tensor_ops)

    def kernel_ops(self) -> KernelOps | None:
        return self._kernel_ops

    def tensor_ops(self) -> TensorOps:
        return self._tensor_ops

    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> TensorRef:
        """NormOps.rms_norm, else TensorOps.rms_norm."""
        part = self._kernel_ops.norm_ops() if self._kernel_ops else None
        return (part or self._tensor_ops).rms_norm(input, weight, eps)

    def rms_norm_residual(
        self, input: TensorRef, residual: TensorRef, weight: TensorRef, eps: float
    ) -> tuple[TensorRef, TensorRef]:
        """NormOps.rms_norm_residual, else add and norm through TensorOps (extension, D-16)."""
        part = self._kernel_ops.norm_ops() if self._kernel_ops else None
        if part is not None:
            try:
                return part.rms_norm_residual(input, residual, weight, eps)
            except UnsupportedError:
                pass  # the part has the norm only: add below
        total = self._tensor_ops.add(input, residual)
        return self.rms_norm(total, weight, eps), total

    def gelu(self, input: TensorRef) -> TensorRef:
        """ActivationOps.gelu, else TensorOps.gelu."""
        part = self._kernel_ops.activation_ops() if self._kernel_ops else None
        return (part or self._tensor_ops).gelu(input)

    def silu(self, input: TensorRef) -> TensorRef:
        """Always TensorOps.silu."""
        return self._tensor_ops.silu(input)

    def silu_mul(self, gate: TensorRef, up: TensorRef) -> TensorRef:
        """ActivationOps.silu_mul, else `mul(silu(gate), up)`."""
        part = self._kernel_ops.activation_ops() if self._kernel_ops else None
        if part is not None:
            return part.silu_mul(gate, up)
        return self._tensor_ops.mul(self._tensor_ops.silu(gate), up)

    def linear(self, input: TensorRef, weight: TensorRef) -> TensorRef:
        """LinearOps.linear, else `matmul(input, transpose(weight))`: the same product on both paths (D-01)."""
        part = self._kernel_ops.linear_ops() if self._kernel_ops else None
        if part is not None:
            return part.linear(input, weight)
        rank = weight.ndim()
        if rank < 2 or input.ndim() < 1:
            raise BackendError(
                f"linear: input {input.shape()} and weight {weight.shape()}; expected (..., in) and (out, in)"
            )
        ops = self._tensor_ops
        transposed = ops.transpose(weight, rank - 2, rank - 1)
        if input.ndim() > 1:
            return ops.matmul(input, transposed)
        row = ops.matmul(input.reshape((1, *input.shape())), transposed)
        return row.reshape((*row.shape()[:-2], row.shape()[-1]))

    def softmax(self, input: TensorRef, dim: int) -> TensorRef:
        """Always TensorOps.softmax."""
        return self._tensor_ops.softmax(input, dim)
