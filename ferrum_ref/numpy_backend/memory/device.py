"""The memory of one device: the pools that share its capacity.

A device here is an arena of host memory under that device's name; bytes really move between arenas.
Not locked: the manager's lock guards it.  Clauses: ME-INFO-1..3, ME-GC-1..2, ME-POOL-3 (specs/memory.md).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ferrum_ref.errors import InternalError
from ferrum_ref.interfaces.memory import DefragmentationStats, MemoryInfo, MemoryManagerConfig, MemoryType
from ferrum_ref.numpy_backend.memory.access import AccessLog
from ferrum_ref.numpy_backend.memory.block import Block
from ferrum_ref.numpy_backend.memory.placement import PlacementName, align_up, make_placement
from ferrum_ref.numpy_backend.memory.pool import Pool
from ferrum_ref.types.devices import Device


class DeviceMemory:
    """Pools by memory type; a type without a pool of its own uses General's."""

    def __init__(
        self,
        device: Device,
        capacity_bytes: int,
        config: MemoryManagerConfig,
        clock: Callable[[], float],
        placement: PlacementName,
    ) -> None:
        self.device, self.capacity_bytes = device, capacity_bytes
        self._config, self._clock = config, clock
        self.pools: dict[MemoryType, Pool] = {}
        for memory_type in MemoryType:
            if memory_type in config.pool_configs:
                self.pools[memory_type] = Pool(
                    memory_type,
                    config.pool_configs[memory_type],
                    capacity_bytes,
                    self._spare_bytes,
                    make_placement(placement),
                    debug=config.enable_debug,
                )
        self._copied_bytes, self._copy_s = 0, 0.0

    def pool(self, memory_type: MemoryType) -> Pool:
        """The pool that serves a memory type. Pure."""
        return self.pools.get(memory_type, self.pools[MemoryType.General])

    def new_block(self, size: int, alignment: int, memory_type: MemoryType, *, pad_only: bool = False) -> Block | None:
        """A placed block of zeros, or None without room.  [ME-ALLOC-1..5, ME-GC-1..2]

        `pad_only`: the alignment rounds the size and not the start, as upstream.
        """
        pool = self.pool(memory_type)
        granule = max(alignment, pool.config.alignment) if pad_only else pool.config.alignment
        start_alignment = pool.config.alignment if pad_only else max(alignment, pool.config.alignment)
        now_s = self._clock()
        log = AccessLog(now_s) if self._config.enable_tracking and pool.config.enable_stats else None
        block = Block(-1, align_up(size, granule), size, start_alignment, memory_type, now_s, log)
        before = self._used_fraction()
        if not self._place(pool, block):
            return None
        if self._config.enable_auto_gc and before < self._config.gc_threshold <= self._used_fraction():
            self.defragment()
        return block

    def release(self, block: Block) -> None:
        """Take the block's extent back."""
        self.pool(block.memory_type).release(block)

    def resize(self, block: Block, size: int) -> bool:
        """Another size, in place or elsewhere; False, the block as it was, without room.  [ME-REALLOC-1..2]"""
        pool = self.pool(block.memory_type)
        if pool.resize_in_place(block, size):
            return True
        if block.why_unmovable() is not None:
            return False
        other = Block(-1, align_up(size, pool.config.alignment), size, block.alignment, block.memory_type, 0.0, None)
        if not self._place(pool, other):
            return False
        pool.view(other.offset, other.offset + block.size)[:] = pool.view(block.offset, block.offset + block.size)
        pool.release(block)
        block.offset, block.extent, block.size = other.offset, other.extent, size
        pool.blocks[block.offset] = block
        return True

    def defragment(self) -> DefragmentationStats:
        """Lower every movable block as far as it goes, then give unused growth back.  [ME-DEFRAG-1..5]"""
        began_s, span, before = self._clock(), self.span_bytes(), self.fragmentation_ratio()
        num_moved = 0
        for pool in self.pools.values():
            for block in sorted(pool.blocks.values(), key=lambda block: block.offset):
                if block.why_unmovable() is None:
                    num_moved += pool.lower(block)
            pool.trim()
        return DefragmentationStats(
            memory_freed=span - self.span_bytes(),
            blocks_moved=num_moved,
            time_taken_ms=max(0, int((self._clock() - began_s) * 1000)),
            fragmentation_before=before,
            fragmentation_after=self.fragmentation_ratio(),
        )

    def count_copy(self, num_bytes: int, took_s: float) -> None:
        """Add a copy to what the measured bandwidth rests on."""
        if self.pools[MemoryType.General].config.enable_stats:
            self._copied_bytes += num_bytes
            self._copy_s += took_s

    # Figures, all pure.
    def total_bytes(self) -> int:
        """What can ever be lent: the capacity, or less when all pools are limited."""
        limits = [pool.limit_bytes() for pool in self.pools.values()]
        bounded = sum(limit for limit in limits if limit is not None)
        return self.capacity_bytes if None in limits else min(self.capacity_bytes, bounded)

    def used_bytes(self) -> int:
        return sum(pool.lent_bytes for pool in self.pools.values())

    def span_bytes(self) -> int:
        return sum(pool.span_bytes() for pool in self.pools.values())

    def fragmentation_ratio(self) -> float:
        """Holes below the last live block of each pool, as a float32 fraction of the spans; 0 without blocks."""
        span = self.span_bytes()
        return float(np.float32((span - self.used_bytes()) / span)) if span else 0.0

    def info(self) -> MemoryInfo:
        """See ME-INFO-1..3."""
        general, used, total = self.pools[MemoryType.General], self.used_bytes(), self.total_bytes()
        free = general.free.total_bytes + general.growable_bytes()
        return MemoryInfo(
            total_bytes=total,
            used_bytes=used,
            free_bytes=free,
            reserved_bytes=total - used - free,
            active_allocations=sum(len(pool.blocks) for pool in self.pools.values()),
            fragmentation_ratio=self.fragmentation_ratio(),
            bandwidth_gbps=float(np.float32(self._copied_bytes / self._copy_s / 1e9)) if self._copy_s > 0 else None,
        )

    def check(self) -> None:
        """Raises InternalError when the pools or their sum contradict the accounts.  [ME-DEBUG-1]"""
        for pool in self.pools.values():
            pool.check()
        if self._spare_bytes() < 0:
            raise InternalError(f"memory of {self.device}: the pools hold more than the capacity")
        self.info()

    def _place(self, pool: Pool, block: Block) -> bool:
        if pool.allocate(block):
            return True
        if not self._config.enable_auto_gc:
            return False
        self.defragment()
        return pool.allocate(block)

    def _used_fraction(self) -> float:
        return self.used_bytes() / max(1, self.total_bytes())

    def _spare_bytes(self) -> int:
        return self.capacity_bytes - sum(pool.committed_bytes for pool in self.pools.values())
