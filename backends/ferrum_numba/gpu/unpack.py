"""Packed weights into float32 without conversion instructions: an integer n below 2**23 is the lower bits of 2**23 + n.

Clause: BK-NCUDA-43 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ferrum_numba.gpu.wide import FLOAT, HALF, I16, I32, Typed, simulated_by, types

TWO_TO_23 = 0x4B000000  # the bits of 2.0**23
Four, Two = types.UniTuple(types.float32, 4), types.UniTuple(types.float32, 2)


def _integer(builder: Any, bits: Any, shift: int, minus: float) -> Any:
    """The number at bit `shift` of `bits`, all others being 0, less `minus`; exact, fused or not."""
    magic = builder.bitcast(builder.or_(bits, I32(TWO_TO_23)), FLOAT)
    return builder.fsub(builder.fmul(magic, FLOAT(2.0**-shift)), FLOAT(2.0 ** (23 - shift) + minus))


def _half_value(bits: Any) -> Any:
    return np.float32(np.uint16(bits).view(np.float16))


@simulated_by(_half_value)
def half_value(typing_context: Any, bits: Any) -> Typed:
    """half_value(bits): the fp16 number with these 16 bits, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], HALF), FLOAT)

    return types.float32(types.uint16), codegen


def _nibbles(word: Any) -> Any:
    return tuple(np.float32((int(word) >> shift & 15) - 8) for shift in (0, 4, 8, 12))


@simulated_by(_nibbles)
def nibbles(typing_context: Any, word: Any) -> Typed:
    """nibbles(word): the four 4-bit numbers of 16 bits, lowest first, each minus 8."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], I32)
        values = [_integer(builder, builder.and_(wide, I32(15 << shift)), shift, 8.0) for shift in (0, 4, 8, 12)]
        return context.make_tuple(builder, signature.return_type, values)

    return Four(types.uint16), codegen


def _signed_bytes(word: Any) -> Any:
    return tuple(np.float32((int(word) >> shift & 255 ^ 128) - 128) for shift in (0, 8))


@simulated_by(_signed_bytes)
def signed_bytes(typing_context: Any, word: Any) -> Typed:
    """signed_bytes(word): the two int8 numbers of 16 bits, the lower first."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flipped = builder.zext(builder.xor(arguments[0], I16(0x8080)), I32)
        low, high = builder.and_(flipped, I32(255)), builder.lshr(flipped, I32(8))
        values = [_integer(builder, low, 0, 128.0), _integer(builder, high, 0, 128.0)]
        return context.make_tuple(builder, signature.return_type, values)

    return Two(types.uint16), codegen
