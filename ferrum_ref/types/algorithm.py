"""How an implementation computes an operation, as far as its rounding errors depend on it.

A backend declares one `Algorithm` per operation (`KernelOps.declared_algorithm`). The judge derives from it the largest
error that an honest run of that algorithm can make; whatever lies outside contradicts the declaration.

Clauses: PA-ALGORITHM-1..3 (specs/parity.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ferrum_ref.errors import InvalidParameterError

# Unit roundoff of each accumulator, round to nearest. TF32 rounds the factors, not the sum: its accumulator is fp32.
ACCUMULATORS: Mapping[str, float] = MappingProxyType(
    {"fp64": 2.0**-53, "fp32": 2.0**-24, "tf32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
)
REDUCTIONS = ("sequential", "tree")


@dataclass(frozen=True, slots=True)
class Algorithm:
    """The declared arithmetic of one operation; the defaults are what a plain float32 implementation does.

    accumulate            unit of products, sums and functions: "fp64", "fp32", "tf32", "fp16" or "bf16"
    reduction             "sequential": any order of the n terms is allowed (n - 1 roundings meet a term at worst);
                          "tree": at most `reduction_depth` additions meet a term
    reduction_depth       for "tree": that number, for the longest sum of the call; None otherwise
    partial_sums          "sequential": a sum of n terms is kept in this many running sums (vector lanes, unrolled
                          loops), none of more than ceil(n / partial_sums) terms, which are joined in any order
    truncates             sums are cut instead of rounded (some tensor cores): doubles the unit
    inexact_products      products of stored values are rounded before they are added (no wide fused multiply-add). Told
                          for completeness: no bound depends on it, since the first product of a sum is rounded anyway
    key_block             attention: keys are taken this many at a time with a running maximum (online, split-KV);
                          each block rescales what came before; None: the maximum is known before the first exponential
    rounds_probabilities  attention: probabilities are rounded to the storage type before they meet V
    rounds_scores         attention: scores q.k are rounded to the storage type before the softmax
    exponent_roundings    roundings of an exponent after the score: 1 for exp(s - max), 3 for exp2((s - max) log2(e))
    rounds_residual       rms_norm_residual: the norm reads the sum after it was rounded to the storage type
    folds_zero_point      quantized_linear: sum d q x - sum d z x instead of sum d (q - z) x
    quantizes_activations quantized_linear: each block of 32 inputs is first rounded to 8 bits, with a scale of its own
    flushes_subnormals    results below the accumulator's and the storage's normal range become zero
    extra_roundings       roundings of intermediates to the storage type, besides the final store and those named above
    *_ulp                 largest error claimed for that function, in units in the last place of the accumulator
                          (0.5: correctly rounded)

    Pure data.  Raises InvalidParameterError: unknown unit or order, tree without depth, negative count or claim.
    [PA-ALGORITHM-1, PA-ALGORITHM-3]
    """

    accumulate: str = "fp32"
    reduction: str = "sequential"
    reduction_depth: int | None = None
    partial_sums: int = 1
    truncates: bool = False
    inexact_products: bool = True
    key_block: int | None = None
    rounds_probabilities: bool = False
    rounds_scores: bool = False
    exponent_roundings: int = 1
    rounds_residual: bool = False
    folds_zero_point: bool = False
    quantizes_activations: bool = False
    flushes_subnormals: bool = False
    extra_roundings: int = 0
    exp_ulp: float = 3.0
    rsqrt_ulp: float = 2.0
    erf_ulp: float = 4.0
    tanh_ulp: float = 4.0
    div_ulp: float = 0.5
    sqrt_ulp: float = 0.5

    def __post_init__(self) -> None:
        if self.accumulate not in ACCUMULATORS:
            self._refuse("accumulate", self.accumulate, f"one of {', '.join(ACCUMULATORS)}")
        if self.reduction not in REDUCTIONS:
            self._refuse("reduction", self.reduction, f"one of {', '.join(REDUCTIONS)}")
        if (self.reduction == "tree") != (self.reduction_depth is not None) or (self.reduction_depth or 0) < 0:
            self._refuse("reduction_depth", self.reduction_depth, "a count >= 0 with reduction='tree', None otherwise")
        if self.partial_sums < 1 or (self.partial_sums > 1 and self.reduction == "tree"):
            self._refuse("partial_sums", self.partial_sums, "a count >= 1, and 1 with reduction='tree'")
        if self.key_block is not None and self.key_block < 1:
            self._refuse("key_block", self.key_block, "None or a count of keys >= 1")
        for name in ("extra_roundings", "exponent_roundings"):
            if getattr(self, name) < 0:
                self._refuse(name, getattr(self, name), "a count >= 0")
        for name in ("exp_ulp", "rsqrt_ulp", "erf_ulp", "tanh_ulp", "div_ulp", "sqrt_ulp"):
            if not getattr(self, name) >= 0.0:
                self._refuse(name, getattr(self, name), "a number of ulps >= 0")

    @property
    def unit(self) -> float:
        """Unit roundoff u of one operation: 2^-24 for float32, doubled where sums are cut.  [PA-ALGORITHM-2]"""
        return ACCUMULATORS[self.accumulate] * (2.0 if self.truncates else 1.0)

    @staticmethod
    def _refuse(field: str, got: object, expected: str) -> None:
        raise InvalidParameterError(f"Algorithm: {field}: got {got!r}, expected {expected}; correct the declaration")
