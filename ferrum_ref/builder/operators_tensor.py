"""Graph operations that are `TensorOps`: elementwise, shapes, products.  Clause: MB-IR-2 (specs/model_builder.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ferrum_ref.builder.attributes import Attributes
from ferrum_ref.builder.operators import MAX_CONSTANT_ELEMENTS, Operator, Runtime, Signal, agree, static_size, tensors
from ferrum_ref.errors import ConfigError
from ferrum_ref.interfaces.tensor import TensorRef


def tensor_operators() -> list[Operator]:
    """add, sub, mul, div, scale, silu, gelu, relu, softmax, matmul, transpose, concat, reshape, slice, fill."""
    elementwise = [Operator(name, (2, 2), _broadcast, _binary(name)) for name in ("add", "sub", "mul", "div")]
    unary = [Operator(name, (1, 1), _same, _unary(name)) for name in ("silu", "gelu", "relu")]
    return [
        *elementwise,
        *unary,
        Operator("scale", (1, 1), _infer_scale, _run_scale),
        Operator("softmax", (1, 1), _infer_softmax, _run_softmax),
        Operator("matmul", (2, 2), _infer_matmul, lambda run, _, x: [run.backend.tensor_ops().matmul(*tensors(x))]),
        Operator("transpose", (1, 1), _infer_transpose, _run_transpose, is_view=True),
        Operator("concat", (1, 4096), _infer_concat, _run_concat),
        Operator("reshape", (1, 1), _infer_reshape, _run_reshape, is_view=True),
        Operator("slice", (1, 1), _infer_slice, _run_slice, is_view=True),
        Operator("fill", (0, 0), _infer_fill, _run_fill),
    ]


def _binary(name: str) -> Any:
    def run(runtime: Runtime, _attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
        return [getattr(runtime.backend.tensor_ops(), name)(*operands)]

    return run


_unary = _binary


def _same(_attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    return [operands[0]]


def _broadcast(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    left, right = operands
    longer, shorter = sorted((left.shape, right.shape), key=len, reverse=True)
    shape = list(longer)
    for offset, dim in enumerate(reversed(shorter), 1):
        other = shape[-offset]
        if not (agree(dim, other) or 1 in (dim, other)):
            raise ConfigError(f"{attributes.operation}: shapes {left.shape} and {right.shape} do not broadcast")
        shape[-offset] = dim if other == 1 else other
    if left.dtype is not right.dtype:
        raise ConfigError(f"{attributes.operation}: got {left.dtype.name} and {right.dtype.name}, expected one type")
    return [Signal(tuple(shape), left.dtype)]


def _infer_scale(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    attributes.number("factor")
    return [operands[0]]


def _run_scale(runtime: Runtime, attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    (x,) = tensors(operands)
    factor = runtime.backend.tensor_factory().from_numpy(np.array([attributes.number("factor")], dtype=np.float32))
    return [runtime.backend.tensor_ops().mul(x, factor.to_dtype(x.dtype()))]


def _axis(attributes: Attributes, name: str, signal: Signal) -> int:
    if not signal.shape:
        raise ConfigError(f"{attributes.operation}: got a scalar, expected at least one axis")
    return attributes.whole(name, 0, len(signal.shape))


def _infer_softmax(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    _axis(attributes, "dim", operands[0])
    return [operands[0]]


def _run_softmax(runtime: Runtime, attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    return [runtime.backend.tensor_ops().softmax(operands[0], attributes.whole("dim", 0))]


def _infer_matmul(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    left, right = operands
    if len(left.shape) != 2 or len(right.shape) != 2 or not agree(left.shape[1], right.shape[0]):
        raise ConfigError(f"{attributes.operation}: got {left.shape} and {right.shape}, expected [m, k] and [k, n]")
    return [Signal((left.shape[0], right.shape[1]), left.dtype)]


def _infer_transpose(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    first, second = _axis(attributes, "dim0", operands[0]), _axis(attributes, "dim1", operands[0])
    shape = list(operands[0].shape)
    shape[first], shape[second] = shape[second], shape[first]
    return [Signal(tuple(shape), operands[0].dtype)]


def _run_transpose(runtime: Runtime, attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    dims = attributes.whole("dim0", 0), attributes.whole("dim1", 0)
    return [runtime.backend.tensor_ops().transpose(operands[0], *dims)]


def _infer_concat(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    first = operands[0]
    dim = _axis(attributes, "dim", first)
    total = 0
    for operand in operands:
        same_rank = len(operand.shape) == len(first.shape)
        if not same_rank or any(
            axis != dim and not agree(a, b) for axis, (a, b) in enumerate(zip(operand.shape, first.shape))
        ):
            raise ConfigError(f"{attributes.operation}: shapes {first.shape} and {operand.shape} do not join on {dim}")
        total = -1 if total == -1 or operand.shape[dim] == -1 else total + operand.shape[dim]
    return [Signal((*first.shape[:dim], total, *first.shape[dim + 1 :]), first.dtype)]


def _run_concat(runtime: Runtime, attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    return [runtime.backend.tensor_ops().concat(tensors(operands), attributes.whole("dim", 0))]


def _infer_reshape(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    shape, source = attributes.dims("shape"), operands[0].shape
    num_dynamic = sum(dim == -1 for dim in source)
    if (num_dynamic, -1 in shape) not in ((0, False), (1, True)) or static_size(shape) != static_size(source):
        raise ConfigError(f"{attributes.operation}: cannot reshape {source} to {tuple(shape)}")
    return [Signal(tuple(shape), operands[0].dtype)]


def _run_reshape(_runtime: Runtime, attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    (x,) = tensors(operands)
    shape = attributes.dims("shape")
    rest = static_size(shape)
    return [x.reshape(tuple(x.numel() // rest if dim == -1 else dim for dim in shape))]


def _infer_slice(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    dim = _axis(attributes, "dim", operands[0])
    size = operands[0].shape[dim]
    if size == -1:
        raise ConfigError(f"{attributes.operation}: axis {dim} is dynamic, expected a fixed one to slice")
    start = attributes.whole("start", 0, size + 1)
    end = attributes.whole("end", start, size + 1)
    shape = list(operands[0].shape)
    shape[dim] = end - start
    return [Signal(tuple(shape), operands[0].dtype)]


def _run_slice(_runtime: Runtime, attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    (x,) = tensors(operands)
    dim = attributes.whole("dim", 0)
    low, high = [0] * x.ndim(), list(x.shape())
    low[dim], high[dim] = attributes.whole("start", 0), attributes.whole("end", 0)
    return [x.view(tuple(low), tuple(high))]


def _infer_fill(attributes: Attributes, _operands: Sequence[Signal]) -> list[Signal]:
    attributes.number("value")
    shape = attributes.dims("shape", 0)
    if static_size(shape) > MAX_CONSTANT_ELEMENTS:
        raise ConfigError(f"{attributes.operation}: shape {shape} has more than {MAX_CONSTANT_ELEMENTS} elements")
    return [Signal(tuple(shape), attributes.data_type("dtype"))]


def _run_fill(runtime: Runtime, attributes: Attributes, _operands: Sequence[Any]) -> list[TensorRef]:
    values = np.full(attributes.dims("shape", 0), attributes.number("value"), dtype=np.float32)
    return [runtime.backend.tensor_factory().from_numpy(values).to_dtype(attributes.data_type("dtype"))]
