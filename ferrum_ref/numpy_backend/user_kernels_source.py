"""Kernel source text becomes an entry point, and what is known about it.   Clauses: BK-KERNEL-1..3, BK-KERNEL-7.

The text is Python and is run as Python, with everything Python can reach: this is an interpreter, not a sandbox.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, TracebackType
from typing import Any

from ferrum_ref.errors import BackendError, InvalidParameterError, NotFoundError
from ferrum_ref.interfaces.backend_kernels import KernelInfo


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel; `waits` if it is a generator function and so may hold barriers."""

    name: str
    filename: str
    entry: Callable[..., Any]
    waits: bool
    info: KernelInfo

    def line_of(self, error: BaseException) -> int | None:
        """The innermost line of the kernel's own text that the error passed through. Pure."""
        return line_in(self.filename, error.__traceback__)


def line_in(filename: str, traceback: TracebackType | None) -> int | None:
    """The innermost line of that file in a traceback. Pure."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == filename:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def compile_kernel(source: str, name: str, number: int, max_threads: int, max_shared_bytes: int) -> Kernel:
    """Compile and run the text, and take its function `name`.  [BK-KERNEL-1..3, BK-KERNEL-7]

    Executes the text. Raises InvalidParameterError (it does not compile, or `name` cannot be an entry point, or a
    declaration is impossible), NotFoundError (no such name), BackendError (the text fails while it runs).
    """
    filename = f"<kernel {number}: {name}>"
    scope: dict[str, Any] = {"__name__": f"kernel_{number}", "__builtins__": builtins}
    code = _compiled(source, filename)
    try:
        exec(code, scope)
    except BaseException as error:
        line = line_in(filename, error.__traceback__)
        raise BackendError(
            f"load_kernel: {name}: the source failed at line {line}: {type(error).__name__}: {error}"
        ) from error
    entry = _entry(scope, name)
    shared = _declared(scope, "SHARED_MEMORY_BYTES", 0, 0, max_shared_bytes)
    threads = _declared(scope, "MAX_THREADS_PER_BLOCK", max_threads, 1, max_threads)
    info = KernelInfo(name, threads, shared, entry.__code__.co_nlocals, _preferred(scope, threads))
    return Kernel(name, filename, entry, inspect.isgeneratorfunction(entry), info)


def _compiled(source: str, filename: str) -> CodeType:
    if not isinstance(source, str):
        raise InvalidParameterError(f"load_kernel: source: got {type(source).__name__}, expected Python source as str")
    try:
        return compile(source, filename, "exec", dont_inherit=True)
    except SyntaxError as error:
        text = (error.text or "").strip()
        raise InvalidParameterError(
            f"load_kernel: source: line {error.lineno}: {error.msg}{f': {text}' if text else ''}"
        ) from error
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:  # null bytes, lone surrogates, depth
        raise InvalidParameterError(f"load_kernel: source: {type(error).__name__}: {error}") from error


def _entry(scope: dict[str, Any], name: str) -> Any:
    entry = scope.get(name)
    if not inspect.isfunction(entry):
        functions = sorted(key for key, value in scope.items() if inspect.isfunction(value))
        if name not in scope or name.startswith("__"):
            raise NotFoundError(
                f"load_kernel: name: got {name!r}, expected a function of the source: {', '.join(functions) or 'none'}"
            )
        raise InvalidParameterError(f"load_kernel: name: {name!r} is {type(entry).__name__}, expected a function")
    if inspect.iscoroutinefunction(entry) or inspect.isasyncgenfunction(entry):
        raise InvalidParameterError(f"load_kernel: name: {name!r} is async, expected a plain or a generator function")
    if not inspect.signature(entry).parameters:
        raise InvalidParameterError(
            f"load_kernel: name: {name!r} takes nothing, expected the thread as first parameter"
        )
    return entry


def _declared(scope: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    """A limit that the source states as a constant."""
    value = scope.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidParameterError(f"load_kernel: {name}: got {value!r}, expected an integer from {low} to {high}")
    return value


def _preferred(scope: dict[str, Any], max_threads: int) -> tuple[int, int, int]:
    value = scope.get("PREFERRED_BLOCK_SIZE", (1, 1, 1))
    sizes = value if isinstance(value, tuple) and len(value) == 3 else (0, 0, 0)
    if not all(isinstance(size, int) and size >= 1 for size in sizes) or sizes[0] * sizes[1] * sizes[2] > max_threads:
        raise InvalidParameterError(
            f"load_kernel: PREFERRED_BLOCK_SIZE: got {value!r}, expected (x, y, z) with at most {max_threads} threads"
        )
    return sizes
