"""A pool: regions of device memory that come and go as its configuration says.

Not locked: the manager's lock guards it.
Clauses: BK-CUPY-21..25 (specs/backend_cupy.md), ME-POOL-3..6, ME-PLACE-1, ME-REALLOC-1 (specs/memory.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ferrum_cupy.machine import Machine
from ferrum_cupy.memory_region import Block, FreeRuns, Region, align_up
from ferrum_ref.errors import InternalError, InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.memory import MemoryPoolConfig, MemoryType

MAX_ALIGNMENT_BYTES = 2 << 20


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
    """`spare_bytes()` is what the device's capacity could still give it."""

    def __init__(
        self,
        memory_type: MemoryType,
        config: MemoryPoolConfig,
        machine: Machine,
        spare_bytes: Callable[[], int],
        *,
        debug: bool,
    ) -> None:
        check_pool_config(config)
        self.memory_type, self.config = memory_type, config
        self.regions: list[Region] = []
        self._machine, self._spare_bytes, self._debug = machine, spare_bytes, debug

    # Figures, all pure.
    @property
    def committed_bytes(self) -> int:
        return sum(region.num_bytes for region in self.regions)

    @property
    def lent_bytes(self) -> int:
        return sum(region.lent_bytes for region in self.regions)

    def blocks(self) -> list[Block]:
        """By region and address."""
        return [block for region in self.regions for _, block in sorted(region.blocks.items())]

    def limit_bytes(self) -> int | None:
        """The most the pool may ever hold; None without limit of its own.  [ME-POOL-3]"""
        return self.config.max_size if self.config.enable_auto_expansion else start_size(self.config)

    def growable_bytes(self) -> int:
        """What expansion could add now."""
        return max(0, self._ceiling() - self.committed_bytes) if self.config.enable_auto_expansion else 0

    def span_bytes(self) -> int:
        """The ends of the last blocks of all regions, summed.  [BK-CUPY-25]"""
        return sum(region.span_bytes() for region in self.regions)

    def usage(self) -> PoolUsage:
        """Where every committed byte is.  [ME-INFO-2]"""
        committed, lent = self.committed_bytes, self.lent_bytes
        requested = sum(region.requested_bytes for region in self.regions)
        return PoolUsage(
            self.memory_type, committed, requested, lent - requested, committed - lent, len(self.blocks())
        )  # fmt: skip

    # Size.
    def start(self) -> None:
        """Hold at least the starting size.  [ME-POOL-3]

        Raises ResourceExhaustedError, nothing changed, when it is to be taken at once and the device has no more.
        """
        missing = min(start_size(self.config), self._ceiling()) - self.committed_bytes
        if missing > 0:
            region = Region(self._machine, missing, debug=self._debug)
            if self.config.pre_allocate:
                region.open(self.config.alignment)
            self.regions.append(region)

    def configure(self, config: MemoryPoolConfig) -> None:
        """Replace the policy.  [ME-POOL-5]

        Raises InvalidParameterError or ResourceExhaustedError, with nothing changed.
        """
        check_pool_config(config)
        before, self.config = self.config, config
        try:
            if self.span_bytes() > self._ceiling():
                raise ResourceExhaustedError(
                    f"configure_pool: live blocks reach over {self.span_bytes()} bytes, the new limit is "
                    f"{self._ceiling()}; free or defragment first"
                )
            self.start()
        except BaseException:
            self.config = before
            raise
        self.trim()

    def trim(self) -> None:
        """Give regions without blocks back; cut free ends that lie above the limit.  [BK-CUPY-25]"""
        ceiling = self._ceiling()
        start = min(start_size(self.config), ceiling)
        for region in reversed(list(self.regions)):
            excess = self.committed_bytes - start
            if not region.blocks and region.num_bytes <= excess:
                self.regions.remove(region)
            elif (above := self.committed_bytes - ceiling) > 0:
                region.cut(max(region.span_bytes(), region.num_bytes - above))
            if not self.config.pre_allocate:
                region.close()

    # Blocks.
    def allocate(self, block: Block) -> bool:
        """Give the block a place and zeroed bytes; False, nothing changed, without room.  [ME-PLACE-1, BK-CUPY-22]"""
        found = [
            (choice[0], index, choice[1])
            for index, region in enumerate(self.regions)
            if (choice := region.choose(block.extent, block.alignment)) is not None
        ]
        try:
            if found:
                _, index, offset = min(found)
                self.regions[index].lend(block, offset)
                return True
            return self._replace([region for region in self.regions if not region.blocks], block)
        except ResourceExhaustedError:  # the device itself has no more
            return False

    def allocate_by_moving(self, block: Block) -> bool:
        """The same after moving everything movable into one region that has room for it too.  [BK-CUPY-25]"""
        try:
            return self._replace([region for region in self.regions if region.is_movable()], block)
        except ResourceExhaustedError:
            return False

    def resize(self, block: Block, size: int) -> bool:
        """In place; False, nothing changed, without room behind the block.  [ME-REALLOC-1]"""
        return block.region.resize(block, size, align_up(size, self.config.alignment))

    def compact(self) -> int:
        """Blocks moved: down within their regions, then all that can move into one region.  [BK-CUPY-25]"""
        lowered = [block for block in self.blocks() if not block.is_fixed() and block.region.lower(block)]
        self.trim()
        movable = [region for region in self.regions if region.blocks and region.is_movable()]
        if len(movable) < 2:
            return len(lowered)
        blocks = [block for region in movable for block in region.blocks.values()]
        try:
            if not self._replace(movable, None):
                return len(lowered)
        except ResourceExhaustedError:  # it takes room for both while the blocks move
            return len(lowered)
        self.trim()
        return len({*lowered, *blocks})

    def _replace(self, old: Sequence[Region], extra: Block | None) -> bool:
        """One region in place of `old`, with their blocks and a new one; False, nothing changed, if it must not be.

        Raises ResourceExhaustedError, nothing changed, when the device has not the memory for it.
        """
        moved = [block for region in old for _, block in sorted(region.blocks.items())]
        given = moved if extra is None else [*moved, extra]
        offsets, span = _packed(given)
        held = sum(region.num_bytes for region in old)
        if extra is None:
            if span > sum(region.span_bytes() for region in old):
                return False
            num_bytes = self._without_growth(held, span)
        else:
            num_bytes = self._with_growth(held, span)
            if num_bytes < span:
                return False
        for region in old:
            region.close()  # those without blocks
        new = Region(self._machine, num_bytes, debug=self._debug)
        new.open(max(block.alignment for block in given))
        for block, offset in zip(moved, offsets):
            block.settle()
            source = block.region.view(block.offset, block.offset + block.size)
            self._machine.copy_bytes(new.view(offset, offset + block.size), source, None)
        for block, offset in zip(given, offsets):
            new.lend(block, offset, zeroed=block is extra)
        at = self.regions.index(old[0]) if old else len(self.regions)
        self.regions[at:at] = [new]
        self.regions = [region for region in self.regions if region not in old]
        return True

    def _with_growth(self, held: int, needed: int) -> int:
        """`held` and the fewest growth steps that make it `needed`, the last one cut; less than needed: no. Pure."""
        missing = max(0, needed - held)
        step = self.config.growth_increment or missing
        steps = -(-missing // step) if missing else 0
        return held + min(steps * step, self.growable_bytes())

    def _without_growth(self, held: int, needed: int) -> int:
        """What of `held` remains when the growth steps that are not needed are given back. Pure.  [ME-POOL-4]"""
        least = max(0, min(start_size(self.config), self._ceiling()) - (self.committed_bytes - held))
        beyond = max(0, needed - least)
        step = self.config.growth_increment
        return max(needed, min(held, least + (-(-beyond // step) * step if step else beyond)))

    def _ceiling(self) -> int:
        limit, reachable = self.limit_bytes(), self.committed_bytes + self._spare_bytes()
        return reachable if limit is None else min(limit, reachable)


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


def _packed(blocks: Sequence[Block]) -> tuple[list[int], int]:
    """Offsets in a new region, each the lowest that is left, and the end of the last block. Pure."""
    plan = FreeRuns(sum(block.extent + block.alignment for block in blocks))
    offsets = []
    for block in blocks:
        offset = plan.lowest(block.extent, block.alignment)
        if offset is None:
            raise InternalError("memory pool: a plan without room")
        plan.take(offset, offset + block.extent)
        offsets.append(offset)
    return offsets, max((offset + block.extent for block, offset in zip(blocks, offsets)), default=0)
