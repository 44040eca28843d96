"""Normalisations over the last axis and softmax.   Clause: BK-NCUDA-8 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

import math

import numpy as np

from ferrum_numba.gpu.casting import cast_float
from ferrum_numba.gpu.kernels import norm
from ferrum_numba.gpu.kernels import softmax as softmax_kernel
from ferrum_numba.gpu.operands import fitting
from ferrum_numba.gpu.runtime import whole_warps
from ferrum_numba.gpu.storage import storage_of
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_ref.errors import BackendError, ShapeError
from ferrum_ref.types.devices import DataType


def rms_norm(x: NumbaTensor, weight: NumbaTensor, eps: float, operation: str = "rms_norm") -> NumbaTensor:
    """y = x / sqrt(mean(x**2, -1) + eps) * weight; x (..., E), weight (E,). Pure. Raises ShapeError otherwise."""
    num_columns = check_weight(operation, x, weight, "weight")
    weight = fitting(operation, x, weight)
    result = NumbaTensor.empty(x.runtime, x.shape(), x.dtype())
    if x.numel():
        num_rows = x.numel() // num_columns
        types = (storage_of(x.dtype(), operation), storage_of(weight.dtype(), operation))
        arguments = (x.flat(), weight.flat(), result.array, num_rows, num_columns, np.float32(eps))
        x.runtime.launch(norm.rms_norm, types, *norm.blocks_for(num_rows, num_columns), *arguments)
    return result


def rms_norm_residual(
    x: NumbaTensor, residual: NumbaTensor, weight: NumbaTensor, eps: float
) -> tuple[NumbaTensor, NumbaTensor]:
    """(rms_norm(r), r) with r = x + residual, read by the norm before r is rounded. Pure. Raises ShapeError."""
    operation = "rms_norm_residual"
    if x.shape() != residual.shape():
        raise ShapeError(f"{operation}: input {x.shape()} and residual {residual.shape()}, expected equal shapes")
    num_columns = check_weight(operation, x, weight, "weight")
    weight = fitting(operation, x, weight)
    if residual.dtype() is not x.dtype():
        raise BackendError(f"{operation}: input {x.dtype()} and residual {residual.dtype()}, expected one element type")
    normed, total = (NumbaTensor.empty(x.runtime, x.shape(), x.dtype()) for _ in range(2))
    if x.numel():
        num_rows = x.numel() // num_columns
        types = (storage_of(x.dtype(), operation), storage_of(weight.dtype(), operation))
        arguments = (
            x.flat(),
            residual.flat(),
            weight.flat(),
            normed.array,
            total.array,
            num_rows,
            num_columns,
            np.float32(eps),
        )
        x.runtime.launch(norm.rms_norm_residual, types, *norm.blocks_for(num_rows, num_columns), *arguments)
    return normed, total


def layer_norm(x: NumbaTensor, weight: NumbaTensor, bias: NumbaTensor | None, eps: float) -> NumbaTensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, in two passes. Pure. Raises ShapeError."""
    operation = "layer_norm"
    num_columns = check_weight(operation, x, weight, "weight")
    weight = fitting(operation, x, weight)
    if bias is not None:
        check_weight(operation, x, bias, "bias")
        if fitting(operation, weight, bias) is not bias:  # weight and bias are read alike: both widened, which is exact
            weight, bias = cast_float(weight, DataType.FP32), cast_float(bias, DataType.FP32)
    result = NumbaTensor.empty(x.runtime, x.shape(), x.dtype())
    if x.numel():
        num_rows = x.numel() // num_columns
        types = (storage_of(x.dtype(), operation), storage_of(weight.dtype(), operation))
        added = weight.flat() if bias is None else bias.flat()
        arguments = (
            x.flat(),
            weight.flat(),
            added,
            result.array,
            num_rows,
            num_columns,
            np.float32(eps),
            int(bias is not None),
        )
        x.runtime.launch(norm.layer_norm, types, *norm.blocks_for(num_rows, num_columns), *arguments)
    return result


def softmax(x: NumbaTensor, dim: int) -> NumbaTensor:
    """p = exp(x - max) / sum(exp(x - max)) along `dim`, which may be negative. Pure. Raises ShapeError."""
    shape = x.shape()
    if not -len(shape) <= dim < len(shape):
        raise ShapeError(f"softmax: dim {dim} of shape {shape}, expected {-len(shape)} <= dim < {len(shape)}")
    kind = storage_of(x.dtype(), "softmax")
    result = NumbaTensor.empty(x.runtime, shape, x.dtype())
    if x.numel():
        length, stride = shape[dim], math.prod(shape[dim % len(shape) + 1 :])
        arguments = (x.flat(), result.array, length, stride)
        x.runtime.launch(softmax_kernel.softmax, (kind,), x.numel() // length, whole_warps(length), *arguments)
    return result


def check_weight(operation: str, x: NumbaTensor, weight: NumbaTensor, argument: str) -> int:
    """E. Raises ShapeError unless x is (..., E) and weight (E,)."""
    if x.ndim() == 0 or weight.ndim() != 1 or weight.shape()[0] != x.shape()[-1]:
        raise ShapeError(
            f"{operation}: {argument} {weight.shape()} with input {x.shape()}, "
            f"expected input (..., E) and {argument} (E,)"
        )
    return x.shape()[-1]
