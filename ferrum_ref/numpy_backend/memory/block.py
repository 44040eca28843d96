"""One live block of a pool.  Clauses: ME-DEFRAG-3, ME-INFO-1 (specs/memory.md)."""

from __future__ import annotations

from dataclasses import dataclass

from ferrum_ref.interfaces.memory import MemoryType, MemoryUsageHint
from ferrum_ref.numpy_backend.memory.access import AccessLog

UNMOVABLE_TYPES = (MemoryType.Pinned, MemoryType.Mapped)


@dataclass(slots=True, eq=False)
class Block:
    """`size` bytes that the owner asked for at the start of `extent` bytes taken from the arena; mutable."""

    offset: int
    extent: int
    size: int
    alignment: int
    memory_type: MemoryType
    allocated_s: float
    log: AccessLog | None
    num_handles: int = 1
    num_maps: int = 0
    hint: MemoryUsageHint | None = None

    @property
    def end(self) -> int:
        return self.offset + self.extent

    def why_unmovable(self) -> str | None:
        """What keeps the block in its place, or None. Pure.  [ME-DEFRAG-3]"""
        if self.num_maps:
            return "it is mapped"
        if self.memory_type in UNMOVABLE_TYPES:
            return f"its memory type is {self.memory_type.value}"
        return "its usage hint is Resident" if self.hint is MemoryUsageHint.Resident else None
