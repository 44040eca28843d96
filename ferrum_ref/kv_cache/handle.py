"""Handle to one sequence's paged cache.  Clauses: KV-HANDLE-1..6 (specs/kv_cache.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ferrum_ref.errors import InvalidParameterError, NotFoundError
from ferrum_ref.interfaces.kv_cache import BlockTable, CacheHandleStats, KvCacheHandle, KvStorage
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import RequestId

if TYPE_CHECKING:
    from ferrum_ref.interfaces.step import SequenceState
    from ferrum_ref.interfaces.tensor import TensorRef
    from ferrum_ref.kv_cache.manager import PagedKvCacheManager


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What one cached token is made of; all zero where only bookkeeping matters. `num_heads` are K/V heads (D-21)."""

    num_layers: int = 0
    num_heads: int = 0
    head_dim: int = 0
    dtype: DataType = DataType.FP32
    device: Device = Device.CPU

    def bytes_per_token(self) -> int:
        """2 * layers * heads * head_dim * dtype bytes (keys and values). Pure."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * self.dtype.size_bytes()

    @staticmethod
    def of_storage(storage: KvStorage, dtype: DataType) -> KvGeometry:
        """The geometry of K/V tensors. Pure."""
        return KvGeometry(storage.num_layers, storage.num_kv_heads, storage.head_dim, dtype, storage.device)


class PagedKvCacheHandle(KvCacheHandle):
    """A block table lent by a `PagedKvCacheManager`.  [KV-HANDLE-1..6]

    `table`, `writable_tokens`, `num_registered_blocks` are the manager's: positions below `writable_tokens` lie in
    blocks of this sequence alone; the first `num_registered_blocks` are findable by their digests.
    """

    __slots__ = (
        "__weakref__",
        "_cache_id",
        "last_access_s",
        "manager",
        "num_registered_blocks",
        "owner",
        "request_id",
        "serial",
        "table",
        "valid",
        "writable_tokens",
    )

    def __init__(self, manager: PagedKvCacheManager, request_id: RequestId, serial: int, table: BlockTable) -> None:
        self.manager = manager
        self._cache_id = f"kv-{serial}"
        self.request_id = request_id
        self.serial = serial
        self.table = table
        self.writable_tokens = 0
        self.num_registered_blocks = 0
        self.owner: SequenceState | None = None
        self.valid = True
        self.last_access_s = 0.0

    def block_table(self) -> BlockTable:
        return self.table

    def block_table_mut(self) -> BlockTable:
        return self.table

    def as_any(self) -> PagedKvCacheHandle:
        return self

    def device(self) -> Device:
        return self.manager.geometry.device

    def num_layers(self) -> int:
        return self.manager.geometry.num_layers

    def num_heads(self) -> int:
        return self.manager.geometry.num_heads

    def head_dim(self) -> int:
        return self.manager.geometry.head_dim

    def key_cache(self, layer: int) -> TensorRef | None:
        found = self._read(layer)
        return None if found is None else found[0]

    def value_cache(self, layer: int) -> TensorRef | None:
        found = self._read(layer)
        return None if found is None else found[1]

    def kv_cache(self, layer: int) -> tuple[TensorRef | None, TensorRef | None]:
        return self._read(layer) or (None, None)

    def clone_handle(self) -> PagedKvCacheHandle:
        return self.manager.fork_handle(self)

    def stats(self) -> CacheHandleStats:
        blocks, tokens = len(self.table.physical_blocks), self.table.sequence_length
        slots = blocks * self.table.block_size
        return CacheHandleStats(
            memory_bytes=slots * self.manager.geometry.bytes_per_token(),
            blocks_allocated=blocks,
            tokens_stored=tokens,
            utilization=tokens / slots if slots else 0.0,
            last_access=self.last_access_s if self.owner is None else self.manager.last_step_s,
        )

    def is_valid(self) -> bool:
        return self.valid

    def cache_id(self) -> str:
        return self._cache_id

    def require_valid(self, operation: str) -> None:
        """Raises NotFoundError when freed."""
        if not self.valid:
            raise NotFoundError(f"{operation}: cache {self._cache_id} was freed; allocate a new one")

    def _read(self, layer: int) -> tuple[TensorRef, TensorRef] | None:
        self.require_valid("kv_cache")
        storage, geometry = self.manager.storage, self.manager.geometry
        if not 0 <= layer < max(geometry.num_layers, 1):
            raise InvalidParameterError(f"kv_cache: layer must be in [0, {geometry.num_layers}), got {layer}")
        if storage is None:
            return None
        return storage.read(layer, list(self.table.physical_blocks), self.table.sequence_length)
