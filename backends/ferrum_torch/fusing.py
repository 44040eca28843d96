"""How the chains of small operations run: one call of torch each, or compiled into one kernel by torch.compile.

Clauses: BK-TORCH-32..34 (specs/backend_torch.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any, Protocol, TypeVar

import torch

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.types.algorithm import Algorithm

Result = TypeVar("Result")
Key = tuple[object, ...]


class Run(Protocol):
    """Calls a function of tensors that has no side effect; its operands have been checked."""

    def __call__(self, function: Callable[..., Result], *arguments: Any) -> Result: ...


def directly(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)`, each operation of torch a call of its own."""
    return function(*arguments)


def as_rows(x: torch.Tensor, run: Run) -> torch.Tensor:
    """x (..., E) as (rows, E) for a compiler, which otherwise compiles for every rank; x itself otherwise. Pure."""
    return x if run is directly or x.numel() == 0 or x.ndim == 2 else x.reshape(-1, x.shape[-1])


def as_line(x: torch.Tensor, run: Run) -> torch.Tensor:
    """x (...) as one axis for a compiler; x itself otherwise. Pure."""
    return x if run is directly else x.reshape(-1)


class Compiled:
    """Passes each function to torch.compile, once for each combination of element types and kinds of shapes.

    Of a shape, only its rank and which sizes are 1 count, as torch has it; other sizes stay symbolic. Tensors without
    elements are left to the function itself. May be shared between threads.  [BK-TORCH-32]
    """

    def __init__(self) -> None:
        self._compiled: dict[Key, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, function: Callable[..., Result], *arguments: Any) -> Result:
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        if any(data.numel() == 0 for data in tensors):
            return function(*arguments)
        key = (function, *((data.dtype, data.device.type, *(size == 1 for size in data.shape)) for data in tensors))
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = torch.compile(_twin(function), dynamic=True)
            compiled: Callable[..., Result] = self._compiled[key]
        return _told(compiled, arguments)


def declared(plain: Algorithm, on_gpu: bool) -> Algorithm:
    """How a compiled chain is computed, `plain` being how it is without. Pure.  [BK-TORCH-34]

    On a GPU the compiler's division is good to 2 ulp and its functions flush subnormals; on a CPU nothing changes.
    """
    return replace(plain, div_ulp=2.0, flushes_subnormals=True) if on_gpu else plain


def compiled_on(device: torch.device) -> Compiled:
    """A `Compiled` that has compiled something for `device`.  [BK-TORCH-33]

    Raises UnsupportedError with the compiler's complaint, such as a missing C++ compiler or Triton.
    """
    run = Compiled()
    run(_probe, torch.ones(2, dtype=torch.bfloat16, device=device))
    return run


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x.float() * 2.0).to(x.dtype)


def _twin(function: Callable[..., Result]) -> Callable[..., Result]:
    """The same function with a code object of its own.

    torch keeps what it compiled with the code object, and at most eight pieces there: without a twin for each
    combination, a ninth would run uncompiled.
    """
    if not isinstance(function, FunctionType):
        return function
    twin = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _told(function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    """What a compiled function returns; a compiler's failure in one line. Raises UnsupportedError."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        complaint = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedError(
            f"make_backend: compiled: torch.compile failed ({complaint}), expected a working compiler: on the CPU a "
            "C++ compiler (g++, or the one that the variable CXX names) with Python's headers, on a GPU also Triton; "
            "install it, or leave 'compiled' out"
        ) from error
