"""Primitive mathematics on tensors, one at a time, awaited, and over lists.

Clauses: TN-OPS-*, TN-ASYNC-*, TN-BATCH-* in specs/tensor.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ferrum_ref.interfaces.tensor_like import Shape, TensorRef


class TensorOps(ABC):
    """Primitive mathematics. Axes count from 0; only `softmax` takes negative ones.  [TN-OPS-1..11]

    Bad shapes raise BackendError. NaN and infinities follow IEEE 754, without warnings.
    """

    @abstractmethod
    def matmul(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """`a @ b`: `[.., m, k] x [.., k, n] -> [.., m, n]`, leading axes broadcast, ranks at least 2."""

    @abstractmethod
    def add(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """`a + b`, broadcast (D-51)."""

    @abstractmethod
    def sub(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """`a - b`, broadcast."""

    @abstractmethod
    def mul(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """`a * b`, broadcast."""

    @abstractmethod
    def div(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """`a / b`, broadcast; division by zero gives inf or NaN."""

    @abstractmethod
    def softmax(self, tensor: TensorRef, dim: int) -> TensorRef:
        """`exp(x - max) / sum(exp(x - max))` along `dim`; a lane of -inf only gives NaN."""

    @abstractmethod
    def layer_norm(self, input: TensorRef, weight: TensorRef, bias: TensorRef | None, eps: float) -> TensorRef:
        """`(x - mean) / sqrt(var + eps) * weight + bias` over the last axis, biased variance; no bias means 0."""

    @abstractmethod
    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> TensorRef:
        """`x / sqrt(mean(x**2) + eps) * weight` over the last axis."""

    @abstractmethod
    def relu(self, tensor: TensorRef) -> TensorRef:
        """`max(x, 0)`; NaN stays NaN."""

    @abstractmethod
    def gelu(self, tensor: TensorRef, *, approximate: str = "none") -> TensorRef:
        """`x * Phi(x)`, the erf form; `approximate="tanh"` (extension) gives the tanh form (D-14)."""

    @abstractmethod
    def silu(self, tensor: TensorRef) -> TensorRef:
        """`x * sigmoid(x)`."""

    @abstractmethod
    def concat(self, tensors: Sequence[TensorRef], dim: int) -> TensorRef:
        """Joined along an existing axis. Raises BackendError for an empty list or other dims that differ."""

    @abstractmethod
    def split(self, tensor: TensorRef, sizes: Sequence[int], dim: int) -> list[TensorRef]:
        """Consecutive pieces along `dim`. Raises BackendError unless the sizes sum to the axis length (D-51)."""

    @abstractmethod
    def transpose(self, tensor: TensorRef, dim0: int, dim1: int) -> TensorRef:
        """Two axes swapped, sharing storage."""

    @abstractmethod
    def permute(self, tensor: TensorRef, dims: Sequence[int]) -> TensorRef:
        """All axes reordered, sharing storage. Raises BackendError unless `dims` is a permutation."""


class AsyncTensorOps(TensorOps):
    """Operations that may be awaited. They run in the order in which they were started.  [TN-ASYNC-1..4]"""

    @abstractmethod
    async def matmul_async(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """As `matmul`: the same value, the same errors, raised where it is awaited.  [TN-ASYNC-1]"""

    @abstractmethod
    async def softmax_async(self, tensor: TensorRef, dim: int) -> TensorRef:
        """As `softmax`.  [TN-ASYNC-1]"""

    @abstractmethod
    async def synchronize(self) -> None:
        """Return when everything that was started before is done. Raises nothing of theirs.  [TN-ASYNC-3]"""


class TensorBatchOps(ABC):
    """Operations over lists of tensors; every result but those of `unstack` is a new tensor.  [TN-BATCH-1..4]"""

    @abstractmethod
    def batch_matmul(self, a_batch: Sequence[TensorRef], b_batch: Sequence[TensorRef]) -> list[TensorRef]:
        """`[matmul(a, b) for each pair]`.  [TN-BATCH-1]

        Raises InvalidParameterError for lists of different length; BackendError as `matmul`, naming the pair.
        """

    @abstractmethod
    def stack(self, tensors: Sequence[TensorRef], dim: int) -> TensorRef:
        """A new axis at `dim`, 0 <= dim <= rank, one entry for each tensor.  [TN-BATCH-2]

        Raises BackendError for an empty list, shapes that differ, or another `dim`.
        """

    @abstractmethod
    def unstack(self, tensor: TensorRef, dim: int) -> list[TensorRef]:
        """One tensor for each index of axis `dim`, the axis removed, storage shared.  [TN-BATCH-3]

        Raises BackendError for an axis outside the rank.
        """

    @abstractmethod
    def pad_batch(self, tensors: Sequence[TensorRef], target_shape: Shape) -> list[TensorRef]:
        """Each tensor grown to `target_shape` with zeros at the end of every axis.  [TN-BATCH-4]

        Raises BackendError for another rank or a dim above the target's.
        """
