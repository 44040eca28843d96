"""Laws of block pools and cache managers.  Clause: PA-ENGINE-2."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ferrum_ref.errors import FerrumError
from ferrum_ref.interfaces.kv_cache import AllocationRequest, KvCacheHandle, KvCacheManager
from ferrum_ref.parity.engine.law import Law, finished
from ferrum_ref.parity.engine.parts import EngineParts
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.sampling import Priority

NUM_STEPS = 150


def refuses(call: Callable[[], object]) -> bool:
    """True if the call ends in one of the project's errors."""
    try:
        call()
    except FerrumError:
        return True
    return False


def pool_keeps_count(parts: EngineParts, rng: np.random.Generator) -> str:
    """Random takes and frees: no block twice, none lost, nothing beyond the pool, all or nothing."""
    num_blocks = int(rng.integers(3, 12))
    pool = parts.make_pool(num_blocks, 4)
    held: list[int] = []
    for _ in range(NUM_STEPS):
        free = num_blocks - len(held)
        if pool.free_block_count() != free:
            return f"{pool.free_block_count()} blocks are free, expected {free}"
        wanted = int(rng.integers(0, num_blocks + 2))
        if rng.random() < 0.5 and held:
            rng.shuffle(held)
            count = int(rng.integers(1, len(held) + 1))
            given, held = held[:count], held[count:]
            pool.free_blocks(given)
            if not refuses(lambda given=given: pool.free_blocks(given[:1])):  # type: ignore[misc]
                return "a block without a reference was freed again"
        elif wanted > free:
            if not refuses(lambda wanted=wanted: pool.allocate_blocks(wanted)):  # type: ignore[misc]
                return f"{wanted} blocks were lent where {free} were free"
        else:
            taken = list(pool.allocate_blocks(wanted))
            if len(taken) != wanted or len({*taken, *held}) != len(taken) + len(held):
                return f"asked for {wanted} blocks, got {taken} while {held} are in use"
            if not all(0 <= block < num_blocks for block in taken):
                return f"blocks {taken} of a pool of {num_blocks}"
            held += taken
    return ""


def _request(num_tokens: int) -> AllocationRequest:
    return AllocationRequest(RequestId.new(), num_tokens, 64, 1, 1, 4, Device.CPU, DataType.FP32, Priority.Normal)


def _blocks(handle: KvCacheHandle) -> list[int]:
    return [int(block) for block in handle.block_table().physical_blocks]


def manager_keeps_count(parts: EngineParts, rng: np.random.Generator) -> str:
    """Random allocations, extensions and releases: enough blocks for every token, none shared, none lost."""
    size, num_blocks = int(rng.integers(2, 5)), int(rng.integers(4, 12))
    manager: KvCacheManager = parts.make_manager(num_blocks, size)
    live: list[tuple[RequestId, KvCacheHandle]] = []
    for _ in range(NUM_STEPS):
        in_use = [block for _, handle in live for block in _blocks(handle)]
        if len(set(in_use)) != len(in_use):
            return f"a block belongs to two requests: {in_use}"
        for request_id, handle in live:
            if len(_blocks(handle)) * size < handle.num_tokens():
                return f"request {request_id} has {len(_blocks(handle))} blocks for {handle.num_tokens()} tokens"
        free = num_blocks - len(in_use)
        if manager.stats().free_blocks != free:
            return f"{manager.stats().free_blocks} blocks are free, expected {free}"
        fault = _one_change(manager, live, rng, size, free)
        if fault:
            return fault
    for request_id, _ in live:
        finished(manager.deallocate(request_id))
    left = manager.stats().free_blocks
    return "" if left == num_blocks else f"{num_blocks - left} blocks are lost after every request has gone"


def _one_change(
    manager: KvCacheManager,
    live: list[tuple[RequestId, KvCacheHandle]],
    rng: np.random.Generator,
    size: int,
    free: int,
) -> str:
    kind = rng.random()
    if kind < 0.4 or not live:
        request = _request(int(rng.integers(1, 4 * size + 1)))
        needed = -(-request.initial_tokens // size)
        if needed > free:
            return "" if refuses(lambda: finished(manager.allocate(request))) else "more was allocated than is free"
        live.append((request.request_id, finished(manager.allocate(request))))
        if not refuses(lambda: finished(manager.allocate(request))):
            return "one request was given two caches"
        return ""
    index = int(rng.integers(len(live)))
    request_id, handle = live[index]
    if kind < 0.75:
        more = 1 if rng.random() < 0.5 else int(rng.integers(1, 4 * size + 1))
        length = handle.num_tokens() + more
        needed = -(-length // size) - len(_blocks(handle))
        if needed > free:
            return "" if refuses(lambda: finished(manager.extend(handle, more))) else "extended beyond what is free"
        finished(manager.extend(handle, more))
        return "" if handle.num_tokens() == length else f"{handle.num_tokens()} tokens after extending to {length}"
    del live[index]
    finished(manager.deallocate(request_id))
    return ""


def forks_share_and_copy(parts: EngineParts, rng: np.random.Generator) -> str:
    """A fork keeps its blocks when its origin goes; a write to a shared last block goes to a copy."""
    size = int(rng.integers(2, 5))
    manager = parts.make_manager(12, size)
    request = _request(2 * size + 1)
    origin = finished(manager.allocate(request))
    fork = origin.clone_handle()
    if _blocks(fork) != _blocks(origin):
        return f"a fork has blocks {_blocks(fork)}, its origin {_blocks(origin)}"
    if manager.stats().free_blocks != 9:
        return f"{manager.stats().free_blocks} blocks are free after a fork, expected 9"
    finished(manager.extend(fork, 1))
    if _blocks(fork)[2] == _blocks(origin)[2]:
        return "two sequences write to one shared block"
    if _blocks(fork)[:2] != _blocks(origin)[:2]:
        return "full blocks were copied though nobody writes to them"
    kept = set(_blocks(fork))
    finished(manager.deallocate(request.request_id))
    if manager.stats().free_blocks != 9:
        return f"{manager.stats().free_blocks} blocks are free beside a living fork of 3 of 12"
    other = finished(manager.allocate(_request(9 * size)))
    overlap = kept & set(_blocks(other))
    return f"blocks {sorted(overlap)} of a living fork were lent again" if overlap else ""


BLOCK_LAWS = (
    Law("KV cache", "pool keeps count", pool_keeps_count),
    Law("KV cache", "manager keeps count", manager_keeps_count),
    Law("KV cache", "forks share and copy", forks_share_and_copy),
)
