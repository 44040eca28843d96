"""How tight the bounds must be, and why a cell may lie outside.

The largest honest err / bound of a cell lies in [0.3, 1] for 16-bit types and above 0.05 for fp32; what lies outside
needs a reason here, in writing. A chain of thousands of roundings never has them all at their worst: it is held to a
floor of its own, in the prob tier.  Clauses: PA-GUARD-2, PA-TIGHT-1..2.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ferrum_ref.parity.schemes.catalogue import SCHEMES

LEAST_16_BIT, LEAST_FP32 = 0.3, 0.05
CHAINS = frozenset({"decode_step"})
LEAST_CHAIN_16_BIT, LEAST_CHAIN_FP32 = 0.1, 0.02

EXACT = frozenset(
    {
        "write_kv", "embedding", "argmax", "sample_token", "relu", "cast", "concat", "split", "transpose", "permute",
        "stack", "unstack", "pad_batch",
    }
)  # fmt: skip
"""Operations whose results must agree bit for bit, or be admissible: there is no bound to be slack."""

_UNDECLARED = (
    "sums in 16 or more vector lanes that are not declared (`partial_sums`): one implementation's roundings stay far "
    "below K + 1 in one direction; declared, the cell reaches the floor; among all honest algorithms the sequential "
    "sum of lost terms reaches 0.99"
)
_WIDE_INSIDE = (
    "a decoder that keeps float32 between its operations rounds to 16 bits once, at the end; the bound permits it once "
    "an operation, and among all honest algorithms those that do so reach 0.22"
)
REASONS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        (f"quantized_linear_{name}", "fp32"): _UNDECLARED
        for name in ("q4_0", "q8_0", *(scheme.name for scheme in SCHEMES))
    }
    | {("decode_step", dtype): _WIDE_INSIDE for dtype in ("fp16", "bf16")}
)
"""Cells of one implementation that may lie below the floor, with the reason; among all honest algorithms none may."""


def is_tight(operation: str, dtype: str, ratio_det: float, ratio_prob: float | None = None) -> bool:
    """Does a cell's largest honest err / bound lie where it should? Pure."""
    if operation in EXACT:
        return ratio_det == 0.0
    if operation in CHAINS:
        least = LEAST_CHAIN_FP32 if dtype == "fp32" else LEAST_CHAIN_16_BIT
        return ratio_prob is not None and least <= ratio_prob <= 1.0
    return (LEAST_FP32 if dtype == "fp32" else LEAST_16_BIT) <= ratio_det <= 1.0
