"""Vectors of floats in LLVM: loads, conversions, sums; what `blocks` and `vector` are written in.

Everything here is portable LLVM: a processor with shorter vectors gets several for one. Pointers are byte pointers,
places in memory may have any alignment, numbers of several bytes are little-endian.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from llvmlite import binding, ir
from numba.core import cgutils

_FEATURES: Final = binding.get_host_cpu_features()
LANES: Final = 16 if _FEATURES.get("avx512f") else 8
HAS_HALF: Final = bool(_FEATURES.get("f16c")) or binding.get_process_triple().startswith(("aarch64", "arm64"))

BYTE: Final = ir.IntType(8)
HALF: Final = ir.IntType(16)
INT: Final = ir.IntType(32)
WORD: Final = ir.IntType(64)
FLOAT: Final = ir.FloatType()
VECTOR: Final = ir.VectorType(FLOAT, LANES)
BYTES: Final = BYTE.as_pointer()


def word(value: int) -> ir.Constant:
    return ir.Constant(WORD, value)


def like(type_: Any, value: float) -> ir.Constant:
    """A constant of an integer or float type, or a vector with it in every lane."""
    return ir.Constant(type_, [value] * type_.count if isinstance(type_, ir.VectorType) else value)


def wider(type_: Any, element: Any) -> Any:
    """`element`, or as many of them as a vector type has."""
    return ir.VectorType(element, type_.count) if isinstance(type_, ir.VectorType) else element


def at(builder: Any, base: Any, offset: Any) -> Any:
    """The byte pointer `offset` bytes on."""
    return builder.gep(base, [word(offset) if isinstance(offset, int) else offset])


def load(builder: Any, base: Any, offset: Any, element: Any, count: int) -> Any:
    """`count` elements (a scalar for 1), at any alignment."""
    type_ = ir.VectorType(element, count) if count > 1 else element
    return builder.load(builder.bitcast(at(builder, base, offset), type_.as_pointer()), align=1)


def store(builder: Any, value: Any, base: Any, offset: Any) -> None:
    """A float or a vector of them, aligned as a float is."""
    builder.store(value, builder.bitcast(at(builder, base, offset), value.type.as_pointer()), align=4)


def indices(places: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(INT, len(places)), list(places))


def spread(builder: Any, value: Any, count: int = LANES) -> Any:
    """The scalar in every lane of a vector of `count`."""
    type_ = ir.VectorType(value.type, count)
    first = builder.insert_element(ir.Constant(type_, ir.Undefined), value, ir.Constant(INT, 0))
    return builder.shuffle_vector(first, ir.Constant(type_, ir.Undefined), indices([0] * count))


def lane_spread(builder: Any, vector: Any, lane: int) -> Any:
    """One element of a vector in every lane of a vector of LANES."""
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), indices([lane] * LANES))


def _llvm_function(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    insert: Any = cgutils.get_or_insert_function  # untyped
    return insert(builder.module, ir.FunctionType(result, arguments), name)


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, with one rounding where the processor has that."""
    name = f"llvm.fmuladd.v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "llvm.fmuladd.f32"
    return builder.call(_llvm_function(builder, name, a.type, [a.type] * 3), [a, b, c])


def half_to_float(builder: Any, bits: Any) -> Any:
    """float16 bit patterns, one or a vector of them, as float32: exact."""
    floats, integers = wider(bits.type, FLOAT), wider(bits.type, INT)
    if HAS_HALF:
        return builder.fpext(builder.bitcast(bits, wider(bits.type, ir.HalfType())), floats)
    wide = builder.zext(bits, integers)
    magnitude = builder.shl(builder.and_(wide, like(integers, 0x7FFF)), like(integers, 13))
    value = builder.fmul(builder.bitcast(magnitude, floats), like(floats, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, like(integers, 0x7C00 << 13))
    exponent = builder.select(special, like(integers, 0x7F800000), like(integers, 0))
    sign = builder.shl(builder.and_(wide, like(integers, 0x8000)), like(integers, 16))
    return builder.bitcast(builder.or_(builder.or_(builder.bitcast(value, integers), exponent), sign), floats)


def fold(builder: Any, vectors: Sequence[Any]) -> Any:
    """The sums of each vector's lanes, as a vector with one element for each of them."""
    num_sums, folded = len(vectors), list(vectors)
    while len(folded) > 1:
        folded = [_halved(builder, a, b, 2 * LANES) for a, b in zip(folded[::2], folded[1::2], strict=True)]
    alone = folded[0]
    while alone.type.count > num_sums:
        alone = _halved(builder, alone, ir.Constant(alone.type, ir.Undefined), alone.type.count)
    return alone


def _halved(builder: Any, a: Any, b: Any, width: int) -> Any:
    """Sums of neighbours in the first `width` lanes of a and b laid end to end."""
    even = builder.shuffle_vector(a, b, indices(range(0, width, 2)))
    odd = builder.shuffle_vector(a, b, indices(range(1, width, 2)))
    return builder.fadd(even, odd)


def add_to(builder: Any, accumulator: Any, a: Any, b: Any) -> None:
    """The number or vector at `accumulator` grows by a b."""
    builder.store(fused(builder, a, b, builder.load(accumulator)), accumulator)


def fetch_ahead(builder: Any, place: Any) -> None:
    """Ask for the cache line at a byte pointer, which need not be anyone's memory."""
    function = _llvm_function(builder, "llvm.prefetch.p0", ir.VoidType(), [BYTES, INT, INT, INT])
    builder.call(function, [place, *(ir.Constant(INT, flag) for flag in (0, 3, 1))])  # to read, in all caches, data
