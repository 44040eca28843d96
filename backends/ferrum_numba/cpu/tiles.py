"""The two ends of a matrix product by panels: weight rows turned into columns, and a tile of the product in registers.

    panel    PANEL rows of a weight, transposed: number k of row r at [k][r], float32
    tile     a few rows of x times a panel, PANEL sums a row, all of them in registers

A sum runs over k in order, one multiply-add at a time, however many rows and panels there are.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any, Final

from numba import extending
from numba.core import cgutils, types

from ferrum_numba.cpu.compiled import device
from ferrum_numba.cpu.lanes import BYTES, FLOAT, LANES, VECTOR, add_to, at, indices, like, load, spread, store, word

intrinsic: Final[Any] = extending.intrinsic  # untyped: see `addresses`

PANEL: Final = 2 * LANES
STEP: Final = 4 if LANES == 16 else 2  # tiles have 1, 2 or 3 times as many rows: up to 24 sums in 32 registers, or 12


def _clamped_rows(builder: Any, base: Any, stride: Any, count: Any, wanted: int) -> list[Any]:
    """Where `wanted` rows begin; the last of `count` stands for those that are not there."""
    last, rows = builder.sub(count, word(1)), []
    for row in range(wanted):
        index = builder.select(builder.icmp_signed("<", word(row), last), word(row), last)
        rows.append(at(builder, base, builder.mul(index, stride)))
    return rows


def _columns(builder: Any, rows: list[Any], place: Any) -> list[Any]:
    """Columns k .. k + 3 of LANES rows of float32, from byte `place` of each on, as vectors."""
    quads = [[load(builder, row, place, FLOAT, 4) for row in rows[first::4]] for first in range(4)]
    mixed = [_joined(builder, quad) for quad in quads]  # vector j: numbers k .. k + 3 of row j, then of row j + 4, ...
    for step in (2, 1):  # two numbers, then one, go from each row of four into the next but one, then the next
        first = indices([lane if lane & step == 0 else LANES + lane - step for lane in range(LANES)])
        second = indices([lane + step if lane & step == 0 else LANES + lane for lane in range(LANES)])
        for index in [index for index in range(4) if index & step == 0]:
            one, other = mixed[index], mixed[index + step]
            mixed[index] = builder.shuffle_vector(one, other, first)
            mixed[index + step] = builder.shuffle_vector(one, other, second)
    return mixed


def _joined(builder: Any, vectors: list[Any]) -> Any:
    """Vectors of one length end to end."""
    while len(vectors) > 1:
        both = indices(range(2 * vectors[0].type.count))
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.shuffle_vector(one, other, both) for one, other in pairs]
    return vectors[0]


@intrinsic
def transpose_rows(typing_context, source, stride, num_rows, count, panel):
    """panel[k][r] = row r's number k < `count`, for LANES rows of float32, `stride` bytes apart.

    Of fewer rows the last is taken again. `panel`: the address of its first column for these rows.
    """

    def generate(context, builder, signature, arguments):
        source, stride, num_rows, count, panel = arguments
        source, panel = builder.inttoptr(source, BYTES), builder.inttoptr(panel, BYTES)
        rows = _clamped_rows(builder, source, stride, num_rows, LANES)
        num_quads = builder.sdiv(count, word(4))
        with cgutils.for_range(builder, num_quads) as loop:
            place = builder.mul(loop.index, word(16))
            target = at(builder, panel, builder.mul(place, word(PANEL)))
            for index, column in enumerate(_columns(builder, rows, place)):
                store(builder, column, target, 4 * PANEL * index)
        done = builder.mul(num_quads, word(4))
        with cgutils.for_range(builder, builder.sub(count, done)) as loop:
            place = builder.add(done, loop.index)
            target = at(builder, panel, builder.mul(place, word(4 * PANEL)))
            for index, row in enumerate(rows):
                store(builder, load(builder, row, builder.mul(place, word(4)), FLOAT, 1), target, 4 * index)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


def _multiplier(height: int) -> Any:
    def multiply(typing_context, x, x_stride, num_rows, panel, panel_stride, depth, out, out_stride, adds):
        """`multiply_tile` of `num_rows` <= `height` rows."""

        def generate(context, builder, signature, arguments):
            _emit_tile(builder, height, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 9), generate

    return intrinsic(multiply)


def _emit_tile(
    builder: Any,
    height: int,
    x: Any,
    x_stride: Any,
    num_rows: Any,
    panel: Any,
    panel_stride: Any,
    depth: Any,
    out: Any,
    out_stride: Any,
    adds: Any,
) -> None:
    x, panel, out = (builder.inttoptr(address, BYTES) for address in (x, panel, out))
    rows = _clamped_rows(builder, x, x_stride, num_rows, height)
    targets = _clamped_rows(builder, out, out_stride, num_rows, height)
    sums = [[cgutils.alloca_once_value(builder, like(VECTOR, 0.0)) for _ in range(2)] for _ in rows]
    with cgutils.for_range(builder, depth) as loop:
        place, column = builder.mul(loop.index, word(4)), builder.mul(loop.index, panel_stride)
        weights = [load(builder, panel, builder.add(column, word(4 * LANES * half)), FLOAT, LANES) for half in (0, 1)]
        for row, halves in zip(rows, sums, strict=True):
            value = spread(builder, load(builder, row, place, FLOAT, 1))
            for total, weight in zip(halves, weights, strict=True):
                add_to(builder, total, value, weight)
    is_more, found = builder.icmp_signed("!=", adds, word(0)), []
    for target, halves in zip(targets, sums, strict=True):
        for half, total in enumerate(halves):
            before = load(builder, target, 4 * LANES * half, FLOAT, LANES)
            value = builder.fadd(builder.load(total), builder.select(is_more, before, like(VECTOR, 0.0)))
            found.append((value, target, 4 * LANES * half))
    for value, target, place in found:  # only now: a row that stands for a missing one is written again
        store(builder, value, target, place)


_multiply_1, _multiply_2, _multiply_3 = (_multiplier(STEP * height) for height in (1, 2, 3))


@device
def rows_of_tile(num_rows):
    """How many of the rows that are left make the next tile."""
    return min(num_rows, STEP * max(1, min(3, num_rows // STEP)))


@device
def multiply_tile(x, x_stride, num_rows, panel, panel_stride, depth, out, out_stride, adds):
    """out[m][r] = sum over k < depth of x[m][k] panel[k][r], for `num_rows` rows m (`rows_of_tile`), PANEL columns r.

    Added to what is there if `adds` is not 0. Rows of x, of the panel and of out are that many bytes apart.
    """
    if num_rows > 2 * STEP:
        _multiply_3(x, x_stride, num_rows, panel, panel_stride, depth, out, out_stride, adds)
    elif num_rows > STEP:
        _multiply_2(x, x_stride, num_rows, panel, panel_stride, depth, out, out_stride, adds)
    else:
        _multiply_1(x, x_stride, num_rows, panel, panel_stride, depth, out, out_stride, adds)
