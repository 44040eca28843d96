"""How functions are compiled: what the optimiser may do, where the result is kept, and who may launch it.

Compiled kernels are kept beside this package, or in the user's cache directory where that is read-only, or nowhere. A
change of any source file here discards what was compiled before: Numba itself looks only at the file that defines a
kernel, not at those whose functions the kernel calls.
Clauses: BK-NCPU-4..5 (specs/backend_numba.md).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numba
from numba import types
from numba.core.ccallback import CFunc

# Sums in any order and fused multiply-adds, both of which the declared algorithms allow. NaN, infinities, signed
# zeros, subnormals and exact division stay as IEEE 754 has them.
REORDERED: Final = frozenset({"reassoc", "contract"})
CONTRACTED: Final = frozenset({"contract"})
_LAUNCH: Final = threading.RLock()  # Numba has one pool of threads, which on some systems two launches may not share


def device(function: Callable[..., Any]) -> Any:
    """A function for kernels to call; its sums may be taken in any order."""
    return numba.njit(nogil=True, error_model="numpy", fastmath=set(REORDERED))(function)


def ordered(function: Callable[..., Any]) -> Any:
    """A function for kernels to call, evaluated in the order in which it is written."""
    return numba.njit(nogil=True, error_model="numpy", fastmath=set(CONTRACTED))(function)


class Kernel:
    """A function compiled at its first call. Its arguments are integers, addresses among them, and floats.

    A parallel one gets the number of threads to spread over, Numba's own at the moment, before the arguments of its
    call. One launch at a time.  [BK-NCPU-4]
    """

    __slots__ = ("__wrapped__", "_dispatcher", "_is_parallel")

    def __init__(self, function: Callable[..., Any], parallel: bool) -> None:
        self.__wrapped__ = function
        self._is_parallel = parallel
        self._dispatcher: Any = numba.njit(nogil=True, error_model="numpy", fastmath=set(REORDERED), parallel=parallel)(
            function
        )
        keep_compiled(self._dispatcher)

    def __call__(self, *args: int | float) -> Any:
        with _LAUNCH:
            if self._is_parallel:
                return self._dispatcher(numba.get_num_threads(), *args)
            return self._dispatcher(*args)


class Routine:
    """A function compiled on its own at its first use, which kernels call by its address.

    What is long and called from several places is compiled once this way, instead of once for each caller and for each
    caller's caller. It takes int64 first and float32 last, and returns nothing.  [BK-NCPU-4]
    """

    __slots__ = ("_compiled", "_function", "_signature")

    def __init__(self, function: Callable[..., Any], integers: int, floats: int) -> None:
        self._function = function
        self._signature = types.void(*[types.int64] * integers, *[types.float32] * floats)
        self._compiled: Any = None

    @property
    def address(self) -> int:
        with _LAUNCH:
            if self._compiled is None:
                options = {"nopython": True, "error_model": "numpy", "fastmath": set(REORDERED)}
                made = CFunc(self._function, (self._signature.args, self._signature.return_type), {}, options)
                keep_compiled(made)
                made.compile()
                self._compiled = made
        address: int = self._compiled.address
        return address


def routine(*, integers: int, floats: int = 0) -> Callable[[Callable[..., Any]], Routine]:
    """Makes a `Routine` of a function with that many arguments."""
    return lambda function: Routine(function, integers, floats)


def parallel_kernel(function: Callable[..., Any]) -> Kernel:
    """A kernel with `prange` loops."""
    return Kernel(function, parallel=True)


def serial_kernel(function: Callable[..., Any]) -> Kernel:
    """A kernel that runs on the caller's thread."""
    return Kernel(function, parallel=False)


def keep_compiled(dispatcher: Any) -> None:
    """Have the machine code written to disk, where there is a place for it.  [BK-NCPU-5]"""
    try:
        dispatcher.enable_caching()
    except RuntimeError:  # neither this package nor the user's cache directory can be written
        return
    index = dispatcher._cache._cache_file
    index._source_stamp = (index._source_stamp, SOURCES)


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


SOURCES: Final = _digest_of_sources()
