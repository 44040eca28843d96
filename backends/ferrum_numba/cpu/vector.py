"""Dot products of packed and plain weight rows, weighted sums of rows, and the largest of a row, as LLVM vector code.

Written out because LLVM's own vectoriser halves the vectors on some processors and loses to bytes and nibbles that
must be widened first. Everything here is portable LLVM: a processor with shorter vectors gets several for one.

    one row block is 32 weights, `LANES` floats are a vector; a row's sum is kept in one or two vectors, which are
    folded at the end: (v0 + v1), (v2 + v3), ... and again, then the elements beyond the last whole vector are added

A row's result does not depend on how many rows are taken together.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import binding, ir
from numba import extending
from numba.core import cgutils, types

intrinsic: Final[Any] = extending.intrinsic  # untyped: see `addresses`

# Element kinds of stored rows, as the kernels number them.
F32: Final = 0
F16: Final = 1
BF16: Final = 2
I8: Final = 3  # int8, one float32 scale a row (applied by the caller)
Q8_0: Final = 4  # ggml: blocks of 34 bytes, float16 d and 32 int8
Q4_0: Final = 5  # ggml: blocks of 18 bytes, float16 d and 16 bytes of nibbles, low halves first
BLOCK: Final = 32
BLOCK_BYTES: Final = (128, 64, 64, 32, 34, 18)
LONG_ROW_BYTES: Final = 2048
LINE_BYTES: Final = 64
ROWS: Final = 4  # rows of a weight that share the loads of x

_FEATURES: Final = binding.get_host_cpu_features()
LANES: Final = 16 if _FEATURES.get("avx512f") else 8
HAS_HALF: Final = bool(_FEATURES.get("f16c")) or binding.get_process_triple().startswith(("aarch64", "arm64"))

_BYTE: Final = ir.IntType(8)
_HALF: Final = ir.IntType(16)
_INT: Final = ir.IntType(32)
_WORD: Final = ir.IntType(64)
_FLOAT: Final = ir.FloatType()
_VECTOR: Final = ir.VectorType(_FLOAT, LANES)
_BYTES: Final = _BYTE.as_pointer()


def _word(value: int) -> ir.Constant:
    return ir.Constant(_WORD, value)


def _like(type_: Any, value: float) -> ir.Constant:
    """A constant of an integer or float type, or a vector with it in every lane."""
    return ir.Constant(type_, [value] * type_.count if isinstance(type_, ir.VectorType) else value)


def _wider(type_: Any, element: Any) -> Any:
    return ir.VectorType(element, type_.count) if isinstance(type_, ir.VectorType) else element


def _at(builder: Any, base: Any, offset: Any) -> Any:
    """The byte pointer `offset` bytes on."""
    return builder.gep(base, [_word(offset) if isinstance(offset, int) else offset])


def _load(builder: Any, base: Any, offset: Any, element: Any, count: int) -> Any:
    """`count` elements (a scalar for 1), at any alignment."""
    type_ = ir.VectorType(element, count) if count > 1 else element
    return builder.load(builder.bitcast(_at(builder, base, offset), type_.as_pointer()), align=1)


def _spread(builder: Any, value: Any) -> Any:
    """The float in every lane."""
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), _indices([0] * LANES))


def _indices(places: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, len(places)), list(places))


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, with one rounding where the processor has that."""
    name = f"llvm.fmuladd.v{LANES}f32" if isinstance(a.type, ir.VectorType) else "llvm.fmuladd.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def half_to_float(builder: Any, bits: Any) -> Any:
    """float16 bit patterns, one or a vector of them, as float32: exact."""
    floats, integers = _wider(bits.type, _FLOAT), _wider(bits.type, _INT)
    if HAS_HALF:
        return builder.fpext(builder.bitcast(bits, _wider(bits.type, ir.HalfType())), floats)
    wide = builder.zext(bits, integers)
    magnitude = builder.shl(builder.and_(wide, _like(integers, 0x7FFF)), _like(integers, 13))
    value = builder.fmul(builder.bitcast(magnitude, floats), _like(floats, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, _like(integers, 0x7C00 << 13))
    exponent = builder.select(special, _like(integers, 0x7F800000), _like(integers, 0))
    sign = builder.shl(builder.and_(wide, _like(integers, 0x8000)), _like(integers, 16))
    return builder.bitcast(builder.or_(builder.or_(builder.bitcast(value, integers), exponent), sign), floats)


def _plain(builder: Any, kind: int, base: Any, offset: Any, count: int) -> Any:
    """`count` weights at a byte offset as float32, of a kind that stores one number an element."""
    if kind == F32:
        return _load(builder, base, offset, _FLOAT, count)
    if kind == I8:
        found = _load(builder, base, offset, _BYTE, count)
        return builder.sitofp(found, _wider(found.type, _FLOAT))
    bits = _load(builder, base, offset, _HALF, count)
    if kind == F16:
        return half_to_float(builder, bits)
    integers = _wider(bits.type, _INT)
    return builder.bitcast(builder.shl(builder.zext(bits, integers), _like(integers, 16)), _wider(bits.type, _FLOAT))


def _quanta(builder: Any, kind: int, block: Any, part: int) -> Any:
    """Vector `part` of a ggml block's weights, without their scale."""
    first = part * LANES
    if kind == Q8_0:
        found = _load(builder, block, 2 + first, _BYTE, LANES)
        return builder.sitofp(found, _VECTOR)
    nibbles = builder.zext(_load(builder, block, 2 + first % 16, _BYTE, LANES), ir.VectorType(_INT, LANES))
    if first >= BLOCK // 2:
        nibbles = builder.lshr(nibbles, _like(nibbles.type, 4))
    else:
        nibbles = builder.and_(nibbles, _like(nibbles.type, 15))
    return builder.sitofp(builder.sub(nibbles, _like(nibbles.type, 8)), _VECTOR)


def _fold(builder: Any, vectors: Sequence[Any]) -> Any:
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
    even = builder.shuffle_vector(a, b, _indices(range(0, width, 2)))
    odd = builder.shuffle_vector(a, b, _indices(range(1, width, 2)))
    return builder.fadd(even, odd)


def _add_to(builder: Any, accumulator: Any, a: Any, b: Any) -> None:
    builder.store(_fused(builder, a, b, builder.load(accumulator)), accumulator)


def _fetch_ahead(builder: Any, place: Any) -> None:
    """Ask for the cache line at a byte pointer, which need not be anyone's memory."""
    type_ = ir.FunctionType(ir.VoidType(), [_BYTES, _INT, _INT, _INT])
    function = cgutils.get_or_insert_function(builder.module, type_, "llvm.prefetch.p0")
    builder.call(function, [place, *(ir.Constant(_INT, flag) for flag in (0, 3, 1))])  # to read, in all caches, data


def _distance_ahead(builder: Any, num_rows: int, stride: Any) -> Any:
    """Bytes from a block to the one to fetch: the same one of the next rows, or farther on in the same long row.

    Packed rows are short: the processor's own prefetcher does not follow them from one to the next.
    """
    is_short = builder.icmp_signed("<=", stride, _word(LONG_ROW_BYTES))
    return builder.select(is_short, builder.mul(stride, _word(num_rows)), _word(LONG_ROW_BYTES // 2))


def _emit_dots(builder: Any, kind: int, num_rows: int, weight: Any, stride: Any, x: Any, count: Any, out: Any) -> None:
    """out[r] = sum over i < count of weight row r's number i times x[i]."""
    rows = [_at(builder, weight, builder.mul(stride, _word(row))) for row in range(num_rows)]
    zero, parts = ir.Constant(_VECTOR, [0.0] * LANES), range(BLOCK // LANES)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(2)] for _ in rows]
    rests = [cgutils.alloca_once_value(builder, ir.Constant(_FLOAT, 0.0)) for _ in rows]
    num_blocks, ahead = builder.sdiv(count, _word(BLOCK)), _distance_ahead(builder, num_rows, stride)
    with cgutils.for_range(builder, num_blocks) as loop:
        place = builder.mul(loop.index, _word(4 * BLOCK))
        xs = [_load(builder, x, builder.add(place, _word(4 * LANES * part)), _FLOAT, LANES) for part in parts]
        for row, totals in zip(rows, sums, strict=True):
            block = _at(builder, row, builder.mul(loop.index, _word(BLOCK_BYTES[kind])))
            if kind != F32:
                _fetch_ahead(builder, _at(builder, block, ahead))
            if kind >= Q8_0:
                scale = half_to_float(builder, _load(builder, block, 0, _HALF, 1))
                inner = builder.fmul(_quanta(builder, kind, block, 0), xs[0])
                for part in parts[1:]:
                    inner = _fused(builder, _quanta(builder, kind, block, part), xs[part], inner)
                _add_to(builder, totals[0], _spread(builder, scale), inner)
                continue
            size = BLOCK_BYTES[kind] // BLOCK
            for part in parts:
                _add_to(builder, totals[part % 2], _plain(builder, kind, block, part * LANES * size, LANES), xs[part])
    if kind < Q8_0:
        _emit_rest(builder, kind, rows, x, count, num_blocks, sums, rests)
    vectors = [builder.fadd(builder.load(even), builder.load(odd)) for even, odd in sums]
    folded = _fold(builder, vectors)
    for index, rest in enumerate(rests):
        total = builder.fadd(builder.extract_element(folded, ir.Constant(_INT, index)), builder.load(rest))
        builder.store(total, builder.gep(out, [_word(index)]))


def _emit_rest(builder: Any, kind: int, rows: Any, x: Any, count: Any, num_blocks: Any, sums: Any, rests: Any) -> None:
    """The elements beyond the last whole block: whole vectors first, then one by one."""
    size = BLOCK_BYTES[kind] // BLOCK
    done = builder.mul(num_blocks, _word(BLOCK))
    num_vectors = builder.sdiv(builder.sub(count, done), _word(LANES))
    with cgutils.for_range(builder, num_vectors) as loop:
        place = builder.add(done, builder.mul(loop.index, _word(LANES)))
        wide = _load(builder, x, builder.mul(place, _word(4)), _FLOAT, LANES)
        for row, totals in zip(rows, sums, strict=True):
            found = _plain(builder, kind, row, builder.mul(place, _word(size)), LANES)
            _add_to(builder, totals[0], found, wide)
    done = builder.add(done, builder.mul(num_vectors, _word(LANES)))
    with cgutils.for_range(builder, builder.sub(count, done)) as loop:
        place = builder.add(done, loop.index)
        single = _load(builder, x, builder.mul(place, _word(4)), _FLOAT, 1)
        for row, rest in zip(rows, rests, strict=True):
            _add_to(builder, rest, _plain(builder, kind, row, builder.mul(place, _word(size)), 1), single)


def _dots(kind: int, num_rows: int) -> Callable[..., Any]:
    def dots(typing_context, weight, stride, x, count, out):
        """`num_rows` dot products with x: rows `stride` bytes apart from `weight` on, float32 results at `out`."""

        def generate(context, builder, signature, arguments):
            weight, stride, x, count, out = arguments
            weight, x = builder.inttoptr(weight, _BYTES), builder.inttoptr(x, _BYTES)
            out = builder.inttoptr(out, _FLOAT.as_pointer())
            _emit_dots(builder, kind, num_rows, weight, stride, x, count, out)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), generate

    made: Callable[..., Any] = intrinsic(dots)
    return made


dots_f32, dot_f32 = _dots(F32, ROWS), _dots(F32, 1)
dots_f16, dots_bf16 = _dots(F16, ROWS), _dots(BF16, ROWS)
dots_i8, dots_q8_0, dots_q4_0 = _dots(I8, ROWS), _dots(Q8_0, ROWS), _dots(Q4_0, ROWS)


def _emit_columns(builder: Any, width: int, offset: Any, heads: Any, rows: Any, stride: Any, count: Any) -> None:
    """`width` vectors (a single element for 0) of every head's weighted sum, from byte `offset` of each row on.

    heads: (factors, result) for each of them, byte pointers.
    """
    lanes, num_parts = (LANES, width) if width else (1, 1)
    places = [builder.add(offset, _word(4 * lanes * part)) for part in range(num_parts)]
    sums = [
        [cgutils.alloca_once_value(builder, _load(builder, out, place, _FLOAT, lanes)) for place in places]
        for _, out in heads
    ]
    with cgutils.for_range(builder, count) as loop:
        row = _at(builder, rows, builder.mul(loop.index, stride))
        found = [_load(builder, row, place, _FLOAT, lanes) for place in places]
        for (factors, _), totals in zip(heads, sums, strict=True):
            factor = _load(builder, factors, builder.mul(loop.index, _word(4)), _FLOAT, 1)
            factor = _spread(builder, factor) if width else factor
            for total, value in zip(totals, found, strict=True):
                _add_to(builder, total, factor, value)
    for (_, out), totals in zip(heads, sums, strict=True):
        for total, place in zip(totals, places, strict=True):
            value = builder.load(total)
            builder.store(value, builder.bitcast(_at(builder, out, place), value.type.as_pointer()), align=4)


def _weighted_rows(num_heads: int) -> Any:
    def add_weighted_rows(typing_context, factors, factors_step, rows, stride, count, size, out, out_step):
        """out[h][d] += sum over j < count of factors[h][j] rows[j][d], d < size, for `num_heads` heads h; float32.

        The heads' factors and results are `factors_step` and `out_step` bytes apart, the rows `stride` bytes.
        """

        def generate(context, builder, signature, arguments):
            factors, factors_step, rows, stride, count, size, out, out_step = arguments
            factors, rows, out = (builder.inttoptr(address, _BYTES) for address in (factors, rows, out))
            heads = [
                (
                    _at(builder, factors, builder.mul(factors_step, _word(head))),
                    _at(builder, out, builder.mul(out_step, _word(head))),
                )
                for head in range(num_heads)
            ]
            end, done = builder.mul(size, _word(4)), _word(0)
            for width in (4, 1, 0):
                step = 4 * LANES * width if width else 4
                num_steps = builder.sdiv(builder.sub(end, done), _word(step))
                with cgutils.for_range(builder, num_steps) as loop:
                    offset = builder.add(done, builder.mul(loop.index, _word(step)))
                    _emit_columns(builder, width, offset, heads, rows, stride, count)
                done = builder.add(done, builder.mul(num_steps, _word(step)))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return intrinsic(add_weighted_rows)


add_weighted_rows, add_weighted_rows_2, add_weighted_rows_4 = (_weighted_rows(heads) for heads in (1, 2, 4))


@intrinsic
def fetch_rows(typing_context, rows, stride, count, num_bytes):
    """Asks for the first `num_bytes` of `count` rows, `stride` bytes apart, to be in cache soon."""

    def generate(context, builder, signature, arguments):
        rows, stride, count, num_bytes = arguments
        rows = builder.inttoptr(rows, _BYTES)
        with cgutils.for_range(builder, count) as row:
            base = _at(builder, rows, builder.mul(row.index, stride))
            num_lines = builder.sdiv(builder.add(num_bytes, _word(LINE_BYTES - 1)), _word(LINE_BYTES))
            with cgutils.for_range(builder, num_lines) as line:
                _fetch_ahead(builder, _at(builder, base, builder.mul(line.index, _word(LINE_BYTES))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def scale_past_cache(typing_context, row, weight, factor, out, count):
    """out[i] = row[i] * factor * weight[i], written to memory without a place in cache being made for it.

    For results so large that they would be gone from the cache before anybody reads them.
    """

    def generate(context, builder, signature, arguments):
        row, weight, factor, out, count = arguments
        row, weight = builder.inttoptr(row, _BYTES), builder.inttoptr(weight, _BYTES)
        ahead = builder.and_(builder.sub(_word(0), out), _word(LINE_BYTES - 1))  # bytes to the first whole line
        first = builder.sdiv(ahead, _word(4))
        first = builder.select(builder.icmp_signed("<", first, count), first, count)
        num_vectors = builder.sdiv(builder.sub(count, first), _word(LANES))
        done = builder.add(first, builder.mul(num_vectors, _word(LANES)))
        out = builder.inttoptr(out, _BYTES)

        def scale(index, lanes):
            place = builder.mul(index, _word(4))
            gain = _spread(builder, factor) if lanes > 1 else factor
            scaled = builder.fmul(_load(builder, row, place, _FLOAT, lanes), gain)
            value = builder.fmul(scaled, _load(builder, weight, place, _FLOAT, lanes))
            return value, builder.bitcast(_at(builder, out, place), value.type.as_pointer())

        with cgutils.for_range(builder, first) as loop:
            builder.store(*scale(loop.index, 1))
        with cgutils.for_range(builder, num_vectors) as loop:
            index = builder.add(first, builder.mul(loop.index, _word(LANES)))
            stored = builder.store(*scale(index, LANES), align=4 * LANES)
            stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT, 1)]))
        with cgutils.for_range(builder, builder.sub(count, done)) as loop:
            builder.store(*scale(builder.add(done, loop.index), 1))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, types.intp, types.intp), generate


