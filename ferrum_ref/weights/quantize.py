"""Rounding weights to what a quantisation scheme can represent.

    INT8 symmetric  s = max|x| / 127, q = rint(x / s), value q * s
    INT8 affine     s = (hi - lo) / 255, z = rint(-lo / s), q = clip(rint(x / s) + z, 0..255), value (q - z) * s
    INT4            per group: e the element of largest |x|, d = e / -8, q = min(trunc(x / d + 8.5), 15),
                    value (q - 8) * float16(d): ggml's Q4_0 for any group size
    FP8             x rounded to E4M3FN or E5M2, saturating at 448 or 57344
    GPTQ, AWQ       per group: the affine grid of `bits` bits between min(x, 0) and max(x, 0), round to nearest

lo = min(0, min x), hi = max(0, max x); rint ties to even; all arithmetic in float32.  Groups lie along the last axis.
GPTQ's and AWQ's own procedures move the rounding error according to activations, which a loader does not have; with
none (the identity as Hessian, equal activations) they are round-to-nearest, which is what is done here.
Clauses: WL-QUANT-1..7.
Source: ONNX DynamicQuantizeLinear; ggml quantize_row_q4_0_ref; Frantar et al. 2022; Lin et al. 2023.
"""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ModelError, UnsupportedError
from ferrum_ref.formats.elements import Array
from ferrum_ref.interfaces.weights import QuantizationConfig
from ferrum_ref.kernels.quant import encode
from ferrum_ref.types.devices import DataType

Float32 = NDArray[np.float32]
_AWQ_GROUP: Final = 128
_FP8_MAX: Final = 448.0
_E5M2_MAX: Final = 57344.0


def quantized(values: Float32, config: QuantizationConfig, wanted: DataType | None, what: str) -> Array:
    """Values on the scheme's grid as float32, or its codes where `wanted` is its code type.  Pure.  [WL-QUANT-1..7]

    `wanted` is the final type when this is the last step, else None. Codes: INT8 for INT8 symmetric, UINT8 for INT8
    affine, INT4 for INT4, UINT8 for INT4 with group_size 32 (ggml's Q4_0 blocks, row by row); all else gets values.
    Raises ModelError for NaN, infinity or a last axis that is not whole groups; InvalidParameterError and
    UnsupportedError for a setting that no scheme has.
    """
    if not isinstance(config, QuantizationConfig.FP8) and not np.isfinite(values).all():
        raise ModelError(f"{what}: Quantize: got NaN or infinity, expected finite numbers")
    if isinstance(config, QuantizationConfig.INT8):
        return _int8_symmetric(values, wanted) if config.symmetric else _int8_affine(values, wanted)
    if isinstance(config, QuantizationConfig.INT4):
        return _int4(values, config.group_size, wanted, what)
    if isinstance(config, QuantizationConfig.FP8):
        return _fp8(values, config.e4m3)
    if isinstance(config, QuantizationConfig.GPTQ):
        _check_bits(config.bits, what)
        return _grid(_grouped(values, config.group_size, what), config.bits, True).reshape(values.shape)
    if isinstance(config, QuantizationConfig.AWQ):
        _check_bits(config.bits, what)
        return _grid(_grouped(values, _AWQ_GROUP, what), config.bits, config.zero_point).reshape(values.shape)
    raise UnsupportedError(f"{what}: Quantize: got {type(config).__name__}, expected INT8, INT4, FP8, GPTQ or AWQ")


def _int8_symmetric(values: Float32, wanted: DataType | None) -> Array:
    scale = np.float32(np.abs(values).max(initial=0)) / np.float32(127)
    codes = np.clip(np.rint(_divided(values, scale)), -127, 127)
    if wanted == DataType.INT8:
        int8: Array = codes.astype(np.int8)
        return int8
    grid: Float32 = codes * scale
    return grid


def _int8_affine(values: Float32, wanted: DataType | None) -> Array:
    low, high = np.float32(values.min(initial=0)), np.float32(values.max(initial=0))
    scale = (high - low) / np.float32(255)
    zero = np.clip(np.rint(_divided(-low, scale)), 0, 255)
    codes = np.clip(np.rint(_divided(values, scale)) + zero, 0, 255)
    if wanted == DataType.UINT8:
        uint8: Array = codes.astype(np.uint8)
        return uint8
    grid: Float32 = (codes - zero) * scale
    return grid


def _int4(values: Float32, group_size: int, wanted: DataType | None, what: str) -> Array:
    groups = _grouped(values, group_size, what)
    if wanted == DataType.UINT8 and group_size == 32:
        return encode("Q4_0", values)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    scale = extreme / np.float32(-8)
    codes = np.clip(np.trunc(_divided(np.float32(1), scale) * groups + np.float32(8.5)), 0, 15) - np.float32(8)
    if wanted == DataType.INT4:
        int4: Array = codes.astype(np.int8).astype(ml_dtypes.int4)
        return int4.reshape(values.shape)
    with np.errstate(over="ignore", under="ignore"):
        stored = scale.astype(np.float16).astype(np.float32)
    if not np.isfinite(stored).all():
        raise ModelError(f"{what}: Quantize: got a group scale of {np.abs(scale).max():g}, expected at most 65504")
    grid: Float32 = codes * stored
    return grid.reshape(values.shape)


def _fp8(values: Float32, e4m3: bool) -> Array:
    kind, most = (ml_dtypes.float8_e4m3fn, _FP8_MAX) if e4m3 else (ml_dtypes.float8_e5m2, _E5M2_MAX)
    return np.clip(values, -most, most).astype(kind).astype(np.float32, copy=False)


def _grid(groups: Float32, bits: int, has_zero: bool) -> Float32:
    """Round to nearest on an affine grid, or a symmetric one of two's complement."""
    most = np.float32(2**bits - 1)
    if not has_zero:
        high = np.float32(2 ** (bits - 1) - 1)
        scale = np.abs(groups).max(axis=-1, keepdims=True) / high
        symmetric: Float32 = np.clip(np.rint(_divided(groups, scale)), -high - 1, high) * scale
        return symmetric
    low = groups.min(axis=-1, keepdims=True, initial=0)
    scale = (groups.max(axis=-1, keepdims=True, initial=0) - low) / most
    zero = np.clip(np.rint(_divided(-low, scale)), 0, most)
    affine: Float32 = (np.clip(np.rint(_divided(groups, scale)) + zero, 0, most) - zero) * scale
    return affine


def _grouped(values: Float32, group_size: int, what: str) -> Float32:
    if group_size == 0:
        raise InvalidParameterError(f"{what}: Quantize: group_size: got 0, expected at least 1")
    if values.ndim == 0 or values.shape[-1] % group_size:
        expected = f"a last axis that is a multiple of {group_size}"
        raise ModelError(f"{what}: Quantize: got shape {list(values.shape)}, expected {expected}")
    return values.reshape(*values.shape[:-1], values.shape[-1] // group_size, group_size)


def _check_bits(bits: int, what: str) -> None:
    if bits not in (2, 3, 4, 8):
        raise InvalidParameterError(f"{what}: Quantize: bits: got {bits}, expected 2, 3, 4 or 8")


def _divided(values: Float32 | np.float32, scale: Float32 | np.float32) -> Float32:
    """values / scale, and 0 where the scale is 0 or the quotient is no float32."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.asarray(np.divide(values, scale), np.float32)
    return np.where(np.isfinite(quotient), quotient, np.float32(0))
