"""The steps after reading, in the order of the list, each checked against its shape.  Clauses: WL-STEP-1..8."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ferrum_ref.errors import ModelError, UnsupportedError
from ferrum_ref.formats.elements import Array, is_sound_shape
from ferrum_ref.interfaces.tensor import TensorFactory
from ferrum_ref.interfaces.weights import TensorSpec, TensorTransformation, TransformationType
from ferrum_ref.interfaces.weights_data import Reshape, Slice, Transpose
from ferrum_ref.types.devices import DataType
from ferrum_ref.weights.placement import rounded
from ferrum_ref.weights.quantize import quantized


def transformed(values: Array, spec: TensorSpec, factory: TensorFactory, what: str) -> Array:
    """The values after all steps; they have `spec.shape`.  Pure.  [WL-STEP-1..8]

    Raises ModelError naming the step and the shape it met, or the final shape that is not the wanted one.
    """
    for number, step in enumerate(spec.transformations):
        where = f"{what}: step {number}"
        wanted = spec.dtype if number == len(spec.transformations) - 1 else None
        values = _applied(values, step, wanted, factory, where)
    check_shape(values.shape, spec.shape, what)
    return values


def check_shape(found: Sequence[int], wanted: Sequence[int], what: str) -> None:
    """Raises ModelError unless the shapes are equal.  [WL-STEP-8]"""
    if tuple(found) != tuple(wanted):
        raise ModelError(f"{what}: shape: got {list(found)} after the transformations, expected {list(wanted)}")


def raw_shape(spec: TensorSpec, what: str) -> tuple[int, ...]:
    """The shape in which bare bytes are read, so that the steps lead to `spec.shape`.  Pure.  [WL-RAW-2]

    A Reshape that comes first takes a flat vector; Transposes alone are undone. Raises ModelError when a Slice, or a
    Transpose before another kind of step, leaves the stored shape open.
    """
    shape = list(spec.shape)
    if not is_sound_shape(shape):
        raise ModelError(f"{what}: shape: got {spec.shape}, expected sizes that fit in memory")
    steps = [step for step in spec.transformations if isinstance(step, (Transpose, Reshape, Slice))]
    if steps and isinstance(steps[0], Reshape):
        return (math.prod(steps[0].shape),)
    for step in reversed(steps):
        if not isinstance(step, Transpose):
            first = type(steps[0]).__name__
            raise ModelError(f"{what}: got {first} as the first step on bare bytes, expected a Reshape to come first")
        _check_axes(len(shape), step, what)
        shape[step.dim0], shape[step.dim1] = shape[step.dim1], shape[step.dim0]
    return tuple(shape)


def transformation_type(step: TensorTransformation) -> TransformationType:
    """The tag.  Raises UnsupportedError for what is no transformation."""
    for kind in TransformationType:
        if isinstance(step, getattr(TensorTransformation, kind.value)):
            return kind
    raise UnsupportedError(f"transformation: got {type(step).__name__}, expected one of TensorTransformation")


def _applied(
    values: Array, step: TensorTransformation, wanted: DataType | None, factory: TensorFactory, where: str
) -> Array:
    if isinstance(step, TensorTransformation.Transpose):
        _check_axes(values.ndim, step, where)
        return values.swapaxes(step.dim0, step.dim1)
    if isinstance(step, TensorTransformation.Reshape):
        return _reshaped(values, step.shape, where)
    if isinstance(step, TensorTransformation.Slice):
        return _sliced(values, step, where)
    if isinstance(step, TensorTransformation.Cast):
        return rounded(values, step.dtype, factory, f"{where}: Cast")
    if isinstance(step, TensorTransformation.Scale):
        kind = np.float64 if values.dtype == np.float64 else np.float32
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scaled: Array = np.multiply(values.astype(kind), kind(np.float32(step.factor)))
        return scaled
    if isinstance(step, TensorTransformation.Quantize):
        return quantized(values.astype(np.float32), step.config, wanted, where)
    raise UnsupportedError(f"{where}: got {type(step).__name__}, expected one of TensorTransformation")


def _check_axes(num_axes: int, step: Transpose, where: str) -> None:
    if max(step.dim0, step.dim1) >= num_axes:
        got = f"axes {step.dim0} and {step.dim1} of {num_axes}"
        raise ModelError(f"{where}: Transpose: got {got}, expected axes from 0 to {num_axes - 1}")


def _reshaped(values: Array, shape: Sequence[int], where: str) -> Array:
    if not is_sound_shape(shape) or math.prod(shape) != values.size:
        expected = f"{values.size} elements in sizes of 0 or more"
        raise ModelError(f"{where}: Reshape: got {list(values.shape)} to {list(shape)!s:.200}, expected {expected}")
    return values.reshape(tuple(shape))


def _sliced(values: Array, step: Slice, where: str) -> Array:
    if step.dim >= values.ndim:
        raise ModelError(f"{where}: Slice: got axis {step.dim} of {values.ndim}, expected an axis of the tensor")
    size = values.shape[step.dim]
    start, end = step.start or 0, size if step.end is None else step.end
    if not start <= end <= size:
        raise ModelError(f"{where}: Slice: got {start}:{end} of {size}, expected start <= end <= {size}")
    return values[(slice(None),) * step.dim + (slice(start, end),)]
