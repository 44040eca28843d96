"""A kernel together with the types of its arguments, and how functions that kernels call are marked.

Clauses: BK-NCUDA-5, BK-NCUDA-17 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numba.cuda
import numba.cuda.libdevice

cuda: Any = numba.cuda  # what kernels use: typed as Any once, here
libdevice: Any = numba.cuda.libdevice

Function = TypeVar("Function", bound=Callable[..., Any])
INTEGER, REAL, DOUBLE = "int64", "float32", "float64"
INTEGERS, REALS, DOUBLES = "int64[::1]", "float32[::1]", "float64[::1]"


@dataclass(frozen=True, slots=True)
class Kernel:
    """`function` runs once in every CUDA thread; `parameters` are numba's names of its arguments' types.

    Arrays are flat and contiguous. What is launched, simulated and compiled ahead of time has this one signature.
    """

    function: Callable[..., None]
    parameters: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def signature(self) -> str:
        return f"void({', '.join(self.parameters)})"


def kernel(*parameters: str) -> Callable[[Callable[..., None]], Kernel]:
    """`@kernel("float32[::1]", "int64")` makes a Kernel of a function with these arguments. Pure."""
    return lambda function: Kernel(function, parameters)


def device(function: Function) -> Function:
    """A function that kernels call. It becomes part of each kernel, so that compiling one needs no GPU at hand."""
    return cast(Function, cuda.jit(device=True, inline="always")(function))
