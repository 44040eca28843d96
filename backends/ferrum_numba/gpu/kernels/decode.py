"""What a decode step needs beside the other kernels: where it is, on the device, and q, k, v brought into place.

Clauses: BK-NCUDA-22 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from typing import Any

from ferrum_numba.gpu.kernel import INTEGER, INTEGERS, Kernel, cuda, kernel
from ferrum_numba.gpu.storage import Storage

TOKEN, POSITION, LENGTH = 0, 1, 2  # what a cursor holds
CURSOR_SIZE = 3


def place_cursor() -> Kernel:
    """cursor = (token, position, position + 1): what the step's other kernels read instead of arguments."""

    @kernel(INTEGERS, INTEGER, INTEGER)
    def place_cursor(cursor: Any, token: int, position: int) -> None:
        if cuda.grid(1) == 0:
            cursor[TOKEN] = token
            cursor[POSITION] = position
            cursor[LENGTH] = position + 1

    return place_cursor


def turn_and_store(x: Storage, t: Storage) -> Kernel:
    """Rotates q in place, and k on its way to row `position` of its cache, where v goes as it is; a thread for a pair.

    qkv (H + 2G, 2 half), tables (P, half), caches (capacity, G, 2 half), all flat. (a, b) -> (a c - b s, b c + a s).
    """
    load, store, load_table = x.load, x.store, t.load

    @kernel(x.array, t.array, t.array, INTEGERS, x.array, x.array, INTEGER, INTEGER, INTEGER)
    def turn_and_store(
        qkv: Any,
        cos: Any,
        sin: Any,
        cursor: Any,
        k_cache: Any,
        v_cache: Any,
        num_heads: int,
        num_kv_heads: int,
        half: int,
    ) -> None:
        index = cuda.grid(1)
        if index < (num_heads + 2 * num_kv_heads) * half:
            position = cursor[POSITION]
            head, pair = index // half, index % half
            place = head * 2 * half + pair
            row = position * num_kv_heads * 2 * half + pair
            a, b = load(qkv, place), load(qkv, place + half)
            if head < num_heads + num_kv_heads:
                c, s = load_table(cos, position * half + pair), load_table(sin, position * half + pair)
                a, b = a * c - b * s, b * c + a * s
            if head < num_heads:
                store(qkv, place, a)
                store(qkv, place + half, b)
            elif head < num_heads + num_kv_heads:
                slot = row + (head - num_heads) * 2 * half
                store(k_cache, slot, a)
                store(k_cache, slot + half, b)
            else:
                slot = row + (head - num_heads - num_kv_heads) * 2 * half
                store(v_cache, slot, a)
                store(v_cache, slot + half, b)

    return turn_and_store
