"""A kernel's own code over other globals: the same byte code with stand-ins for `cuda`, `math` and `libdevice`.

Nothing of the kernel's module is changed, so the same kernel may be simulated and compiled in one process.
Clause: BK-CUDASIM-1 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from ferrum_ref.errors import InvalidParameterError


class Binder:
    """Rebuilds functions over `stand_ins` by module name; device functions that they call are rebuilt too.

    Each function is rebuilt once, so recursion and shared device functions keep their identity.
    """

    def __init__(self, stand_ins: Mapping[str, Any]) -> None:
        self._stand_ins = stand_ins
        self._bound: dict[int, FunctionType] = {}

    def bind(self, kernel: Any) -> Callable[..., Any]:
        """The function of `kernel` over the stand-ins. Raises InvalidParameterError if it is no Python function."""
        function = getattr(kernel, "py_func", kernel)
        if not isinstance(function, FunctionType):
            raise InvalidParameterError(
                f"simulator: kernel: got {type(kernel).__name__}, expected a Python function or numba.cuda.jit of one"
            )
        if id(function) not in self._bound:
            names = _names_of(function.__code__)
            scope: dict[str, Any] = {"__builtins__": builtins}
            bound = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, _empty(function))
            self._bound[id(function)] = bound  # before its callees: they may call it in turn
            scope.update(
                {name: self._replaced(function.__globals__[name]) for name in names & set(function.__globals__)}
            )
            for cell, original in zip(bound.__closure__ or (), function.__closure__ or (), strict=True):
                cell.cell_contents = self._replaced(original.cell_contents)
        return self._bound[id(function)]

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, ModuleType):
            return self._stand_ins.get(value.__name__, value)
        return self.bind(value) if hasattr(value, "py_func") else value


def _empty(function: FunctionType) -> tuple[CellType, ...]:
    return tuple(CellType() for _ in function.__closure__ or ())


def _names_of(code: CodeType) -> set[str]:
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*(_names_of(inner) for inner in nested))
