"""Conversion between the floating-point types: exact, to nearest with ties to even.

The expected value does not come from a conversion routine: it is looked up among all numbers of the target type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.operation import IID, Case, Expected, Inputs, Operation, case, exact
from ferrum_ref.parity.units import STORAGES, Array, Storage
from ferrum_ref.types.algorithm import Algorithm
from ferrum_ref.types.devices import DataType

TARGETS: Mapping[str, tuple[DataType, np.dtype[Any]]] = MappingProxyType(
    {
        **{name: (storage.data_type, storage.numpy_dtype) for name, storage in STORAGES.items()},
        "fp8": (DataType.FP8, np.dtype(ml_dtypes.float8_e4m3fn)),
    }
)
SATURATING = "fp8"  # E4M3FN has no infinities: what lies beyond its largest number becomes that number


class Cast(Operation):
    """`to_dtype`: every number of a 16-bit source, every middle between neighbours of the target, and random ones."""

    name = "cast"
    cases = (
        case("every 16-bit number", to="fp16"),
        case("every 16-bit number", to="bf16"),
        case("every 16-bit number", to="fp8"),
        case("every 16-bit number", to="fp32"),
        case("middles", to="fp16"),
        case("middles", to="bf16"),
        case("middles", to="fp8"),
        case(IID, to="fp16", shape=(3, 40)),
        case(IID, to="bf16", shape=(129,)),
        case(IID, to="fp8", shape=(2, 65)),
        case(IID, to="fp32", shape=(2, 0)),
        case("strided", to="bf16", shape=(3, 33)),
        case("from fp8", to="fp8"),
    )

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        target = case.sizes["to"]
        if case.probe == "every 16-bit number":
            source = np.arange(2**16, dtype=np.uint16).view(
                np.float16 if storage.name == "fp32" else storage.numpy_dtype
            )
            with np.errstate(invalid="ignore"):
                return Inputs(case, storage, {"x": storage.round(source)})
        if case.probe == "middles":
            return Inputs(case, storage, {"x": _around_middles(TARGETS[target][1], storage)})
        if case.probe == "from fp8":
            numbers = np.arange(2**8, dtype=np.uint8).view(TARGETS["fp8"][1])
            return Inputs(case, storage, {"x": numbers})
        x = draws.normal(rng, case.sizes["shape"], storage)
        return Inputs(case, storage, {"x": draws.strided(x) if case.probe == "strided" else x})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        return bridge.host(bridge.tensor(backend, inputs, "x").to_dtype(_target(inputs)[1]))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        name, _ = _target(inputs)
        return [exact("y", nearest_even(inputs.exact("x"), name))]


def _target(inputs: Inputs) -> tuple[str, DataType]:
    """From fp8 the target is the cell's own type; else the case names it."""
    name = inputs.storage.name if inputs.case.probe == "from fp8" else str(inputs.case.sizes["to"])
    return name, TARGETS[name][0]


def nearest_even(values: Array, target: str) -> Array:
    """float64 values rounded to `target` by looking for the two neighbours among all its numbers. Pure."""
    dtype = TARGETS[target][1]
    if dtype.itemsize > 2:  # float32: numpy's own conversion is a single instruction that rounds as IEEE 754 says
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    numbers = _numbers(dtype)
    flat = np.abs(np.where(np.isnan(values), 0.0, values)).reshape(-1)
    above = np.minimum(np.searchsorted(numbers, flat), numbers.size - 1)
    below = np.maximum(above - 1, 0)
    to_above, to_below = numbers[above] - flat, flat - numbers[below]
    index = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    rounded = numbers[index]
    if target != SATURATING:  # the middle between the largest number and the next power of two rounds to infinity
        limit = numbers[-1] + (numbers[-1] - numbers[-2]) / 2.0
        rounded = np.where(flat >= limit, np.inf, rounded)
    signed = np.copysign(rounded.reshape(values.shape), values)
    with np.errstate(over="ignore"):
        return np.asarray(np.where(np.isnan(values), np.nan, signed).astype(dtype))


def _numbers(dtype: np.dtype[Any]) -> Array:
    """The finite numbers >= 0 of a type of at most 16 bits, ascending: an even index has an even last bit."""
    codes = np.arange(2 ** (8 * dtype.itemsize - 1), dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        numbers = codes.view(dtype).astype(np.float64)
    return numbers[np.isfinite(numbers)]


def _around_middles(dtype: np.dtype[Any], storage: Storage) -> Array:
    """The middles between neighbours of `dtype`, the values just beside them, and what lies beyond; as stored."""
    numbers = _numbers(dtype)
    middles = (numbers[1:] + numbers[:-1]) / 2.0
    step = 2.0 * storage.unit * middles
    beyond = numbers[-1] * np.array([1.0, 1.01, 1.03, 1.04, 1.0625, 1.07, 2.0, 4.0])
    values = np.concatenate([middles, middles - step, middles + step, beyond, [np.inf, np.nan, 0.0]])
    return storage.round(np.concatenate([values, -values]))
