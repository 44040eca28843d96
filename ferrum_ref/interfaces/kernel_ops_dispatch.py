"""One place to call: fused kernels where a backend has them, primitive operations where not.

Clauses: KN-DISPATCH-* in specs/kernels.md.
"""

from __future__ import annotations

from ferrum_ref.errors import BackendError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops_traits import KernelOps
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef
from ferrum_ref.types.parity_mode import ParityMode


class KernelOpsDispatch:
    """Takes KernelOps where there are some, and TensorOps otherwise.  [KN-DISPATCH-1..5]

    `parity_mode` UPSTREAM: the fallback of `linear` does not transpose the weight (D-01).
    """

    __slots__ = ("_kernel_ops", "_parity_mode", "_tensor_ops")

    def __init__(
        self,
        kernel_ops: KernelOps | None,
        tensor_ops: TensorOps,
        *,
        parity_mode: ParityMode = ParityMode.REFERENCE,
    ) -> None:
        self._kernel_ops = kernel_ops
        self._tensor_ops = tensor_ops
        self._parity_mode = parity_mode

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
        """LinearOps.linear, else `matmul(input, transpose(weight))`: the same product on both paths (D-01).

        UPSTREAM: the fallback is `matmul(input, weight)`, a wrong result for square weights, BackendError for others.
        """
        part = self._kernel_ops.linear_ops() if self._kernel_ops else None
        if part is not None:
            return part.linear(input, weight)
        rank = weight.ndim()
        if rank < 2 or input.ndim() < 1:
            raise BackendError(
                f"linear: input {input.shape()} and weight {weight.shape()}; expected (..., in) and (out, in)"
            )
        ops = self._tensor_ops
        if self._parity_mode is ParityMode.UPSTREAM:
            return ops.matmul(input, weight)
        transposed = ops.transpose(weight, rank - 2, rank - 1)
        if input.ndim() > 1:
            return ops.matmul(input, transposed)
        row = ops.matmul(input.reshape((1, *input.shape())), transposed)
        return row.reshape((*row.shape()[:-2], row.shape()[-1]))

    def softmax(self, input: TensorRef, dim: int) -> TensorRef:
        """Always TensorOps.softmax."""
        return self._tensor_ops.softmax(input, dim)
