"""Stand-ins for `math` and `numba.cuda.libdevice`: CUDA's types and special values in place of Python's.

A float32 argument gives a float32 result, correctly rounded from float64; where Python raises (exp of 1000, log of 0),
CUDA gives an infinity or NaN, and so do these.   Clause: BK-CUDASIM-9 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ferrum_ref.errors import UnsupportedError


def _rounded(function: Callable[..., float], *arguments: Any) -> Any:
    """function(*arguments) in float64, as float32 if every argument is one."""
    single = all(isinstance(argument, np.float32) for argument in arguments)
    try:
        value = function(*(float(argument) for argument in arguments))
    except OverflowError:
        value = math.inf
    except ValueError:
        value = math.nan
    return np.float32(value) if single else np.float64(value)


def _log(x: float) -> float:
    return -math.inf if x == 0.0 else math.log(x)


def _sqrt(x: float) -> float:
    return x if x == math.inf else math.sqrt(x)


class SimulatedMath:
    """What kernels use of `math`."""

    pi, e, inf, nan = math.pi, math.e, math.inf, math.nan

    def exp(self, x: Any) -> Any:
        return _rounded(math.exp, x)

    def log(self, x: Any) -> Any:
        return _rounded(_log, x)

    def sqrt(self, x: Any) -> Any:
        return _rounded(_sqrt, x)

    def tanh(self, x: Any) -> Any:
        return _rounded(math.tanh, x)

    def erf(self, x: Any) -> Any:
        return _rounded(math.erf, x)

    def erfc(self, x: Any) -> Any:
        return _rounded(math.erfc, x)

    def fabs(self, x: Any) -> Any:
        return _rounded(math.fabs, x)

    def isnan(self, x: Any) -> bool:
        return bool(x != x)

    def isinf(self, x: Any) -> bool:
        return math.isinf(x)

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(f"simulator: math.{name}: has no stand-in; add it to {__name__}")


class SimulatedLibdevice:
    """What kernels use of `numba.cuda.libdevice`: reinterpreted bits and the reciprocal root."""

    def float_as_int(self, x: Any) -> int:
        return int(np.float32(x).view(np.int32))

    def int_as_float(self, bits: Any) -> np.float32:
        return np.float32(np.uint32(int(bits) & 0xFFFFFFFF).view(np.float32))

    def double_as_longlong(self, x: Any) -> int:
        return int(np.float64(x).view(np.int64))

    def longlong_as_double(self, bits: Any) -> np.float64:
        return np.float64(np.uint64(int(bits) & 0xFFFFFFFFFFFFFFFF).view(np.float64))

    def rsqrtf(self, x: Any) -> Any:
        return _rounded(lambda value: math.inf if value == 0.0 else 1.0 / math.sqrt(value), np.float32(x))

    def fast_fdividef(self, x: Any, y: Any) -> Any:
        """Rounded correctly here; a GPU's may err by two units."""
        return np.float32(np.float32(x) / np.float32(y))

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(f"simulator: libdevice.{name}: has no stand-in; add it to {__name__}")
