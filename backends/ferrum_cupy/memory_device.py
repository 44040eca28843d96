"""The pools of one device, and the figures they add up to.  Not locked: the manager's lock guards it.

Clauses: BK-CUPY-20..25 (specs/backend_cupy.md), ME-INFO-1..3, ME-GC-1..2 (specs/memory.md).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ferrum_cupy.machine import Machine
from ferrum_cupy.memory_pool import Pool
from ferrum_cupy.memory_region import Block, Region, align_up
from ferrum_ref.errors import InternalError, InvalidParameterError
from ferrum_ref.interfaces.memory import DefragmentationStats, MemoryInfo, MemoryManagerConfig, MemoryType


class DeviceMemory:
    """Pools by memory type; a type without a pool of its own uses General's."""

    def __init__(
        self, machine: Machine, capacity_bytes: int, config: MemoryManagerConfig, clock: Callable[[], float]
    ) -> None:
        check_manager_config(config)
        self.capacity_bytes = capacity_bytes
        self._machine, self._config, self._clock = machine, config, clock
        self.pools: dict[MemoryType, Pool] = {}
        for memory_type in MemoryType:
            if memory_type in config.pool_configs:
                pool_config = config.pool_configs[memory_type]
                pool = Pool(memory_type, pool_config, machine, self._spare_bytes, debug=config.enable_debug)
                self.pools[memory_type] = pool
                pool.start()
        self._copied_bytes, self._copy_s = 0, 0.0

    def pool(self, memory_type: MemoryType) -> Pool:
        """The pool that serves a memory type. Pure."""
        return self.pools.get(memory_type, self.pools[MemoryType.General])

    def new_block(self, size: int, alignment: int, memory_type: MemoryType) -> Block | None:
        """A placed block of zeros, or None without room.  [ME-ALLOC-1..5, ME-GC-1..2]"""
        pool = self.pool(memory_type)
        extent, nowhere = align_up(size, pool.config.alignment), Region(self._machine, 0, debug=False)
        block = Block(extent, size, max(alignment, pool.config.alignment), memory_type, self._clock(), nowhere)
        before = self._used_fraction()
        if not self._place(pool, block):
            return None
        if self._config.enable_auto_gc and before < self._config.gc_threshold <= self._used_fraction():
            self.defragment()
        return block

    def resize(self, block: Block, size: int) -> bool:
        """Another size, in place or elsewhere; False, the block as it was, without room.  [ME-REALLOC-1..2]"""
        block.settle()
        pool = self.pool(block.memory_type)
        if pool.resize(block, size):
            return True
        if block.is_fixed():
            return False
        extent = align_up(size, pool.config.alignment)
        other = Block(extent, size, block.alignment, block.memory_type, block.allocated_s, block.region)
        if not self._place(pool, other):
            return False
        common = min(size, block.size)
        source = block.region.view(block.offset, block.offset + common)
        self._machine.copy_bytes(other.region.view(other.offset, other.offset + common), source, None)
        block.region.release(block)
        region, offset = other.region, other.offset
        region.blocks[offset] = block
        block.region, block.offset, block.extent, block.size = region, offset, extent, size
        return True

    def defragment(self) -> DefragmentationStats:
        """Move blocks together, then give unused growth back.  [ME-DEFRAG-1..5, BK-CUPY-25]"""
        began_s, span, before = self._clock(), self.span_bytes(), self.fragmentation_ratio()
        num_moved = sum(pool.compact() for pool in self.pools.values())
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
        """Holes below the last block of each region, as a float32 fraction of the spans; 0 without blocks."""
        span = self.span_bytes()
        return float(np.float32((span - self.used_bytes()) / span)) if span else 0.0

    def info(self) -> MemoryInfo:
        """See ME-INFO-1..3."""
        general, used, total = self.pools[MemoryType.General], self.used_bytes(), self.total_bytes()
        free = general.committed_bytes - general.lent_bytes + general.growable_bytes()
        return MemoryInfo(
            total_bytes=total,
            used_bytes=used,
            free_bytes=free,
            reserved_bytes=total - used - free,
            active_allocations=sum(len(region.blocks) for pool in self.pools.values() for region in pool.regions),
            fragmentation_ratio=self.fragmentation_ratio(),
            bandwidth_gbps=float(np.float32(self._copied_bytes / self._copy_s / 1e9)) if self._copy_s > 0 else None,
        )

    def check(self) -> None:
        """Raises InternalError when the regions or their sum contradict the accounts.  [ME-DEBUG-1]"""
        for pool in self.pools.values():
            for region in pool.regions:
                region.check()
        if self._spare_bytes() < 0:
            raise InternalError(f"memory of {self._machine.device}: the pools hold more than the capacity")
        self.info()

    def _place(self, pool: Pool, block: Block) -> bool:
        if pool.allocate(block):
            return True
        if not self._config.enable_auto_gc:
            return False
        self.defragment()
        return pool.allocate(block) or pool.allocate_by_moving(block)

    def _used_fraction(self) -> float:
        return self.used_bytes() / max(1, self.total_bytes())

    def _spare_bytes(self) -> int:
        return self.capacity_bytes - sum(pool.committed_bytes for pool in self.pools.values())


def check_manager_config(config: MemoryManagerConfig) -> None:
    """Raises InvalidParameterError for settings without meaning.  [ME-CONFIG-2]"""
    if MemoryType.General not in config.pool_configs:
        raise InvalidParameterError(
            "MemoryManagerConfig: pool_configs must hold General, where allocate(size, device) takes its memory"
        )
    if not 0.0 <= config.gc_threshold <= 1.0:
        raise InvalidParameterError(f"MemoryManagerConfig: gc_threshold must be in [0, 1], got {config.gc_threshold}")
    if config.max_concurrent_transfers < 1:
        raise InvalidParameterError("MemoryManagerConfig: max_concurrent_transfers must be >= 1, got 0")
