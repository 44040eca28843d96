"""In which arithmetic a whole model runs.   Clauses: PA-WIDE-2, PA-MODEL-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ferrum_ref.kernels.linear import linear
from ferrum_ref.parity.units import Array


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """One way to run the model: its element type, and whether sums over features run backwards."""

    dtype: type[np.floating[Any]]
    reversed_sums: bool = False

    def of(self, values: Array) -> Array:
        """Stored or computed values in this run's type: exact for stored ones. Pure."""
        return values.astype(self.dtype, copy=False)

    def linear(self, x: Array, weight: Array) -> Array:
        """x @ weight.T with the terms in this order. Pure."""
        x = self.of(x)
        if self.reversed_sums:
            return linear(np.ascontiguousarray(x[..., ::-1]), weight[:, ::-1])
        return linear(x, weight)


WIDE = Arithmetic(np.float64)
FLOOR = (Arithmetic(np.float32), Arithmetic(np.float32, reversed_sums=True))
