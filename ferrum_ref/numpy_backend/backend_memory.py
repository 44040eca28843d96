"""The memory manager that a backend's settings ask for.   Clauses: BK-NUMPY-7, BK-NUMPY-9."""

from __future__ import annotations

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend_data import BackendConfig, BackendMemoryConfig, MemoryGrowthStrategy
from ferrum_ref.interfaces.memory import MemoryManagerConfig, MemoryPoolConfig, MemoryType
from ferrum_ref.numpy_backend.memory import DEFAULT_CAPACITY_BYTES, NumpyMemoryManager
from ferrum_ref.types.devices import Device

NUM_INCREMENTS = 8


def make_memory_manager(config: BackendConfig | None) -> NumpyMemoryManager:
    """A manager of the CPU's arena; without settings, one that grows as it needs.  [BK-NUMPY-7, BK-NUMPY-9]

    Raises UnsupportedError for a pool that is not reused; InvalidParameterError for an alignment the arena cannot give.
    """
    if config is None:
        return NumpyMemoryManager(Device.CPU)
    memory = config.memory_config
    if not memory.enable_pooling:
        raise UnsupportedError(
            "configure: memory_config.enable_pooling: got false, and the numpy backend's arena always reuses its "
            "blocks; set it to true"
        )
    settings = MemoryManagerConfig(pool_configs={MemoryType.General: pool_of(memory)}, enable_debug=config.enable_debug)
    capacity_bytes = DEFAULT_CAPACITY_BYTES if memory.pool_size is None else memory.pool_size
    return NumpyMemoryManager(Device.CPU, capacity_bytes, settings)


def pool_of(memory: BackendMemoryConfig) -> MemoryPoolConfig:
    """Static: all of it at once and no more. Dynamic: what each allocation needs. Incremental: by eighths. Pure."""
    size_bytes = DEFAULT_CAPACITY_BYTES if memory.pool_size is None else memory.pool_size
    if memory.growth_strategy is MemoryGrowthStrategy.Static:
        return MemoryPoolConfig(
            initial_size=size_bytes,
            max_size=size_bytes,
            growth_increment=0,
            enable_auto_expansion=False,
            alignment=memory.alignment,
            pre_allocate=True,
        )
    step = 0 if memory.growth_strategy is MemoryGrowthStrategy.Dynamic else -(-size_bytes // NUM_INCREMENTS)
    return MemoryPoolConfig(initial_size=step, max_size=size_bytes, growth_increment=step, alignment=memory.alignment)
