"""One thread for each element: activations, arithmetic, rounding to another type.

Clauses: BK-NCUDA-9, BK-NCUDA-10 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, Kernel, cuda, device, kernel
from ferrum_numba.gpu.storage import Storage

ROOT_HALF = np.float32(math.sqrt(0.5))
TWICE_ROOT = np.float32(2.0 * math.sqrt(2.0 / math.pi))
CUBIC = np.float32(0.044715)  # of the tanh form of GELU (Hendrycks and Gimpel 2016)
HALF, ONE = np.float32(0.5), np.float32(1.0)


@device
def times_sigmoid(x: Any, t: Any) -> Any:
    """x / (1 + exp(-t)), never overflowing; below 0 the exponential comes in two factors, which are not subnormal."""
    if t >= np.float32(0.0):
        return x / (ONE + math.exp(-t))
    root = math.exp(HALF * t)
    return x * root * root / (ONE + math.exp(t))


@device
def silu(x: Any) -> Any:
    """x * sigmoid(x); -0 at -inf."""
    if x == np.float32(-math.inf):
        return np.float32(-0.0)
    return times_sigmoid(x, x)


@device
def gelu(x: Any) -> Any:
    """x/2 erfc(-x / sqrt 2), which does not cancel for negative x; -0 at -inf."""
    if x == np.float32(-math.inf):
        return np.float32(-0.0)
    return HALF * x * math.erfc(-x * ROOT_HALF)


@device
def gelu_tanh(x: Any) -> Any:
    """x * sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x**3), which is the tanh form; -0 at -inf."""
    if x == np.float32(-math.inf):
        return np.float32(-0.0)
    return times_sigmoid(x, TWICE_ROOT * x * (ONE + CUBIC * x * x))


@device
def relu(x: Any) -> Any:
    """max(x, 0); NaN stays NaN."""
    return np.float32(0.0) if x < np.float32(0.0) else x


@device
def identity(x: Any) -> Any:
    return x


@device
def add(a: Any, b: Any) -> Any:
    return a + b


@device
def sub(a: Any, b: Any) -> Any:
    return a - b


@device
def mul(a: Any, b: Any) -> Any:
    return a * b


@device
def div(a: Any, b: Any) -> Any:
    """IEEE: a / 0 is an infinity or NaN."""
    return a / b


@device
def silu_mul(gate: Any, up: Any) -> Any:
    return silu(gate) * up


UNARY: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "cast": identity}
)
BINARY: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"add": add, "sub": sub, "mul": mul, "div": div, "silu_mul": silu_mul}
)


def unary(name: str, x: Storage, y: Storage) -> Kernel:
    """target[i] = function(source[i])."""
    function, load, store = UNARY[name], x.load, y.store

    @kernel(x.array, y.array, INTEGER)
    def unary(source: Any, target: Any, count: int) -> None:
        index = cuda.grid(1)
        if index < count:
            store(target, index, function(load(source, index)))

    return unary


def binary(name: str, a: Storage, b: Storage, y: Storage) -> Kernel:
    """target[i] = function(left[i % left_count], right[i % right_count]): a shorter operand repeats."""
    function, load_left, load_right, store = BINARY[name], a.load, b.load, y.store

    @kernel(a.array, b.array, y.array, INTEGER, INTEGER, INTEGER)
    def binary(left: Any, right: Any, target: Any, count: int, left_count: int, right_count: int) -> None:
        index = cuda.grid(1)
        if index < count:
            left_index, right_index = index, index
            if left_count != count:  # a division costs more than the rest
                left_index = index % left_count
            if right_count != count:
                right_index = index % right_count
            store(target, index, function(load_left(left, left_index), load_right(right, right_index)))

    return binary
