"""The paged manager under any order of calls: references are conserved and nobody sees another's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ferrum_ref.errors import ResourceExhaustedError
from ferrum_ref.interfaces.kv_cache import AllocationRequest
from ferrum_ref.kv_cache.handle import PagedKvCacheHandle
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.sampling import Priority


class ListStorage:
    """One number per slot, in place of K/V tensors."""

    num_layers, num_kv_heads, head_dim, device = 1, 1, 1, Device.CPU

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.slots = [[-1] * block_size for _ in range(num_blocks)]

    def copy_block(self, src: int, dst: int) -> None:
        self.slots[dst] = list(self.slots[src])

    def read(self, layer: int, block_ids: Sequence[int], num_tokens: int) -> tuple[list[int], list[int]]:
        values = [value for block in block_ids for value in self.slots[block]][:num_tokens]
        return values, values


class KvCacheMachine(RuleBasedStateMachine):
    """Rules: allocate, extend and write, clone, free, forget a clone and collect."""

    @initialize(num_blocks=st.integers(1, 10), size=st.integers(1, 4))
    def start(self, num_blocks: int, size: int) -> None:
        self.size = size
        self.storage = ListStorage(num_blocks, size)
        self.cache = PagedKvCacheManager(num_blocks, size, storage=self.storage)
        self.texts: list[tuple[PagedKvCacheHandle, list[int]]] = []  # live handles and what each must read back
        self.clones: set[str] = set()
        self.written = 0

    def write(self, handle: PagedKvCacheHandle, text: list[int], count: int) -> None:
        blocks = handle.block_table().physical_blocks
        for position in range(len(text), len(text) + count):
            self.written += 1
            text.append(self.written)
            self.storage.slots[blocks[position // self.size]][position % self.size] = self.written

    @rule(tokens=st.integers(0, 12))
    def allocate(self, tokens: int) -> None:
        request = AllocationRequest(RequestId.new(), tokens, 64, 1, 1, 1, Device.CPU, DataType.FP32, Priority.Normal)
        free, possible = self.cache.num_free_blocks, self.cache.can_allocate(request)
        try:
            handle = self.cache.allocate_now(request)
        except ResourceExhaustedError:
            assert not possible
            assert self.cache.num_free_blocks == free
            return
        assert possible
        text: list[int] = []
        self.write(handle, text, tokens)
        self.texts.append((handle, text))

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), tokens=st.integers(0, 9))
    def extend(self, data: st.DataObject, tokens: int) -> None:
        handle, text = self.texts[data.draw(st.integers(0, len(self.texts) - 1))]  # no handle may stay with hypothesis
        free, blocks = self.cache.num_free_blocks, list(handle.block_table().physical_blocks)
        try:
            self.cache.extend_now(handle, tokens)
        except ResourceExhaustedError:
            assert self.cache.num_free_blocks == free
            assert handle.block_table().physical_blocks == blocks
            assert handle.num_tokens() == len(text)
            return
        self.write(handle, text, tokens)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def clone(self, data: st.DataObject) -> None:
        handle, text = self.texts[data.draw(st.integers(0, len(self.texts) - 1))]  # no handle may stay with hypothesis
        clone = handle.clone_handle()
        self.clones.add(clone.cache_id())
        self.texts.append((clone, list(text)))

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        handle, _ = self.texts.pop(data.draw(st.integers(0, len(self.texts) - 1)))
        self.cache.free_handle(handle)
        assert not handle.is_valid()

    @precondition(lambda self: self.clones)
    @rule()
    def forget_clones(self) -> None:
        before = len(self.texts)
        self.texts = [(handle, text) for handle, text in self.texts if handle.cache_id() not in self.clones]
        self.clones.clear()
        assert self.cache.gc_now().caches_freed == before - len(self.texts)

    @invariant()
    def conserved(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_invariants([])

    @invariant()
    def everyone_reads_their_own_text(self) -> None:
        for handle, text in getattr(self, "texts", []):
            assert handle.key_cache(0) == text
            assert handle.num_tokens() == len(text)
            assert handle.block_table().num_blocks() == -(-len(text) // self.size)

    def teardown(self) -> None:
        for handle, _ in getattr(self, "texts", []):
            self.cache.free_handle(handle)
        if hasattr(self, "cache"):
            assert self.cache.num_free_blocks == self.cache.num_blocks


KvCacheMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestKvCache = pytest.mark.clause(
    "KV-POOL-6", "KV-MANAGER-1", "KV-MANAGER-3", "KV-MANAGER-5", "KV-MANAGER-7", "KV-COW-1", "KV-COW-2", "KV-COW-3"
)(KvCacheMachine.TestCase)
