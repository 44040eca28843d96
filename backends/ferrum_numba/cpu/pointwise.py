"""Kernels element by element: SiLU and gated SiLU, both forms of GELU, rotary positions.

Operands come in blocks of elements that lie one behind another; the blocks themselves may be apart, as the halves of a
fused projection are.
Clauses: BK-NCPU-8..9 (specs/backend_numba.md), KN-SILU-*, KN-GELU-*, KN-ROPE-* (specs/kernels.md).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math

import numpy as np
from numba import prange

from ferrum_numba.cpu.addresses import floats_at, integers_at
from ferrum_numba.cpu.compiled import device, ordered, parallel_kernel
from ferrum_numba.cpu.floats import element_bytes, exp32, room_for, store, widened
from ferrum_numba.cpu.threads import chunk_bounds, num_chunks
from ferrum_numba.cpu.vector import F32

SMALLEST_CHUNK = 1 << 16  # elements worth a thread
ERF, TANH = 0, 1  # the two forms of GELU


@ordered
def silu32(x):
    """x sigmoid(x) = x m**2 / (1 + h**2), h = exp(-|x| / 2), m = h below 0 and 1 above: nothing overflows.

    exp(x) in two factors, since it becomes subnormal long before x exp(x) does; -0 at -inf.
    """
    half = exp32(np.float32(-0.5) * np.float32(abs(x)))
    factor = half if x < np.float32(0.0) else np.float32(1.0)
    y = x * factor * factor / (np.float32(1.0) + half * half)
    return np.float32(-0.0) if x == np.float32(-np.inf) else y


@device
def silu_mul_blocks(start, stop, gate, up, out, gate_step, up_step, size, count, kind):
    """silu(gate) * up, or silu(gate) where `up` is 0."""
    first, second = np.empty(size, np.float32), np.empty(size, np.float32)
    width = element_bytes(kind)
    for block in range(start, stop):
        here = min(size, count - block * size)
        gates = widened(gate + block * gate_step, kind, here, first)
        target = room_for(out + block * size * width, kind, here, first)
        if up:
            ups = widened(up + block * up_step, kind, here, second)
            for i in range(here):
                target[i] = silu32(gates[i]) * ups[i]
        else:
            for i in range(here):
                target[i] = silu32(gates[i])
        store(target, out + block * size * width, kind, here)


@parallel_kernel
def silu_mul(threads, gate, up, out, gate_step, up_step, size, count, kind):
    num_blocks = (count + size - 1) // size
    chunks = num_chunks(threads, num_blocks, SMALLEST_CHUNK // size)
    if chunks == 1:
        silu_mul_blocks(0, num_blocks, gate, up, out, gate_step, up_step, size, count, kind)
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, num_blocks)
        silu_mul_blocks(start, stop, gate, up, out, gate_step, up_step, size, count, kind)


@ordered
def gelu64(x, form):
    """x/2 erfc(-x / sqrt 2), or x sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x**3); -0 at -inf."""
    if x == -np.inf:
        return -0.0
    if form == ERF:
        return 0.5 * x * math.erfc(-x * math.sqrt(0.5))
    return x / (1.0 + math.exp(-2.0 * math.sqrt(2.0 / math.pi) * x * (1.0 + 0.044715 * x * x)))


@ordered
def to_odd(value):
    """The float64 cut to float32, the last bit set where that loses something: rounding it again rounds once.

    Source: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums", rounding to odd.
    """
    narrow = np.float32(value)
    back = np.float64(narrow)
    if back == value or value != value:
        return narrow
    bits = narrow.view(np.uint32)
    if abs(back) > abs(value):
        bits = np.uint32(bits - np.uint32(1))
    return np.uint32(bits | np.uint32(1)).view(np.float32)


@device
def gelu_run(start, stop, x, out, form, kind):
    width, scratch = element_bytes(kind), np.empty(stop - start, np.float32)
    values = widened(x + start * width, kind, stop - start, scratch)
    target = room_for(out + start * width, kind, stop - start, scratch)
    for i in range(stop - start):
        y = gelu64(np.float64(values[i]), form)
        target[i] = np.float32(y) if kind == F32 else to_odd(y)
    store(target, out + start * width, kind, stop - start)


@parallel_kernel
def gelu(threads, x, out, count, form, kind):
    chunks = num_chunks(threads, count, SMALLEST_CHUNK // 8)
    if chunks == 1:
        gelu_run(0, count, x, out, form, kind)
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, count)
        gelu_run(start, stop, x, out, form, kind)


@device
def turn(row, cos, sin, out, half):
    """(a, b) -> (a c - b s, b c + a s) for the pairs (row[i], row[i + half]). `out` may be `row`."""
    for i in range(half):
        a, b = row[i], row[i + half]
        out[i] = a * cos[i] - b * sin[i]
        out[i + half] = b * cos[i] + a * sin[i]


@device
def rotate_tokens(
    start, stop, x, cos, sin, positions, out, tokens, heads, size, batch_step, token_step, head_step, kind
):
    scratch, turned = np.empty(size, np.float32), np.empty(size, np.float32)
    half, width = size // 2, element_bytes(kind)
    places = integers_at(positions, tokens)
    for row in range(start, stop):
        place = 4 * places[row % tokens] * half
        angles_cos, angles_sin = floats_at(cos + place, half), floats_at(sin + place, half)
        source = x + row // tokens * batch_step + row % tokens * token_step
        for head in range(heads):
            target = out + (row * heads + head) * size * width
            values = widened(source + head * head_step, kind, size, scratch)
            found = room_for(target, kind, size, turned)
            turn(values, angles_cos, angles_sin, found, half)
            store(found, target, kind, size)


@parallel_kernel
def rotate(threads, x, cos, sin, positions, out, batches, tokens, heads, size, batch_step, token_step, head_step, kind):
    """x of three strides, its elements one behind another; float32 tables; positions int64."""
    chunks = num_chunks(threads, batches * tokens, SMALLEST_CHUNK // max(1, heads * size))
    if chunks == 1:
        rotate_tokens(
            0,
            batches * tokens,
            x,
            cos,
            sin,
            positions,
            out,
            tokens,
            heads,
            size,
            batch_step,
            token_step,
            head_step,
            kind,
        )
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, batches * tokens)
        rotate_tokens(
            start, stop, x, cos, sin, positions, out, tokens, heads, size, batch_step, token_step, head_step, kind
        )
