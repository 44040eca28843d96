"""One thread for each pack of eight elements: activations, arithmetic, rounding to another type.

Clauses: BK-NCUDA-9, BK-NCUDA-10, BK-NCUDA-42 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, Kernel, cuda, device, kernel, libdevice
from ferrum_numba.gpu.kernels.packs import widening
from ferrum_numba.gpu.pack_math import gathered, spread
from ferrum_numba.gpu.storage import Storage
from ferrum_numba.gpu.wide import PACK, fetch, is_aligned, put

ROOT_HALF = np.float32(math.sqrt(0.5))
TWICE_ROOT = np.float32(2.0 * math.sqrt(2.0 / math.pi))
CUBIC = np.float32(0.044715)  # of the tanh form of GELU (Hendrycks and Gimpel 2016)
HALF, ONE = np.float32(0.5), np.float32(1.0)
LOWEST = np.float32(-80.0)  # 1 + exp(-80) is 1 in float32


@device
def times_sigmoid(x: Any, t: Any) -> Any:
    """x / (1 + exp(-t)) by one exponential, which never overflows; where it is nearly subnormal, in two factors."""
    if t < LOWEST:
        root = math.exp(HALF * t)
        return x * root * root
    shrunk = math.exp(-math.fabs(t))
    return libdevice.fast_fdividef(x * shrunk if t < np.float32(0.0) else x, ONE + shrunk)


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


def packs_of(count: int) -> int:
    """The number of threads for `count` elements. Pure."""
    return -(-count // PACK)


def unary(name: str, x: Storage, y: Storage) -> Kernel:
    """target[i] = function(source[i])."""
    function, load, store = UNARY[name], x.load, y.store

    widen = widening(x)

    @kernel(x.array, y.array, INTEGER)
    def unary(source: Any, target: Any, count: int) -> None:
        first = cuda.grid(1) * PACK
        if first + PACK <= count and is_aligned(source) and is_aligned(target):
            values = cuda.local.array(PACK, np.float32)
            spread(widen(fetch(source, 0, first, count)), values, 0)
            for i in range(PACK):
                values[i] = function(values[i])
            put(target, 0, first, count, gathered(values, 0))
        else:
            for index in range(first, min(first + PACK, count)):
                store(target, index, function(load(source, index)))

    return unary


def binary(name: str, a: Storage, b: Storage, y: Storage) -> Kernel:
    """target[i] = function(left[i % left_count], right[i % right_count]): a shorter operand repeats."""
    function, load_left, load_right, store = BINARY[name], a.load, b.load, y.store
    widen_left, widen_right = widening(a), widening(b)

    @kernel(a.array, b.array, y.array, INTEGER, INTEGER, INTEGER)
    def binary(left: Any, right: Any, target: Any, count: int, left_count: int, right_count: int) -> None:
        first = cuda.grid(1) * PACK
        left_first, right_first = first, first
        if left_count != count:  # a division costs more than the rest
            left_first = first % left_count
        if right_count != count:
            right_first = first % right_count
        is_whole = first + PACK <= count and left_first % PACK == 0 and right_first % PACK == 0
        is_whole = is_whole and is_aligned(left) and is_aligned(right) and is_aligned(target)
        if is_whole and left_first + PACK <= left_count and right_first + PACK <= right_count:
            values, others = cuda.local.array(PACK, np.float32), cuda.local.array(PACK, np.float32)
            some, more = fetch(left, 0, left_first, count), fetch(right, 0, right_first, count)
            spread(widen_left(some), values, 0)
            spread(widen_right(more), others, 0)
            for i in range(PACK):
                values[i] = function(values[i], others[i])
            put(target, 0, first, count, gathered(values, 0))
        else:
            for index in range(first, min(first + PACK, count)):
                value = function(load_left(left, index % left_count), load_right(right, index % right_count))
                store(target, index, value)

    return binary
