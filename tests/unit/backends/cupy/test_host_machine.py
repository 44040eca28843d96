"""CUDA C on the CPU: fibers, barriers, shuffles, and the bugs that they bring to light."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ferrum_cupy.host.machine import Host, kernels_in, open_host

from ferrum_ref.errors import BackendError, UnsupportedError

PROGRAM = """
extern "C" __global__ void rotate(const float* x, float* y) {
    float from_left = __shfl_sync(0xffffffffu, x[threadIdx.x], threadIdx.x % 32 + 31);
    y[blockIdx.x * blockDim.x + threadIdx.x] = from_left;
}
extern "C" __global__ void total(const float* x, float* y, int n, long long offset, float scale) {
    __shared__ float seen[64];
    seen[threadIdx.x] = threadIdx.x < n ? x[offset + threadIdx.x] : 0.0f;
    __syncthreads();
    for (int step = 32; step > 0; step /= 2) {
        if (threadIdx.x < step) seen[threadIdx.x] += seen[threadIdx.x + step];
        __syncthreads();
    }
    if (threadIdx.x == 0) y[0] = scale * seen[0];
}
extern "C" __global__ void no_barrier(const float* x, float* y) {
    __shared__ float seen[64];
    seen[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = seen[63 - threadIdx.x];
}
extern "C" __global__ void odd_ones_leave(float* y) {
    if (threadIdx.x % 2) return;
    __syncthreads();
    y[threadIdx.x] = 1.0f;
}
extern "C" __global__ void shuffle_with_the_dead(float* y) {
    if (threadIdx.x == 5) return;
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
extern "C" __global__ void wait_for_each_other(float* y) {
    if (threadIdx.x < 16) __syncthreads();
    else y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
"""


class Small(Host):
    """A host machine over the program above."""

    def call(self, kernel: str, grid: tuple[int, int, int], threads: int, *arguments: Any) -> None:
        self._libraries[("program", ())] = ctypes.CDLL(str(self.library(PROGRAM, {})))
        self.launch("program", kernel, {}, grid, threads, arguments)


@pytest.fixture(scope="module")
def small(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small("g++", tmp_path_factory.mktemp("host"))


@pytest.mark.clause("BK-CUPY-4")
def test_lanes_read_each_other(small: Small) -> None:
    x, y = np.arange(64, dtype=np.float32), np.zeros(192, np.float32)
    small.call("rotate", (3, 1, 1), 64, x, y)
    expected = np.concatenate([np.roll(x[:32], 1), np.roll(x[32:], 1)])
    assert np.array_equal(y, np.tile(expected, 3))


@pytest.mark.clause("BK-CUPY-4")
def test_a_reduction_in_shared_memory(small: Small) -> None:
    x, y = np.arange(100, dtype=np.float32), np.zeros(1, np.float32)
    small.call("total", (1, 1, 1), 64, x, y, np.int32(50), np.int64(7), np.float32(0.5))
    assert y[0] == 0.5 * x[7:57].sum()


@pytest.mark.clause("BK-CUPY-4")
def test_a_missing_barrier_shows_every_time(small: Small) -> None:
    """Threads run in order of their index, so the first half reads what the second has not written yet."""
    x, results = np.arange(1, 65, dtype=np.float32), []
    for _ in range(2):
        y = np.zeros(64, np.float32)
        small.call("total", (1, 1, 1), 64, np.zeros(64, np.float32), y, np.int32(0), np.int64(0), np.float32(0))
        small.call("no_barrier", (1, 1, 1), 64, x, y)
        results.append(y)
    assert not np.array_equal(results[0][:32], x[::-1][:32])
    assert np.array_equal(results[0][32:], x[::-1][32:])


@pytest.mark.clause("BK-CUPY-4")
@pytest.mark.parametrize(
    ("kernel", "threads", "said"),
    [
        ("odd_ones_leave", 64, r"odd_ones_leave: block \(0, 0, 0\): 32 of 64 threads ended before a barrier"),
        ("shuffle_with_the_dead", 32, "shuffle of warp 0 misses lanes that have ended"),
        ("wait_for_each_other", 32, "threads wait for each other at a barrier and at a shuffle"),
        ("rotate", 40, "no multiple of a warp"),
    ],
)
def test_threads_that_miss_each_other(small: Small, kernel: str, threads: int, said: str) -> None:
    arguments = [np.zeros(64, np.float32)] * (2 if kernel == "rotate" else 1)
    with pytest.raises(BackendError, match=said):
        small.call(kernel, (1, 1, 1), threads, *arguments)


@pytest.mark.clause("BK-CUPY-3")
def test_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch, host: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="expected 'cpu'"):
        open_host("cuda:0")
    with pytest.raises(UnsupportedError, match=r"g\+\+ refuses the kernels: .*nonsense"):
        Host("g++", tmp_path).library("nonsense;", {})
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"g\+\+ is not installed"):
        open_host("cpu")


def test_names_of_kernels() -> None:
    assert kernels_in(PROGRAM)[:2] == ["rotate", "total"]
    assert kernels_in("POINTWISE(silu, silu_of(value))\n") == ["silu"]
