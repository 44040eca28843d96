"""Makes numpy memory managers and the streams they copy on.  Clauses: ME-FACTORY-1..2 (specs/memory.md)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.memory import MemoryManagerConfig, MemoryManagerFactory
from ferrum_ref.numpy_backend.memory.manager import DEFAULT_CAPACITY_BYTES, NumpyMemoryManager
from ferrum_ref.numpy_backend.memory.placement import PlacementName
from ferrum_ref.numpy_backend.memory.streams import NumpyStreamManager
from ferrum_ref.types.devices import Device


class NumpyMemoryManagerFactory(MemoryManagerFactory):
    """`capacities`: device -> bytes of its memory; the CPU alone when not given.

    Every manager has arenas of its own; a plain one of its device, an advanced one of all devices of the factory. All
    managers of a device queue their copies on that device's one stream manager.  [ME-FACTORY-1..2]
    """

    def __init__(
        self,
        capacities: Mapping[Device, int] | None = None,
        *,
        placement: PlacementName = "best_fit",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacities = {Device.CPU: DEFAULT_CAPACITY_BYTES} if capacities is None else dict(capacities)
        self._placement, self._clock = placement, clock
        self._lock = threading.Lock()
        self._streams: dict[Device, NumpyStreamManager] = {}

    async def create_memory_manager(self, device: Device, config: MemoryManagerConfig) -> NumpyMemoryManager:
        return self._create(device, config, {})

    async def create_advanced_memory_manager(self, device: Device, config: MemoryManagerConfig) -> NumpyMemoryManager:
        peers = {peer: capacity for peer, capacity in self._capacities.items() if peer != device}
        return self._create(device, config, peers)

    async def create_stream_manager(self, device: Device) -> NumpyStreamManager:
        return self._streams_of(device)

    def _create(self, device: Device, config: MemoryManagerConfig, peers: Mapping[Device, int]) -> NumpyMemoryManager:
        streams = self._streams_of(device)
        return NumpyMemoryManager(
            device,
            self._capacities[device],
            config,
            peers=peers,
            streams=streams,
            placement=self._placement,
            clock=self._clock,
        )

    def _streams_of(self, device: Device) -> NumpyStreamManager:
        if device not in self._capacities:
            served = ", ".join(str(name) for name in self._capacities)
            raise UnsupportedError(f"memory factory: no device {device} here; it serves {served}")
        with self._lock:
            return self._streams.setdefault(device, NumpyStreamManager())
