"""Loading a kernel: what its text may be, what is known about it afterwards, and its handle."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ferrum_ref.errors import (
    BackendError,
    DeviceError,
    InvalidParameterError,
    NotFoundError,
)
from ferrum_ref.interfaces.backend import KernelHandle, KernelInfo
from ferrum_ref.numpy_backend.user_kernels import NumpyKernelExecutor
from ferrum_ref.types.devices import Device

ADD = """
def add(thread, a, b, out):
    i = thread.block_idx.x * thread.block_dim.x + thread.thread_idx.x
    if i < len(out):
        out[i] = a[i] + b[i]
"""
TILED = """
import numpy as np

TILE = 4
SHARED_MEMORY_BYTES = 2 * TILE * TILE * 8
PREFERRED_BLOCK_SIZE = (TILE, TILE, 1)

def load(thread, tile, matrix, row, column):
    inside = row < matrix.shape[0] and column < matrix.shape[1]
    tile[thread.thread_idx.y, thread.thread_idx.x] = matrix[row, column] if inside else 0
    yield thread.syncthreads()

def matmul(thread, a, b, out):
    tile_a, tile_b = thread.shared.view(np.float64).reshape(2, TILE, TILE)
    x, y = thread.thread_idx.x, thread.thread_idx.y
    row, column = thread.block_idx.y * TILE + y, thread.block_idx.x * TILE + x
    total = 0.0
    for start in range(0, a.shape[1], TILE):
        yield from load(thread, tile_a, a, row, start + x)
        yield from load(thread, tile_b, b, start + y, column)
        for k in range(TILE):
            total += tile_a[y, k] * tile_b[k, x]
        yield thread.syncthreads()
    if row < out.shape[0] and column < out.shape[1]:
        out[row, column] = total
"""


@pytest.mark.clause("BK-KERNEL-2")
@pytest.mark.parametrize(
    ("source", "kind", "complaint"),
    [
        ("def f(t):\n    return 1 +\n", InvalidParameterError, r"line 2: invalid syntax: return 1 \+"),
        ("x = 1\n  y = 2\n", InvalidParameterError, "line 2: unexpected indent"),
        ("\0", InvalidParameterError, "null byte"),
        ("a = " + "(" * 5000, InvalidParameterError, "source"),
        (b"def f(t): pass", InvalidParameterError, "got bytes, expected Python source as str"),
        ("def f(t): pass\n\n1 / 0\n", BackendError, "failed at line 3: ZeroDivisionError"),
        ("import surely_absent_module", BackendError, "line 1: ModuleNotFoundError"),
        ("import sys\nsys.exit(3)", BackendError, "line 2: SystemExit: 3"),
    ],
)
def test_a_text_that_does_not_load(source: Any, kind: type[Exception], complaint: str) -> None:
    executor = NumpyKernelExecutor()
    with pytest.raises(kind, match=complaint):
        asyncio.run(executor.load_kernel(source, "f", Device.CPU))
    assert executor.num_kernels == 0


@pytest.mark.clause("BK-KERNEL-1")
def test_loading_executes_the_text(tmp_path: Any) -> None:
    mark = tmp_path / "mark"
    source = f"open({str(mark)!r}, 'w').close()\ndef f(thread): pass\n"
    asyncio.run(NumpyKernelExecutor().load_kernel(source, "f", Device.CPU))
    assert mark.exists()


@pytest.mark.clause("BK-KERNEL-3")
@pytest.mark.parametrize(
    ("name", "kind", "complaint"),
    [
        ("ad", NotFoundError, "got 'ad', expected a function of the source: add, later, nothing"),
        ("__builtins__", NotFoundError, "expected a function"),
        ("number", InvalidParameterError, "'number' is int"),
        ("later", InvalidParameterError, "async"),
        ("nothing", InvalidParameterError, "takes nothing"),
    ],
)
def test_an_entry_point_that_is_none(name: str, kind: type[Exception], complaint: str) -> None:
    source = ADD + "number = 3\nasync def later(thread): pass\ndef nothing(): pass\n"
    with pytest.raises(kind, match=complaint):
        asyncio.run(NumpyKernelExecutor().load_kernel(source, name, Device.CPU))


@pytest.mark.clause("BK-KERNEL-3")
def test_kernels_run_on_the_cpu_only() -> None:
    with pytest.raises(DeviceError, match="cuda:0, expected cpu"):
        asyncio.run(NumpyKernelExecutor().load_kernel(ADD, "add", Device.cuda(0)))


@pytest.mark.clause("BK-KERNEL-7")
def test_kernel_info() -> None:
    executor = NumpyKernelExecutor()
    load = executor.load_kernel
    plain = asyncio.run(load(ADD, "add", Device.CPU))
    assert executor.get_kernel_info(plain) == KernelInfo("add", 1024, 0, 5, (1, 1, 1))  # thread a b out i
    tiled = asyncio.run(load("MAX_THREADS_PER_BLOCK = 64\n" + TILED, "matmul", Device.CPU))
    info = executor.get_kernel_info(tiled)
    assert info is not None
    assert (info.max_threads_per_block, info.shared_memory_size) == (64, 256)
    assert info.preferred_block_size == (4, 4, 1)
    for declaration in (
        "MAX_THREADS_PER_BLOCK = 0",
        "MAX_THREADS_PER_BLOCK = 1025",
        "MAX_THREADS_PER_BLOCK = True",
        "SHARED_MEMORY_BYTES = -1",
        "SHARED_MEMORY_BYTES = 49153",
        "PREFERRED_BLOCK_SIZE = (1025, 1, 1)",
        "PREFERRED_BLOCK_SIZE = (0, 1, 1)",
        "PREFERRED_BLOCK_SIZE = 64",
    ):
        with pytest.raises(InvalidParameterError, match=declaration.split()[0]):
            asyncio.run(load(f"{declaration}\n{ADD}", "add", Device.CPU))


@pytest.mark.clause("BK-KERNEL-12")
def test_handles_are_never_reused() -> None:
    async def run() -> None:
        executor = NumpyKernelExecutor()
        first = await executor.load_kernel(ADD, "add", Device.CPU)
        assert first == KernelHandle(1)
        await executor.unload_kernel(first)
        second = await executor.load_kernel(ADD, "add", Device.CPU)
        assert second == KernelHandle(2)
        assert executor.get_kernel_info(first) is None
        assert executor.get_kernel_info(KernelHandle(99)) is None
        for handle in (first, KernelHandle(0)):
            with pytest.raises(NotFoundError, match="names no loaded kernel"):
                await executor.execute_kernel(handle, (1, 1, 1), (1, 1, 1), [])
            with pytest.raises(NotFoundError, match="names no loaded kernel"):
                await executor.unload_kernel(handle)

    asyncio.run(run())
