"""Mappings into the host, regions that two devices share, and migration.

Clauses: ME-MAP-1..3, ME-SHARE-1..3 (specs/memory.md).
"""

from __future__ import annotations

import weakref
from contextlib import suppress

from ferrum_ref.errors import AlreadyExistsError, InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.memory import MemoryAccess, MemoryHandle, MemoryType
from ferrum_ref.numpy_backend.memory.state import MemoryState, check_size
from ferrum_ref.types.devices import Device


def map_memory(state: MemoryState, handle: MemoryHandle, access: MemoryAccess) -> memoryview:
    """See `AdvancedMemoryManager.map_memory`.  [ME-MAP-1]"""
    with state.lock:
        allocation = state.handles.get(handle, "map_memory")
        if allocation.mapping is not None:
            raise AlreadyExistsError(f"map_memory: handle {handle.id()} is mapped; use that view or unmap it first")
        window = allocation.bytes(0, allocation.block.size)
        window.flags.writeable = access is not MemoryAccess.ReadOnly
        allocation.mapping, allocation.mapped_bytes = window.data, weakref.ref(window)
        allocation.block.num_maps += 1
        return allocation.mapping


def unmap_memory(state: MemoryState, handle: MemoryHandle) -> None:
    """See `AdvancedMemoryManager.unmap_memory`.  [ME-MAP-2..3]"""
    with state.lock:
        allocation = state.handles.get(handle, "unmap_memory")
        if allocation.mapping is None:
            raise InvalidParameterError(f"unmap_memory: handle {handle.id()} is not mapped; map_memory comes first")
        with suppress(BufferError):
            allocation.mapping.release()
        if allocation.mapped_bytes is not None and allocation.mapped_bytes() is not None:
            raise InvalidParameterError(
                f"unmap_memory: slices or arrays of the view of handle {handle.id()} are alive; drop them, then unmap"
            )
        allocation.mapping = allocation.mapped_bytes = None
        allocation.block.num_maps -= 1


def create_mapping(
    state: MemoryState, src_device: Device, dst_device: Device, size: int
) -> tuple[MemoryHandle, MemoryHandle]:
    """One block at home on `src_device`, two handles.  [ME-SHARE-1..2]"""
    check_size(size, "create_mapping")
    home = state.memory_of(src_device, "create_mapping")
    state.memory_of(dst_device, "create_mapping")
    block = home.new_block(size, 1, MemoryType.Mapped)
    if block is None:
        raise ResourceExhaustedError(f"create_mapping: no {size} bytes free on {src_device}; free some memory first")
    block.num_handles = 2
    return state.add(src_device, home, block), state.add(dst_device, home, block)


def prefetch(state: MemoryState, handle: MemoryHandle, target_device: Device) -> None:
    """A block of the same size on the target, the bytes, then the old block back.  [ME-SHARE-3]"""
    allocation = state.handles.get(handle, "prefetch")
    target, source = state.memory_of(target_device, "prefetch"), allocation.block
    if target is allocation.home:
        return
    why = source.why_unmovable()
    if why is not None:
        raise InvalidParameterError(f"prefetch: handle {handle.id()} must not move: {why}")
    block = target.new_block(source.size, source.alignment, source.memory_type)
    if block is None:
        raise ResourceExhaustedError(
            f"prefetch: no {source.size} bytes free on {target_device}; free some memory first"
        )
    block.allocated_s, block.log, block.hint = source.allocated_s, source.log, source.hint
    contents, old_home = allocation.bytes(0, source.size), allocation.home
    allocation.home, allocation.device, allocation.block = target, target_device, block
    allocation.bytes(0, block.size)[:] = contents
    old_home.release(source)
