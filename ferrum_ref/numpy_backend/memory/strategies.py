"""Strategies beside upstream's best fit.  Clauses: ME-STRATEGY-1, ME-STRATEGY-6 (specs/memory.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ferrum_ref.interfaces.memory import AllocationRequirements, AllocationStrategy, MemoryInfo
from ferrum_ref.interfaces.memory_strategy import aligned_size_bytes
from ferrum_ref.types.devices import Device


class PreferredFirstStrategy(AllocationStrategy):
    """The first preferred device with room, else the first available one.  [ME-STRATEGY-6]"""

    def select_device(
        self,
        size: int,
        requirements: AllocationRequirements,
        available_devices: Sequence[Device],
        memory_info: Mapping[Device, MemoryInfo],
    ) -> Device | None:
        candidates = with_room(size, requirements, available_devices, memory_info)
        preferred = (device for device in requirements.preferred_devices if device in candidates)
        return next(preferred, candidates[0] if candidates else None)

    def name(self) -> str:
        return "preferred_first"


class MostFreeStrategy(AllocationStrategy):
    """The device with the most free bytes, the first on a tie.  [ME-STRATEGY-6]"""

    def select_device(
        self,
        size: int,
        requirements: AllocationRequirements,
        available_devices: Sequence[Device],
        memory_info: Mapping[Device, MemoryInfo],
    ) -> Device | None:
        candidates = with_room(size, requirements, available_devices, memory_info)
        return max(candidates, key=lambda device: memory_info[device].free_bytes, default=None)

    def name(self) -> str:
        return "most_free"


def with_room(
    size: int,
    requirements: AllocationRequirements,
    available_devices: Sequence[Device],
    memory_info: Mapping[Device, MemoryInfo],
) -> list[Device]:
    """Available devices with the aligned size free, in order. Pure."""
    needed = aligned_size_bytes(size, requirements.alignment)
    return [
        device
        for device in available_devices
        if device in memory_info and memory_info[device].total_bytes and memory_info[device].free_bytes >= needed
    ]
