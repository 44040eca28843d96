"""A region: one piece of device memory out of which blocks are lent.  Not locked: the manager's lock guards it.

Clauses: BK-CUPY-21..22, BK-CUPY-24 (specs/backend_cupy.md), ME-ALLOC-2..5, ME-POOL-1..2 (specs/memory.md).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Final

from ferrum_cupy.machine import DeviceArray, DeviceEvent, Machine
from ferrum_cupy.memory_moves import move_bytes
from ferrum_ref.errors import InternalError
from ferrum_ref.interfaces.memory import MemoryType

MACHINE_ALIGNMENT_BYTES: Final = 512  # what `Machine.allocate_bytes` promises
FREED: Final = 0xDD
FIXED_TYPES: Final = (MemoryType.Pinned, MemoryType.Mapped)


def align_up(offset: int, alignment: int) -> int:
    """The lowest multiple of `alignment` (a power of two) not below `offset`. Pure."""
    return (offset + alignment - 1) & -alignment


@dataclass(slots=True, eq=False)
class Block:
    """`size` bytes that the owner asked for at the start of `extent` bytes of a region; mutable."""

    extent: int
    size: int
    alignment: int
    memory_type: MemoryType
    allocated_s: float
    region: Region
    offset: int = -1
    num_borrowers: int = 0
    pending: list[DeviceEvent] = field(default_factory=list)  # of queued copies from and to it

    @property
    def end(self) -> int:
        return self.offset + self.extent

    def is_fixed(self) -> bool:
        """Whether it must stay where it is. Pure.  [BK-CUPY-24]"""
        return self.num_borrowers > 0 or self.memory_type in FIXED_TYPES

    def settle(self) -> None:
        """Wait for the queued copies that read or write it.  [BK-CUPY-27]"""
        for event in self.pending:
            event.synchronize()
        self.pending.clear()

    def await_later(self, event: DeviceEvent) -> None:
        """Remember a queued copy."""
        self.pending = [other for other in self.pending if not other.is_done]
        self.pending.append(event)


class FreeRuns:
    """Disjoint runs [start, end), sorted, that never touch: neighbours are joined at once.  [ME-POOL-1..2]"""

    def __init__(self, num_bytes: int) -> None:
        self.runs: list[tuple[int, int]] = [(0, num_bytes)] if num_bytes else []

    def add(self, start: int, end: int) -> None:
        """Raises InternalError if any of it is free already."""
        if start == end:
            return
        index = bisect_left(self.runs, (start, start))
        before = self.runs[index - 1] if index else (-1, -1)
        after = self.runs[index] if index < len(self.runs) else (-1, -1)
        if before[1] > start or (index < len(self.runs) and after[0] < end):
            raise InternalError(f"memory free list: [{start}, {end}) is already free")
        low, high = index, index
        if before[1] == start:
            low, start = index - 1, before[0]
        if after[0] == end:
            high, end = index + 1, after[1]
        self.runs[low:high] = [(start, end)]

    def take(self, start: int, end: int) -> None:
        """Raises InternalError unless one run holds it."""
        index = bisect_right(self.runs, start, key=lambda run: run[0]) - 1
        if index < 0 or self.runs[index][1] < end:
            raise InternalError(f"memory free list: [{start}, {end}) is not free")
        low, high = self.runs[index]
        self.runs[index : index + 1] = [run for run in ((low, start), (end, high)) if run[0] < run[1]]

    def run_at(self, offset: int) -> tuple[int, int] | None:
        """The run that holds the byte at `offset`. Pure."""
        index = bisect_right(self.runs, offset, key=lambda run: run[0]) - 1
        return self.runs[index] if index >= 0 and offset < self.runs[index][1] else None

    def lowest(self, extent: int, alignment: int, address: int = 0) -> int | None:
        """The lowest offset with `extent` free bytes whose address, byte 0 being at `address`, is aligned. Pure."""
        aligned = ((align_up(address + start, alignment) - address, end) for start, end in self.runs)
        return next((offset for offset, end in aligned if offset + extent <= end), None)

    def tail_start(self, end: int) -> int:
        """Start of the run that reaches `end`; `end` itself when none does. Pure."""
        return self.runs[-1][0] if self.runs and self.runs[-1][1] == end else end


class Region:
    """`num_bytes` that may be lent; the device memory is taken when the first block needs it.  [BK-CUPY-21]"""

    def __init__(self, machine: Machine, num_bytes: int, *, debug: bool) -> None:
        self.num_bytes = num_bytes
        self.free = FreeRuns(num_bytes)
        self.blocks: dict[int, Block] = {}  # by offset
        self.lent_bytes = self.requested_bytes = 0
        self._machine, self._debug = machine, debug
        self._buffer: DeviceArray | None = None
        self._address = 0

    def open(self, alignment: int) -> None:
        """Take the device memory if it is not here.  Raises ResourceExhaustedError, nothing changed."""
        if self._buffer is None:
            slack = max(0, alignment - MACHINE_ALIGNMENT_BYTES)
            whole = self._machine.allocate_bytes(self.num_bytes + slack)
            first = self._machine.address(whole)
            skipped = align_up(first, alignment) - first
            self._buffer, self._address = whole[skipped : skipped + self.num_bytes], first + skipped
            if self._debug:
                self._machine.fill_bytes(self._buffer, FREED)

    def close(self) -> None:
        """Give the device memory of a region without blocks back to the machine."""
        if not self.blocks:
            self._buffer = None

    @property
    def is_open(self) -> bool:
        return self._buffer is not None

    def address(self, offset: int) -> int:
        """On the device, of an open region. Pure."""
        return self._address + offset

    def view(self, start: int, end: int) -> DeviceArray:
        """Those bytes themselves."""
        return self._opened()[start:end]

    def choose(self, extent: int, alignment: int) -> tuple[int, int] | None:
        """(bytes of the run, offset): the smallest run that holds an aligned block, the lowest on a tie. Pure."""
        address = self._address if self.is_open else 0  # it will begin on a multiple of what opens it
        fitting = (
            (end - start, offset)
            for start, end in self.free.runs
            if (offset := align_up(address + start, alignment) - address) + extent <= end
        )
        return min(fitting, default=None)

    def lend(self, block: Block, offset: int, *, zeroed: bool = True) -> None:
        """Give the block that place.  Raises ResourceExhaustedError, nothing changed, when the device has no memory."""
        self.open(block.alignment)
        self.free.take(offset, offset + block.extent)
        block.region, block.offset = self, offset
        self.blocks[offset] = block
        self.lent_bytes += block.extent
        self.requested_bytes += block.size
        if zeroed:
            self._machine.fill_bytes(self.view(offset, offset + block.extent), 0)

    def release(self, block: Block) -> None:
        """Take the extent back."""
        del self.blocks[block.offset]
        self._take_back(block.offset, block.end)
        self.lent_bytes -= block.extent
        self.requested_bytes -= block.size

    def resize(self, block: Block, size: int, extent: int) -> bool:
        """In place; new bytes are zero. False, nothing changed: no room behind it.  [ME-REALLOC-1]"""
        end = block.offset + extent
        if end > block.end:
            run = self.free.run_at(block.end)
            if run is None or run[1] < end:
                return False
            self.free.take(block.end, end)
        common = block.offset + min(size, block.size)
        if common < end:
            self._machine.fill_bytes(self.view(common, end), 0)
        if end < block.end:
            self._take_back(end, block.end)
        self.lent_bytes += extent - block.extent
        self.requested_bytes += size - block.size
        block.extent, block.size = extent, size
        return True

    def lower(self, block: Block) -> bool:
        """Move the block to the lowest place below it that holds it, contents and all; False if there is none."""
        start, end = block.offset, block.end
        self.free.add(start, end)
        offset = self.free.lowest(block.extent, block.alignment, self._address)
        self.free.take(start, end)
        if offset is None or offset >= start:
            return False
        block.settle()
        move_bytes(self._machine, self._opened(), offset, self._opened(), start, block.size, None)
        self.free.add(start, end)
        self.free.take(offset, offset + block.extent)
        if self._debug:
            self._machine.fill_bytes(self.view(max(start, offset + block.extent), end), FREED)
        del self.blocks[start]
        self.blocks[offset] = block
        block.offset = offset
        return True

    def cut(self, num_bytes: int) -> None:
        """Lend no more than the first `num_bytes`, all beyond being free; the memory goes with the last block."""
        self.free.take(num_bytes, self.num_bytes)
        self.num_bytes = num_bytes

    def span_bytes(self) -> int:
        """End of the last block, 0 without. Pure."""
        return self.free.tail_start(self.num_bytes)

    def is_movable(self) -> bool:
        """None of its blocks must stay. Pure."""
        return not any(block.is_fixed() for block in self.blocks.values())

    def check(self) -> None:
        """Raises InternalError unless blocks and free runs tile the region and the accounts agree.  [ME-DEBUG-1]"""
        used = [(block.offset, block.end) for block in self.blocks.values()]
        position = 0
        for start, end in sorted([*used, *self.free.runs]):
            if start != position or end <= start:
                raise InternalError(f"memory region: gap or overlap at byte {position}")
            position = end
        requested = sum(block.size for block in self.blocks.values())
        lent = sum(end - start for start, end in used)
        accounts = (self.num_bytes, self.lent_bytes, self.requested_bytes)
        if accounts != (position, lent, requested):
            raise InternalError(
                f"memory region: accounts {accounts} are not what is there, {(position, lent, requested)}"
            )
        for offset, block in self.blocks.items():
            if offset != block.offset or block.region is not self or not 0 < block.size <= block.extent:
                raise InternalError(f"memory region: bad block at byte {offset}")
            if self.address(offset) % block.alignment:
                raise InternalError(f"memory region: byte {offset} is not aligned to {block.alignment}")
        if self._debug and self.is_open:
            for start, end in self.free.runs:
                if not bool((self.view(start, end) == FREED).all()):
                    raise InternalError(f"memory region: free bytes in [{start}, {end}) were written by somebody")

    def _take_back(self, start: int, end: int) -> None:
        if self._debug:
            self._machine.fill_bytes(self.view(start, end), FREED)
        self.free.add(start, end)

    def _opened(self) -> DeviceArray:
        if self._buffer is None:
            raise InternalError("memory region: no device memory behind a block")
        return self._buffer
