"""A manager that takes tokens back: rejected drafts leave the cache, and whole blocks return to the pool.

Clauses: MX-TRUNCATE-2..5 (specs/model_executor.md).
"""

from __future__ import annotations

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.kv_cache import KvCacheHandle
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.types.record import check_unsigned


class RollbackKvCacheManager(PagedKvCacheManager):
    """`PagedKvCacheManager` with the counterpart of `extend`."""

    def truncate_now(self, handle: KvCacheHandle, new_len: int) -> None:
        """Account for the first `new_len` tokens only.  [MX-TRUNCATE-2..5]

        Blocks wholly behind them lose this handle's reference, last first; one that another handle shares stays with
        it. A block kept in part is no longer findable by the digest of its old content, and is copied before it is
        written if another handle shares it. Mutates handle and pool.
        Raises InvalidParameterError (longer than the cache, another manager's handle), NotFoundError (freed),
        SchedulerError (a step loop's cache, or a step is in flight).
        """
        check_unsigned(new_len, 2**64, "truncate", "new_len")
        with self._lock:
            paged = self._own(handle, "truncate")
            table, size = paged.table, self.block_size
            if new_len > table.sequence_length:
                raise InvalidParameterError(
                    f"truncate: {handle.cache_id()} accounts for {table.sequence_length} tokens, got new_len {new_len};"
                    " use extend to grow it"
                )
            num_kept = -(-new_len // size)
            dropped = table.physical_blocks[num_kept:]
            del table.physical_blocks[num_kept:]
            self.pool.give_back(reversed(dropped))
            table.sequence_length = new_len
            paged.writable_tokens = num_kept * size
            paged.num_registered_blocks = min(paged.num_registered_blocks, new_len // size)
            if new_len % size:
                tail = table.physical_blocks[-1]
                if self.pool.ref_counts[tail] > 1:
                    paged.writable_tokens = new_len  # the next write makes a private copy first
                else:
                    self.pool.index.evict([tail])
            self.report_pressure()
