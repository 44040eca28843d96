"""Caches of attention keys and values: the handle to one sequence's cache, and the manager that lends blocks to it.

A cache is a list of fixed-size blocks. `num_heads` always means key/value heads (D-21).
Upstream: `ferrum_interfaces::kv_cache`; the records are in `kv_cache_data.py` and re-exported here.
Clauses: KV-TABLE-1..5, KV-HANDLE-1..6, KV-MANAGER-1..8, KV-PRESSURE-1..2 (specs/kv_cache.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ferrum_ref.interfaces.kv_cache_data import (
    AllocationRequest,
    BlockTable,
    CacheGcStats,
    CacheHandleStats,
    CacheManagerStats,
    MemoryPressure,
    MemoryPressureThresholds,
    pressure_from_fraction,
)
from ferrum_ref.types.devices import Device
from ferrum_ref.types.ids import BlockId, RequestId

if TYPE_CHECKING:
    from ferrum_ref.interfaces.tensor import TensorRef

__all__ = [
    "AllocationRequest",
    "BlockAllocator",
    "BlockTable",
    "CacheGcStats",
    "CacheHandleStats",
    "CacheManagerStats",
    "KvCacheHandle",
    "KvCacheManager",
    "KvStorage",
    "MemoryPressure",
    "MemoryPressureThresholds",
    "pressure_from_fraction",
]


class KvCacheHandle(ABC):
    """Reference to one sequence's cache.  [KV-HANDLE-1..6]"""

    __slots__ = ()

    @abstractmethod
    def block_table(self) -> BlockTable:
        """The live table, to read."""

    @abstractmethod
    def block_table_mut(self) -> BlockTable:
        """The live table, to write; the caller answers for its consistency (D-47)."""

    @abstractmethod
    def as_any(self) -> Any:
        """The handle itself (upstream's downcast hook)."""

    @abstractmethod
    def device(self) -> Device:
        """Where the blocks live."""

    def num_tokens(self) -> int:
        """Tokens the manager accounts for: `block_table().sequence_length`. Pure."""
        return self.block_table().sequence_length

    @abstractmethod
    def num_layers(self) -> int:
        """Layers cached. Pure."""

    @abstractmethod
    def num_heads(self) -> int:
        """Key/value heads cached (D-21). Pure."""

    @abstractmethod
    def head_dim(self) -> int:
        """Elements of one head. Pure."""

    @abstractmethod
    def key_cache(self, layer: int) -> TensorRef | None:
        """Keys `[num_tokens, G, D]` of a layer; None without storage.  Raises InvalidParameterError: unknown layer."""

    @abstractmethod
    def value_cache(self, layer: int) -> TensorRef | None:
        """Values `[num_tokens, G, D]` of a layer; else as `key_cache`."""

    def kv_cache(self, layer: int) -> tuple[TensorRef | None, TensorRef | None]:
        """(key_cache(layer), value_cache(layer))."""
        return self.key_cache(layer), self.value_cache(layer)

    @abstractmethod
    def clone_handle(self) -> KvCacheHandle:
        """A second handle on the same blocks; the first write to a shared block copies it.  [KV-HANDLE-3; D-06]

        Mutates the manager (reference counts).  Raises NotFoundError on a freed handle.
        """

    @abstractmethod
    def stats(self) -> CacheHandleStats:
        """Numbers of this handle. Pure."""

    @abstractmethod
    def is_valid(self) -> bool:
        """False once deallocated. Pure."""

    @abstractmethod
    def cache_id(self) -> str:
        """Unique text id; never used again, not even by the same request after a preemption. Pure."""


class KvCacheManager(ABC):
    """Allocation and lifetime of caches.  [KV-MANAGER-1..8]"""

    @abstractmethod
    async def allocate(self, request: AllocationRequest) -> KvCacheHandle:
        """Reserve blocks for `initial_tokens`, all or nothing.  [KV-MANAGER-1..2; D-08]

        Mutates the manager.  Raises ResourceExhaustedError (nothing taken), AlreadyExistsError: the id has a cache.
        """

    @abstractmethod
    async def extend(self, handle: KvCacheHandle, additional_tokens: int) -> None:
        """Account for more tokens, with blocks to hold them; any live handle will do.  [KV-MANAGER-3; D-47]

        Mutates handle and manager.  Raises ResourceExhaustedError (handle unchanged), NotFoundError: freed handle.
        """

    @abstractmethod
    async def deallocate(self, request_id: RequestId) -> None:
        """Free the request's cache; an unknown id is no error.  [KV-MANAGER-4]"""

    @abstractmethod
    def can_allocate(self, request: AllocationRequest) -> bool:
        """Would `allocate` succeed now. Pure.  [KV-MANAGER-5]"""

    @abstractmethod
    def stats(self) -> CacheManagerStats:
        """Numbers of the manager. Pure.  [KV-MANAGER-6]"""

    @abstractmethod
    async def gc(self) -> CacheGcStats:
        """Free the handles that nobody references any more.  [KV-MANAGER-7; D-57]"""

    @abstractmethod
    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Install the one callback that hears of a changed pressure level.  [KV-PRESSURE-2]"""

    @abstractmethod
    def get_handle(self, request_id: RequestId) -> KvCacheHandle | None:
        """The request's handle, or None. Pure."""

    @abstractmethod
    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """All (request id, handle) in order of allocation. Pure."""


class BlockAllocator(ABC):
    """A pool of fixed-size blocks, ids from 0.  [KV-POOL-1..4]"""

    @abstractmethod
    def allocate_blocks(self, num_blocks: int) -> list[BlockId]:
        """That many blocks, or ResourceExhaustedError and none. Mutates the pool."""

    @abstractmethod
    def free_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Drop one reference of each, in the given order; InvalidParameterError if one has none, and no change."""

    @abstractmethod
    def free_block_count(self) -> int:
        """Blocks without a reference. Pure."""

    @abstractmethod
    def total_block_count(self) -> int:
        """Capacity. Pure."""

    @abstractmethod
    def block_size(self) -> int:
        """Tokens per block. Pure."""

    @abstractmethod
    def defragment(self) -> None:
        """Reorder the free list to ascending ids; blocks in use stay where they are."""


class KvStorage(Protocol):
    """The K/V tensors behind the blocks. The manager copies and reads; executors write."""

    @property
    def num_layers(self) -> int:
        """Layers."""

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads."""

    @property
    def head_dim(self) -> int:
        """Elements of one head."""

    @property
    def device(self) -> Device:
        """Placement."""

    def copy_block(self, src: int, dst: int) -> None:
        """Block dst becomes a copy of block src in every layer."""

    def read(self, layer: int, block_ids: Sequence[int], num_tokens: int) -> tuple[TensorRef, TensorRef]:
        """The first `num_tokens` K and V of those blocks, each `[num_tokens, G, D]`."""
