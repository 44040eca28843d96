"""Runs a kernel over a grid of blocks of threads, with barriers that all threads of a block must reach together.

Threads are no operating-system threads: a block's threads run one after the other, each up to its next barrier. A
kernel with barriers is therefore a generator function that yields at them.   Clauses: BK-KERNEL-4..6, BK-KERNEL-8..10.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.backend_kernels import Dim3
from ferrum_ref.numpy_backend.user_kernels_args import Arguments
from ferrum_ref.numpy_backend.user_kernels_source import Kernel


class Index(NamedTuple):
    """Three coordinates; x runs fastest."""

    x: int
    y: int
    z: int


class Barrier:
    """What `thread.syncthreads()` returns and a kernel yields."""

    __slots__ = ()


BARRIER: Final = Barrier()


class KernelThread:
    """The first argument of every kernel: where this thread is, and its block's shared memory.  [BK-KERNEL-4]

    `shared` is the block's static shared memory, SHARED_MEMORY_BYTES of uint8, zeros at the start of a block.
    """

    __slots__ = ("block_dim", "block_idx", "grid_dim", "num_barriers_owed", "shared", "thread_idx")

    def __init__(self, block_idx: Index, thread_idx: Index, grid: Index, block: Index, shared: NDArray[np.uint8]):
        self.block_idx = block_idx
        self.thread_idx = thread_idx
        self.grid_dim = grid
        self.block_dim = block
        self.shared = shared
        self.num_barriers_owed = 0

    def syncthreads(self) -> Barrier:
        """A barrier for all threads of the block: write `yield thread.syncthreads()`.  [BK-KERNEL-5]"""
        self.num_barriers_owed += 1
        return BARRIER


Code: TypeAlias = "GeneratorType[Any, None, Any]"
Running: TypeAlias = tuple[KernelThread, Code]


def run_grid(
    kernel: Kernel, grid: Dim3, block: Dim3, arguments: Arguments, check: Callable[[], None], reverse: bool
) -> None:
    """Every block in order, every thread of it in order, x fastest (`reverse`: from the last).  [BK-KERNEL-4..6]

    `check` is called before each thread and may raise to stop the launch. Mutates the arguments.
    Raises BackendError when the kernel fails, with block, thread and line; what ran before stays written.
    """
    grid_dim, block_dim = Index(*grid), Index(*block)
    with np.errstate(all="ignore"):
        for block_idx in _indices(grid_dim, reverse):
            shared = np.zeros(kernel.info.shared_memory_size, np.uint8)
            values = arguments.of_block()
            threads = (
                KernelThread(block_idx, thread_idx, grid_dim, block_dim, shared)
                for thread_idx in _indices(block_dim, reverse)
            )
            if kernel.waits:
                _run_waiting(kernel, threads, values, check)
            else:
                _run_plain(kernel, threads, values, check)


def _indices(sizes: Index, reverse: bool) -> Iterator[Index]:
    xs, ys, zs = (range(size - 1, -1, -1) if reverse else range(size) for size in sizes)
    return (Index(x, y, z) for z in zs for y in ys for x in xs)


def _run_plain(
    kernel: Kernel, threads: Iterator[KernelThread], values: tuple[Any, ...], check: Callable[[], None]
) -> None:
    entry = kernel.entry
    for thread in threads:
        check()
        try:
            entry(thread, *values)
        except BaseException as error:
            raise _failed(kernel, thread, error) from error
        if thread.num_barriers_owed:
            raise _not_yielded(kernel, thread)


def _run_waiting(
    kernel: Kernel, threads: Iterator[KernelThread], values: tuple[Any, ...], check: Callable[[], None]
) -> None:
    """All threads to their first barrier, all to their second, and so on until all have finished."""
    waiting: list[Running] = [(thread, kernel.entry(thread, *values)) for thread in threads]
    try:
        while waiting:
            arrived: list[Running] = []
            finished: list[Running] = []
            for running in waiting:
                check()
                (arrived if _advance(kernel, running) else finished).append(running)
            _check_together(kernel, arrived, finished)
            waiting = arrived
    except BaseException:
        for _, code in waiting:
            with contextlib.suppress(BaseException):  # the kernel has failed already; its clean-up cannot fail it more
                code.close()
        raise


def _advance(kernel: Kernel, running: Running) -> bool:
    """Run one thread to its next barrier; False if it finished."""
    thread, code = running
    try:
        yielded = next(code)
    except StopIteration:
        if thread.num_barriers_owed:
            raise _not_yielded(kernel, thread) from None
        return False
    except BaseException as error:
        raise _failed(kernel, thread, error) from error
    if yielded is not BARRIER or thread.num_barriers_owed != 1:
        if thread.num_barriers_owed > 1:
            raise _not_yielded(kernel, thread)
        raise BackendError(
            f"{_place(kernel, thread, _line(code))}: the kernel yielded {yielded!r}, "
            "expected `yield thread.syncthreads()`"
        )
    thread.num_barriers_owed = 0
    return True


def _check_together(kernel: Kernel, arrived: list[Running], finished: list[Running]) -> None:
    """Raises BackendError unless all threads wait at one barrier, or none waits.  [BK-KERNEL-6]"""
    if not arrived:
        return
    thread, code = arrived[0]
    line = _line(code)
    elsewhere = next(((other, _line(code)) for other, code in arrived if _line(code) != line), None)
    if elsewhere is not None:
        other, other_line = elsewhere
        there = f"thread {_text(other.thread_idx)} waits at line {other_line}"
    elif finished:
        there = f"thread {_text(finished[0][0].thread_idx)} has finished ({len(finished)} in all)"
    else:
        return
    raise BackendError(
        f"{_place(kernel, thread, line)}: divergent barrier: this thread waits there while {there}; "
        "every thread of a block must reach the same barrier"
    )


def _line(code: Code) -> int | None:
    """The line at which a suspended kernel waits, in the innermost function that it yields from."""
    while isinstance(code.gi_yieldfrom, GeneratorType):
        code = code.gi_yieldfrom
    return code.gi_frame.f_lineno if code.gi_frame is not None else None


def _failed(kernel: Kernel, thread: KernelThread, error: BaseException) -> BackendError:
    return BackendError(f"{_place(kernel, thread, kernel.line_of(error))}: {type(error).__name__}: {error}")


def _not_yielded(kernel: Kernel, thread: KernelThread) -> BackendError:
    return BackendError(
        f"{_place(kernel, thread, None)}: syncthreads() was called but not waited for; "
        "write `yield thread.syncthreads()`"
    )


def _place(kernel: Kernel, thread: KernelThread, line: int | None) -> str:
    where = f"execute_kernel: {kernel.name}: block {_text(thread.block_idx)}, thread {_text(thread.thread_idx)}"
    return where if line is None else f"{where}, line {line}"


def _text(index: Index) -> str:
    return f"({index.x}, {index.y}, {index.z})"
