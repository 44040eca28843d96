"""Matrix products through cuBLAS, packed weights through a kernel, the embedding table.

Clauses: BK-CUPY-11 (specs/backend_cupy.md), KN-LINEAR-*, KN-QLINEAR-*, KN-EMBED-* (specs/kernels.md).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from ferrum_cupy.machine import STORAGE, DeviceArray
from ferrum_cupy.runtime import Runtime, as_integers, packable
from ferrum_cupy.storage import FLOATS, common_type
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import Ints, QuantScheme
from ferrum_ref.interfaces.tensor import matmul_output_shape
from ferrum_ref.types.devices import DataType

GGML_GROUP: Final = 32
WARPS_PER_BLOCK: Final = 4
ROWS_AT_ONCE: Final = 4
STREAMED_ROWS: Final = 8  # of x; as in quantized.cu what follows
STREAMED_GROUP: Final = 64
LARGEST_GRID_Y: Final = 65535
STREAMED_OUTPUTS: Final = {"stream_q4_0": 16, "stream_q8_0": 8}  # rows of W a block


def linear(runtime: Runtime, x: CupyTensor, weight: object) -> CupyTensor:
    """y = x @ weight.T; x (..., in) of rank >= 1, weight (out, in); result in x's type. Pure. Raises ShapeError."""
    w = runtime.float_of("linear", "weight", weight)
    shape, dims = x.shape(), w.shape()
    if len(dims) != 2 or not shape or shape[-1] != dims[1]:
        raise ShapeError(
            f"linear: input {shape} and weight {dims}, expected (..., in) and (out, in); "
            "weights are stored output first"
        )
    rows = x.array.reshape(math.prod(shape[:-1]), dims[1])
    if x.kind is w.kind:
        y = CupyTensor(runtime.machine, runtime.machine.multiply(rows, w.array, x.kind, is_rounded=True), x.kind)
    else:
        wide = runtime.wide("linear", x).reshape(rows.shape)
        sums = runtime.machine.multiply(wide, runtime.wide("linear", w), DataType.FP32)
        y = runtime.rounded(sums, x.kind)
    return y.reshape((*shape[:-1], dims[0]))


