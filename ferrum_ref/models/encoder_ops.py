"""What every bidirectional encoder does, over a backend's operations: projections, norms, attention of whole sequences.

Clauses: FM-ENCODER-1..2 (specs/families.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionOps, AttentionParams, Ints, LinearOps
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef


@dataclass(frozen=True, slots=True)
class Affine:
    """y = x W^T + b: weight `[out, in]`, bias `[out]` or None."""

    weight: TensorRef
    bias: TensorRef | None


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm: weight `[E]`, bias `[E]` or None."""

    weight: TensorRef
    bias: TensorRef | None
    eps: float


class EncoderOps:
    """Stateless; one for each encoder."""

    def __init__(self, backend: ComputeBackend, owner: str) -> None:
        """Raises UnsupportedError if the backend lacks attention or linear kernels; `owner` is named in it."""
        kernels = backend.kernel_ops()
        attention = None if kernels is None else kernels.attention_ops()
        linear = None if kernels is None else kernels.linear_ops()
        if attention is None or linear is None:
            lacking = "linear" if linear is None else "attention"
            raise UnsupportedError(f"{owner}: backend {backend.name()!r} offers no {lacking} kernels; choose another")
        self.attention: AttentionOps = attention
        self._linear: LinearOps = linear
        self.tensor: TensorOps = backend.tensor_ops()

    def gather(self, table: TensorRef, rows: Ints) -> TensorRef:
        """Rows of `[N, E]` by number. Pure."""
        return self._linear.embedding(table, rows)

    def affine(self, x: TensorRef, part: Affine) -> TensorRef:
        """`[N, in]` -> `[N, out]`. Pure."""
        y = self._linear.linear(x, part.weight)
        return y if part.bias is None else self.tensor.add(y, part.bias)

    def norm(self, x: TensorRef, part: Norm) -> TensorRef:
        """Layer norm over the last axis. Pure."""
        return self.tensor.layer_norm(x, part.weight, part.bias, part.eps)

    def attend(self, qkv: TensorRef, lengths: Sequence[int], num_heads: int) -> TensorRef:
        """Each row attends to every row of its own sequence.  Pure.  [FM-ENCODER-1..2]

        qkv `[N, 3E]`: q, k, v side by side; sequence i owns the next lengths[i] rows -> `[N, E]`. Neighbours of equal
        length share one call; nothing is padded.
        """
        num_rows, width = qkv.shape()
        head_dim = width // (3 * num_heads)
        params = AttentionParams(num_heads, num_heads, head_dim, head_dim**-0.5, causal=False)
        by_head = qkv.reshape((num_rows, 3 * num_heads, head_dim))
        parts = []
        for start, count, length in _runs(lengths):
            rows = by_head.view((start, 0, 0), (start + count * length, 3 * num_heads, head_dim))
            rows = rows.reshape((count, length, 3 * num_heads, head_dim))
            q, k, v = (
                rows.view((0, 0, first, 0), (count, length, first + num_heads, head_dim))
                for first in (0, num_heads, 2 * num_heads)
            )
            attended = self.attention.attention(q, k, v, params)
            parts.append(attended.reshape((count * length, num_heads * head_dim)))
        return parts[0] if len(parts) == 1 else self.tensor.concat(parts, 0)


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first row, number of sequences, their length) of each run of equal lengths."""
    start = 0
    for length, run in groupby(lengths):
        count = len(list(run))
        yield start, count, length
        start += count * length
