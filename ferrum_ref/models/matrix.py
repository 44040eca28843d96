"""A model's matrix as it is kept for running: a dense tensor, or the packed form of its file.

    apply_matrix(linear, x, weight)      x @ weight.T
    matrix_rows(linear, weight, ids)     weight[ids]
    weight_parts(weight)                 its parts, for a backend that reads them itself

Clauses: MD-PACK-1..4 (specs/model_files.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.kernel_ops import Ints, LinearOps
from ferrum_ref.interfaces.quant_schemes import QuantScheme
from ferrum_ref.interfaces.tensor import TensorFactory, TensorOps, TensorRef
from ferrum_ref.interfaces.weight_parts import WeightPart
from ferrum_ref.kernels.quant_matrix import QuantMatrix
from ferrum_ref.types.devices import DataType, Device


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Rows in one stored form: the tensor and scheme for `quantized_linear`, and the same rows on the host.

    `scheme` None: the rows are plain numbers of the model's own type, and `tensor` is a matrix like any other.
    """

    tensor: TensorRef
    scheme: QuantScheme | None
    stored: QuantMatrix

    def apply(self, linear: LinearOps, x: TensorRef) -> TensorRef:
        """x @ rows.T.  Pure."""
        if self.scheme is None:
            return linear.linear(x, self.tensor)
        return linear.quantized_linear(x, self.tensor, self.scheme)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix `[out, in]` whose `parts` lie one below the other, each packed as in its file.  [MD-PACK-1]

    `dtype()` is the element type of the rows that `matrix_rows` gives; products have their input's.
    """

    parts: tuple[PackedPart, ...]
    element: DataType
    tensor_ops: TensorOps
    factory: TensorFactory

    def shape(self) -> tuple[int, int]:
        """(out, in).  Pure."""
        return sum(part.stored.shape[0] for part in self.parts), self.parts[0].stored.shape[1]

    def dtype(self) -> DataType:
        return self.element

    def device(self) -> Device:
        return self.parts[0].tensor.device()

    def size_bytes(self) -> int:
        """Bytes of the packed form.  Pure."""
        return sum(part.stored.num_bytes for part in self.parts)


Weight: TypeAlias = TensorRef | PackedWeight


def apply_matrix(linear: LinearOps, x: TensorRef, weight: Weight) -> TensorRef:
    """x `[..., in]` @ weight.T -> `[..., out]`; a packed weight stays packed.  Pure.  [MD-PACK-2]

    Raises UnsupportedError where the backend has no such kernel; BackendError for other shapes.
    """
    if not isinstance(weight, PackedWeight):
        return linear.linear(x, weight)
    found = [part.apply(linear, x) for part in weight.parts]
    return found[0] if len(found) == 1 else weight.tensor_ops.concat(found, len(x.shape()) - 1)


def matrix_rows(linear: LinearOps, weight: Weight, ids: Ints) -> TensorRef:
    """weight[ids] `[T, in]`; of a packed weight only these rows are decoded, on the host.  Pure.  [MD-PACK-3]

    Raises InvalidParameterError for an id outside [0, out).
    """
    if not isinstance(weight, PackedWeight):
        return linear.embedding(weight, ids)
    rows = _host_rows([part.stored for part in weight.parts], np.asarray(ids, np.int64))
    return weight.factory.from_numpy(rows).to_dtype(weight.element)


def weight_parts(weight: Weight) -> tuple[WeightPart, ...]:
    """The tensors themselves, part below part; a dense matrix is one.  Pure.  [TW-PARTS-1]"""
    if not isinstance(weight, PackedWeight):
        return (WeightPart.dense(weight),)
    return tuple(WeightPart(part.tensor, part.scheme, part.stored.shape) for part in weight.parts)


def _host_rows(parts: Sequence[QuantMatrix], ids: np.ndarray) -> np.ndarray:
    if len(parts) == 1:
        return parts[0].at(ids)
    rows = np.empty((len(ids), parts[0].shape[1]), np.float32)
    start = 0
    for part in parts:
        mine = (ids >= start) & (ids < start + part.shape[0])
        rows[mine] = part.at(ids[mine] - start)
        start += part.shape[0]
    if len(outside := ids[(ids < 0) | (ids >= start)]):
        raise InvalidParameterError(f"packed rows: id {int(outside[0])}, expected 0 <= id < {start}")
    return rows
