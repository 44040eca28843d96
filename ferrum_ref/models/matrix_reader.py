"""Reads a checkpoint's tensors onto a backend: dense, or as they are packed in the file.

    reader = MatrixReader(checkpoint, backend, DataType.FP32, packed=True)
    qkv = reader.stacked(["….q_proj.weight", "….k_proj.weight", "….v_proj.weight"])
    norm = reader.tensor("model.norm.weight")

Clauses: MD-PACK-1, MD-PACK-4 (specs/model_files.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.quant_schemes import QuantScheme
from ferrum_ref.interfaces.tensor import TensorFactory, TensorRef
from ferrum_ref.kernels.quant_matrix import AwqMatrix, Fp8Matrix, GptqMatrix, GroupMatrix, QuantMatrix, RowMatrix
from ferrum_ref.models.finite import require_finite
from ferrum_ref.models.matrix import PackedPart, PackedWeight, Weight
from ferrum_ref.types.devices import DataType

Array = npt.NDArray[Any]
_PLAIN: Final[Mapping[str, np.dtype[Any]]] = MappingProxyType(
    {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
)


class TensorSource(Protocol):
    """What is needed of a checkpoint to read it dense."""

    def read(self, name: str, dtype: Any = np.float32, out: Array | None = None) -> Array: ...


@runtime_checkable
class PackedSource(Protocol):
    """What is needed besides to leave matrices packed."""

    def packed_matrix(self, name: str) -> QuantMatrix | None:
        """The stored form of a matrix; None for a tensor of another rank."""

    def release(self, name: str) -> None:
        """The tensor's bytes are not needed for now."""


class MatrixReader:
    """Named tensors as a backend's.  Safe for concurrent calls."""

    def __init__(self, source: TensorSource, backend: ComputeBackend, dtype: DataType, packed: bool = False) -> None:
        """`packed`: matrices stay in the form their file has, where the backend's `quantized_linear` takes it.

        Raises InvalidParameterError for a dtype other than FP32, FP16 and BF16.
        """
        self._source = source
        self._factory = backend.tensor_factory()
        self._tensor_ops = backend.tensor_ops()
        self._dtype = dtype
        self._element = float_element(dtype)
        self._is_packed = packed
        self._kinds = frozenset(backend.capabilities().extra_capabilities.get("quantized_linear", []))

    def tensor(self, name: str) -> TensorRef:
        """The tensor, dense."""
        return self._factory.from_numpy(self._source.read(name, self._element))

    def stacked(self, names: Sequence[str], out: Array | None = None) -> Weight:
        """The rows of several [out, in] matrices one below the other (or vectors end to end); packed if all can be.

        `out`: memory for the dense form, of the whole shape. Dense tensors are decoded straight into it.
        [MD-PACK-1, MD-PACK-4]  Errors of the checkpoint pass through.
        Raises InvalidFormatError for a packed matrix with a NaN or an infinity.  [MD-PACK-6]
        """
        parts = [self._packed(name) for name in names] if self._is_packed else [None]
        kept = [part for part in parts if part is not None]
        if len(parts) == 1 and kept and kept[0].scheme is None:
            return kept[0].tensor
        if kept and len(kept) == len(parts):
            return PackedWeight(tuple(kept), self._dtype, self._tensor_ops, self._factory)
        if out is None and len(names) == 1:
            return self.tensor(names[0])
        if out is None:
            return self._factory.from_numpy(np.concatenate([self._source.read(name, self._element) for name in names]))
        start = 0
        for name in names:
            rows = self._rows_of(name)
            if rows is None:
                values = self._source.read(name, self._element)
                out[start : start + len(values)] = values
                rows = len(values)
            else:
                self._source.read(name, self._element, out=out[start : start + rows])
            start += rows
        return self._factory.from_numpy(out)

    def _packed(self, name: str) -> PackedPart | None:
        if not isinstance(self._source, PackedSource):
            return None
        stored = self._source.packed_matrix(name)
        if stored is None:
            return None
        if not stored.is_finite():
            require_finite(name, stored.rows(0, stored.shape[0]))
        self._source.release(name)
        if (plain := _plain(stored, np.dtype(self._element))) is not None:
            return PackedPart(self._factory.from_numpy(plain), None, stored)
        return packed_part(stored, self._factory) if stored.kind in self._kinds else None

    def _rows_of(self, name: str) -> int | None:
        tensors = getattr(self._source, "tensors", None)
        if not isinstance(tensors, Mapping) or name not in tensors:
            return None
        return int(tensors[name].shape[0])


def _plain(stored: QuantMatrix, element: np.dtype[Any]) -> Array | None:
    """The stored rows as an array, where they are numbers of this very type that a processor can read in place."""
    if not isinstance(stored, RowMatrix) or _PLAIN.get(stored.format) != element:
        return None
    values = stored.packed.view(element)
    return values if values.flags.aligned and values.flags.c_contiguous else None


def packed_part(stored: QuantMatrix, factory: TensorFactory) -> PackedPart:
    """The stored matrix as what `quantized_linear` takes; a backend on the host shares its memory.  [MD-PACK-1]

    Raises InvalidParameterError for a kind of matrix that has no scheme.
    """
    put = factory.from_numpy
    if isinstance(stored, RowMatrix):
        known = {"Q4_0": QuantScheme.Q4_0(32), "Q8_0": QuantScheme.Q8_0(32)}
        return PackedPart(put(stored.packed), known.get(stored.format, QuantScheme.Rows(stored.format)), stored)
    if isinstance(stored, GptqMatrix):
        w, g_idx = stored.weights, stored.weights.g_idx
        order = None if g_idx is None else put(g_idx)
        scheme: QuantScheme = QuantScheme.Gptq(w.bits, w.group_size, w.version, put(w.qzeros), put(w.scales), order)
        return PackedPart(put(w.qweight), scheme, stored)
    if isinstance(stored, AwqMatrix):
        awq = stored.weights
        scheme = QuantScheme.Awq(awq.group_size, put(awq.qzeros), put(awq.scales))
        return PackedPart(put(awq.qweight), scheme, stored)
    if isinstance(stored, GroupMatrix):
        groups = stored.weights
        zeros = None if groups.zeros is None else put(groups.zeros)
        return PackedPart(put(groups.quanta), QuantScheme.Groups(groups.bits, put(groups.scales), zeros), stored)
    if isinstance(stored, Fp8Matrix):
        return PackedPart(put(stored.bits), QuantScheme.Fp8(stored.format, put(stored.scale)), stored)
    raise InvalidParameterError(f"packed matrix: got {type(stored).__name__}, which no QuantScheme describes")


def float_element(dtype: DataType) -> Any:
    """The numpy element type of a float DataType. Pure.  Raises InvalidParameterError for the others."""
    if dtype is DataType.BF16:
        return ml_dtypes.bfloat16
    if dtype is DataType.FP16:
        return np.float16
    if dtype is DataType.FP32:
        return np.float32
    raise InvalidParameterError(f"MatrixReader: weights are kept as FP32, FP16 or BF16, got {dtype.name}")
