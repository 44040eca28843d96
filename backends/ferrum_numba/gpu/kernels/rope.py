"""Rotary position embedding: one thread for each pair.   Clause: BK-NCUDA-11 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

from typing import Any

from ferrum_numba.gpu.kernel import INTEGER, INTEGERS, Kernel, cuda, kernel
from ferrum_numba.gpu.storage import Storage


def rotary_embedding(x: Storage, t: Storage) -> Kernel:
    """(a, b) -> (a c - b s, b c + a s) for the pair (i, i + half) of every head; x (B, T, H, 2 half) flat.

    c, s are row positions[token] of the tables (P, half).
    """
    load, store, load_table = x.load, x.store, t.load

    @kernel(x.array, t.array, t.array, INTEGERS, x.array, INTEGER, INTEGER, INTEGER, INTEGER)
    def rotary_embedding(
        source: Any,
        cos: Any,
        sin: Any,
        positions: Any,
        target: Any,
        num_pairs: int,
        num_tokens: int,
        num_heads: int,
        half: int,
    ) -> None:
        index = cuda.grid(1)
        if index < num_pairs:
            pair, head = index % half, index // half
            place = positions[head // num_heads % num_tokens] * half + pair
            c, s = load_table(cos, place), load_table(sin, place)
            first = head * 2 * half + pair
            a, b = load(source, first), load(source, first + half)
            store(target, first, a * c - b * s)
            store(target, first + half, b * c + a * s)

    return rotary_embedding
