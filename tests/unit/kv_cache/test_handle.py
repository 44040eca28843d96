"""Reading a cache through its handle, with a storage of plain lists."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ferrum_ref.errors import InvalidParameterError, NotFoundError
from ferrum_ref.interfaces.kv_cache import AllocationRequest
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.sampling import Priority


class ListStorage:
    """Slots of plain values in place of tensors; one layer's K are the values, V their negatives."""

    num_layers, num_kv_heads, head_dim, device = 2, 1, 1, Device.CPU

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.slots = [[0] * block_size for _ in range(num_blocks)]
        self.copies: list[tuple[int, int]] = []
        self.broken = False

    def copy_block(self, src: int, dst: int) -> None:
        if self.broken:
            raise OSError("no copy today")
        self.copies.append((src, dst))
        self.slots[dst] = list(self.slots[src])

    def read(self, layer: int, block_ids: Sequence[int], num_tokens: int) -> tuple[object, object]:
        values = [value for block in block_ids for value in self.slots[block]][:num_tokens]
        return values, [-value for value in values]


def asking(tokens: int) -> AllocationRequest:
    return AllocationRequest(RequestId.new(), tokens, 64, 2, 1, 1, Device.CPU, DataType.FP32, Priority.Normal)


def write(storage: ListStorage, blocks: list[int], position: int, value: int) -> None:
    size = len(storage.slots[0])
    storage.slots[blocks[position // size]][position % size] = value


@pytest.mark.clause("KV-HANDLE-1", "KV-HANDLE-2", "KV-HANDLE-4")
def test_keys_and_values_come_in_logical_order() -> None:
    storage = ListStorage(4, 2)
    cache = PagedKvCacheManager(4, 2, storage=storage)
    handle = cache.allocate_now(asking(3))
    assert handle.block_table() is handle.block_table_mut() is handle.as_any().table
    for position, value in enumerate((7, 8, 9)):
        write(storage, handle.block_table().physical_blocks, position, value)
    assert handle.key_cache(0) == [7, 8, 9]
    assert handle.value_cache(1) == [-7, -8, -9]
    assert handle.kv_cache(0) == ([7, 8, 9], [-7, -8, -9])
    assert (handle.num_layers(), handle.num_heads(), handle.head_dim()) == (2, 1, 1)
    for layer in (-1, 2):
        with pytest.raises(InvalidParameterError):
            handle.key_cache(layer)
    cache.free_handle(handle)
    with pytest.raises(NotFoundError):
        handle.value_cache(0)


@pytest.mark.clause("KV-HANDLE-2")
def test_without_storage_there_is_nothing_to_read() -> None:
    handle = PagedKvCacheManager(4, 2).allocate_now(asking(3))
    assert handle.key_cache(0) is None
    assert handle.kv_cache(0) == (None, None)


@pytest.mark.clause("KV-COW-1", "KV-COW-2")
def test_the_copy_carries_the_contents() -> None:
    storage = ListStorage(4, 4)
    cache = PagedKvCacheManager(4, 4, storage=storage)
    handle = cache.allocate_now(asking(2))
    for position, value in enumerate((5, 6)):
        write(storage, handle.block_table().physical_blocks, position, value)
    clone = handle.clone_handle()
    for live, value in ((handle, 70), (clone, 80)):
        cache.extend_now(live, 1)
        write(storage, live.block_table().physical_blocks, 2, value)
    assert storage.copies == [(0, 1)]
    assert handle.key_cache(0) == [5, 6, 70]
    assert clone.key_cache(0) == [5, 6, 80]


@pytest.mark.clause("KV-MANAGER-3", "KV-COW-1")
def test_a_failed_copy_takes_nothing() -> None:
    storage = ListStorage(4, 4)
    cache = PagedKvCacheManager(4, 4, storage=storage)
    handle = cache.allocate_now(asking(2))
    clone = handle.clone_handle()
    storage.broken = True
    with pytest.raises(OSError, match="no copy"):
        cache.extend_now(clone, 1)
    assert cache.num_free_blocks == 3
    assert clone.num_tokens() == 2
    cache.check_invariants([])
