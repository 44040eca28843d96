"""Launch arguments: what a kernel sees, what it may write, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import (
    AlreadyExistsError,
    BackendError,
    InvalidParameterError,
    NotFoundError,
    ResourceExhaustedError,
)
from ferrum_ref.interfaces.backend import KernelArg, ScalarValue
from ferrum_ref.interfaces.memory import MemoryAccess, MemoryHandle
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.numpy_backend.tensor import NumpyTensor
from ferrum_ref.numpy_backend.user_kernels import NumpyKernelExecutor
from ferrum_ref.types.devices import DataType, Device

FILL = "def f(thread, x):\n    x[...] = 7\n"
ONE = (1, 1, 1)


def launch(source: str, args: Sequence[Any], grid: Any = ONE, block: Any = ONE) -> None:
    async def run() -> None:
        executor = NumpyKernelExecutor()
        await executor.execute_kernel(await executor.load_kernel(source, "f", Device.CPU), grid, block, args)

    asyncio.run(run())


@pytest.mark.clause("BK-ARG-3")
def test_a_kernel_writes_to_the_tensor_and_all_its_views() -> None:
    whole = make_backend().tensor_factory().zeros((3, 4), DataType.FP32, Device.CPU)
    launch(FILL, [KernelArg.Tensor(whole.view((1, 0), (2, 4)))])
    assert whole.to_numpy().tolist() == [[0] * 4, [7] * 4, [0] * 4]


@pytest.mark.clause("BK-ARG-3")
def test_a_tensor_of_another_backend_is_refused() -> None:
    from ferrum_ref.plugins import load_backend

    foreign = load_backend("torch").tensor_factory().zeros((2,), DataType.FP32, Device.CPU)
    with pytest.raises(BackendError, match=r"argument 0: got a .*TorchTensor, expected a NumpyTensor"):
        launch(FILL, [KernelArg.Tensor(foreign)])


@pytest.mark.clause("BK-ARG-4")
def test_buffers_share_the_first_bytes() -> None:
    floats = np.zeros((2, 3), np.float32)
    launch("def f(t, x):\n    x[:] = range(len(x))\n", [KernelArg.Buffer(floats, 16)])
    assert floats.tolist() == [[0, 1, 2], [3, 0, 0]]
    for memory in (bytearray(4), memoryview(bytearray(4)), memoryview(np.zeros(2, np.uint16))):
        launch(FILL, [KernelArg.Buffer(memory, 3)])
        assert bytes(memory) == b"\7\7\7\0"


@pytest.mark.clause("BK-ARG-4")
def test_read_only_memory_stays_so() -> None:
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    for memory in (frozen, b"abcd", memoryview(b"abcd")):
        with pytest.raises(BackendError, match="read-only"):
            launch(FILL, [KernelArg.Buffer(memory, memoryview(memory).nbytes)])
    assert not frozen.any()


@pytest.mark.clause("BK-ARG-4")
@pytest.mark.parametrize(
    ("memory", "size", "complaint"),
    [
        (np.zeros(4), 33, "size is 33 bytes, expected at most the 32"),
        (np.zeros(4), 12, "in elements of 8"),
        (np.zeros((4, 4))[:, 1:], 8, "C-contiguous"),
        (memoryview(bytes(8))[::2], 4, "got memoryview, expected contiguous memory"),
        (0x7F0000000000, 8, "got int, expected .*; Python has no raw addresses"),
        ([1, 2], 8, "got list"),
        (None, 8, "got NoneType"),
    ],
)
def test_memory_that_is_none(memory: Any, size: int, complaint: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"argument 0: buffer: .*{complaint}|{complaint}"):
        launch(FILL, [KernelArg.Buffer(memory, size)])


@pytest.mark.clause("BK-ARG-4")
def test_an_argument_must_say_what_it_is() -> None:
    for arg in (np.zeros(3), 5, ScalarValue.U8(5), NumpyTensor(np.zeros(3))):
        with pytest.raises(InvalidParameterError, match=r"argument 0: got .*, expected a KernelArg"):
            launch(FILL, [arg])


@pytest.mark.clause("BK-ARG-5")
def test_a_buffer_over_a_memory_handle() -> None:
    source = "def f(t, x, y):\n    x[t.thread_idx.x] = y[t.thread_idx.x] + t.thread_idx.x\n"

    async def run() -> None:
        backend = make_backend()
        manager, executor = backend.memory_manager(), backend.kernel_executor()
        assert executor is not None
        block = await manager.allocate(8, Device.CPU)
        manager.write(block, bytes([10] * 8))  # type: ignore[attr-defined]
        handle = await executor.load_kernel(source, "f", Device.CPU)
        args = [KernelArg.Buffer(block, 6), KernelArg.Buffer(block, 8)]
        await executor.execute_kernel(handle, ONE, (5, 1, 1), args)
        assert manager.read(block) == bytes([10, 11, 12, 13, 14, 10, 10, 10])  # type: ignore[attr-defined]
        for _ in range(2):  # a launch that fails unmaps too
            with pytest.raises(BackendError, match="IndexError"):
                await executor.execute_kernel(handle, ONE, (9, 1, 1), args)
            info = manager.handle_info(block)
            assert info is not None
            assert not info.is_mapped
        with pytest.raises(InvalidParameterError, match="size is 9 bytes"):
            await executor.execute_kernel(handle, ONE, ONE, [KernelArg.Buffer(block, 9), args[1]])
        await manager.map_memory(block, MemoryAccess.ReadWrite)  # type: ignore[attr-defined]
        with pytest.raises(AlreadyExistsError, match="mapped"):
            await executor.execute_kernel(handle, ONE, ONE, args)
        await manager.unmap_memory(block)  # type: ignore[attr-defined]
        await manager.deallocate(block)
        with pytest.raises(NotFoundError):
            await executor.execute_kernel(handle, ONE, ONE, args)

    asyncio.run(run())


@pytest.mark.clause("BK-ARG-5")
def test_a_handle_means_nothing_without_its_manager() -> None:
    with pytest.raises(InvalidParameterError, match="no memory manager"):
        launch(FILL, [KernelArg.Buffer(MemoryHandle(1), 1)])


@pytest.mark.clause("BK-ARG-6")
def test_shared_memory_is_the_blocks_own_and_starts_as_zeros() -> None:
    source = """
SHARED_MEMORY_BYTES = 8

def f(thread, out, scratch):
    scratch += 1
    thread.shared[thread.thread_idx.x] += 2
    yield thread.syncthreads()
    if thread.thread_idx.x == 0:
        out[thread.block_idx.x] = [scratch.sum(), thread.shared.sum(), len(scratch), len(thread.shared)]
"""
    out = np.zeros((3, 4))
    launch(source, [KernelArg.Tensor(NumpyTensor(out)), KernelArg.LocalMemory(2)], (3, 1, 1), (5, 1, 1))
    assert out.tolist() == [[10, 10, 2, 8]] * 3


@pytest.mark.clause("BK-ARG-6")
def test_shared_memory_has_a_limit() -> None:
    source = "SHARED_MEMORY_BYTES = 49000\ndef f(thread, *scratch): pass\n"
    launch(source, [KernelArg.LocalMemory(152)])
    with pytest.raises(ResourceExhaustedError, match=r"needs 49153 bytes .*\(49000 declared, 153 in arguments\)"):
        launch(source, [KernelArg.LocalMemory(152), KernelArg.LocalMemory(1)])
