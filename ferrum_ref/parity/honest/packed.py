"""Projections by weights in the further packed forms: decoded and added up in several orders, or offsets folded out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from ferrum_ref.parity.honest.linear import projected
from ferrum_ref.parity.honest.sums import F32, Kernel, dot_blas, dot_sequential, dot_split, stored, wide
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.ops.packed import packed_arrays
from ferrum_ref.parity.schemes.scheme import Scheme
from ferrum_ref.types.algorithm import Algorithm

DOTS = MappingProxyType({"decoded": dot_blas, "sequential": dot_sequential, "by blocks": dot_split})
BACKWARDS, FOLDED = "backwards", "offsets folded out"
FORMS: Mapping[str, Algorithm] = MappingProxyType(
    {**dict.fromkeys([*DOTS, BACKWARDS], Algorithm()), FOLDED: Algorithm(folds_zero_point=True)}
)


def packed_linear(scheme: Scheme, form: str) -> Kernel:
    """form: decoded | sequential | by blocks | backwards | offsets folded out."""

    def run(inputs: Inputs) -> tuple[np.ndarray, ...]:
        (x,) = wide(inputs, "x")
        arrays, sizes = packed_arrays(inputs), inputs.case.sizes
        weight = scheme.weights(arrays, sizes)
        if form == FOLDED:
            offsets = scheme.offsets(arrays, sizes)
            codes = (weight - offsets).astype(F32)
            return stored(inputs, projected(x, codes, dot_blas) + projected(x, offsets.astype(F32), dot_blas))
        if form == BACKWARDS:
            return stored(inputs, projected(x[..., ::-1], weight.astype(F32)[:, ::-1], dot_sequential))
        return stored(inputs, projected(x, weight.astype(F32), DOTS[form]))

    return run
