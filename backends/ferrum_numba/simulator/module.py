"""What a kernel sees as `cuda`.   Clauses: BK-CUDASIM-2..8 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import numpy as np

from ferrum_numba.simulator.atomics import SimulatedAtomic
from ferrum_numba.simulator.block import Block, Request
from ferrum_numba.simulator.memory import CheckedArray, LocalArray, poison
from ferrum_numba.simulator.moment import Dim3, Moment
from ferrum_numba.simulator.warp import LANES
from ferrum_ref.errors import BackendError, InvalidParameterError, UnsupportedError

FULL_MASK = 0xFFFFFFFF
SHUFFLED = (np.int32, np.int64, np.uint32, np.uint64, np.float32, np.float64, int, float, bool)


class SimulatedCuda:
    """`numba.cuda` inside a kernel, for the block that is running. Also the clock of its arrays."""

    warpsize = LANES

    def __init__(self, kernel_code: CodeType, grid: Dim3, block: Dim3, shared_bytes: int) -> None:
        self.gridDim, self.blockDim = grid, block
        self.atomic = SimulatedAtomic()
        self.shared = SimpleNamespace(array=self._shared_array)
        self.local = SimpleNamespace(array=self._local_array)
        self.const = SimpleNamespace(array_like=lambda array: array)
        self._kernel_code, self._shared_bytes = kernel_code, shared_bytes
        self._block: Block
        self.moment: Moment
        self._shared_arrays: dict[tuple[Any, ...], CheckedArray] = {}

    def enter(self, block: Block) -> None:
        """Start a new block: its shared memory is fresh."""
        self._block = block
        self._shared_arrays = {}

    @property
    def threadIdx(self) -> Dim3:
        return self._block.current.index

    @property
    def blockIdx(self) -> Dim3:
        return self._block.index

    @property
    def laneid(self) -> int:
        return self._block.current.lane

    def grid(self, ndim: int) -> Any:
        """The thread's place in the grid: an int for ndim 1, else a tuple."""
        thread, block = self._block.current.index, self._block.index
        places = tuple(b * size + t for b, size, t in zip(block, self.blockDim, thread, strict=True))
        return places[0] if ndim == 1 else places[:ndim]

    def gridsize(self, ndim: int) -> Any:
        sizes = tuple(blocks * size for blocks, size in zip(self.gridDim, self.blockDim, strict=True))
        return sizes[0] if ndim == 1 else sizes[:ndim]

    def syncthreads(self) -> None:
        self._block.wait(self._request("syncthreads"))

    def syncthreads_count(self, predicate: Any) -> int:
        return int(self._block.wait(self._request("syncthreads_count", predicate)))

    def syncthreads_and(self, predicate: Any) -> int:
        return int(self._block.wait(self._request("syncthreads_and", predicate)))

    def syncthreads_or(self, predicate: Any) -> int:
        return int(self._block.wait(self._request("syncthreads_or", predicate)))

    def syncwarp(self, mask: int = FULL_MASK) -> None:
        self._exchange("syncwarp", mask)

    def shfl_sync(self, mask: int, value: Any, src_lane: Any) -> Any:
        return self._shuffle("shfl_sync", mask, value, src_lane)

    def shfl_up_sync(self, mask: int, value: Any, delta: Any) -> Any:
        return self._shuffle("shfl_up_sync", mask, value, delta)

    def shfl_down_sync(self, mask: int, value: Any, delta: Any) -> Any:
        return self._shuffle("shfl_down_sync", mask, value, delta)

    def shfl_xor_sync(self, mask: int, value: Any, lane_mask: Any) -> Any:
        return self._shuffle("shfl_xor_sync", mask, value, lane_mask)

    def ballot_sync(self, mask: int, predicate: Any) -> int:
        return int(self._exchange("ballot_sync", mask, predicate))

    def all_sync(self, mask: int, predicate: Any) -> bool:
        return bool(self._exchange("all_sync", mask, predicate))

    def any_sync(self, mask: int, predicate: Any) -> bool:
        return bool(self._exchange("any_sync", mask, predicate))

    def eq_sync(self, mask: int, predicate: Any) -> bool:
        return bool(self._exchange("eq_sync", mask, predicate))

    def match_any_sync(self, mask: int, value: Any) -> int:
        return int(self._exchange("match_any_sync", mask, value))

    def match_all_sync(self, mask: int, value: Any) -> Any:
        return self._exchange("match_all_sync", mask, value)

    def lanemask_lt(self) -> int:
        return (1 << self._block.current.lane) - 1

    def threadfence(self) -> None:
        """Nothing: every write is seen at once."""

    threadfence_block = threadfence_system = threadfence

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return np.float32(float(a) * float(b) + float(c)) if isinstance(a, np.float32) else float(a) * b + c

    def popc(self, value: Any) -> int:
        return int(value).bit_count()

    def selp(self, condition: Any, a: Any, b: Any) -> Any:
        return a if condition else b

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(f"simulator: cuda.{name}: has no stand-in; add it to {__name__}")

    def _shuffle(self, operation: str, mask: int, value: Any, parameter: Any) -> Any:
        if not isinstance(value, SHUFFLED):
            raise InvalidParameterError(
                f"{self.moment.place}: {operation}: value: got {type(value).__name__}, expected 32 or 64 bits; widen it"
            )
        return self._exchange(operation, mask, value, parameter)

    def _exchange(self, operation: str, mask: int, *operands: Any) -> Any:
        lane = self._block.current.lane
        if not int(mask) >> lane & 1:
            raise BackendError(
                f"{self.moment.place}: {operation}: mask {int(mask):#010x} leaves out the calling lane {lane}"
            )
        return self._block.wait(self._request(operation, *operands, mask=int(mask)))

    def _request(self, operation: str, *operands: Any, mask: int = 0) -> Request:
        """The caller's place is its whole stack up to the kernel, so that two calls of a device function differ."""
        frame = sys._getframe(2)
        while frame.f_code.co_filename == __file__ and frame.f_back is not None:
            frame = frame.f_back
        file, line = frame.f_code.co_filename, frame.f_lineno
        site = [id(frame.f_code), frame.f_lasti]
        while frame.f_code is not self._kernel_code and frame.f_back is not None:
            frame = frame.f_back
            site += id(frame.f_code), frame.f_lasti
        return Request(operation, tuple(site), file, line, mask, operands)

    def _shared_array(self, shape: Any, dtype: Any, alignment: int | None = None) -> CheckedArray:
        """One array for the block and place of call; shape 0 is the dynamic memory of the launch.  [BK-CUDASIM-5]

        It lies on no better address than asked for.  [BK-CUDASIM-11]
        """
        frame = sys._getframe(1)
        element = np.dtype(dtype)
        dynamic = shape == 0
        key: tuple[Any, ...] = ("dynamic",) if dynamic else (id(frame.f_code), frame.f_lasti)
        if key not in self._shared_arrays:
            size = self._shared_bytes // element.itemsize if dynamic else shape
            name = f"shared {element} array ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
            self._shared_arrays[key] = CheckedArray(
                poison(size, element), name, self, starts_written=False, address=alignment or element.itemsize
            )
        found = self._shared_arrays[key]
        if found.dtype != element:
            raise UnsupportedError(
                f"{self.moment.place}: cuda.shared.array: dynamic memory seen as {element} and as {found.dtype}, "
                "expected one element type in a launch"
            )
        return found

    def _local_array(self, shape: Any, dtype: Any) -> CheckedArray:
        frame = sys._getframe(1)
        name = f"local {np.dtype(dtype)} array ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        return LocalArray(poison(shape, dtype), name, self)
