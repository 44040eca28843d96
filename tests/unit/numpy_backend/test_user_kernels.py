"""User kernels: what they compute, in which order, and every way in which they can be wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import (
    BackendError,
    InvalidParameterError,
    ResourceExhaustedError,
)
from ferrum_ref.interfaces.backend import KernelArg, ScalarValue
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.numpy_backend.tensor import NumpyTensor
from ferrum_ref.numpy_backend.user_kernels import NumpyKernelExecutor
from ferrum_ref.types.devices import Device

ADD = """
def add(thread, a, b, out):
    i = thread.block_idx.x * thread.block_dim.x + thread.thread_idx.x
    if i < len(out):
        out[i] = a[i] + b[i]
"""
REDUCE = """
import numpy as np

def reduce(thread, x, out, scratch):
    partial = scratch.view(np.float64)
    me, size = thread.thread_idx.x, thread.block_dim.x
    i = thread.block_idx.x * size + me
    partial[me] = x[i] if i < len(x) else 0
    yield thread.syncthreads()
    step = size // 2
    while step:
        if me < step:
            partial[me] += partial[me + step]
        yield thread.syncthreads()
        step //= 2
    if me == 0:
        out[thread.block_idx.x] = partial[0]
"""
MATMUL = """
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


def buffer(array: Any) -> Any:
    return KernelArg.Buffer(array, memoryview(array).nbytes)


def tensor(array: Any) -> Any:
    return KernelArg.Tensor(NumpyTensor(array))


def launch(source: str, name: str, grid: Any, block: Any, args: Sequence[Any], **options: Any) -> NumpyKernelExecutor:
    executor = NumpyKernelExecutor(**options)

    async def run() -> None:
        handle = await executor.load_kernel(source, name, Device.CPU)
        await executor.execute_kernel(handle, grid, block, args)

    asyncio.run(run())
    return executor


@pytest.mark.clause("BK-KERNEL-1", "BK-KERNEL-4", "BK-ARG-4")
@pytest.mark.parametrize("reverse", [False, True])
def test_vector_add(reverse: bool) -> None:
    rng = np.random.default_rng(0)
    a, b, out = rng.standard_normal(1000), rng.standard_normal(1000), np.zeros(1000)
    launch(ADD, "add", (8, 1, 1), (128, 1, 1), [buffer(a), buffer(b), buffer(out)], reverse=reverse)
    np.testing.assert_array_equal(out, a + b)


@pytest.mark.clause("BK-KERNEL-5", "BK-ARG-6")
@pytest.mark.parametrize("reverse", [False, True])
def test_block_reduction(reverse: bool) -> None:
    x = np.random.default_rng(1).integers(-100, 100, 200).astype(np.float64)
    blocks = x.copy()
    blocks.resize(4, 64)
    out = np.zeros(4)
    args = [buffer(x), buffer(out), KernelArg.LocalMemory(64 * 8)]
    launch(REDUCE, "reduce", (4, 1, 1), (64, 1, 1), args, reverse=reverse)
    np.testing.assert_array_equal(out, blocks.sum(1))


@pytest.mark.clause("BK-KERNEL-5")
@pytest.mark.parametrize("reverse", [False, True])
def test_an_exchange_between_neighbours_needs_its_barrier(reverse: bool) -> None:
    source = """
def f(thread, out, scratch):
    me, size = thread.thread_idx.x, thread.block_dim.x
    scratch[me] = 10 + me
    yield thread.syncthreads()
    out[me] = scratch[(me + 1) % size]
"""
    expected = [11, 12, 13, 14, 10]
    for text, is_right in ((source, True), (source.replace("yield thread.syncthreads()", "pass"), False)):
        out = np.zeros(5, np.uint8)
        launch(text, "f", (1, 1, 1), (5, 1, 1), [buffer(out), KernelArg.LocalMemory(5)], reverse=reverse)
        assert (out.tolist() == expected) is is_right


