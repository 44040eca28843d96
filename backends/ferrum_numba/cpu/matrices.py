"""Kernels of matrix products with stored weights: one or a few rows of x times every row of the weight.

The weight is read once, four rows at a time, each row group meeting all rows of x while it is in cache; more rows of x
than that are better served by `products`. What depends on the kind of weight is a routine of each kind, compiled when
it is first used.
Clauses: BK-NCPU-12..13, BK-NCPU-22 (specs/backend_numba.md), KN-QLINEAR-* (specs/kernels.md).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from numba import prange

from ferrum_numba.cpu.addresses import call, floats_at
from ferrum_numba.cpu.compiled import Routine, parallel_kernel, routine
from ferrum_numba.cpu.threads import chunk_bounds, num_chunks
from ferrum_numba.cpu.vector import KINDS, ROWS, dots, widen_stored

WEIGHTS_A_CHUNK = 16384  # worth a thread
UNPACKED_A_CHUNK = 65536


def _multiplier(kind: int) -> Routine:
    @routine(integers=10)
    def multiply_rows(start, stop, weight, stride, scales, x, out, num_x, size, num_weights):
        """out[m, r] for the rows start .. stop - 1 of the weight; x (num_x, size), out (num_x, num_weights), float32.

        `scales` are a float32 for each row of the weight, 0 where there are none.
        """
        found = np.empty(ROWS, np.float32)
        row = start
        while row < stop:
            taken = ROWS if stop - row >= ROWS else 1  # of too few rows each is taken ROWS times
            apart = stride if taken == ROWS else 0
            for m in range(num_x):
                dots(kind, weight + row * stride, apart, x + 4 * m * size, size, found.ctypes.data)
                target = floats_at(out + 4 * (m * num_weights + row), taken)
                for i in range(taken):
                    target[i] = found[i]
                if scales:
                    factors = floats_at(scales + 4 * row, taken)
                    for i in range(taken):
                        target[i] *= factors[i]
            row += taken

    return multiply_rows


def _unpacker(kind: int) -> Routine:
    @routine(integers=7)
    def unpack_run(start, stop, weight, stride, scales, out, size):
        """out (rows, size) float32 of the rows start .. stop - 1: exact, but for products with row scales."""
        for row in range(start, stop):
            widen_stored(kind, weight + row * stride, size, out + 4 * row * size)
            if scales:
                target, scale = floats_at(out + 4 * row * size, size), floats_at(scales + 4 * row, 1)[0]
                for i in range(size):
                    target[i] *= scale

    return unpack_run


MULTIPLY_ROWS: Final[Mapping[int, Routine]] = MappingProxyType({kind: _multiplier(kind) for kind in KINDS})
UNPACK_RUN: Final[Mapping[int, Routine]] = MappingProxyType({kind: _unpacker(kind) for kind in KINDS})


@parallel_kernel
def multiply(threads, multiply_rows, weight, stride, scales, x, out, num_x, size, num_weights):
    """out = x @ weight.T for few rows of x; `multiply_rows` is the address of the routine of the weight's kind."""
    groups = (num_weights + ROWS - 1) // ROWS
    chunks = num_chunks(threads, groups, WEIGHTS_A_CHUNK // max(1, ROWS * size * num_x))
    if chunks == 1:
        call(multiply_rows, (0, num_weights, weight, stride, scales, x, out, num_x, size, num_weights))
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, groups)
        stop = min(num_weights, stop * ROWS)
        call(multiply_rows, (start * ROWS, stop, weight, stride, scales, x, out, num_x, size, num_weights))


@parallel_kernel
def unpack_rows(threads, unpack_run, weight, stride, scales, out, num_rows, size):
    """float32 (num_rows, size) of stored rows; `unpack_run` is the address of the routine of their kind."""
    chunks = num_chunks(threads, num_rows, UNPACKED_A_CHUNK // max(1, size))
    if chunks == 1:
        call(unpack_run, (0, num_rows, weight, stride, scales, out, size))
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, num_rows)
        call(unpack_run, (start, stop, weight, stride, scales, out, size))
