"""Sixteen bytes in one instruction, which numba's arrays do not offer: intrinsics with plain twins for the simulator.

An intrinsic builds LLVM instructions when a kernel is compiled; its `py_func` does the same to the simulator's arrays,
which check the alignment. A pack is eight neighbouring elements: one access of 16 bytes for 16-bit elements, two for
float32. What is fetched stays as it lies until it is widened, so that several loads can be under way before the first
is waited for.   Clauses: BK-NCUDA-42 (specs/backend_numba_cuda.md), BK-CUDASIM-11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba.cuda.types
import numpy as np
from llvmlite import ir
from numba.cuda.extending import intrinsic

types: Any = numba.cuda.types  # typed as Any once, here
PACK = 8  # elements
VECTOR_BYTES = 16
GLOBAL = 1  # an address space
LANES = range(4)
I16, I32, I64, HALF, FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
WORDS, FLOATS = ir.VectorType(I32, 4), ir.VectorType(FLOAT, 4)
Codegen = Callable[[Any, Any, Any, Any], Any]
Typed = tuple[Any, Codegen]


def simulated_by(function: Callable[..., Any]) -> Callable[[Callable[..., Typed]], Any]:
    """Makes an intrinsic of a typing function; under the simulator `function` runs in its place. Pure."""

    def made(typed: Callable[..., Typed]) -> Any:
        result: Any = intrinsic(typed)
        result.py_func = function
        return result

    return made


def address_of(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Where array[index] lies, in the generic address space; the index is not checked."""
    return builder.gep(context.make_array(kind)(context, builder, value=array).data, [index])


def global_address(context: Any, builder: Any, kind: Any, array: Any, index: Any, target: ir.Type) -> Any:
    """The same in global memory, as the address of a `target`."""
    place = builder.bitcast(address_of(context, builder, kind, array, index), target.as_pointer())
    return builder.addrspacecast(place, target.as_pointer(GLOBAL))


def _joined(values: list[Any], builder: Any, kind: ir.VectorType) -> Any:
    vector = ir.Constant(kind, ir.Undefined)
    for lane in LANES:
        vector = builder.insert_element(vector, values[lane], I32(lane))
    return vector


def _is_aligned(array: Any) -> bool:
    return bool(array.address % VECTOR_BYTES == 0)


@simulated_by(_is_aligned)
def is_aligned(typing_context: Any, array: Any) -> Typed:
    """is_aligned(array): does it start at a multiple of 16 bytes?"""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.ptrtoint(address_of(context, builder, signature.args[0], arguments[0], I64(0)), I64)
        return builder.icmp_unsigned("==", builder.and_(place, I64(VECTOR_BYTES - 1)), I64(0))

    return types.boolean(array), codegen


def _fetch(array: Any, start: int, first: int, end: int) -> Any:
    if first < end:
        return array.pack(start + first, PACK, VECTOR_BYTES)
    return (array.dtype.type(0),) * PACK


@simulated_by(_fetch)
def fetch(typing_context: Any, array: Any, start: Any, first: Any, end: Any) -> Typed:
    """fetch(array, start, first, end): the pack at start + first as it lies, zeros unless first < end.

    No branch: instead of one beyond the end the pack at `start`, which must exist, is read and forgotten.
    """
    is_float = array.dtype == types.float32
    raw = types.UniTuple(types.float32, 8) if is_float else types.UniTuple(types.uint32, 4)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, (source, origin, offset, limit) = signature.args[0], arguments
        is_inside = builder.icmp_signed("<", offset, limit)
        index = builder.add(origin, builder.select(is_inside, offset, I64(0)))
        vector, zero = (FLOATS, FLOAT(0.0)) if is_float else (WORDS, I32(0))
        parts: list[Any] = []
        for part in range(2 if is_float else 1):
            place = global_address(context, builder, kind, source, builder.add(index, I64(4 * part)), vector)
            loaded = builder.load(place, align=VECTOR_BYTES)
            parts += [builder.extract_element(loaded, I32(lane)) for lane in LANES]
        kept = [builder.select(is_inside, part, zero) for part in parts]
        return context.make_tuple(builder, signature.return_type, kept)

    return raw(array, types.int64, types.int64, types.int64), codegen


def _widen_half(raw: Any) -> Any:
    return tuple(np.float32(element) for element in raw)


@simulated_by(_widen_half)
def widen_half(typing_context: Any, raw: Any) -> Typed:
    """widen_half(raw): the eight fp16 numbers of a fetched pack as float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = []
        for lane in LANES:
            word = builder.extract_value(arguments[0], lane)
            for bits in (builder.trunc(word, I16), builder.trunc(builder.lshr(word, I32(16)), I16)):
                values.append(builder.fpext(builder.bitcast(bits, HALF), FLOAT))
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.float32, PACK)(raw), codegen


def _widen_bfloat(raw: Any) -> Any:
    return tuple(np.uint32(int(element) << 16).view(np.float32) for element in raw)


@simulated_by(_widen_bfloat)
def widen_bfloat(typing_context: Any, raw: Any) -> Typed:
    """widen_bfloat(raw): the eight bf16 numbers of a fetched pack as float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = []
        for lane in LANES:
            word = builder.extract_value(arguments[0], lane)
            values.append(builder.bitcast(builder.shl(word, I32(16)), FLOAT))
            values.append(builder.bitcast(builder.and_(word, I32(0xFFFF0000)), FLOAT))
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.float32, PACK)(raw), codegen


def _put(array: Any, start: int, first: int, end: int, values: Any) -> None:
    if first < end:
        rounded = [rounded_bfloat16(value) for value in values] if array.dtype == np.uint16 else values
        array.store_pack(start + first, rounded, VECTOR_BYTES)


def rounded_bfloat16(value: Any) -> np.uint16:
    """The bits of a float32 rounded to bf16, to nearest, ties to even; those of NaN are 0x7fff, as on a GPU. Pure."""
    bits = int(np.float32(value).view(np.uint32))
    if bits & 0x7FFFFFFF > 0x7F800000:
        return np.uint16(0x7FFF)
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF)


@simulated_by(_put)
def put(typing_context: Any, array: Any, start: Any, first: Any, end: Any, values: Any) -> Typed:
    """put(array, start, first, end, values): eight float32 numbers rounded to array's type, if first < end.

    A uint16 array holds bf16.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, (target, origin, offset, limit, given) = signature.args[0], arguments
        with builder.if_then(builder.icmp_signed("<", offset, limit)):
            elements = [builder.extract_value(given, i) for i in range(PACK)]
            vector, index = FLOATS, builder.add(origin, offset)
            if kind.dtype != types.float32:
                vector, pair = WORDS, ir.FunctionType(I32, [FLOAT, FLOAT])
                rounding = f"cvt.rn.{'f16' if kind.dtype == types.float16 else 'bf16'}x2.f32 $0, $1, $2;"
                upper_first = [(elements[2 * lane + 1], elements[2 * lane]) for lane in LANES]
                elements = [builder.asm(pair, rounding, "=r,f,f", both, False) for both in upper_first]
            for part in range(len(elements) // 4):
                place = global_address(context, builder, kind, target, builder.add(index, I64(4 * part)), vector)
                builder.store(_joined(elements[4 * part :], builder, vector), place, align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, types.int64, values), codegen
