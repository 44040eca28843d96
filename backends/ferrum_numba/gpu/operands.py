"""Operands of an operation: this backend's own tensors, of fitting float types.   Clause: BK-NCUDA-18."""

from __future__ import annotations

from ferrum_numba.gpu.casting import cast_float
from ferrum_numba.gpu.runtime import Runtime
from ferrum_numba.gpu.storage import storage_of
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_ref.errors import BackendError
from ferrum_ref.types.devices import DataType


def take(runtime: Runtime, operation: str, argument: str, tensor: object) -> NumbaTensor:
    """The first operand of an operation, which is counted. Raises BackendError after shutdown and for another backend's
    tensor."""
    runtime.begin(operation)
    return beside(runtime, operation, argument, tensor)


def beside(runtime: Runtime, operation: str, argument: str, tensor: object) -> NumbaTensor:
    """A further operand. Raises BackendError for a tensor of another backend, or of another device."""
    if not isinstance(tensor, NumbaTensor):
        raise BackendError(
            f"{operation}: {argument}: got {type(tensor).__name__}, expected a tensor of the numba-cuda backend; "
            "convert it with tensor_factory().from_numpy(tensor.to_numpy())"
        )
    if tensor.runtime.machine.device != runtime.machine.device:
        raise BackendError(
            f"{operation}: {argument}: is on {tensor.device()}, expected {runtime.machine.device}, "
            "the device of this backend; hand over to_numpy()"
        )
    return tensor


def fitting(operation: str, x: NumbaTensor, weight: NumbaTensor) -> NumbaTensor:
    """`weight` in x's type, or in fp32 where they differ, which is exact. Raises BackendError for operands that are no
    floats."""
    storage_of(x.dtype(), operation)
    storage_of(weight.dtype(), operation)
    return weight if weight.dtype() is x.dtype() else cast_float(weight, DataType.FP32)
