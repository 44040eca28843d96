"""Self-check and state of a paged cache.  Clauses: KV-POOL-6 (specs/kv_cache.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from ferrum_ref.errors import InternalError
from ferrum_ref.interfaces.kv_cache import BlockTable
from ferrum_ref.interfaces.step import SequenceState
from ferrum_ref.kv_cache.block_pool import BlockPool
from ferrum_ref.kv_cache.handle import PagedKvCacheHandle


def check_cache(
    pool: BlockPool,
    handles: Sequence[PagedKvCacheHandle],
    forks: Sequence[BlockTable],
    sequences: Iterable[SequenceState],
) -> None:
    """Raises InternalError unless references, free list, digests, tables and sequences agree.  [KV-POOL-6]"""
    tables = [*(handle.table for handle in handles), *forks]
    held = Counter(block for table in tables for block in table.physical_blocks)
    free = list(pool.free_list())
    for block, count in enumerate(pool.ref_counts):
        _require(count == held[block], f"block {block} has {count} references, {held[block]} tables hold it")
    _require(len(free) == pool.num_free, f"{len(free)} blocks in the free list, {pool.num_free} counted")
    _require(len(set(free)) == len(free), "a block stands in the free list twice")
    unreferenced = {block for block, count in enumerate(pool.ref_counts) if not count}
    _require(set(free) == unreferenced, "free list and unreferenced blocks differ")
    pool.index.check()
    for table in tables:
        size = table.block_size
        _require(len(set(table.physical_blocks)) == table.num_blocks(), "a table holds a block twice")
        _require(table.sequence_length <= table.num_blocks() * size, "a table is longer than its blocks")
    owned = {id(handle.owner): handle for handle in handles if handle.owner is not None}
    for sequence in sequences:
        if sequence.handle is not None:
            handle = owned.pop(id(sequence), None)
            _require(handle is sequence.handle, f"request {sequence.request_id} and its handle disagree")
            length = sequence.handle.table.sequence_length
            _require(
                length == sequence.num_computed_tokens,
                f"request {sequence.request_id}: table says {length} tokens, {sequence.num_computed_tokens} computed",
            )
    _require(not owned, f"{len(owned)} caches belong to no live request")
    _check_private_tails(pool, handles)


def _check_private_tails(pool: BlockPool, handles: Sequence[PagedKvCacheHandle]) -> None:
    """No block is shared while one of its holders may write to it."""
    for handle in handles:
        size, length = handle.table.block_size, handle.table.sequence_length
        for block in handle.table.physical_blocks[length // size : -(-handle.writable_tokens // size)]:
            if handle.writable_tokens > length:
                _require(pool.ref_counts[block] == 1, f"block {block} is shared and writable")


def state_of(pool: BlockPool, handles: Sequence[PagedKvCacheHandle], forks: Sequence[BlockTable]) -> Iterator[object]:
    """Free order, references, digests, tables: equal streams behave equally. Pure."""
    yield list(pool.free_list())
    yield pool.ref_counts
    yield pool.index.state()
    for handle in sorted(handles, key=lambda handle: handle.serial):
        table = handle.table
        yield (handle.serial, str(handle.request_id), table.physical_blocks, table.sequence_length)
        yield (handle.writable_tokens, handle.num_registered_blocks)
    for table in forks:
        yield (table.physical_blocks, table.sequence_length)


def _require(holds: bool, breach: str) -> None:
    if not holds:
        raise InternalError(f"KV cache invariant broken: {breach}")
