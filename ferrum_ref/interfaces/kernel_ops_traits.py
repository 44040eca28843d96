"""The fused operations of a language model, in six optional parts.   Clauses: KN-* in specs/kernels.md."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

from numpy.typing import NDArray

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.kernel_ops_data import AttentionParams, QuantScheme, SamplingParams
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.types.algorithm import Algorithm

Ints: TypeAlias = Sequence[int] | NDArray[Any]
"""Positions, ids, slots, block numbers: a sequence of ints or an integer ndarray."""


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
        """Rotate pair (i, i + D/2) of every head by the angle of its token's position.  [KN-ROPE-1..7]

        x (B, T, H, D); caches (P, D/2); position_ids T ints, each one indexes the caches on its own (D-15).
        Raises BackendError if len(position_ids) != T; InvalidParameterError for a position outside [0, P).
        """


class AttentionOps(ABC):
    """Attention over contiguous and over paged keys and values."""

    @abstractmethod
    def attention(
        self, q: TensorRef, k: TensorRef, v: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None
    ) -> TensorRef:
        """`softmax(scale Q K^T + mask) V`, softmax in float32.  [KN-ATTN-1..12]

        q (B, Sq, H, D), k and v (B, Skv, G, D) -> (B, Sq, H, D). Head h uses kv head h // (H/G). Causal: query i sees
        keys j <= Skv - Sq + i. A query that sees no key gives zeros. `sinks` (H,) (extension): one more logit of each
        head, neither scaled nor capped, that takes its share of the softmax and attends to nothing.
        Raises UnsupportedError where a backend has no sinks or no `params.logit_softcap` and is asked for them;
        BackendError for other shapes.
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
        sinks: TensorRef | None = None,
    ) -> TensorRef:
        """Attention of T new tokens over keys and values that lie in blocks (D-17).  [KN-PAGED-1..7]

        q (B, H, D) for T = 1 or (B, T, H, D); caches (num_blocks, block_size, G, D); block_table flat for B = 1 or
        (B, max_blocks); context_lens (B,): valid positions of each sequence, its T new ones included. Query t of
        sequence b sits at position context_lens[b] - T + t and, if causal, sees positions up to its own. Without
        context_lens every covered slot is valid. `sinks` as in `attention`. Result has q's shape.
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
        """The same product with weights that stay packed, in ggml's block layout.  [KN-QLINEAR-1..4]

        packed_weight uint8 (out, in/32 * 18) for Q4_0, (out, in/32 * 34) for Q8_0. Raises UnsupportedError (this
        default body; elsewhere for a group size other than 32); BackendError for other shapes.
        """
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
        """Penalty, temperature, top-k, top-p, draw, in this order (D-18).  [KN-SAMPLE-1..10]

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
