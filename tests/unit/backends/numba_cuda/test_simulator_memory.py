"""Shared, local and global memory: identity, bounds, unwritten elements, races, atomics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ferrum_numba.simulator import Schedule, Simulator
from numba import cuda

from ferrum_ref.errors import BackendError, UnsupportedError


def run(kernel: Any, *arguments: Any, grid: Any = 1, block: Any = 32, **options: Any) -> None:
    Simulator().launch(kernel, grid, block, *arguments, **options)


@pytest.mark.clause("BK-CUDASIM-5")
def test_two_shared_arrays_of_one_line_are_two() -> None:
    def kernel(out: Any) -> None:
        # fmt: off
        a = cuda.shared.array(4, np.int64); b = cuda.shared.array(4, np.int64)  # noqa: E702
        # fmt: on
        a[cuda.threadIdx.x], b[cuda.threadIdx.x] = 1, 2
        out[cuda.threadIdx.x] = 10 * a[cuda.threadIdx.x] + b[cuda.threadIdx.x]

    out = np.zeros(4, np.int64)
    run(kernel, out, block=4)
    assert out.tolist() == [12] * 4


@pytest.mark.clause("BK-CUDASIM-5")
def test_dynamic_memory_has_the_size_of_the_launch_and_one_type() -> None:
    def kernel(out: Any) -> None:
        held = cuda.shared.array(0, np.float32)
        out[0] = len(held)

    def two_types(out: Any) -> None:
        cuda.shared.array(0, np.float32)
        cuda.shared.array(0, np.int64)

    out = np.zeros(1, np.int64)
    run(kernel, out, block=1, shared_bytes=96)
    assert out[0] == 24
    with pytest.raises(UnsupportedError, match="one element type"):
        run(two_types, out, block=1, shared_bytes=96)


@pytest.mark.clause("BK-CUDASIM-5")
def test_shared_memory_is_fresh_in_every_block_and_local_memory_in_every_thread() -> None:
    def from_the_block_before(out: Any) -> None:
        held = cuda.shared.array(1, np.float32)
        if cuda.blockIdx.x == 0:
            held[0] = 1.0
        out[cuda.blockIdx.x] = held[0]

    def unwritten_local(out: Any) -> None:
        own = cuda.local.array(2, np.int32)
        own[0] = cuda.threadIdx.x
        out[cuda.threadIdx.x] = own[cuda.threadIdx.x]

    told = r"block \(1, 0, 0\) thread \(0, 0, 0\): shared float32 array .*\[0\] is read before anything was written"
    with pytest.raises(BackendError, match=told):
        run(from_the_block_before, np.zeros(2), grid=2, block=1)
    with pytest.raises(BackendError, match=r"thread \(1, 0, 0\): local int32 array .*\[1\] is read before"):
        run(unwritten_local, np.zeros(2), block=2)


def missing_barrier(data: Any) -> None:
    held = cuda.shared.array(32, np.float32)
    held[cuda.threadIdx.x] = data[cuda.threadIdx.x]
    data[cuda.threadIdx.x] = held[31 - cuda.threadIdx.x]


def overwritten_too_soon(data: Any) -> None:
    held = cuda.shared.array(2, np.float32)
    thread = cuda.threadIdx.x
    for step in range(2):
        if thread == 0:
            held[0] = step
        cuda.syncthreads()
        data[thread] += held[0]  # the next round's write is not held back


def written_by_all(data: Any) -> None:
    held = cuda.shared.array(1, np.float32)
    held[0] = cuda.threadIdx.x


def mixed_with_atomics(data: Any) -> None:
    held = cuda.shared.array(1, np.int64)
    if cuda.threadIdx.x == 0:
        held[0] = 0
    cuda.atomic.add(held, 0, 1)


def across_warps(data: Any) -> None:
    held = cuda.shared.array(64, np.float32)
    held[cuda.threadIdx.x] = 1.0
    cuda.syncwarp()
    data[cuda.threadIdx.x] = held[(cuda.threadIdx.x + 32) % 64]


def global_between_blocks(data: Any) -> None:
    data[0] = cuda.blockIdx.x


def global_read_after_write(data: Any) -> None:
    data[cuda.grid(1)] = 1.0
    data[32 + cuda.grid(1)] = data[(cuda.grid(1) + 1) % 32]


@pytest.mark.clause("BK-CUDASIM-6", "BK-CUDASIM-7")
@pytest.mark.parametrize(
    ("kernel", "block", "grid", "schedule"),
    [
        (missing_barrier, 32, 1, Schedule.FORWARDS),
        (missing_barrier, 32, 1, Schedule.BACKWARDS),
        (overwritten_too_soon, 32, 1, Schedule.FORWARDS),
        (overwritten_too_soon, 32, 1, Schedule.BACKWARDS),
        (written_by_all, 32, 1, Schedule.FORWARDS),
        (mixed_with_atomics, 32, 1, Schedule.FORWARDS),
        (across_warps, 64, 1, Schedule.FORWARDS),
        (global_between_blocks, 1, 2, Schedule.FORWARDS),
        (global_read_after_write, 32, 1, Schedule.BACKWARDS),
    ],
)
def test_races_are_told_with_both_threads(kernel: Any, block: int, grid: int, schedule: Schedule) -> None:
    told = r"thread \(\d+, 0, 0\): .*\[\d+\] is (read before|touched while block \(0, 0, 0\) thread \(\d+, 0, 0\))"
    if schedule is Schedule.BACKWARDS and grid > 1:
        told = told.replace("(0, 0, 0)", "(1, 0, 0)")
    with pytest.raises(BackendError, match=told):
        Simulator(schedule).launch(kernel, grid, block, np.zeros(64))


@pytest.mark.clause("BK-CUDASIM-6")
def test_a_warp_that_syncs_itself_does_not_race() -> None:
    def within_a_warp(data: Any) -> None:
        held = cuda.shared.array(32, np.float32)
        for step in range(3):
            held[cuda.threadIdx.x] = data[cuda.threadIdx.x] + step
            cuda.syncwarp()
            data[cuda.threadIdx.x] = held[(cuda.threadIdx.x + 1) % 32]
            cuda.syncwarp()

    data = np.arange(32, dtype=np.float32)
    run(within_a_warp, data)
    assert data.tolist() == [(lane + 3) % 32 + 3 for lane in range(32)]


@pytest.mark.clause("BK-CUDASIM-7")
def test_atomics_return_what_was_there_and_do_not_race() -> None:
    def count(total: Any, seen: Any, extremes: Any) -> None:
        thread = cuda.threadIdx.x
        seen[thread] = cuda.atomic.add(total, 0, 2)
        cuda.atomic.max(extremes, 0, thread)
        cuda.atomic.min(extremes, 1, thread)
        cuda.atomic.or_(extremes, 2, 1 << (thread % 5))
        cuda.atomic.sub(extremes, 3, 1)
        cuda.atomic.cas(extremes, 4, 0, thread + 1)
        cuda.atomic.xor(extremes, 5, thread)
        cuda.atomic.and_(extremes, 6, ~thread)

    total, seen = np.zeros(1, np.int64), np.zeros(32, np.int64)
    extremes = np.array([-5, 5, 0, 0, 0, 0, 63])
    run(count, total, seen, extremes)
    assert total[0] == 64
    assert seen.tolist() == list(range(0, 64, 2))
    assert extremes.tolist() == [31, 0, 31, -32, 1, 0, 32]


@pytest.mark.clause("BK-CUDASIM-8")
@pytest.mark.parametrize(("index", "shown"), [((4,), r"\[4\]"), ((-1,), r"\[-1\]"), ((0, 0), r"\[0, 0\]")])
def test_an_index_out_of_bounds_is_told(index: Any, shown: str) -> None:
    def read(out: Any, data: Any) -> None:
        out[0] = data[index if len(index) > 1 else index[0]]

    def write(out: Any, data: Any) -> None:
        data[index if len(index) > 1 else index[0]] = 1.0

    for kernel in (read, write):
        with pytest.raises(BackendError, match=rf"block \(0, 0, 0\) thread \(0, 0, 0\): data{shown} is out of bounds"):
            run(kernel, np.zeros(1), np.zeros(4), block=1)


@pytest.mark.clause("BK-CUDASIM-8")
def test_each_axis_has_its_own_bounds() -> None:
    def read(out: Any, data: Any) -> None:
        out[0] = data[0, 3]

    with pytest.raises(BackendError, match=r"data\[0, 3\] is out of bounds, expected indices within \(4, 3\)"):
        run(read, np.zeros(1), np.zeros((4, 3)), block=1)
