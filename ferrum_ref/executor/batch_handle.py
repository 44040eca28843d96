"""The caches of a batch of several sequences behind one handle.  Clauses: MX-HANDLE-5 (specs/model_executor.md)."""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_ref.errors import InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.kv_cache import BlockTable, CacheHandleStats, KvCacheHandle
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.types.devices import Device


class BatchCacheHandle(KvCacheHandle):
    """One cache a row: what `prefill` of `[B, T]` returns and `decode` of `[B, 1]` takes.  [MX-HANDLE-5]

    Each row keeps its own block table, length and life; there is no common table (UnsupportedError).
    """

    __slots__ = ("rows",)

    def __init__(self, rows: Sequence[KvCacheHandle]) -> None:
        """Raises InvalidParameterError without rows, or for one cache twice."""
        if not rows or len({row.cache_id() for row in rows}) != len(rows):
            raise InvalidParameterError(
                f"BatchCacheHandle: expected at least one cache and each once, got {[row.cache_id() for row in rows]}"
            )
        self.rows = tuple(rows)

    def block_table(self) -> BlockTable:
        raise UnsupportedError(f"{self.cache_id()}: every row has a block table of its own; use rows[i].block_table()")

    def block_table_mut(self) -> BlockTable:
        return self.block_table()

    def as_any(self) -> BatchCacheHandle:
        return self

    def device(self) -> Device:
        return self.rows[0].device()

    def num_tokens(self) -> int:
        """Tokens of the longest row."""
        return max(row.num_tokens() for row in self.rows)

    def num_layers(self) -> int:
        return self.rows[0].num_layers()

    def num_heads(self) -> int:
        return self.rows[0].num_heads()

    def head_dim(self) -> int:
        return self.rows[0].head_dim()

    def key_cache(self, layer: int) -> TensorRef | None:
        """The rows differ in length.  Raises UnsupportedError unless there is one row."""
        return self._only_row("key_cache").key_cache(layer)

    def value_cache(self, layer: int) -> TensorRef | None:
        """The rows differ in length.  Raises UnsupportedError unless there is one row."""
        return self._only_row("value_cache").value_cache(layer)

    def clone_handle(self) -> BatchCacheHandle:
        return BatchCacheHandle([row.clone_handle() for row in self.rows])

    def stats(self) -> CacheHandleStats:
        """Sums; utilization weighted by blocks, last_access the latest."""
        parts = [row.stats() for row in self.rows]
        blocks = sum(part.blocks_allocated for part in parts)
        return CacheHandleStats(
            memory_bytes=sum(part.memory_bytes for part in parts),
            blocks_allocated=blocks,
            tokens_stored=sum(part.tokens_stored for part in parts),
            utilization=sum(p.utilization * p.blocks_allocated for p in parts) / blocks if blocks else 0.0,
            last_access=max(part.last_access for part in parts),
        )

    def is_valid(self) -> bool:
        return all(row.is_valid() for row in self.rows)

    def cache_id(self) -> str:
        """The rows' ids, joined by "+"."""
        return "+".join(row.cache_id() for row in self.rows)

    def _only_row(self, operation: str) -> KvCacheHandle:
        if len(self.rows) != 1:
            raise UnsupportedError(f"{operation}: {len(self.rows)} rows of different lengths; use rows[i].{operation}")
        return self.rows[0]


def cache_rows(operation: str, handle: KvCacheHandle, num_rows: int) -> tuple[KvCacheHandle, ...]:
    """One handle a row. Pure.  Raises UnsupportedError where their numbers differ: a handle is one sequence's cache."""
    rows = handle.rows if isinstance(handle, BatchCacheHandle) else (handle,)
    if len(rows) != num_rows:
        raise UnsupportedError(
            f"{operation}: batch of {num_rows} with {len(rows)} cache(s); a handle is one sequence's cache: give a"
            f" BatchCacheHandle of {num_rows}, let prefill allocate one, or use batch_{operation}"
        )
    return rows
