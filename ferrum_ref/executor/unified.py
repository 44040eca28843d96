"""The synchronous core: one mixed forward over paged K/V.  Clauses: MX-UNIFIED-1..4 (specs/model_executor.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import ModelError, NotFoundError, ResourceExhaustedError
from ferrum_ref.interfaces.forward import ForwardBatch, RaggedDecoder
from ferrum_ref.interfaces.kv_cache import KvCacheHandle
from ferrum_ref.interfaces.kv_storage import KvBatch, PagedKv
from ferrum_ref.interfaces.model_executor import UnifiedBatch, UnifiedBatchItem

Logits = npt.NDArray[np.float32]


def run_unified(decoder: RaggedDecoder, storage: PagedKv, batch: UnifiedBatch) -> list[Logits | None]:
    """Logits `[V]` after the last token of each final item, None for the others, in the items' order.  [MX-UNIFIED-1]

    Single tokens run first, side by side, so that they share one attention call. Mutates the storage: each item's K/V
    at its positions, in its own blocks.  Raises, before anything is written: ModelError (no tokens, a negative
    position, one sequence twice), ResourceExhaustedError (beyond the context or the item's blocks), NotFoundError (a
    freed handle), InvalidParameterError (token id or block out of range).  [MX-UNIFIED-3, MX-UNIFIED-5]
    """
    if not batch.items:
        return []
    check_distinct(batch.items)
    order = sorted(range(len(batch.items)), key=lambda i: len(batch.items[i].q_tokens) != 1)
    items = [batch.items[i] for i in order]
    forward = ForwardBatch.build(
        [item.q_tokens for item in items],
        [item.pos_offset for item in items],
        [item.is_final_chunk for item in items],
    )
    decoder.check(forward)
    kv = bind(storage, [item.kv_cache for item in items], [item.pos_offset for item in items], forward.lengths)
    rows = iter(np.asarray(decoder.forward(forward, kv).to_numpy(), dtype=np.float32))
    results: list[Logits | None] = [None] * len(items)
    for index, item in zip(order, items, strict=True):
        if item.is_final_chunk:
            results[index] = next(rows)
    return results


def bind(
    storage: PagedKv,
    handles: Sequence[KvCacheHandle],
    starts: Sequence[int],
    num_new: Sequence[int],
    operation: str = "execute_unified",
) -> KvBatch:
    """The handles' blocks as one forward's cache. Pure.

    Raises NotFoundError (a freed handle), ResourceExhaustedError (a table is too short).
    """
    tables = []
    for handle, start, new in zip(handles, starts, num_new, strict=True):
        if not handle.is_valid():
            raise NotFoundError(f"{operation}: cache {handle.cache_id()} was freed; allocate a new one")
        blocks = handle.block_table().physical_blocks
        if len(blocks) * storage.block_size < start + new:
            raise ResourceExhaustedError(
                f"{operation}: {handle.cache_id()} has {len(blocks)} blocks of {storage.block_size} tokens, which"
                f" cannot hold {start} cached + {new} new tokens; extend it first"
            )
        tables.append(blocks)
    return storage.bind(tables, starts, num_new)


def check_distinct(items: Sequence[UnifiedBatchItem]) -> None:
    """Raises ModelError naming a sequence that occurs twice, or one with nothing to run."""
    seen: set[str] = set()
    for item in items:
        if item.seq_id in seen:
            raise ModelError(f"execute_unified: sequence {item.seq_id!r} occurs twice; merge its tokens into one item")
        if not item.q_tokens:
            raise ModelError(f"execute_unified: sequence {item.seq_id!r} has no tokens; leave it out of the batch")
        seen.add(item.seq_id)
