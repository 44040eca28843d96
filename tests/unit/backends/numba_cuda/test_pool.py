"""Device memory kept for reuse, without a device; and what a GPU does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ferrum_numba.gpu.machine import why_unusable
from ferrum_numba.gpu.pool import BlockPool, rounded_size
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.types.devices import Device


class Memory:
    """Lends numbered blocks of at most `most` bytes together."""

    def __init__(self, most: int) -> None:
        self.most, self.lent, self.num_asked = most, 0, 0

    def allocate(self, num_bytes: int) -> Block:
        self.num_asked += 1
        if self.lent + num_bytes > self.most:
            raise MemoryError(f"no {num_bytes} bytes")
        self.lent += num_bytes
        return Block(self, num_bytes)


class Block:
    def __init__(self, device: Memory, num_bytes: int) -> None:
        self.device, self.num_bytes = device, num_bytes

    def __del__(self) -> None:
        self.device.lent -= self.num_bytes


@pytest.mark.clause("BK-NCUDA-40")
@given(st.integers(1, 1 << 40))
def test_sizes_are_few_and_hardly_larger(num_bytes: int) -> None:
    size = rounded_size(num_bytes)
    assert num_bytes <= size <= max(num_bytes + 512, num_bytes * 9 / 8)
    assert size % 512 == 0
    assert rounded_size(size) == size


@pytest.mark.clause("BK-NCUDA-40")
def test_a_block_given_back_is_lent_again_without_asking() -> None:
    device = Memory(1 << 20)
    pool = BlockPool(device.allocate, MemoryError)
    first, give_back = pool.take(1000)
    second, _ = pool.take(1024)
    assert second is not first
    give_back()
    third, _ = pool.take(1024)  # the same size class as 1000 bytes
    assert third is first
    assert device.num_asked == 2
    assert rounded_size(1025) == 1536
    assert pool.take(1025)[0].num_bytes == 1536
    assert pool.kept_bytes() == 0


@pytest.mark.clause("BK-NCUDA-40")
def test_where_the_device_has_no_more_what_is_kept_goes_back_first() -> None:
    device = Memory(4096)
    pool = BlockPool(device.allocate, MemoryError)
    small, give_back = pool.take(2048)
    give_back()
    del small, give_back
    assert pool.kept_bytes() == 2048
    large, _ = pool.take(4096)
    assert (large.num_bytes, pool.kept_bytes()) == (4096, 0)
    with pytest.raises(MemoryError, match="no 512 bytes"):
        pool.take(1)


@pytest.mark.clause("BK-NCUDA-41")
def test_a_gpu_needs_no_greenlet() -> None:
    code = (
        "import sys; sys.modules['greenlet'] = None; from ferrum_numba.gpu.backend import NumbaCudaBackend\n"
        "from ferrum_numba.gpu import make_backend\n"
        "try: make_backend('simulator')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("UnsupportedError")
    assert "greenlet" in done.stdout


@pytest.mark.clause("BK-NCUDA-41", "BK-NCUDA-3")
def test_a_missing_compiler_is_told_apart_from_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba import cuda

    monkeypatch.setattr(cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "cuda_error", lambda: None)
    monkeypatch.setattr(cuda, "gpus", [object()])
    assert "finds the GPU and not NVVM" in why_unusable(Device.CUDA(0))
