"""Dot products with stored weight rows, rows widened to float32, weighted sums of rows, and the largest of a row.

Written out as LLVM vector code because LLVM's own vectoriser halves the vectors on some processors and loses to bytes
and nibbles that must be widened first.

    a block is 32 weights, or 256 of ggml's K-quants; a row's sum is kept in two vectors, which are added and folded at
    the end: (v0 + v1), (v2 + v3), ... and again, then the elements beyond the last whole vector are added

A row's result does not depend on how many rows are taken together.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

from ferrum_numba.cpu.blocks import BLOCK, BLOCK_FORMATS
from ferrum_numba.cpu.lanes import (
    BYTE,
    BYTES,
    FLOAT,
    HALF,
    INT,
    LANES,
    VECTOR,
    add_to,
    at,
    fetch_ahead,
    fold,
    half_to_float,
    like,
    load,
    spread,
    store,
    wider,
    word,
)

intrinsic: Final[Any] = extending.intrinsic  # untyped: see `addresses`

# Element kinds of stored rows, as the kernels number them; beyond these four ggml's, in BLOCK_FORMATS.
F32: Final = 0
F16: Final = 1
BF16: Final = 2
I8: Final = 3  # int8, one float32 scale a row (applied by the caller)
PLAIN_BYTES: Final[Mapping[int, int]] = MappingProxyType({F32: 4, F16: 2, BF16: 2, I8: 1})
KINDS: Final = (*PLAIN_BYTES, *BLOCK_FORMATS)
STORED_KINDS: Final[Mapping[str, int]] = MappingProxyType(  # by the names of QuantScheme.kind
    {"f32": F32, "f16": F16, "bf16": BF16, **{layout.name: kind for kind, layout in BLOCK_FORMATS.items()}}
)
LONG_ROW_BYTES: Final = 2048
LINE_BYTES: Final = 64
ROWS: Final = 4  # rows of a weight that share the loads of x


def unit_of(kind: int) -> tuple[int, int]:
    """(elements, bytes) of which a row of this kind has a whole number."""
    if kind in PLAIN_BYTES:
        return 1, PLAIN_BYTES[kind]
    return BLOCK_FORMATS[kind].num_elements, BLOCK_FORMATS[kind].num_bytes


def _block_of(kind: int) -> tuple[int, int]:
    """(elements, bytes) that are worked on together."""
    if kind in PLAIN_BYTES:
        return BLOCK, BLOCK * PLAIN_BYTES[kind]
    return unit_of(kind)


def _plain(builder: Any, kind: int, base: Any, offset: Any, count: int) -> Any:
    """`count` weights at a byte offset as float32, of a kind that stores one number an element."""
    if kind == F32:
        return load(builder, base, offset, FLOAT, count)
    if kind == I8:
        found = load(builder, base, offset, BYTE, count)
        return builder.sitofp(found, wider(found.type, FLOAT))
    bits = load(builder, base, offset, HALF, count)
    if kind == F16:
        return half_to_float(builder, bits)
    integers = wider(bits.type, INT)
    return builder.bitcast(builder.shl(builder.zext(bits, integers), like(integers, 16)), wider(bits.type, FLOAT))


def _head(builder: Any, kind: int, block: Any) -> list[Any]:
    return [] if kind in PLAIN_BYTES else BLOCK_FORMATS[kind].head(builder, block)


def _weights(builder: Any, kind: int, block: Any, head: list[Any], first: int) -> Any:
    """Numbers first .. first + LANES - 1 of a block."""
    if kind in PLAIN_BYTES:
        return _plain(builder, kind, block, first * PLAIN_BYTES[kind], LANES)
    return BLOCK_FORMATS[kind].weights(builder, block, head, first)


def _distance_ahead(builder: Any, num_rows: int, stride: Any) -> Any:
    """Bytes from a block to the one to fetch: the same one of the next rows, or farther on in the same long row.

    Packed rows are short: the processor's own prefetcher does not follow them from one to the next.
    """
    is_short = builder.icmp_signed("<=", stride, word(LONG_ROW_BYTES))
    return builder.select(is_short, builder.mul(stride, word(num_rows)), word(LONG_ROW_BYTES // 2))


def _emit_dots(builder: Any, kind: int, num_rows: int, weight: Any, stride: Any, x: Any, count: Any, out: Any) -> None:
    """out[r] = sum over i < count of weight row r's number i times x[i]."""
    rows = [at(builder, weight, builder.mul(stride, word(row))) for row in range(num_rows)]
    sums = [[cgutils.alloca_once_value(builder, like(VECTOR, 0.0)) for _ in range(2)] for _ in rows]
    rests = [cgutils.alloca_once_value(builder, ir.Constant(FLOAT, 0.0)) for _ in rows]
    (num_elements, num_bytes), ahead = _block_of(kind), _distance_ahead(builder, num_rows, stride)
    num_blocks = builder.sdiv(count, word(num_elements))
    with cgutils.for_range(builder, num_blocks) as loop:
        place = builder.mul(loop.index, word(4 * num_elements))
        blocks = [at(builder, row, builder.mul(loop.index, word(num_bytes))) for row in rows]
        for block in blocks if kind != F32 else []:
            for line in range(0, num_bytes, LINE_BYTES):
                fetch_ahead(builder, at(builder, at(builder, block, ahead), line))
        heads = [_head(builder, kind, block) for block in blocks]
        for run in range(0, num_elements, BLOCK):
            places = range(run, run + BLOCK, LANES)
            xs = [load(builder, x, builder.add(place, word(4 * first)), FLOAT, LANES) for first in places]
            for block, head, totals in zip(blocks, heads, sums, strict=True):
                for index, first in enumerate(places):
                    add_to(builder, totals[index % 2], _weights(builder, kind, block, head, first), xs[index])
    if kind in PLAIN_BYTES:
        _emit_rest(builder, kind, rows, x, count, num_blocks, sums, rests)
    folded = fold(builder, [builder.fadd(builder.load(even), builder.load(odd)) for even, odd in sums])
    for index, rest in enumerate(rests):
        total = builder.fadd(builder.extract_element(folded, ir.Constant(INT, index)), builder.load(rest))
        builder.store(total, builder.gep(out, [word(index)]))


