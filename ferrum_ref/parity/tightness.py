"""How tight the bounds must be, and why a cell may lie outside.

The largest honest err / bound of a cell lies in [0.3, 1] for 16-bit types and above 0.05 for fp32; what lies outside
needs a reason here, in writing.  Clauses: PA-GUARD-2, PA-TIGHT-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

LEAST_16_BIT, LEAST_FP32 = 0.3, 0.05

EXACT = frozenset(
    {
        "write_kv", "embedding", "argmax", "sample_token", "relu", "cast", "concat", "split", "transpose", "permute",
        "stack", "unstack", "pad_batch",
    }
)  # fmt: skip
"""Operations whose results must agree bit for bit, or be admissible: there is no bound to be slack."""

REASONS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        (
            "quantized_linear_q4_0",
            "fp32",
        ): "sums of 32 terms or more in vector lanes: one implementation's roundings stay "
        "far below K + 1 in one direction; among all honest algorithms the sequential sum of lost terms reaches 0.99",
        ("quantized_linear_q8_0", "fp32"): "as quantized_linear_q4_0",
    }
)
"""Cells of one implementation that may lie below the floor, with the reason; among all honest algorithms none may."""


def is_tight(operation: str, dtype: str, ratio: float) -> bool:
    """Does a cell's largest honest err / bound lie where it should? Pure."""
    if operation in EXACT:
        return ratio == 0.0
    return ratio <= 1.0 and ratio >= (LEAST_FP32 if dtype == "fp32" else LEAST_16_BIT)
