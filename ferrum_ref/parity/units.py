"""Unit roundoffs and the growth of rounding errors over many operations.

    u            unit roundoff: |fl(x) - x| <= u |x|
    eta          half the smallest subnormal: |fl(x) - x| <= u |x| + eta, for every finite x in range
    gamma_n      n u / (1 - n u): n roundings, all in the worst direction
    gamma~_n     the same when the roundings are independent with mean zero, except with probability delta
    tau          2 ulp u: relative error of a function claimed good to `ulp` units in the last place

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1; Higham and Mary, SIAM J. Sci.
Comput. 41 (2019), theorem 2.4.  Clauses: PA-UNIT-1..3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.kernels.rounding import round_to
from ferrum_ref.types.devices import DataType

Array = NDArray[Any]
FAILURE_PROBABILITY = 1e-9  # delta: chance that one honest call exceeds a probabilistic bound anywhere


@dataclass(frozen=True, slots=True)
class Storage:
    """A floating-point type in which tensors are stored.  [PA-UNIT-1]

    unit = 2^-precision_bits, eta = half the smallest subnormal, largest = the largest finite value.
    """

    name: str
    data_type: DataType
    numpy_dtype: np.dtype[Any]
    precision_bits: int
    eta: float
    smallest_normal: float
    largest: float

    @property
    def unit(self) -> float:
        return 2.0**-self.precision_bits

    def round(self, values: Array) -> Array:
        """`values` rounded once to this type, to nearest with ties to even; overflow gives infinities. Pure."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.array(round_to(np.asarray(values), self.numpy_dtype))


def _storage(name: str, data_type: DataType, scalar: Any) -> Storage:
    info: Any = ml_dtypes.finfo(scalar)  # type: ignore[no-untyped-call]
    half_subnormal = float(info.smallest_subnormal) / 2.0
    precision_bits = info.nmant + 1
    return Storage(
        name, data_type, np.dtype(scalar), precision_bits, half_subnormal, float(info.smallest_normal), float(info.max)
    )


STORAGES: Mapping[str, Storage] = MappingProxyType(
    {
        "fp32": _storage("fp32", DataType.FP32, np.float32),
        "fp16": _storage("fp16", DataType.FP16, np.float16),
        "bf16": _storage("bf16", DataType.BF16, ml_dtypes.bfloat16),
    }
)


def storage_named(name: str) -> Storage:
    """The storage type called `name`. Raises InvalidParameterError for an unknown name."""
    if name not in STORAGES:
        raise InvalidParameterError(f"parity: dtype {name!r} is unknown; expected one of {', '.join(STORAGES)}")
    return STORAGES[name]


def gamma(count: float | Array, unit: float) -> Array:
    """n u / (1 - n u); infinite once n u >= 1, where nothing can be promised. Pure.  [PA-UNIT-2]"""
    product = np.asarray(count, dtype=np.float64) * unit
    with np.errstate(divide="ignore"):
        return np.where(product < 1.0, product / np.maximum(1.0 - product, 0.0), np.inf)


def confidence_factor(count: float, num_outputs: int, delta: float = FAILURE_PROBABILITY) -> float:
    """lambda = sqrt(2 ln(2 n N / delta)): n roundings in each of N outputs all stay within lambda deviations."""
    return math.sqrt(2.0 * math.log(2.0 * max(count, 1.0) * max(num_outputs, 1) / delta))


def gamma_probabilistic(count: float | Array, unit: float, num_outputs: int) -> Array:
    """min(gamma_n, exp(lambda sqrt(n) u + n u^2 / (1 - u)) - 1), lambda as in confidence_factor. Pure.  [PA-UNIT-3]"""
    counts = np.asarray(count, dtype=np.float64)
    factor = confidence_factor(float(counts.max(initial=0.0)), num_outputs)
    grown = np.expm1(factor * np.sqrt(counts) * unit + counts * unit**2 / (1.0 - unit))
    return np.minimum(gamma(counts, unit), grown)
