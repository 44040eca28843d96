"""Stored elements and float32, exponential and hyperbolic tangent, inside kernels.

Numba knows no 16-bit floats: their bits are widened to float32, exactly, and results are rounded to them once, to
nearest, ties to even, with gradual underflow and overflow to infinity; a NaN stays one.
Clauses: BK-NCPU-6..7 (specs/backend_numba.md).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math

import numpy as np
from numba import prange

from ferrum_numba.cpu.addresses import floats_at, halves_at
from ferrum_numba.cpu.compiled import device, ordered, parallel_kernel
from ferrum_numba.cpu.threads import chunk_bounds, num_chunks
from ferrum_numba.cpu.vector import F16, F32

ELEMENTS_A_CHUNK = 16384


@ordered
def half_to_float(bits):
    """A float16 bit pattern's number."""
    magnitude = np.uint32(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13))
    scaled = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    exponent = np.uint32(0x7F800000) if magnitude >= np.uint32(0x7C00 << 13) else np.uint32(0)
    sign = np.uint32(np.uint32(bits & np.uint16(0x8000)) << np.uint32(16))
    return np.uint32(scaled | exponent | sign).view(np.float32)


@ordered
def bfloat_to_float(bits):
    """A bfloat16 bit pattern's number: the upper half of a float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@ordered
def float_to_half(value):
    """The bits of the nearest float16.

    Subnormal results are rounded by an addition whose last place is 2**-24. Source: Giesen, "Half to float done quick".
    """
    bits = np.float32(value).view(np.uint32)
    sign = np.uint32(bits & np.uint32(0x80000000))
    bits = np.uint32(bits ^ sign)
    odd = np.uint32((bits >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(bits - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13))
    shifted = np.float32(bits.view(np.float32) + np.float32(0.5)).view(np.uint32)
    small = np.uint32(shifted - np.uint32(126 << 23))
    beyond = np.uint32(0x7E00) if bits > np.uint32(0x7F800000) else np.uint32(0x7C00)
    found = small if bits < np.uint32(113 << 23) else normal
    found = beyond if bits >= np.uint32(143 << 23) else found
    return np.uint16(found | np.uint32(sign >> np.uint32(16)))


@ordered
def float_to_bfloat(value):
    """The bits of the nearest bfloat16."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    quiet = np.uint32(np.uint32(bits >> np.uint32(16)) | np.uint32(0x40))
    is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(quiet if is_nan else rounded)


@ordered
def exp32(x):
    """exp(x) within one unit in the last place, subnormal results included; NaN gives NaN.

    x = n ln 2 + r, |r| <= ln(2) / 2; a polynomial for exp(r), then two powers of two. Source: Moshier, Cephes, expf.
    """
    low = x if x > np.float32(-104.0) else np.float32(-104.0)
    held = low if low < np.float32(89.0) else np.float32(89.0)
    n = (held * np.float32(1.4426950408889634) + np.float32(12582912.0)) - np.float32(12582912.0)
    r = held - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1.0)
    whole = np.int32(n)
    first = np.int32(whole >> np.int32(1))
    second = np.int32(whole - first)
    p = p * np.int32((first + np.int32(127)) << np.int32(23)).view(np.float32)
    p = p * np.int32((second + np.int32(127)) << np.int32(23)).view(np.float32)
    return p if x == x else x


@ordered
def tanh32(x):
    """tanh(x) within 3 units in the last place; NaN gives NaN.  Source: Moshier, Cephes, tanhf."""
    size = np.float32(abs(x))
    if size > np.float32(0.625):
        rest = np.float32(1.0) - np.float32(2.0) / (exp32(size + size) + np.float32(1.0))
        return rest if x > np.float32(0.0) else -rest
    z = x * x
    p = np.float32(-5.70498872745e-3)
    p = p * z + np.float32(2.06390887954e-2)
    p = p * z + np.float32(-5.37397155531e-2)
    p = p * z + np.float32(1.33314422036e-1)
    p = p * z + np.float32(-3.33332819422e-1)
    return p * z * x + x


@ordered
def rsqrt(x):
    return np.float32(1.0) / np.float32(math.sqrt(x))


@device
def element_bytes(kind):
    return 4 if kind == F32 else 2


@device
def widened(address, kind, count, scratch):
    """`count` stored elements as float32: themselves, or copies in `scratch`."""
    if kind == F32:
        return floats_at(address, count)
    bits = halves_at(address, count)
    if kind == F16:
        for i in range(count):
            scratch[i] = half_to_float(bits[i])
    else:
        for i in range(count):
            scratch[i] = bfloat_to_float(bits[i])
    return scratch[:count]


@device
def room_for(address, kind, count, scratch):
    """Where to put `count` float32 results: the place itself, or `scratch`, from which `store` rounds them."""
    return floats_at(address, count) if kind == F32 else scratch[:count]


@device
def store(values, address, kind, count):
    """The results that `room_for` gave room to, rounded where they have to be."""
    if kind == F32:
        return
    bits = halves_at(address, count)
    if kind == F16:
        for i in range(count):
            bits[i] = float_to_half(values[i])
    else:
        for i in range(count):
            bits[i] = float_to_bfloat(values[i])


@parallel_kernel
def widen_all(threads, source, kind, target, count):
    """float32 values of `count` stored 16-bit elements."""
    chunks = num_chunks(threads, count, ELEMENTS_A_CHUNK)
    if chunks == 1:
        widened(source, kind, count, floats_at(target, count))
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, count)
        widened(source + 2 * start, kind, stop - start, floats_at(target + 4 * start, stop - start))


@parallel_kernel
def round_all(threads, source, target, kind, count):
    """`count` float32 values as 16-bit elements."""
    chunks = num_chunks(threads, count, ELEMENTS_A_CHUNK)
    if chunks == 1:
        store(floats_at(source, count), target, kind, count)
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, count)
        store(floats_at(source + 4 * start, stop - start), target + 2 * start, kind, stop - start)
