"""Arithmetic on packs: tuples of eight float32 numbers.   Clause: BK-NCUDA-42 (specs/backend_numba_cuda.md).

Intrinsics, since numba takes minutes to inline as many functions of tuples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ferrum_numba.gpu.wide import FLOAT, I64, PACK, Typed, address_of, simulated_by, types

Numbers = types.UniTuple(types.float32, PACK)
ZERO = np.float32(0.0)


def _parts(builder: Any, pack: Any) -> list[Any]:
    return [builder.extract_value(pack, i) for i in range(PACK)]


def _dot(a: Any, b: Any, total: Any) -> Any:
    for left, right in zip(a, b, strict=True):
        total += left * right
    return total


@simulated_by(_dot)
def dot(typing_context: Any, a: Any, b: Any, total: Any) -> Typed:
    """dot(a, b, total): total + a . b, one product after the other."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, result = _parts(builder, arguments[0]), _parts(builder, arguments[1]), arguments[2]
        for one, other in zip(left, right, strict=True):
            result = builder.fadd(result, builder.fmul(one, other))
        return result

    return types.float32(Numbers, Numbers, types.float32), codegen


def _sum_of(a: Any, total: Any) -> Any:
    for value in a:
        total += value
    return total


@simulated_by(_sum_of)
def sum_of(typing_context: Any, a: Any, total: Any) -> Typed:
    """sum_of(a, total): total + the numbers, one after the other."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result = arguments[1]
        for value in _parts(builder, arguments[0]):
            result = builder.fadd(result, value)
        return result

    return types.float32(Numbers, types.float32), codegen


def _plus(a: Any, b: Any) -> Any:
    return tuple(left + right for left, right in zip(a, b, strict=True))


@simulated_by(_plus)
def plus(typing_context: Any, a: Any, b: Any) -> Typed:
    """plus(a, b): the sums."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        both = zip(_parts(builder, arguments[0]), _parts(builder, arguments[1]), strict=True)
        return context.make_tuple(builder, signature.return_type, [builder.fadd(*pair) for pair in both])

    return Numbers(Numbers, Numbers), codegen


def _minus(a: Any, b: Any) -> Any:
    return tuple(left - right for left, right in zip(a, b, strict=True))


@simulated_by(_minus)
def minus(typing_context: Any, a: Any, b: Any) -> Typed:
    """minus(a, b): the differences."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        both = zip(_parts(builder, arguments[0]), _parts(builder, arguments[1]), strict=True)
        return context.make_tuple(builder, signature.return_type, [builder.fsub(*pair) for pair in both])

    return Numbers(Numbers, Numbers), codegen


def _times(a: Any, b: Any) -> Any:
    return tuple(left * right for left, right in zip(a, b, strict=True))


@simulated_by(_times)
def times(typing_context: Any, a: Any, b: Any) -> Typed:
    """times(a, b): the products."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        both = zip(_parts(builder, arguments[0]), _parts(builder, arguments[1]), strict=True)
        return context.make_tuple(builder, signature.return_type, [builder.fmul(*pair) for pair in both])

    return Numbers(Numbers, Numbers), codegen


def _scaled(a: Any, scale: Any) -> Any:
    return tuple(value * scale for value in a)


@simulated_by(_scaled)
def scaled(typing_context: Any, a: Any, scale: Any) -> Typed:
    """scaled(a, scale): the numbers times `scale`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = [builder.fmul(value, arguments[1]) for value in _parts(builder, arguments[0])]
        return context.make_tuple(builder, signature.return_type, values)

    return Numbers(Numbers, types.float32), codegen


def _shifted(a: Any, shift: Any, first: int, end: int) -> Any:
    return tuple(value - shift if first + i < end else ZERO for i, value in enumerate(a))


@simulated_by(_shifted)
def shifted(typing_context: Any, a: Any, shift: Any, first: Any, end: Any) -> Typed:
    """shifted(a, shift, first, end): the numbers less `shift`, of columns from `first` on; zeros from `end` on."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pack, shift, first, end = arguments
        values = []
        for i, value in enumerate(_parts(builder, pack)):
            is_inside = builder.icmp_signed("<", builder.add(first, I64(i)), end)
            values.append(builder.select(is_inside, builder.fsub(value, shift), FLOAT(0.0)))
        return context.make_tuple(builder, signature.return_type, values)

    return Numbers(Numbers, types.float32, types.int64, types.int64), codegen


def _spread(pack: Any, array: Any, first: int) -> None:
    array.store_pack(first, pack, 4)


@simulated_by(_spread)
def spread(typing_context: Any, pack: Any, array: Any, first: Any) -> Typed:
    """spread(pack, array, first): array[first : first + 8] = pack, in float32.

    A local array that is touched at constant places only stays in registers.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for i, value in enumerate(_parts(builder, arguments[0])):
            index = builder.add(arguments[2], I64(i))
            builder.store(value, address_of(context, builder, signature.args[1], arguments[1], index))
        return context.get_dummy_value()

    return types.void(Numbers, array, types.int64), codegen


def _gathered(array: Any, first: int) -> Any:
    return array.pack(first, PACK, 4)


@simulated_by(_gathered)
def gathered(typing_context: Any, array: Any, first: Any) -> Typed:
    """gathered(array, first): array[first : first + 8] as a pack."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, (source, origin) = signature.args[0], arguments
        indices = [builder.add(origin, I64(i)) for i in range(PACK)]
        values = [builder.load(address_of(context, builder, kind, source, index)) for index in indices]
        return context.make_tuple(builder, signature.return_type, values)

    return Numbers(array, types.int64), codegen
