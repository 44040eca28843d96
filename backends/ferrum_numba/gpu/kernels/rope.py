"""Rotary position embedding: one block for each token, a thread for eight neighbouring pairs of a head.

Clauses: BK-NCUDA-11, BK-NCUDA-42 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from typing import Any

from ferrum_numba.gpu.kernel import INTEGER, INTEGERS, Kernel, cuda, device, kernel
from ferrum_numba.gpu.kernels.packs import Access, narrow_access, wide_access
from ferrum_numba.gpu.pack_math import minus, plus, times
from ferrum_numba.gpu.storage import Storage
from ferrum_numba.gpu.wide import PACK, is_aligned

THREADS = 256


def blocks_for(
    batch: int, num_tokens: int, num_heads: int, half: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(grid, block): tokens by sequences; threads along a head, then over heads. Pure."""
    along = min(-(-half // PACK), THREADS)
    over = min(num_heads, max(1, THREADS // along))
    return (num_tokens, batch, 1), (along, over, 1)


def rotary_embedding(x: Storage, t: Storage) -> Kernel:
    """(a, b) -> (a c - b s, b c + a s) for the pair (i, i + half) of every head; x (B, T, H, 2 half) flat.

    c, s are row positions[token] of the tables (P, half). blockIdx is (token, sequence).
    """
    wide, narrow = _turn(wide_access(x), wide_access(t)), _turn(narrow_access(), narrow_access())

    @kernel(x.array, t.array, t.array, INTEGERS, x.array, INTEGER, INTEGER)
    def rotary_embedding(
        source: Any, cos: Any, sin: Any, positions: Any, target: Any, num_heads: int, half: int
    ) -> None:
        table = positions[cuda.blockIdx.x] * half
        token = (cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x) * num_heads * 2 * half
        is_whole = half % PACK == 0 and is_aligned(source) and is_aligned(target)
        is_whole = is_whole and is_aligned(cos) and is_aligned(sin)
        head = cuda.threadIdx.y
        while head < num_heads:
            start = token + head * 2 * half
            first = cuda.threadIdx.x * PACK
            while first < half:
                if is_whole:
                    wide(source, cos, sin, target, start, table, first, half)
                else:
                    narrow(source, cos, sin, target, start, table, first, half)
                first += cuda.blockDim.x * PACK
            head += cuda.blockDim.y

    return rotary_embedding


def _turn(at: Access, of: Access) -> Any:
    fetch, widen, put, fetch_table, widen_table = at.fetch, at.widen, at.put, of.fetch, of.widen

    @device
    def turn(source: Any, cos: Any, sin: Any, target: Any, start: int, table: int, first: int, half: int) -> None:
        x, y = fetch(source, start, first, half), fetch(source, start + half, first, half)
        u, v = fetch_table(cos, table, first, half), fetch_table(sin, table, first, half)
        a, b, c, s = widen(x), widen(y), widen_table(u), widen_table(v)
        put(target, start, first, half, minus(times(a, c), times(b, s)))
        put(target, start + half, first, half, plus(times(b, c), times(a, s)))

    return turn
