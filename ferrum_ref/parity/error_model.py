"""What a declared `Algorithm` on a storage type makes of the units: the one argument of every bound.

Three bounds are derived from one declaration:
    det     every rounding in the worst direction: exceeding it proves that the declaration is not kept
    prob    independent roundings of mean zero: gamma~ for gamma; exceeded by an honest run with probability 1e-9
    sharp   the same on independent data of mean zero: sums of products grow like their root mean square

A fourth tier looks at many results together; it stands in `statistical.py`.  Clauses: PA-TIER-1..4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from ferrum_ref.parity.units import Array, Storage, confidence_factor, gamma, gamma_probabilistic
from ferrum_ref.types.algorithm import Algorithm

ACCUMULATOR_BITS: Mapping[str, int] = MappingProxyType({"fp64": 53, "fp32": 24, "tf32": 24, "fp16": 11, "bf16": 8})
SMALLEST_NORMAL: Mapping[str, float] = MappingProxyType(
    {"fp64": 2.0**-1022, "fp32": 2.0**-126, "tf32": 2.0**-126, "fp16": 2.0**-14, "bf16": 2.0**-126}
)
TF32_UNIT = 2.0**-11
DET, PROB, SHARP = "det", "prob", "sharp"
SPREAD = (
    "spread"  # no tier of a verdict: the root of the sum of squares of an operation's roundings, for chains of them
)


@dataclass(frozen=True, slots=True)
class ErrorModel:
    """The roundings of `algorithm` on inputs stored as `storage`, in one tier, over `num_outputs` results."""

    algorithm: Algorithm
    storage: Storage
    tier: str = DET
    num_outputs: int = 1

    def probable(self, num_outputs: int) -> ErrorModel:
        """The prob tier of the same declaration. Pure."""
        return replace(self, tier=PROB, num_outputs=num_outputs)

    def sharpened(self, num_outputs: int) -> ErrorModel:
        """The sharp tier of the same declaration. Pure."""
        return replace(self, tier=SHARP, num_outputs=num_outputs)

    @property
    def sharp(self) -> bool:
        return self.tier in (SHARP, SPREAD)

    @property
    def unit(self) -> float:
        return self.algorithm.unit

    @property
    def flush(self) -> float:
        """Absolute error of exp and its like below the accumulator's normal range, where a function may give zero."""
        return SMALLEST_NORMAL[self.algorithm.accumulate]

    @property
    def underflow(self) -> float:
        """Absolute error of a product below the accumulator's normal range: half the spacing, or all if flushed."""
        if self.algorithm.flushes_subnormals:
            return self.flush
        return self.flush * 2.0 ** -ACCUMULATOR_BITS[self.algorithm.accumulate]

    @property
    def products_are_exact(self) -> bool:
        """Two stored significands fit the accumulator.

        A fused multiply-add (`inexact_products=False`) does not save the rounding: the first product of a sum is then
        rounded when it is added to zero, and meets K roundings as any other order has it.
        """
        return 2 * self.storage.precision_bits <= ACCUMULATOR_BITS[self.algorithm.accumulate]

    @property
    def factor_unit(self) -> float:
        """Roundoff of each factor before it is multiplied: TF32 cuts float32 factors to 11 bits."""
        return TF32_UNIT if self.algorithm.accumulate == "tf32" and self.storage.precision_bits > 11 else 0.0

    def gamma(self, count: float | Array) -> Array:
        """gamma_n of the accumulator, gamma~_n in the prob and sharp tiers, sqrt(n) u for a spread."""
        if self.tier == SPREAD:
            return np.sqrt(np.asarray(count, dtype=np.float64)) * self.unit
        if self.tier == DET:
            return gamma(count, self.unit)
        return gamma_probabilistic(count, self.unit, self.num_outputs)

    def tau(self, ulp: float) -> float:
        """Relative error of a function claimed good to `ulp` units in the last place."""
        return 2.0 * ulp * self.unit

    def additions(self, num_terms: float | Array) -> Array:
        """Additions that meet one term of a sum of `num_terms`, at worst: n - 1, or the depth of a declared tree.

        In p partial sums: ceil(n / p) - 1 within one and p - 1 where they are joined.  [PA-DOT-4]
        """
        terms = np.asarray(num_terms, dtype=np.float64)
        count = np.maximum(terms - 1.0, 0.0)
        depth, parts = self.algorithm.reduction_depth, self.algorithm.partial_sums
        if parts > 1:
            return np.asarray(np.minimum(count, np.ceil(terms / parts) + (parts - 2.0)))
        return count if depth is None else np.minimum(count, float(depth))

    def dot_roundings(self, num_terms: float | Array) -> Array:
        """Roundings that meet one product in a dot product of stored values: the additions, one more if inexact."""
        return self.additions(num_terms) + (0.0 if self.products_are_exact else 1.0)

    def confidence(self, count: float) -> float:
        """lambda of the probabilistic bounds for `count` roundings in each of the outputs; 1 for a spread."""
        if self.tier == SPREAD:
            return 1.0
        return confidence_factor(count, self.num_outputs)

    @property
    def extra(self) -> float:
        """Relative error of the declared extra roundings of intermediates to the storage type."""
        return float(gamma(self.algorithm.extra_roundings, self.storage.unit))

    @property
    def store(self) -> tuple[float, float]:
        """(relative, absolute) roundoff of the final store: u_s and eta_s, or nothing.  [PA-STORE-1..2]

        Storing costs no rounding where the storage type holds every number of the accumulator. Declared flushing takes
        what is below the normal range all the same.
        """
        algorithm, storage = self.algorithm, self.storage
        narrower = storage.precision_bits < ACCUMULATOR_BITS[algorithm.accumulate]
        shorter = storage.smallest_normal > SMALLEST_NORMAL[algorithm.accumulate]
        eta = storage.eta if narrower or shorter else 0.0
        return storage.unit if narrower else 0.0, storage.smallest_normal if algorithm.flushes_subnormals else eta

    def stored(self, error: Array, value: Array) -> Array:
        """B = (1 + u_s) e + u_s |y| + eta_s: the bound after one rounding to the storage type. [PA-STORE-1..2]"""
        unit, eta = self.store
        return (1.0 + unit) * error + unit * np.abs(value) + eta
