"""Device memory in numpy: arenas, pools, handles, transfers, streams, pressure, defragmentation.

Clauses: ME-* in specs/memory.md.
"""

from ferrum_ref.numpy_backend.memory.factory import NumpyMemoryManagerFactory
from ferrum_ref.numpy_backend.memory.manager import DEFAULT_CAPACITY_BYTES, NumpyMemoryManager
from ferrum_ref.numpy_backend.memory.monitor import NumpyGlobalMemoryMonitor
from ferrum_ref.numpy_backend.memory.pool import PoolUsage
from ferrum_ref.numpy_backend.memory.strategies import MostFreeStrategy, PreferredFirstStrategy
from ferrum_ref.numpy_backend.memory.streams import NumpyStreamManager

__all__ = [
    "DEFAULT_CAPACITY_BYTES", "MostFreeStrategy", "NumpyGlobalMemoryMonitor", "NumpyMemoryManager",
    "NumpyMemoryManagerFactory", "NumpyStreamManager", "PoolUsage", "PreferredFirstStrategy",
]  # fmt: skip