@pytest.mark.clause("BK-KERNEL-4", "BK-KERNEL-5", "BK-KERNEL-7", "BK-ARG-3")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (7, 9, 5), (1, 3, 12)])
def test_tiled_matmul(sizes: tuple[int, int, int], reverse: bool) -> None:
    rows, inner, columns = sizes
    rng = np.random.default_rng(2)
    a = rng.integers(-9, 9, (rows, inner)).astype(np.float64)
    b = rng.integers(-9, 9, (inner, columns)).astype(np.float64)
    out = np.full((rows, columns), np.nan)
    grid = (-(-columns // 4), -(-rows // 4), 1)
    launch(MATMUL, "matmul", grid, (4, 4, 1), [tensor(a), tensor(b), tensor(out)], reverse=reverse)
    np.testing.assert_array_equal(out, a @ b)


@pytest.mark.clause("BK-KERNEL-4")
@given(
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.booleans(),
)
def test_every_thread_runs_once_x_fastest(
    grid: tuple[int, int, int], block: tuple[int, int, int], reverse: bool
) -> None:
    source = """
def who(thread, seen, position):
    assert thread.grid_dim == tuple(seen.shape[2::-1]) and thread.block_dim == tuple(seen.shape[:2:-1])
    bx, by, bz = thread.block_idx
    tx, ty, tz = thread.thread_idx
    assert (thread.block_idx.z, thread.thread_idx.y) == (bz, ty)
    seen[bz, by, bx, tz, ty, tx] += 1 + position[0]
    position[0] += 1
"""
    seen, position = np.zeros((*grid[::-1], *block[::-1]), np.int64), np.zeros(1, np.int64)
    launch(source, "who", grid, block, [tensor(seen), buffer(position)], reverse=reverse)
    order = np.arange(1, seen.size + 1)
    np.testing.assert_array_equal(seen.reshape(-1), order[::-1] if reverse else order)


@pytest.mark.clause("BK-KERNEL-4")
def test_backwards_shows_a_race() -> None:
    source = "def last(thread, out):\n    out[0] = thread.thread_idx.x\n"
    results = []
    for reverse in (False, True):
        out = np.zeros(1)
        launch(source, "last", (1, 1, 1), (5, 1, 1), [buffer(out)], reverse=reverse)
        results.append(out[0])
    assert results == [4, 0]


DIVERGENT = {
    "some finish": (
        "def f(t):\n    if t.thread_idx.x == 2:\n        yield t.syncthreads()\n",
        r"thread \(2, 0, 0\), line 3: divergent barrier.*thread \(0, 0, 0\) has finished \(3 in all\)",
    ),
    "two places": (
        "def f(t):\n    if t.thread_idx.x < 2:\n        yield t.syncthreads()\n"
        "    else:\n        yield t.syncthreads()\n",
        r"thread \(0, 0, 0\), line 3: divergent.*thread \(2, 0, 0\) waits at line 5",
    ),
    "loops of unequal length": (
        "def f(t):\n    for _ in range(1 + t.thread_idx.x):\n        yield t.syncthreads()\n",
        r"thread \(1, 0, 0\), line 3: divergent",
    ),
    "inside a helper": (
        "def g(t):\n    yield t.syncthreads()\ndef f(t):\n    yield t.syncthreads()\n    if t.thread_idx.x:\n"
        "        yield from g(t)\n    else:\n        yield t.syncthreads()\n",
        r"thread \(0, 0, 0\), line 8: divergent.*thread \(1, 0, 0\) waits at line 2",
    ),
    "not yielded": ("def f(t):\n    t.syncthreads()\n", "called but not waited for"),
    "not yielded in a generator": (
        "def f(t):\n    yield t.syncthreads()\n    t.syncthreads()\n",
        "called but not waited for",
    ),
    "two at once": ("def f(t):\n    t.syncthreads()\n    yield t.syncthreads()\n", "called but not waited for"),
    "something else": ("def f(t):\n    yield 5\n", r"line 2: the kernel yielded 5, expected `yield thread\.sync"),
    "an old barrier": (
        "def f(t):\n    b = t.syncthreads()\n    yield b\n    yield b\n",
        "line 4: the kernel yielded",
    ),
}


@pytest.mark.clause("BK-KERNEL-6")
@pytest.mark.parametrize("case", DIVERGENT)
def test_barriers_that_do_not_hold_are_reported(case: str) -> None:
    source, complaint = DIVERGENT[case]
    with pytest.raises(BackendError, match=complaint):
        launch(source, "f", (1, 1, 1), (4, 1, 1), [])


@pytest.mark.clause("BK-KERNEL-8")
@pytest.mark.parametrize("generator", [False, True])
def test_an_error_names_block_thread_and_line(generator: bool) -> None:
    source = """
def helper(values, index):
    values[index] = 1

def f(thread, values):
    index = thread.block_idx.y * 2 + thread.thread_idx.z
    helper(values, index)
"""
    if generator:
        source += "    yield thread.syncthreads()\n"
    values = np.zeros(3)
    executor = NumpyKernelExecutor()
    handle = asyncio.run(executor.load_kernel(source, "f", Device.CPU))
    with pytest.raises(
        BackendError, match=r"f: block \(0, 1, 0\), thread \(0, 0, 1\), line 3: IndexError: index 3"
    ) as caught:
        asyncio.run(executor.execute_kernel(handle, (1, 2, 1), (1, 1, 2), [buffer(values)]))
    assert isinstance(caught.value.__cause__, IndexError)
    assert values.tolist() == [1, 1, 1]
    values = np.zeros(4)
    asyncio.run(executor.execute_kernel(handle, (1, 2, 1), (1, 1, 2), [buffer(values)]))
    assert values.tolist() == [1, 1, 1, 1]


@pytest.mark.clause("BK-KERNEL-8")
def test_a_kernel_cannot_end_the_program() -> None:
    with pytest.raises(BackendError, match="SystemExit: 4"):
        launch("import sys\ndef f(t):\n    sys.exit(4)\n", "f", (1, 1, 1), (1, 1, 1), [])
    stubborn = "def f(t):\n    try:\n        yield t.syncthreads()\n        1 / 0\n    finally:\n        yield 1\n"
    with pytest.raises(BackendError, match="the kernel yielded 1"):
        launch(stubborn, "f", (1, 1, 1), (3, 1, 1), [])


@pytest.mark.clause("BK-KERNEL-9")
@pytest.mark.parametrize(
    ("grid", "block", "num_args", "kind", "complaint"),
    [
        ((0, 1, 1), (1, 1, 1), 3, InvalidParameterError, "grid_size"),
        ((1, 1), (1, 1, 1), 3, InvalidParameterError, r"grid_size: got \(1, 1\), expected \(x, y, z\)"),
        ((1, 1, 2**32), (1, 1, 1), 3, InvalidParameterError, "grid_size"),
        ((1, 1, 1), (1, -1, 1), 3, InvalidParameterError, "block_size"),
        ((1, 1, 1), (1, 1.0, 1), 3, InvalidParameterError, "block_size"),
        ((1, 1, 1), 4, 3, InvalidParameterError, "block_size"),
        ((1, 1, 1), (1025, 1, 1), 3, ResourceExhaustedError, "1025 threads, expected at most 1024"),
        ((1, 1, 1), (32, 8, 5), 3, ResourceExhaustedError, "1280 threads"),
        ((1, 1, 1), (1, 1, 1), 2, InvalidParameterError, r"add\(thread, a, b, out\): got the thread and 2 arguments"),
        ((1, 1, 1), (1, 1, 1), 4, InvalidParameterError, "4 arguments"),
    ],
)
def test_a_launch_that_cannot_be(grid: Any, block: Any, num_args: int, kind: type[Exception], complaint: str) -> None:
    out = np.zeros(4)
    with pytest.raises(kind, match=complaint):
        launch(ADD, "add", grid, block, [buffer(np.ones(4))] * (num_args - 1) + [buffer(out)])
    assert not out.any()


@pytest.mark.clause("BK-KERNEL-10", "BK-ARG-1", "BK-ARG-2")
def test_arithmetic_keeps_the_width_of_its_operands() -> None:
    source = """
def f(t, a, b, x, flag, out):
    out[:3] = a + b, x * x, flag
    out[3:] = [value.dtype.itemsize for value in (a, b, x, flag)]
"""
    out = np.zeros(7)
    scalars = [ScalarValue.U8(200), ScalarValue.U8(100), ScalarValue.F32(1e30), ScalarValue.Bool(True)]
    args = [*(KernelArg.Scalar(scalar) for scalar in scalars), buffer(out)]
    launch(source, "f", (1, 1, 1), (1, 1, 1), args)
    assert out.tolist() == [44, np.inf, 1, 1, 1, 4, 1]


@pytest.mark.clause("BK-KERNEL-11")
def test_launches_run_in_the_order_of_their_calls() -> None:
    source = """
def note(t, order, number):
    if t.block_idx.x == t.grid_dim.x - 1:
        order[order[0]] = number
        order[0] += 1
"""
    order = np.zeros(10, np.int64)
    order[0] = 1

    async def run() -> None:
        backend = make_backend()
        executor = backend.kernel_executor()
        assert executor is not None
        handle = await executor.load_kernel(source, "note", Device.CPU)
        tasks = [
            asyncio.ensure_future(
                executor.execute_kernel(
                    handle,
                    (20000 // number**3, 1, 1),  # the first ones take longest
                    (1, 1, 1),
                    [buffer(order), KernelArg.Scalar(ScalarValue.I64(number))],
                )
            )
            for number in range(1, 10)
        ]
        await asyncio.sleep(0)  # all nine have queued their launch
        await backend.synchronize(Device.CPU)
        assert order[1:].tolist() == list(range(1, 10))
        await asyncio.gather(*tasks)
        assert backend.status().operations_completed == 9

    asyncio.run(run())


ENDLESS = "def f(t, count):\n    count[0] += 1\n"


@pytest.mark.clause("BK-KERNEL-11")
def test_a_cancelled_caller_stops_its_launch() -> None:
    count = np.zeros(1, np.int64)

    async def run() -> None:
        executor = NumpyKernelExecutor()
        handle = await executor.load_kernel(ENDLESS, "f", Device.CPU)
        task = asyncio.ensure_future(executor.execute_kernel(handle, (2**32 - 1, 1, 1), (1, 1, 1), [buffer(count)]))
        while not count[0]:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stopped_at = int(count[0])
        await executor.execute_kernel(handle, (1, 1, 1), (1, 1, 1), [buffer(count)])
        assert count[0] == stopped_at + 1

    asyncio.run(run())


@pytest.mark.clause("BK-KERNEL-11", "BK-NUMPY-10")
def test_shutdown_stops_a_launch() -> None:
    count = np.zeros(1, np.int64)

    async def run() -> None:
        backend = make_backend()
        executor = backend.kernel_executor()
        assert executor is not None
        handle = await executor.load_kernel(ENDLESS, "f", Device.CPU)
        task = asyncio.ensure_future(executor.execute_kernel(handle, (2**32 - 1, 1, 1), (1, 1, 1), [buffer(count)]))
        while not count[0]:
            await asyncio.sleep(0.001)
        await backend.shutdown()
        with pytest.raises(BackendError, match="shut down during the launch"):
            await task
        assert executor.get_kernel_info(handle) is None
        for call in (
            executor.load_kernel(ENDLESS, "f", Device.CPU),
            executor.execute_kernel(handle, (1, 1, 1), (1, 1, 1), []),
            executor.unload_kernel(handle),
        ):
            with pytest.raises(BackendError, match="has been shut down"):
                await call

    asyncio.run(run())