def _emit_rest(builder: Any, kind: int, rows: Any, x: Any, count: Any, num_blocks: Any, sums: Any, rests: Any) -> None:
    """The elements beyond the last whole block: whole vectors first, then one by one."""
    size = PLAIN_BYTES[kind]
    done = builder.mul(num_blocks, word(BLOCK))
    num_vectors = builder.sdiv(builder.sub(count, done), word(LANES))
    with cgutils.for_range(builder, num_vectors) as loop:
        place = builder.add(done, builder.mul(loop.index, word(LANES)))
        wide = load(builder, x, builder.mul(place, word(4)), FLOAT, LANES)
        for row, totals in zip(rows, sums, strict=True):
            found = _plain(builder, kind, row, builder.mul(place, word(size)), LANES)
            add_to(builder, totals[0], found, wide)
    done = builder.add(done, builder.mul(num_vectors, word(LANES)))
    with cgutils.for_range(builder, builder.sub(count, done)) as loop:
        place = builder.add(done, loop.index)
        single = load(builder, x, builder.mul(place, word(4)), FLOAT, 1)
        for row, rest in zip(rows, rests, strict=True):
            add_to(builder, rest, _plain(builder, kind, row, builder.mul(place, word(size)), 1), single)


def _generate_dots(context: Any, builder: Any, kind: int, num_rows: int, arguments: Sequence[Any]) -> Any:
    weight, stride, x, count, out = arguments
    weight, x = builder.inttoptr(weight, BYTES), builder.inttoptr(x, BYTES)
    _emit_dots(builder, kind, num_rows, weight, stride, x, count, builder.inttoptr(out, FLOAT.as_pointer()))
    return context.get_dummy_value()


@intrinsic(prefer_literal=True)
def dots(typing_context, kind, weight, stride, x, count, out):
    """ROWS dot products with x: rows of a constant `kind`, `stride` bytes apart from `weight` on.

    float32 results at `out`; a kind of blocks needs a `count` of whole ones.
    """

    def generate(context, builder, signature, arguments):
        return _generate_dots(context, builder, signature.args[0].literal_value, ROWS, arguments[1:])

    return types.void(kind, *[types.intp] * 5), generate


def _float_dots(num_rows: int) -> Callable[..., Any]:
    def float_dots(typing_context, weight, stride, x, count, out):
        """The same of `num_rows` float32 rows."""

        def generate(context, builder, signature, arguments):
            return _generate_dots(context, builder, F32, num_rows, arguments)

        return types.void(*[types.intp] * 5), generate

    made: Callable[..., Any] = intrinsic(float_dots)
    return made


dots_f32, dot_f32 = _float_dots(ROWS), _float_dots(1)


@intrinsic(prefer_literal=True)
def widen_stored(typing_context, kind, row, count, out):
    """out[i] = number i < count of a stored row of a constant `kind` as float32, which is exact; int8 without scale."""

    def generate(context, builder, signature, arguments):
        number = signature.args[0].literal_value
        _, row, count, out = arguments
        row, out = builder.inttoptr(row, BYTES), builder.inttoptr(out, BYTES)
        num_elements, num_bytes = _block_of(number)
        num_blocks = builder.sdiv(count, word(num_elements))
        with cgutils.for_range(builder, num_blocks) as loop:
            block = at(builder, row, builder.mul(loop.index, word(num_bytes)))
            target = at(builder, out, builder.mul(loop.index, word(4 * num_elements)))
            head = _head(builder, number, block)
            for first in range(0, num_elements, LANES):
                store(builder, _weights(builder, number, block, head, first), target, 4 * first)
        if number in PLAIN_BYTES:
            done = builder.mul(num_blocks, word(num_elements))
            with cgutils.for_range(builder, builder.sub(count, done)) as loop:
                place = builder.add(done, loop.index)
                found = _plain(builder, number, row, builder.mul(place, word(PLAIN_BYTES[number])), 1)
                store(builder, found, out, builder.mul(place, word(4)))
        return context.get_dummy_value()

    return types.void(kind, *[types.intp] * 3), generate


