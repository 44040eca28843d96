"""Tensors as the contracts see them: handles that know their shape, a factory, and primitive operations.

Upstream: `ferrum_interfaces::tensor`; its names live in the `tensor_*` modules beside this one and are all found here,
those of `tensor::utils` under `tensor.utils` too. Every operation takes and returns handles (`TensorRef`); what lies
behind a handle is the backend's own affair. Where upstream leaves a point open (broadcasting, NaN), numpy's rules hold.
Clauses: TN-* in specs/tensor.md.
"""

from __future__ import annotations

from ferrum_ref.interfaces import tensor_shapes as utils
from ferrum_ref.interfaces.tensor_factory import TensorFactory
from ferrum_ref.interfaces.tensor_like import Array, Shape, TensorLike, TensorRef, last_row_f32
from ferrum_ref.interfaces.tensor_memory import (
    Fp8Format,
    TensorDataAccess,
    TensorLayout,
    TensorMemoryManager,
    TensorMemoryStats,
)
from ferrum_ref.interfaces.tensor_ops import AsyncTensorOps, TensorBatchOps, TensorOps
from ferrum_ref.interfaces.tensor_shapes import are_broadcastable, broadcast_shapes, matmul_output_shape

__all__ = [
    "Array",
    "AsyncTensorOps",
    "Fp8Format",
    "Shape",
    "TensorBatchOps",
    "TensorDataAccess",
    "TensorFactory",
    "TensorLayout",
    "TensorLike",
    "TensorMemoryManager",
    "TensorMemoryStats",
    "TensorOps",
    "TensorRef",
    "are_broadcastable",
    "broadcast_shapes",
    "last_row_f32",
    "matmul_output_shape",
    "utils",
]
