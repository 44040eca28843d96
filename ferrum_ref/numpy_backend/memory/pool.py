"""A pool: one arena that grows and shrinks as its configuration says, its free list and its live blocks.

Not locked: the manager's lock guards it.  Clauses: ME-POOL-1..6, ME-REALLOC-1, ME-DEBUG-1 (specs/memory.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ferrum_ref.errors import InternalError, InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.memory import MemoryPoolConfig, MemoryType
from ferrum_ref.numpy_backend.memory.arena import MAX_ALIGNMENT_BYTES, Arena, Bytes
from ferrum_ref.numpy_backend.memory.block import Block
from ferrum_ref.numpy_backend.memory.free_list import FreeList
from ferrum_ref.numpy_backend.memory.placement import Placement, align_up, first_fitting


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """committed_bytes = requested_bytes + padding_bytes + free_bytes, always.  [ME-INFO-2]"""

    memory_type: MemoryType
    committed_bytes: int
    requested_bytes: int
    padding_bytes: int
    free_bytes: int
    num_blocks: int


class Pool:
    """Lends extents of [0, committed_bytes); `spare_bytes()` is what the device could still give it."""

    def __init__(
        self,
        memory_type: MemoryType,
        config: MemoryPoolConfig,
        capacity_bytes: int,
        spare_bytes: Callable[[], int],
        placement: Placement,
        *,
        debug: bool,
    ) -> None:
        check_pool_config(config)
        self.memory_type, self.config = memory_type, config
        self.free = FreeList()
        self.blocks: dict[int, Block] = {}  # by offset
        self.committed_bytes = self.lent_bytes = self.requested_bytes = 0
        self._capacity_bytes, self._spare_bytes = capacity_bytes, spare_bytes
        self._placement, self._debug = placement, debug
        self._arena: Arena | None = None
        self._start()

    # Size.
    def limit_bytes(self) -> int | None:
        """The most the pool may ever hold; None without limit of its own.  [ME-POOL-3]"""
        return self.config.max_size if self.config.enable_auto_expansion else start_size(self.config)

    def growable_bytes(self) -> int:
        """What expansion could add now. Pure."""
        return max(0, self._ceiling() - self.committed_bytes) if self.config.enable_auto_expansion else 0

    def span_bytes(self) -> int:
        """End of the last live block, 0 without. Pure."""
        return self.free.tail_start(self.committed_bytes)

    def configure(self, config: MemoryPoolConfig) -> None:
        """Replace the policy.  [ME-POOL-5]

        Raises InvalidParameterError or ResourceExhaustedError, with nothing changed.
        """
        check_pool_config(config)
        before, self.config = self.config, config
        try:
            ceiling = self._ceiling()
            if self.span_bytes() > ceiling:
                raise ResourceExhaustedError(
                    f"configure_pool: live blocks reach to byte {self.span_bytes()}, the new limit is {ceiling};"
                    " free or defragment first"
                )
            if self._arena is not None and self._arena_bytes() > self._arena.limit_bytes:
                self._replace_arena(self._arena)
        except BaseException:
            self.config = before
            raise
        self._start()
        self.trim()

    def trim(self) -> None:
        """Give the growth steps above the last live block back to the device.  [ME-POOL-4]"""
        start, step = min(self._start_bytes(), self.committed_bytes), self.config.growth_increment
        beyond = max(0, self.span_bytes() - start)
        kept = min(start + (-(-beyond // step) * step if step else beyond), self._ceiling())
        if kept < self.committed_bytes:
            self.free.take(kept, self.committed_bytes)
            self.committed_bytes = kept
            if self._arena is not None:
                self._arena.discard(kept)

    # Blocks.
    def allocate(self, block: Block) -> bool:
        """Give the block an offset, zeroed bytes and a place in the accounts; False, nothing changed, without room.

        `block.alignment` must be a multiple of the pool's; `block.extent` a multiple of the pool's alignment.
        """
        offset = self._placement.choose(self.free, block.extent, block.alignment)
        if offset is None:
            offset = align_up(self.span_bytes(), block.alignment)
            if not self._grow_to(offset + block.extent):
                return False
        self._lend(offset, offset + block.extent)
        block.offset = offset
        self.blocks[offset] = block
        self.lent_bytes += block.extent
        self.requested_bytes += block.size
        return True

    def release(self, block: Block) -> None:
        """Take the block's extent back."""
        del self.blocks[block.offset]
        self._take_back(block.offset, block.end)
        self.lent_bytes -= block.extent
        self.requested_bytes -= block.size

    def resize_in_place(self, block: Block, size: int) -> bool:
        """Shrink, or grow into what follows; new bytes are zero. False, nothing changed: no room.  [ME-REALLOC-1]"""
        extent = align_up(size, self.config.alignment)
        end = block.offset + extent
        if end > block.end:
            if self.free.tail_start(self.committed_bytes) == block.end and end > self.committed_bytes:
                self._grow_to(end)
            run = self.free.run_at(block.end)
            if run is None or run[1] < end:
                return False
            self._lend(block.end, end)
        elif end < block.end:
            self._take_back(end, block.end)
        self.view(block.offset + min(size, block.size), end).fill(0)
        self.lent_bytes += extent - block.extent
        self.requested_bytes += size - block.size
        block.extent, block.size = extent, size
        return True

    def lower(self, block: Block) -> bool:
        """Move the block, contents and all, to the lowest place below it that holds it; False if there is none."""
        start, end = block.offset, block.end
        self.free.add(start, end)
        offset = first_fitting(self.free.by_address(), block.extent, block.alignment)
        if offset is None or offset >= start:
            self.free.take(start, end)
            return False
        self.free.take(offset, offset + block.extent)
        self._arena_or_new().move(start, offset, block.extent)
        if self._debug:
            self._arena_or_new().poison(max(start, offset + block.extent), end)
        del self.blocks[start]
        block.offset = offset
        self.blocks[offset] = block
        return True

    def view(self, start: int, end: int) -> Bytes:
        """Those bytes of the arena themselves."""
        return self._arena_or_new().view(start, end)

    # Accounts.
    def usage(self) -> PoolUsage:
        """Where every committed byte is. Pure.  [ME-INFO-2]"""
        padding = self.lent_bytes - self.requested_bytes
        free = self.committed_bytes - self.lent_bytes
        return PoolUsage(
            self.memory_type, self.committed_bytes, self.requested_bytes, padding, free, len(self.blocks)
        )  # fmt: skip

    def check(self) -> None:
        """Raises InternalError unless blocks and free runs tile the arena and the accounts agree.  [ME-DEBUG-1]"""
        used = [(block.offset, block.end) for block in self.blocks.values()]
        position = 0
        for start, end in sorted([*used, *self.free.by_address()]):
            if start != position or end <= start:
                raise InternalError(f"memory pool {self.memory_type.value}: gap or overlap at byte {position}")
            position = end
        requested = sum(block.size for block in self.blocks.values())
        lent = sum(end - start for start, end in used)
        accounts = (self.committed_bytes, self.lent_bytes, self.requested_bytes, self.free.total_bytes)
        if accounts != (position, lent, requested, position - lent):
            raise InternalError(f"memory pool {self.memory_type.value}: accounts {accounts} are not what is there")
        for offset, block in self.blocks.items():
            if offset != block.offset or offset % block.alignment or not 0 < block.size <= block.extent:
                raise InternalError(f"memory pool {self.memory_type.value}: bad block {block}")
        if self._debug and self._arena is not None:
            for start, end in self.free.by_address():
                if not self._arena.is_poisoned(start, end):
                    raise InternalError(
                        f"memory pool {self.memory_type.value}: free bytes in [{start}, {end}) were written by somebody"
                    )

    def _start(self) -> None:
        """Hold at least the starting size, its pages touched if the configuration says so."""
        before = self.committed_bytes
        self._commit(self._start_bytes())
        if self.config.pre_allocate and before < self.committed_bytes:
            self.view(before, self.committed_bytes).fill(0)

    def _start_bytes(self) -> int:
        return min(start_size(self.config), self._ceiling())

    def _ceiling(self) -> int:
        limit, reachable = self.limit_bytes(), self.committed_bytes + self._spare_bytes()
        return reachable if limit is None else min(limit, reachable)

    def _grow_to(self, end: int) -> bool:
        step = self.config.growth_increment or end - self.committed_bytes
        if end > self.committed_bytes + self.growable_bytes():
            return False
        steps = -(-(end - self.committed_bytes) // step)
        self._commit(min(self.committed_bytes + steps * step, self.committed_bytes + self.growable_bytes()))
        return True

    def _commit(self, end: int) -> None:
        if end > self.committed_bytes:
            self.free.add(self.committed_bytes, end)
            self.committed_bytes = end

    def _lend(self, start: int, end: int) -> None:
        self._arena_or_new().lend(start, end, poison=self._debug)
        self.free.take(start, end)

    def _take_back(self, start: int, end: int) -> None:
        if self._debug:
            self._arena_or_new().poison(start, end)
        self.free.add(start, end)

    def _arena_bytes(self) -> int:
        limit = self.limit_bytes()
        return self._capacity_bytes if limit is None else min(limit, self._capacity_bytes)

    def _arena_or_new(self) -> Arena:
        if self._arena is None:
            self._arena = Arena(self._arena_bytes())
        return self._arena

    def _replace_arena(self, old: Arena) -> None:
        """A larger arena with the same bytes at the same offsets.  Raises InvalidParameterError."""
        mapped = next((block for block in self.blocks.values() if block.num_maps), None)
        if mapped is not None:
            raise InvalidParameterError(
                f"configure_pool: the arena must move to hold {self._arena_bytes()} bytes, but the block at byte"
                f" {mapped.offset} is mapped; unmap it first"
            )
        new = Arena(self._arena_bytes())
        new.view(0, old.touched_bytes)[:] = old.view(0, old.touched_bytes)
        new.touched_bytes = old.touched_bytes
        self._arena = new


def start_size(config: MemoryPoolConfig) -> int:
    """Bytes a pool starts with: initial_size, or with pre_allocate all of max_size. Pure.  [ME-POOL-3]"""
    return config.max_size if config.pre_allocate and config.max_size is not None else config.initial_size


def check_pool_config(config: MemoryPoolConfig) -> None:
    """Raises InvalidParameterError for a bad alignment or a max_size below initial_size.  [ME-CONFIG-2]"""
    check_alignment(config.alignment, "MemoryPoolConfig")
    if config.max_size is not None and config.max_size < config.initial_size:
        raise InvalidParameterError(
            f"MemoryPoolConfig: max_size {config.max_size} is below initial_size {config.initial_size}; raise it"
        )


def check_alignment(alignment: int, operation: str) -> None:
    """Raises InvalidParameterError unless the alignment is a power of two up to 2 MiB.  [ME-ALLOC-5]"""
    if not 1 <= alignment <= MAX_ALIGNMENT_BYTES or alignment & (alignment - 1):
        raise InvalidParameterError(
            f"{operation}: alignment must be a power of two in [1, {MAX_ALIGNMENT_BYTES}], got {alignment}"
        )
