"""Ids that die with what they name: a slot and the generation of its tenant.  Clauses: BK-CUPY-20, ME-ALLOC-6."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ferrum_cupy.memory_region import Block
from ferrum_ref.errors import InvalidParameterError, NotFoundError
from ferrum_ref.interfaces.memory import MemoryHandle
from ferrum_ref.types.record import check_unsigned

SLOT_BITS: Final = 32
LAST_GENERATION: Final = 2**32 - 1


class HandleTable:
    """id = generation << 32 | slot + 1; a slot out of generations is never used again."""

    def __init__(self) -> None:
        self._blocks: list[Block | None] = []
        self._generations: list[int] = []
        self._vacant: list[int] = []

    def add(self, block: Block) -> MemoryHandle:
        """A handle that was never given before."""
        if not self._vacant:
            self._vacant.append(len(self._blocks))
            self._blocks.append(None)
            self._generations.append(0)
        slot = self._vacant.pop()
        self._blocks[slot] = block
        return self._handle(slot)

    def peek(self, handle: MemoryHandle) -> Block | None:
        """The block, or None when the handle is not alive. Pure."""
        slot, generation = _parts(handle)
        alive = 0 <= slot < len(self._blocks) and self._generations[slot] == generation
        return self._blocks[slot] if alive else None

    def get(self, handle: MemoryHandle, operation: str) -> Block:
        """The block. Pure.  Raises NotFoundError, saying whether the handle is null, freed or unknown."""
        block = self.peek(handle)
        if block is None:
            slot, generation = _parts(handle)
            known = 0 <= slot < len(self._blocks) and generation <= self._generations[slot]
            fault = "freed" if known else "unknown to this manager" if handle.is_valid() else "null"
            raise NotFoundError(f"{operation}: handle {handle.id()} is {fault}; expected a live one")
        return block

    def remove(self, handle: MemoryHandle) -> None:
        """Kill a live handle."""
        slot, generation = _parts(handle)
        self._blocks[slot] = None
        if generation < LAST_GENERATION:
            self._generations[slot] += 1
            self._vacant.append(slot)

    def items(self) -> Iterator[tuple[MemoryHandle, Block]]:
        """Live handles in order of slot. Pure."""
        for slot, block in enumerate(self._blocks):
            if block is not None:
                yield self._handle(slot), block

    def _handle(self, slot: int) -> MemoryHandle:
        return MemoryHandle(self._generations[slot] << SLOT_BITS | slot + 1)


def _parts(handle: MemoryHandle) -> tuple[int, int]:
    return (handle.id() & (1 << SLOT_BITS) - 1) - 1, handle.id() >> SLOT_BITS


def check_size(size: int, operation: str) -> None:
    """Raises InvalidParameterError unless 1 <= size < 2**64.  [ME-ALLOC-1]"""
    if check_unsigned(size, 2**64, operation, "size") == 0:
        raise InvalidParameterError(f"{operation}: size must be >= 1, got 0; an empty allocation has no bytes to name")


def check_range(operation: str, block: Block, offset: int, size: int) -> None:
    """Raises InvalidParameterError unless [offset, offset + size) lies in the allocation.  [ME-COPY-2]"""
    if offset < 0 or size < 0 or offset + size > block.size:
        raise InvalidParameterError(
            f"{operation}: bytes [{offset}, {offset + size}) of an allocation of {block.size} bytes;"
            " expected a range inside it"
        )
