"""User kernels on the CPU: Python source, launched over a grid, one launch after the other.   Clauses: BK-KERNEL-1..12.

Loading a kernel EXECUTES the text it is given, with all of Python's rights: that is its purpose. Do not load text whose
author you would not let run a program on this machine.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from ferrum_ref.errors import (
    BackendError,
    CancelledError,
    DeviceError,
    InvalidParameterError,
    NotFoundError,
    ResourceExhaustedError,
)
from ferrum_ref.interfaces.backend_kernels import BufferArg, Dim3, KernelArg, KernelExecutor, KernelHandle, KernelInfo
from ferrum_ref.numpy_backend.user_kernels_args import Arguments
from ferrum_ref.numpy_backend.user_kernels_grid import run_grid
from ferrum_ref.numpy_backend.user_kernels_source import Kernel, compile_kernel
from ferrum_ref.types.devices import Device
from ferrum_ref.types.record import check_unsigned

if TYPE_CHECKING:
    from ferrum_ref.interfaces.memory import DeviceMemoryManager

MAX_THREADS_PER_BLOCK = 1024
MAX_SHARED_MEMORY_BYTES = 48 * 1024


class NumpyKernelExecutor(KernelExecutor):
    """Loads kernels written in Python and runs them in order of their launch, in one thread of its own.

        def add(thread, a, b, out):
            i = thread.block_idx.x * thread.block_dim.x + thread.thread_idx.x
            if i < len(out):
                out[i] = a[i] + b[i]

    A kernel with barriers is a generator function: `yield thread.syncthreads()`. Threads of a block take turns between
    barriers, so `out[0] += x` is atomic; `reverse=True` runs blocks and threads backwards, which must not change the
    result of a kernel without races. The source may state SHARED_MEMORY_BYTES (then `thread.shared`),
    MAX_THREADS_PER_BLOCK and PREFERRED_BLOCK_SIZE.
    """

    def __init__(
        self,
        memory: Callable[[], DeviceMemoryManager] | None = None,
        *,
        max_threads_per_block: int = MAX_THREADS_PER_BLOCK,
        max_shared_memory_bytes: int = MAX_SHARED_MEMORY_BYTES,
        reverse: bool = False,
        done: Callable[[str, BaseException | None], None] | None = None,
    ) -> None:
        """`memory` gives the manager whose handles may be buffers; `done(name, error)` is told of every launch."""
        self._memory = memory
        self._max_threads = max_threads_per_block
        self._max_shared_bytes = max_shared_memory_bytes
        self._reverse = reverse
        self._done = done
        self._kernels: dict[KernelHandle, Kernel] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._queue = ThreadPoolExecutor(1, thread_name_prefix="kernels")
        self._closed = threading.Event()

    async def load_kernel(self, source: str, name: str, device: Device) -> KernelHandle:
        """Compile and execute `source`, Python text, and take its function `name`.  [BK-KERNEL-1..3]"""
        self._check_open("load_kernel")
        if device != Device.CPU:
            raise DeviceError(f"load_kernel: device: got {device}, expected cpu; the numpy backend has no other device")
        number = next(self._numbers)
        compiling = self._queue.submit(compile_kernel, source, name, number, self._max_threads, self._max_shared_bytes)
        kernel = await asyncio.wrap_future(compiling)
        handle = KernelHandle(number)
        with self._lock:
            self._kernels[handle] = kernel
        return handle

    async def execute_kernel(
        self, handle: KernelHandle, grid_size: Dim3, block_size: Dim3, args: Sequence[KernelArg]
    ) -> None:
        """Queue the launch and return when it has run.  [BK-KERNEL-4..6, BK-KERNEL-8..11]

        A caller that is cancelled stops its launch before the next thread.
        """
        self._check_open("execute_kernel")
        kernel = self._kernel("execute_kernel", handle)
        grid = _sizes("grid_size", grid_size)
        block = _sizes("block_size", block_size)
        num_threads = block[0] * block[1] * block[2]
        if num_threads > kernel.info.max_threads_per_block:
            raise ResourceExhaustedError(
                f"execute_kernel: {kernel.name}: block_size {block} has {num_threads} threads, "
                f"expected at most {kernel.info.max_threads_per_block}"
            )
        async with AsyncExitStack() as mappings:
            await self._bind_and_run(kernel, grid, block, args, mappings)

    def get_kernel_info(self, handle: KernelHandle) -> KernelInfo | None:
        with self._lock:
            kernel = self._kernels.get(handle)
        return kernel.info if kernel is not None else None

    async def unload_kernel(self, handle: KernelHandle) -> None:
        """Forget the kernel; launches already queued still run.  [BK-KERNEL-12]"""
        self._check_open("unload_kernel")
        self._kernel("unload_kernel", handle)
        with self._lock:
            self._kernels.pop(handle, None)

    async def drain(self) -> None:
        """Return when every launch queued so far has run (extension)."""
        self._check_open("synchronize")
        await asyncio.wrap_future(self._queue.submit(_nothing))

    async def close(self) -> None:
        """Stop what runs before its next thread, forget all kernels, refuse everything from now on (extension)."""
        self._closed.set()
        await asyncio.to_thread(self._queue.shutdown, True)
        with self._lock:
            self._kernels.clear()

    @property
    def num_kernels(self) -> int:
        """Kernels loaded at present."""
        return len(self._kernels)

    async def _bind_and_run(
        self, kernel: Kernel, grid: Dim3, block: Dim3, args: Sequence[KernelArg], mappings: AsyncExitStack
    ) -> None:
        arguments = Arguments(args, await self._mapped(args, mappings))
        arguments.check_shared(kernel.name, kernel.info.shared_memory_size, self._max_shared_bytes)
        _check_arity(kernel, arguments)
        await self._run(kernel, grid, block, arguments)

    async def _run(self, kernel: Kernel, grid: Dim3, block: Dim3, arguments: Arguments) -> None:
        cancelled = threading.Event()

        def check() -> None:
            if cancelled.is_set():
                raise CancelledError(f"execute_kernel: {kernel.name}: the launch was cancelled")
            if self._closed.is_set():
                raise BackendError(f"execute_kernel: {kernel.name}: the numpy backend was shut down during the launch")

        def launch() -> None:
            error: BaseException | None = None
            try:
                run_grid(kernel, grid, block, arguments, check, self._reverse)
            except BaseException as raised:
                error = raised
                raise
            finally:
                arguments.release()
                if self._done is not None:
                    self._done("execute_kernel", error)

        running: Future[None] = self._queue.submit(launch)
        try:
            await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            cancelled.set()
            if not running.cancelled():  # its buffers stay mapped until it has stopped
                await asyncio.wait([asyncio.ensure_future(asyncio.to_thread(_settled, running))])
            raise

    async def _mapped(self, args: Sequence[KernelArg], mappings: AsyncExitStack) -> dict[int, memoryview]:
        """The bytes behind the memory handles among the buffers, mapped until `mappings` closes."""
        from ferrum_ref.interfaces.memory import AdvancedMemoryManager, MemoryAccess, MemoryHandle

        found: dict[int, memoryview] = {}
        seen: dict[MemoryHandle, memoryview] = {}
        for position, arg in enumerate(args):
            if not isinstance(arg, BufferArg) or not isinstance(arg.ptr, MemoryHandle):
                continue
            manager = self._memory() if self._memory is not None else None
            if not isinstance(manager, AdvancedMemoryManager):
                raise InvalidParameterError(
                    f"execute_kernel: argument {position}: got a MemoryHandle, and this executor has no memory manager "
                    "that maps memory; use backend.kernel_executor()"
                )
            if arg.ptr not in seen:
                seen[arg.ptr] = await manager.map_memory(arg.ptr, MemoryAccess.ReadWrite)
                mappings.push_async_callback(manager.unmap_memory, arg.ptr)
            found[position] = seen[arg.ptr]
        mappings.push(_forget_locals)
        return found

    def _kernel(self, operation: str, handle: KernelHandle) -> Kernel:
        with self._lock:
            kernel = self._kernels.get(handle)
        if kernel is None:
            raise NotFoundError(f"{operation}: handle: {handle!r} names no loaded kernel; load it with load_kernel")
        return kernel

    def _check_open(self, operation: str) -> None:
        if self._closed.is_set():
            raise BackendError(f"{operation}: the numpy backend has been shut down; make a new one with make_backend()")


def _sizes(argument: str, sizes: Dim3) -> Dim3:
    """Three integers in [1, 2**32)."""
    try:
        x, y, z = sizes
    except (TypeError, ValueError):
        raise InvalidParameterError(f"execute_kernel: {argument}: got {sizes!r}, expected (x, y, z)") from None
    checked = tuple(check_unsigned(size, 2**32, "execute_kernel", argument) for size in (x, y, z))
    if 0 in checked:
        raise InvalidParameterError(f"execute_kernel: {argument}: got {checked}, expected sizes of at least 1")
    return checked[0], checked[1], checked[2]


def _check_arity(kernel: Kernel, arguments: Arguments) -> None:
    signature = inspect.signature(kernel.entry)
    try:
        signature.bind(None, *[None] * len(arguments))
    except TypeError as error:
        raise InvalidParameterError(
            f"execute_kernel: {kernel.name}{signature}: got the thread and {len(arguments)} arguments: {error}"
        ) from None


def _forget_locals(_kind: object, error: BaseException | None, _traceback: TracebackType | None) -> bool:
    """Arrays over mapped memory must be gone before it is unmapped; a failed kernel's frames would keep them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    return False


def _settled(running: Future[None]) -> None:
    """Wait for a launch, whatever becomes of it."""
    running.exception()


def _nothing() -> None:
    """Takes its turn in the queue."""
