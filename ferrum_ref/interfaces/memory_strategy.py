"""Which device an allocation goes to: the contract and upstream's one strategy.

Upstream: `ferrum_interfaces::memory`; re-exported by `memory.py` beside this file.
Clauses: ME-STRATEGY-1..5 (specs/memory.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.memory_data import AllocationRequirements, MemoryInfo
from ferrum_ref.types.devices import Device
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.record import check_unsigned


class AllocationStrategy(ABC):
    """Chooses the device for an allocation.  [ME-STRATEGY-1]"""

    @abstractmethod
    def select_device(
        self,
        size: int,
        requirements: AllocationRequirements,
        available_devices: Sequence[Device],
        memory_info: Mapping[Device, MemoryInfo],
    ) -> Device | None:
        """The best of `available_devices` with room for `size` bytes by `memory_info`, or None. Pure."""

    @abstractmethod
    def name(self) -> str:
        """Identifier. Pure."""


def aligned_size_bytes(size: int, alignment: int | None) -> int:
    """`size` rounded up to a multiple of `alignment` (None: as it is). Pure.  [ME-STRATEGY-3; D-40]

    Raises InvalidParameterError unless size >= 0 and the alignment is a power of two.
    """
    check_unsigned(size, 2**64, "aligned_size_bytes", "size")
    if alignment is None:
        return size
    if alignment < 1 or alignment & (alignment - 1):
        raise InvalidParameterError(f"aligned_size_bytes: alignment must be a power of two, got {alignment}")
    return -(-size // alignment) * alignment


class BestFitStrategy(AllocationStrategy):
    """The tightest fit, pulled towards half-full and preferred devices.  [ME-STRATEGY-2..4; D-40]

    score = 1 - (free - size) / total - 0.5 * |used / total - 0.5| + 0.2 * pref, pref = 1 / (index + 1) for the device
    at that index of preferred_devices, else 0. Highest score wins, the first on a tie. A device without an entry in
    `memory_info`, with total 0 or with free < size is never chosen. `size` is first rounded up to the wished
    alignment; UPSTREAM does not round. `used` is the use before the allocation; criticality, lifetime and memory type
    do not count. float64 throughout, in the order written.
    """

    def __init__(self, *, parity_mode: ParityMode = ParityMode.REFERENCE) -> None:
        self._parity_mode = parity_mode

    def select_device(
        self,
        size: int,
        requirements: AllocationRequirements,
        available_devices: Sequence[Device],
        memory_info: Mapping[Device, MemoryInfo],
    ) -> Device | None:
        """See the class.  Raises InvalidParameterError for an alignment that is no power of two."""
        rounded = aligned_size_bytes(size, requirements.alignment)
        needed = size if self._parity_mode is ParityMode.UPSTREAM else rounded
        best: tuple[float, Device] | None = None
        for device in available_devices:
            info = memory_info.get(device)
            if info is None or info.total_bytes == 0 or info.free_bytes < needed:
                continue
            score = _score(needed, info, _preference(device, requirements.preferred_devices))
            if best is None or score > best[0]:
                best = score, device
        return None if best is None else best[1]

    def name(self) -> str:
        return "best_fit"


def _score(size: int, info: MemoryInfo, preference: float) -> float:
    waste = (info.free_bytes - size) / info.total_bytes
    utilization = info.used_bytes / info.total_bytes
    return 1.0 - waste - 0.5 * abs(utilization - 0.5) + 0.2 * preference


def _preference(device: Device, preferred: Sequence[Device]) -> float:
    return 1.0 / (preferred.index(device) + 1) if device in preferred else 0.0
