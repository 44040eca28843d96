"""Errors, at the place where upstream has them (`ferrum_types::errors`); they are defined in `ferrum_ref.errors`.

`Result` is upstream's result type. A function here returns the value and raises the error, so `Result[int]` means to a
type checker what `int` means, and says at run time that a FerrumError may be raised.  Clauses: TY-ERROR-1..6.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from ferrum_ref.errors import FerrumError

_Value = TypeVar("_Value")

Result = Annotated[_Value, FerrumError]

__all__ = ["FerrumError", "Result"]
