"""What a backend's parts have in common: is it open, how many operations has it done, how did the last failure read.

Clauses: BK-COMPUTE-3, BK-NUMPY-6..8.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from ferrum_ref.errors import BackendError
from ferrum_ref.numpy_backend.tensor import NumpyTensor

Part = TypeVar("Part")
Operation = Callable[..., Any]


class Ledger:
    """Counts the operations of one backend; exact under threads."""

    def __init__(self) -> None:
        self.is_open = True
        self.is_debug = False
        self.num_operations = 0
        self.last_error: str | None = None
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def check_open(self, operation: str) -> None:
        """Raises BackendError after shutdown.  [BK-COMPUTE-3]"""
        if not self.is_open:
            raise BackendError(f"{operation}: the numpy backend has been shut down; make a new one with make_backend()")

    def done(self, operation: str, error: BaseException | None = None) -> None:
        """Enter an operation that has ended, well or not.  [BK-NUMPY-6]"""
        with self._lock:
            if error is None:
                self.num_operations += 1
                if self.is_debug:
                    self.calls[operation] += 1
            else:
                self.last_error = str(error)

    def check_result(self, operation: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Under debugging: raises BackendError for a NaN that the operands did not have.  [BK-NUMPY-8]"""
        results = result if isinstance(result, (tuple, list)) else (result,)
        if any(map(_has_nan, results)) and not any(map(_has_nan, arguments)):
            raise BackendError(
                f"{operation}: the result has a NaN and no operand had one; look at the operands' infinities and zeros"
            )


def counted(part: Part, ledger: Ledger, *, computes: bool = True) -> Part:
    """An object of the part's class whose public operations are checked and entered.  [BK-NUMPY-6]

    What an operation calls inside is not counted again: the calls go to `part` itself. `computes`: its results are
    looked at under debugging.
    """
    return _in_front_of(part, lambda name, method: _entered(name, method, ledger, computes))


def guarded(part: Part, ledger: Ledger) -> Part:
    """An object of the part's class that refuses after shutdown and counts nothing.  [BK-COMPUTE-3]"""

    def checked(name: str, method: Operation) -> Operation:
        @functools.wraps(method)
        def call(_self: object, *args: Any, **options: Any) -> Any:
            ledger.check_open(name)
            return method(*args, **options)

        return call

    return _in_front_of(part, checked)


def _in_front_of(part: Part, wrap: Callable[[str, Operation], Operation]) -> Part:
    base = type(part)
    methods = {
        name: wrap(name, getattr(part, name))
        for name in dir(base)
        if not name.startswith("_") and inspect.isfunction(getattr(base, name))
    }
    rest = {"__module__": base.__module__, "__getattr__": lambda _self, name: getattr(part, name)}
    return cast(Part, object.__new__(type(base.__name__, (base,), {**rest, **methods})))


def _entered(name: str, method: Operation, ledger: Ledger, computes: bool) -> Operation:
    """The method behind the ledger: refused after shutdown, entered when it ends, well or not."""

    def finish(arguments: tuple[Any, ...], result: Any) -> Any:
        if ledger.is_debug and computes:
            try:
                ledger.check_result(name, arguments, result)
            except BackendError as error:
                ledger.done(name, error)
                raise
        ledger.done(name)
        return result

    @functools.wraps(method)
    async def later(_self: object, *args: Any, **options: Any) -> Any:
        ledger.check_open(name)
        try:
            result = await method(*args, **options)
        except Exception as error:
            ledger.done(name, error)
            raise
        return finish(args, result)

    @functools.wraps(method)
    def now(_self: object, *args: Any, **options: Any) -> Any:
        ledger.check_open(name)
        try:
            result = method(*args, **options)
        except Exception as error:
            ledger.done(name, error)
            raise
        return finish(args, result)

    return later if inspect.iscoroutinefunction(method) else now


def _has_nan(value: Any) -> bool:
    if not isinstance(value, NumpyTensor) or not value.dtype().is_float():
        return False
    return bool(np.isnan(value.array.astype(np.float32, copy=False)).any())
