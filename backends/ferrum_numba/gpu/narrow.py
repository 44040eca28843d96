"""Packs of eight elements one by one, where addresses or sizes do not allow more: the same values as `wide`.

Clause: BK-NCUDA-42 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from ferrum_numba.gpu.wide import (
    FLOAT,
    HALF,
    I16,
    I32,
    I64,
    PACK,
    Typed,
    global_address,
    rounded_bfloat16,
    simulated_by,
    types,
)


def _widened(builder: Any, kind: Any, element: Any) -> Any:
    if kind.dtype == types.float32:
        return element
    if kind.dtype == types.float16:
        return builder.fpext(builder.bitcast(element, HALF), FLOAT)
    return builder.bitcast(builder.shl(builder.zext(element, I32), I32(16)), FLOAT)


def _rounded(builder: Any, kind: Any, value: Any) -> Any:
    if kind.dtype == types.float32:
        return value
    if kind.dtype == types.float16:
        return builder.bitcast(builder.fptrunc(value, HALF), I16)
    return builder.asm(ir.FunctionType(I16, [FLOAT]), "cvt.rn.bf16.f32 $0, $1;", "=h,f", [value], False)


def _fetch_each(array: Any, start: int, first: int, end: int) -> Any:
    values = []
    for index in range(first, first + PACK):
        element = array[start + index] if index < end else array.dtype.type(0)
        is_bfloat = array.dtype == np.uint16
        values.append(np.uint32(int(element) << 16).view(np.float32) if is_bfloat else np.float32(element))
    return tuple(values)


@simulated_by(_fetch_each)
def fetch_each(typing_context: Any, array: Any, start: Any, first: Any, end: Any) -> Typed:
    """fetch_each(array, start, first, end): eight elements from start + first on as float32, zeros beyond the end.

    No branch: instead of one beyond the end the element at `start`, which must exist, is read and forgotten.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, (source, origin, offset, limit) = signature.args[0], arguments
        stored, values = FLOAT if kind.dtype == types.float32 else I16, []
        for i in range(PACK):
            own = builder.add(offset, I64(i))
            is_inside = builder.icmp_signed("<", own, limit)
            index = builder.add(origin, builder.select(is_inside, own, I64(0)))
            element = builder.load(global_address(context, builder, kind, source, index, stored))
            values.append(builder.select(is_inside, _widened(builder, kind, element), FLOAT(0.0)))
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.float32, PACK)(array, types.int64, types.int64, types.int64), codegen


def _put_each(array: Any, start: int, first: int, end: int, values: Any) -> None:
    for index in range(first, min(first + PACK, end)):
        value = values[index - first]
        array[start + index] = rounded_bfloat16(value) if array.dtype == np.uint16 else value


@simulated_by(_put_each)
def put_each(typing_context: Any, array: Any, start: Any, first: Any, end: Any, values: Any) -> Typed:
    """put_each(array, start, first, end, values): eight float32 numbers rounded to array's type, those before `end`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, (target, origin, offset, limit, given) = signature.args[0], arguments
        stored = FLOAT if kind.dtype == types.float32 else I16
        for i in range(PACK):
            own = builder.add(offset, I64(i))
            with builder.if_then(builder.icmp_signed("<", own, limit)):
                place = global_address(context, builder, kind, target, builder.add(origin, own), stored)
                builder.store(_rounded(builder, kind, builder.extract_value(given, i)), place)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, types.int64, values), codegen
