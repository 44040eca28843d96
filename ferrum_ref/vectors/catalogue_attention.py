"""The part of the committed set that concerns attention and the cache.   Clauses: GV-SET-1..3."""

from __future__ import annotations

from typing import Final

from ferrum_ref.vectors.selection import ALL, BF16, BOTH, FP16, FP32, Group, Pick

ATTENTION: Final = (
    Group(
        "attention",
        "o = softmax(cap(softmax_scale q k^T) + mask) v; q (B, T, H, D), k and v (B, S, G, D), "
        "head h reads h // (H / G); causal: query t sees keys j <= S - T + t, the last sliding_window of them if that "
        "is above 0; cap(s) = c tanh(s / c) for logit_softcap c > 0; sinks (H,): one more logit in each head's sum; "
        "a query that sees nothing gives zeros",
        ("KN-ATTN-1", "KN-ATTN-2"),
        (
            Pick(3, FP16, ("grouped heads 7:1",)),
            Pick(9, FP32, ("queries that see nothing",), ("KN-ATTN-3",)),
            Pick(11, ALL, ("one key",)),
            Pick(20, FP32, ("no keys",), ("KN-ATTN-3",)),
            Pick(23, FP32, ("D-52", "scale is not 1/sqrt(D)"), ("KN-ATTN-4",)),
            Pick(30, BF16, ("D-52", "window"), ("KN-ATTN-6",)),
            Pick(31, FP16, ("D-52", "window"), ("KN-ATTN-6",)),
            Pick(36, BOTH, ("window", "soft cap"), ("KN-ATTN-6", "KN-ATTN-10", "KN-ATTN-11")),
            Pick(42, FP16, ("maximum taken off",), ("KN-ATTN-5",)),
            Pick(54, FP32, ("D-52", "negative scale"), ("KN-ATTN-4",)),
        ),
    ),
    Group(
        "paged_attention",
        "attention of each sequence b over positions 0 .. lens[b] - 1, its T queries the last of them; position p lies "
        "in block table[b, p // block], row p % block, of the caches (blocks, block, G, D); q (B, T, H, D), or (B, H, "
        "D) for T = 1; what no position needs holds NaN",
        ("KN-PAGED-1", "KN-PAGED-3", "KN-PAGED-5"),
        (
            Pick(3, BF16, ("D-17", "ragged lengths")),
            Pick(9, ALL, ("blocks of one", "ragged lengths")),
            Pick(10, FP16, ("block size 7", "grouped heads 7:1", "last block ragged")),
            Pick(13, FP32, ("D-17", "ragged lengths", "empty sequence")),
            Pick(21, BF16, ("ragged lengths",), ("KN-PAGED-8",)),
            Pick(23, BF16, ("ragged lengths", "window"), ("KN-PAGED-8",)),
            Pick(38, FP16, ("negative scale", "last block ragged")),
        ),
    ),
    Group(
        "write_kv",
        "cache[slots[t]] = rows[t], the cache (blocks, block, G, D) seen as (slots, G, D); a slot below 0 skips a row",
        ("KN-WRITEKV-1",),
        (Pick(1, BF16, (), ("KN-WRITEKV-2",)), Pick(2, FP32), Pick(3, FP32)),
    ),
)