def _emit_columns(builder: Any, width: int, offset: Any, heads: Any, rows: Any, stride: Any, count: Any) -> None:
    """`width` vectors (a single element for 0) of every head's weighted sum, from byte `offset` of each row on.

    heads: (factors, result) for each of them, byte pointers.
    """
    lanes, num_parts = (LANES, width) if width else (1, 1)
    places = [builder.add(offset, word(4 * lanes * part)) for part in range(num_parts)]
    sums = [
        [cgutils.alloca_once_value(builder, load(builder, out, place, FLOAT, lanes)) for place in places]
        for _, out in heads
    ]
    with cgutils.for_range(builder, count) as loop:
        row = at(builder, rows, builder.mul(loop.index, stride))
        found = [load(builder, row, place, FLOAT, lanes) for place in places]
        for (factors, _), totals in zip(heads, sums, strict=True):
            factor = load(builder, factors, builder.mul(loop.index, word(4)), FLOAT, 1)
            factor = spread(builder, factor) if width else factor
            for total, value in zip(totals, found, strict=True):
                add_to(builder, total, factor, value)
    for (_, out), totals in zip(heads, sums, strict=True):
        for total, place in zip(totals, places, strict=True):
            value = builder.load(total)
            builder.store(value, builder.bitcast(at(builder, out, place), value.type.as_pointer()), align=4)


def _weighted_rows(num_heads: int) -> Any:
    def add_weighted_rows(typing_context, factors, factors_step, rows, stride, count, size, out, out_step):
        """out[h][d] += sum over j < count of factors[h][j] rows[j][d], d < size, for `num_heads` heads h; float32.

        The heads' factors and results are `factors_step` and `out_step` bytes apart, the rows `stride` bytes.
        """

        def generate(context, builder, signature, arguments):
            factors, factors_step, rows, stride, count, size, out, out_step = arguments
            factors, rows, out = (builder.inttoptr(address, BYTES) for address in (factors, rows, out))
            heads = [
                (
                    at(builder, factors, builder.mul(factors_step, word(head))),
                    at(builder, out, builder.mul(out_step, word(head))),
                )
                for head in range(num_heads)
            ]
            end, done = builder.mul(size, word(4)), word(0)
            for width in (4, 1, 0):
                step = 4 * LANES * width if width else 4
                num_steps = builder.sdiv(builder.sub(end, done), word(step))
                with cgutils.for_range(builder, num_steps) as loop:
                    offset = builder.add(done, builder.mul(loop.index, word(step)))
                    _emit_columns(builder, width, offset, heads, rows, stride, count)
                done = builder.add(done, builder.mul(num_steps, word(step)))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return intrinsic(add_weighted_rows)


add_weighted_rows, add_weighted_rows_2, add_weighted_rows_4 = (_weighted_rows(heads) for heads in (1, 2, 4))


@intrinsic
def fetch_rows(typing_context, rows, stride, count, num_bytes):
    """Asks for the first `num_bytes` of `count` rows, `stride` bytes apart, to be in cache soon."""

    def generate(context, builder, signature, arguments):
        rows, stride, count, num_bytes = arguments
        rows = builder.inttoptr(rows, BYTES)
        with cgutils.for_range(builder, count) as row:
            base = at(builder, rows, builder.mul(row.index, stride))
            num_lines = builder.sdiv(builder.add(num_bytes, word(LINE_BYTES - 1)), word(LINE_BYTES))
            with cgutils.for_range(builder, num_lines) as line:
                fetch_ahead(builder, at(builder, base, builder.mul(line.index, word(LINE_BYTES))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def largest(typing_context, values, count):
    """The largest of `count` float32, -inf for none; a NaN is passed over."""

    def generate(context, builder, signature, arguments):
        values, count = builder.inttoptr(arguments[0], BYTES), arguments[1]
        lowest = float("-inf")
        wide = cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [lowest] * LANES))
        best = cgutils.alloca_once_value(builder, ir.Constant(FLOAT, lowest))
        num_vectors = builder.sdiv(count, word(LANES))
        with cgutils.for_range(builder, num_vectors) as loop:
            _keep_larger(builder, wide, load(builder, values, builder.mul(loop.index, word(4 * LANES)), FLOAT, LANES))
        done = builder.mul(num_vectors, word(LANES))
        with cgutils.for_range(builder, builder.sub(count, done)) as loop:
            place = builder.mul(builder.add(done, loop.index), word(4))
            _keep_larger(builder, best, load(builder, values, place, FLOAT, 1))
        vector = builder.load(wide)
        for lane in range(LANES):
            _keep_larger(builder, best, builder.extract_element(vector, ir.Constant(INT, lane)))
        return builder.load(best)

    return types.float32(types.intp, types.intp), generate


def _keep_larger(builder: Any, held: Any, found: Any) -> None:
    old = builder.load(held)
    builder.store(builder.select(builder.fcmp_ordered(">", found, old), found, old), held)
