"""Order of threads, barriers, and barriers that some threads never reach."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from ferrum_numba.simulator import Schedule, Simulator
from numba import cuda

from ferrum_ref.errors import BackendError, InvalidParameterError, UnsupportedError


def launch(kernel: Any, *arguments: Any, grid: Any = 1, block: Any = 32, **options: Any) -> None:
    Simulator().launch(kernel, grid, block, *arguments, **options)


@pytest.mark.clause("BK-CUDASIM-1", "BK-CUDASIM-2")
def test_every_thread_of_a_three_dimensional_grid_runs_once() -> None:
    def mark(counts: Any, order: Any) -> None:
        x, y, z = cuda.grid(3)
        counts[x, y, z] += 1
        order[x, y, z] = (cuda.threadIdx.z * cuda.blockDim.y + cuda.threadIdx.y) * cuda.blockDim.x + cuda.threadIdx.x

    counts, order = np.zeros((6, 6, 2), np.int64), np.full((6, 6, 2), -1)
    launch(mark, counts, order, grid=(2, 3), block=(3, 2, 2))
    assert (counts == 1).all()
    x, y, z = np.indices((6, 6, 2))
    assert (order == (z * 2 + y % 2) * 3 + x % 3).all()


@pytest.mark.clause("BK-CUDASIM-2")
@pytest.mark.parametrize(("schedule", "expected"), [(Schedule.FORWARDS, 3), (Schedule.BACKWARDS, 0)])
def test_threads_run_in_order_or_in_reverse(schedule: Schedule, expected: int) -> None:
    def last_comes_to_stay(seen: Any) -> None:
        cuda.atomic.exch(seen, 0, cuda.grid(1))

    seen = np.full(1, -1)
    Simulator(schedule).launch(last_comes_to_stay, 2, 2, seen)
    assert seen[0] == expected


@cuda.jit(device=True)
def doubled(value: Any) -> Any:
    return value + value


@pytest.mark.clause("BK-CUDASIM-1")
def test_device_functions_and_closures_come_along_and_the_module_stays_as_it_was() -> None:
    factor = 3

    @cuda.jit(device=True)
    def scaled(value: Any) -> Any:
        return doubled(value) * factor

    @cuda.jit
    def kernel(data: Any) -> None:
        data[cuda.grid(1)] = scaled(data[cuda.grid(1)])

    data = np.arange(4)
    launch(kernel, data, block=4)
    assert data.tolist() == [0, 6, 12, 18]
    assert globals()["cuda"] is sys.modules["numba.cuda"]


@pytest.mark.clause("BK-CUDASIM-3")
def test_a_barrier_makes_writes_of_others_visible() -> None:
    def reverse(data: Any) -> None:
        held = cuda.shared.array(64, np.float32)
        place = cuda.threadIdx.x
        held[place] = data[place]
        cuda.syncthreads()
        data[place] = held[63 - place]

    data = np.arange(64, dtype=np.float32)
    launch(reverse, data, block=64)
    assert data.tolist() == list(range(63, -1, -1))


@pytest.mark.clause("BK-CUDASIM-3")
def test_voting_barriers_count_over_the_block() -> None:
    def vote(out: Any) -> None:
        thread = cuda.threadIdx.x
        count = cuda.syncthreads_count(thread % 3 == 0)
        every, some = cuda.syncthreads_and(thread >= 0), cuda.syncthreads_or(thread == 70)
        out[thread, 0], out[thread, 1], out[thread, 2] = count, every, some

    out = np.zeros((40, 3), np.int64)
    launch(vote, out, block=40)
    assert (out == [14, 1, 0]).all()


def half_waits(data: Any) -> None:
    if cuda.threadIdx.x < 16:
        cuda.syncthreads()
    data[cuda.threadIdx.x] = 1


def two_places(data: Any) -> None:
    if cuda.threadIdx.x == 3:
        cuda.syncthreads()
    else:
        cuda.syncthreads()
    data[cuda.threadIdx.x] = 1


def ends_early(data: Any) -> None:
    if cuda.grid(1) >= 40:
        return
    data[cuda.grid(1)] = 1
    cuda.syncthreads()


@cuda.jit(device=True)
def meet() -> None:
    cuda.syncthreads()


def same_function_twice(data: Any) -> None:
    if cuda.threadIdx.x == 0:
        meet()
    else:
        meet()


@pytest.mark.clause("BK-CUDASIM-3")
@pytest.mark.parametrize(
    ("kernel", "grid", "told"),
    [
        (half_waits, 1, r"block \(0, 0, 0\): divergent barrier: threads \(0, 0, 0\), .* and 10 more at syncthreads"),
        (half_waits, 1, r"threads \(16, 0, 0\), .* ended"),
        (two_places, 1, r"thread \(3, 0, 0\) at syncthreads \(test_simulator_threads.py:\d+\)"),
        (ends_early, 2, r"block \(1, 0, 0\): divergent barrier: threads \(0, 0, 0\), .*\(8, 0, 0\), .* ended"),
        (same_function_twice, 1, r"divergent barrier: thread \(0, 0, 0\) at syncthreads"),
    ],
)
def test_a_divergent_barrier_is_told_with_block_and_threads(kernel: Any, grid: int, told: str) -> None:
    with pytest.raises(BackendError, match=told):
        launch(kernel, np.zeros(64), grid=grid)


@pytest.mark.clause("BK-CUDASIM-9")
def test_functions_follow_cuda_in_type_and_in_special_values() -> None:
    def functions(out: Any, types: Any) -> None:
        big, zero = np.float32(1000.0), np.float32(0.0)
        out[0], out[1], out[2] = math.exp(big), math.log(zero), math.sqrt(np.float32(-1.0))
        types[0] = math.tanh(big).itemsize
        types[1] = math.tanh(1.0).itemsize

    out, types = np.zeros(3, np.float32), np.zeros(2, np.int64)
    launch(functions, out, types, block=1)
    assert out[:2].tolist() == [math.inf, -math.inf]
    assert math.isnan(out[2])
    assert types.tolist() == [4, 8]


@pytest.mark.clause("BK-CUDASIM-9")
def test_what_has_no_stand_in_is_named() -> None:
    def cosine(out: Any) -> None:
        out[0] = math.cos(np.float32(1.0))

    def cluster(out: Any) -> None:
        out[0] = cuda.clusters(1)

    for kernel, name in ((cosine, r"math\.cos"), (cluster, r"cuda\.clusters")):
        with pytest.raises(UnsupportedError, match=name):
            launch(kernel, np.zeros(1), block=1)


@pytest.mark.clause("BK-CUDASIM-10")
@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes"),
    [(0, 32, 0), (1, 0, 0), ((1, 1, 1, 1), 1, 0), (1, 1025, 0), (1, (32, 33), 0), (1, 32, 48 * 1024 + 4)],
)
def test_launches_that_no_gpu_takes_are_refused(grid: Any, block: Any, shared_bytes: int) -> None:
    with pytest.raises(InvalidParameterError, match="expected"):
        launch(half_waits, np.zeros(1), grid=grid, block=block, shared_bytes=shared_bytes)


@pytest.mark.clause("BK-CUDASIM-1")
def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="expected a Python function"):
        launch("kernel", np.zeros(1))


@pytest.mark.slow
@pytest.mark.clause("BK-CUDASIM-1")
def test_numbas_own_simulator_switched_on_does_no_harm() -> None:
    code = (
        "import numpy as np\n"
        "from ferrum_numba.gpu import make_backend\n"
        "b = make_backend('simulator')\n"
        "x = b.tensor_factory().from_numpy(np.arange(40, dtype=np.float16))\n"
        "assert b.kernel_ops().sampling_ops().argmax(x) == 39\n"
        "print(float(b.tensor_ops().softmax(x, 0).to_numpy().astype(np.float64).sum()))\n"
    )
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - 1.0) < 40 * 2.0**-11
