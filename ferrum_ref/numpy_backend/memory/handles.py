"""Ids that die with what they name: a slot number and the generation of its tenant in one 64-bit integer.

Clauses: ME-ALLOC-6 (specs/memory.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from ferrum_ref.errors import NotFoundError
from ferrum_ref.interfaces.memory import MemoryHandle

SLOT_BITS = 32
SLOT_MASK = (1 << SLOT_BITS) - 1
LAST_GENERATION = 2**32 - 1

Entry = TypeVar("Entry")


class HandleTable(Generic[Entry]):
    """Handle -> entry. id = generation << 32 | slot + 1; a slot out of generations is never used again."""

    def __init__(self) -> None:
        self._entries: list[Entry | None] = []
        self._generations: list[int] = []
        self._vacant: list[int] = []

    def add(self, entry: Entry) -> MemoryHandle:
        """A handle that was never given before."""
        if self._vacant:
            slot = self._vacant.pop()
            self._entries[slot] = entry
        else:
            slot = len(self._entries)
            self._entries.append(entry)
            self._generations.append(0)
        return self._handle(slot)

    def peek(self, handle: MemoryHandle) -> Entry | None:
        """The entry, or None when the handle is not alive. Pure."""
        slot = self._slot(handle)
        return None if slot is None else self._entries[slot]

    def get(self, handle: MemoryHandle, operation: str) -> Entry:
        """The entry. Pure.  Raises NotFoundError, saying whether the handle is null, freed or unknown."""
        entry = self.peek(handle)
        if entry is None:
            raise NotFoundError(f"{operation}: handle {handle.id()} is {self._fault(handle)}; expected a live one")
        return entry

    def remove(self, handle: MemoryHandle, operation: str) -> Entry:
        """Kill the handle and return its entry.  Raises NotFoundError."""
        entry = self.get(handle, operation)
        slot = (handle.id() & SLOT_MASK) - 1
        self._entries[slot] = None
        if self._generations[slot] < LAST_GENERATION:
            self._generations[slot] += 1
            self._vacant.append(slot)
        return entry

    def items(self) -> Iterator[tuple[MemoryHandle, Entry]]:
        """Live handles in order of slot. Pure."""
        for slot, entry in enumerate(self._entries):
            if entry is not None:
                yield self._handle(slot), entry

    def _handle(self, slot: int) -> MemoryHandle:
        return MemoryHandle(self._generations[slot] << SLOT_BITS | slot + 1)

    def _slot(self, handle: MemoryHandle) -> int | None:
        slot, generation = (handle.id() & SLOT_MASK) - 1, handle.id() >> SLOT_BITS
        if not 0 <= slot < len(self._entries) or self._generations[slot] != generation:
            return None
        return slot

    def _fault(self, handle: MemoryHandle) -> str:
        slot, generation = (handle.id() & SLOT_MASK) - 1, handle.id() >> SLOT_BITS
        if not handle.is_valid():
            return "null"
        known = 0 <= slot < len(self._entries) and generation <= self._generations[slot]
        return "freed" if known else "unknown to this manager"