def quantized_linear(runtime: Runtime, x: CupyTensor, packed_weight: object, scheme: QuantScheme) -> CupyTensor:
    """y = x @ W.T, W in ggml's q4_0 or q8_0 blocks; packed (out, in/32 * block bytes) uint8. Pure.

    Raises UnsupportedError for another scheme or group; ShapeError for other shapes or element types.
    """
    if not isinstance(scheme, QuantScheme.Q4_0 | QuantScheme.Q8_0) or scheme.group_size != GGML_GROUP:
        raise UnsupportedError(
            f"quantized_linear: scheme: got {scheme}, expected Q4_0 or Q8_0 with group_size={GGML_GROUP}, "
            "ggml's blocks; dequantise and call linear"
        )
    packed = runtime.beside("quantized_linear", "packed_weight", packed_weight)
    layout, block_bytes = ("q4_0", 18) if isinstance(scheme, QuantScheme.Q4_0) else ("q8_0", 34)
    shape, dims = x.shape(), packed.shape()
    if (
        packed.kind is not DataType.UINT8
        or len(dims) != 2
        or not shape
        or dims[1] * GGML_GROUP != shape[-1] * block_bytes
    ):
        raise ShapeError(
            f"quantized_linear: input {shape} and packed_weight {dims} of {packed.kind.name}, "
            f"expected (..., in) and uint8 (out, in/{GGML_GROUP}*{block_bytes})"
        )
    machine, xp = runtime.machine, runtime.machine.xp
    rows, outputs = math.prod(shape[:-1]), dims[0]
    data, blocks = xp.ascontiguousarray(x.array), xp.ascontiguousarray(packed.array)
    y = xp.empty((*shape[:-1], outputs), data.dtype)
    if not y.size:
        return CupyTensor(machine, y, x.kind)
    defines, (inner, threads) = {"STORAGE": STORAGE[x.kind]}, (shape[-1], WARPS_PER_BLOCK * 32)
    if rows <= STREAMED_ROWS and inner and inner % STREAMED_GROUP == 0 and packable(inner, data, blocks):
        kernel = f"stream_{layout}"
        grid = (rows, -(-outputs // STREAMED_OUTPUTS[kernel]), 1)
        if grid[1] <= LARGEST_GRID_Y:
            machine.launch(
                "quantized", kernel, defines, grid, threads, (data, blocks, y, np.int32(inner), np.int32(outputs))
            )
            return CupyTensor(machine, y, x.kind)
    grid = (-(-outputs // WARPS_PER_BLOCK), -(-rows // ROWS_AT_ONCE), 1)
    arguments = (data, blocks, y, np.int32(rows), np.int32(inner), np.int32(outputs))
    machine.launch("quantized", f"linear_{layout}", {**defines, "ROWS": ROWS_AT_ONCE}, grid, threads, arguments)
    return CupyTensor(machine, y, x.kind)


def embedding(runtime: Runtime, table: CupyTensor, ids: Ints) -> CupyTensor:
    """y[t] = table[ids[t]]; table (V, E) any type; result (T, E). Pure. Raises ShapeError, InvalidParameterError."""
    shape = table.shape()
    if len(shape) != 2:
        raise ShapeError(f"embedding: table {shape}, expected (V, E)")
    index = as_integers("embedding", "ids", ids)
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < shape[0]:
        bad = index[(index < 0) | (index >= shape[0])]
        raise InvalidParameterError(
            f"embedding: ids: got {int(bad[0])}, expected 0 <= id < {shape[0]}; the tokenizer and the model disagree"
        )
    return CupyTensor(runtime.machine, table.array[runtime.indices(index)], table.kind)


def matmul(runtime: Runtime, a: CupyTensor, b: CupyTensor) -> CupyTensor:
    """a @ b: [.., m, k] x [.., k, n] -> [.., m, n] in the common type; leading axes broadcast. Pure.

    One call of cuBLAS: rows folded where b is one matrix, else a product for each index of the leading axes.
    """
    kind, shape = check_matmul(a, b)
    xp, ours = runtime.machine.xp, a.kind if a.kind is b.kind and a.kind in STORAGE else DataType.FP32
    left, right = (t.array if t.kind is ours else runtime.wide("matmul", t) for t in (a, b))
    if right.ndim == 2:
        left, right = left.reshape(1, math.prod(shape[:-1]), left.shape[-1]), right[None]
    else:
        left, right = (_each(xp, array, shape[:-2]) for array in (left, right))
    product = runtime.machine.multiply_many(left, right, ours)
    found = CupyTensor(runtime.machine, product, ours) if ours is kind else runtime.rounded(product, kind)
    return found.reshape(shape)


def check_matmul(a: CupyTensor, b: CupyTensor) -> tuple[DataType, tuple[int, ...]]:
    """The type and shape of a @ b. Pure. Raises ShapeError, and BackendError for element types without products."""
    shape = matmul_output_shape(a.shape(), b.shape())
    for name, operand in (("a", a), ("b", b)):
        if operand.kind not in FLOATS:
            raise BackendError(f"matmul: {name}: element type {operand.kind.name}, expected fp32, fp16 or bf16")
    return common_type("matmul", a.kind, b.kind), tuple(shape)


def _each(xp: Any, array: DeviceArray, leading: tuple[int, ...]) -> DeviceArray:
    """Matrices one after another: one for each index of the leading axes, or a single one for all. Pure."""
    matrix = array.shape[-2:]
    if math.prod(array.shape[:-2]) == 1:
        return array.reshape(1, *matrix)
    return xp.broadcast_to(array, (*leading, *matrix)).reshape(math.prod(leading), *matrix)
