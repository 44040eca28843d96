"""Rotary position embedding: one block for each token.   Clause: BK-NCUDA-11 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

from typing import Any

from ferrum_numba.gpu.kernel import INTEGER, INTEGERS, Kernel, cuda, kernel
from ferrum_numba.gpu.storage import Storage


def rotary_embedding(x: Storage, t: Storage) -> Kernel:
    """(a, b) -> (a c - b s, b c + a s) for the pair (i, i + half) of every head; x (B, T, H, 2 half) flat.

    c, s are row positions[token] of the tables (P, half).
    """
    load, store, load_table = x.load, x.store, t.load

    @kernel(x.array, t.array, t.array, INTEGERS, x.array, INTEGER, INTEGER, INTEGER)
    def rotary_embedding(
        source: Any,
        cos: Any,
        sin: Any,
        positions: Any,
        target: Any,
        num_tokens: int,
        num_heads: int,
        half: int,
    ) -> None:
        table = positions[cuda.blockIdx.x % num_tokens] * half
        start = cuda.blockIdx.x * num_heads * 2 * half
        for index in range(cuda.threadIdx.x, num_heads * half, cuda.blockDim.x):
            head = index // half
            pair = index - head * half
            first = start + head * half + index  # the pair of this head: 2 half head + pair
            a, b = load(source, first), load(source, first + half)
            c, s = load_table(cos, table + pair), load_table(sin, table + pair)
            store(target, first, a * c - b * s)
            store(target, first + half, b * c + a * s)

    return rotary_embedding