@intrinsic
def largest(typing_context, values, count):
    """The largest of `count` float32, -inf for none; a NaN is passed over."""

    def generate(context, builder, signature, arguments):
        values, count = builder.inttoptr(arguments[0], _BYTES), arguments[1]
        lowest = float("-inf")
        wide = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [lowest] * LANES))
        best = cgutils.alloca_once_value(builder, ir.Constant(_FLOAT, lowest))
        num_vectors = builder.sdiv(count, _word(LANES))
        with cgutils.for_range(builder, num_vectors) as loop:
            _keep_larger(
                builder, wide, _load(builder, values, builder.mul(loop.index, _word(4 * LANES)), _FLOAT, LANES)
            )
        done = builder.mul(num_vectors, _word(LANES))
        with cgutils.for_range(builder, builder.sub(count, done)) as loop:
            place = builder.mul(builder.add(done, loop.index), _word(4))
            _keep_larger(builder, best, _load(builder, values, place, _FLOAT, 1))
        vector = builder.load(wide)
        for lane in range(LANES):
            _keep_larger(builder, best, builder.extract_element(vector, ir.Constant(_INT, lane)))
        return builder.load(best)

    return types.float32(types.intp, types.intp), generate


def _keep_larger(builder: Any, held: Any, found: Any) -> None:
    old = builder.load(held)
    builder.store(builder.select(builder.fcmp_ordered(">", found, old), found, old), held)
