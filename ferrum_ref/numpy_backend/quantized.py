"""A packed tensor and its scheme as the kernels' packed matrix.   Clauses: QT-SCHEME-1..2, QT-MATRIX-3."""

from __future__ import annotations

from ferrum_ref.errors import ShapeError, UnsupportedError
from ferrum_ref.interfaces.quant_schemes import QuantAwq, QuantFp8, QuantGptq, QuantGroups, QuantRows, QuantScheme
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kernels.quant import FORMATS
from ferrum_ref.kernels.quant_awq import AwqWeights
from ferrum_ref.kernels.quant_gptq import GptqWeights
from ferrum_ref.kernels.quant_groups import GroupWeights
from ferrum_ref.kernels.quant_matrix import AwqMatrix, Fp8Matrix, GptqMatrix, GroupMatrix, QuantMatrix, RowMatrix
from ferrum_ref.kernels.rounding import Array
from ferrum_ref.numpy_backend.tensor import array_of

KINDS = (*(name.lower() for name in FORMATS), "gptq", "awq", "int8", "int4", "fp8")
_NAME = "quantized_linear"


def matrix_of(packed_weight: TensorRef, scheme: QuantScheme) -> QuantMatrix:
    """The packed matrix that a tensor of this scheme is; shares its memory. Pure.

    Raises UnsupportedError for a scheme or format that is none of KINDS; BackendError where the tensors do not fit.
    """
    if isinstance(scheme, QuantRows):
        return RowMatrix(array_of(_NAME, packed_weight), scheme.format)
    packed = _matrix("packed_weight", packed_weight)
    if isinstance(scheme, QuantGptq):
        g_idx = None if scheme.g_idx is None else array_of(_NAME, scheme.g_idx)
        zeros, scales = _matrix("qzeros", scheme.qzeros), _matrix("scales", scheme.scales)
        return GptqMatrix(GptqWeights(packed, zeros, scales, g_idx, scheme.bits, scheme.group_size, scheme.version))
    if isinstance(scheme, QuantAwq):
        zeros, scales = _matrix("qzeros", scheme.qzeros), _matrix("scales", scheme.scales)
        return AwqMatrix(AwqWeights(packed, zeros, scales, scheme.group_size))
    if isinstance(scheme, QuantGroups):
        offsets = None if scheme.zeros is None else _matrix("zeros", scheme.zeros)
        scales = _matrix("scales", scheme.scales)
        return GroupMatrix(GroupWeights(packed, scales, offsets, scheme.bits, -1))
    if isinstance(scheme, QuantFp8):
        return Fp8Matrix(packed, array_of(_NAME, scheme.scale), scheme.format)
    raise UnsupportedError(f"{_NAME}: scheme {scheme!r}, expected one of the kinds {', '.join(KINDS)}")


def _matrix(part: str, tensor: TensorRef) -> Array:
    array = array_of(_NAME, tensor)
    if array.ndim != 2:
        raise ShapeError(f"{_NAME}: {part}: got {list(array.shape)}, expected a matrix")
    return array
