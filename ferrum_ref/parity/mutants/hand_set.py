"""Tolerances that well-known test suites set by hand, to stand beside the derived bounds in the kill matrix.

Not one of them judges anything here. Each compares a result with the exact value, rounded to the result's type:
"close" asks |got - y| <= absolute + relative |y| of every element; "similar" asks for a small mean square error beside
the values' own, or for a large cosine. Drawn tokens are left out: such suites look at a few of them at most.

Sources: torch.testing.assert_close, defaults by type; onnx.backend.test, rtol and atol of its runner; two styles of
attention libraries: fixed limits by operation and type, and similarity.  Clause: PA-MUTANT-3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ferrum_ref.kernels.rounding import round_to
from ferrum_ref.parity.ops.operation import Expected
from ferrum_ref.parity.units import Array

ATTENTION = ("attention", "paged_attention")
NORMS = ("rms_norm", "rms_norm_residual", "layer_norm", "tensor_rms_norm")


@dataclass(frozen=True)
class Close:
    """|got - y| <= absolute + relative |y| for every element."""

    relative: float
    absolute: float

    def accepts(self, value: Array, got: Array) -> bool:
        with np.errstate(all="ignore"):
            near = np.abs(got - value) <= self.absolute + self.relative * np.abs(value)
        return bool(np.all(near | _same_special(value, got)))


@dataclass(frozen=True)
class Similar:
    """sum (got - y)^2 <= error sum y^2, or a cosine of at least `cosine` where that is set."""

    error: float
    cosine: float | None = None

    def accepts(self, value: Array, got: Array) -> bool:
        special = ~np.isfinite(value)
        if not np.all(_same_special(value, got) | ~special) or not np.all(np.isfinite(got[~special])):
            return False
        value, got = value[~special], got[~special]
        size, length = float(value @ value), float(got @ got)
        if self.cosine is not None:
            return size == 0.0 or float(value @ got) >= self.cosine * (size * length) ** 0.5 > 0.0
        lost = float((got - value) @ (got - value))
        return lost <= self.error * size


Limit = Close | Similar


@dataclass(frozen=True)
class HandSet:
    """One suite: its limit for an operation and a dtype."""

    name: str
    limit: Callable[[str, str], Limit]

    def accepts(self, operation: str, dtype: str, expected: Sequence[Expected], outputs: Sequence[Array]) -> bool:
        """Would this suite pass the outputs? Exact outputs must be equal; drawn ones are not looked at. Pure."""
        if len(outputs) != len(expected):
            return False
        return all(self._accepts_one(operation, dtype, *pair) for pair in zip(expected, outputs, strict=True))

    def _accepts_one(self, operation: str, dtype: str, wanted: Expected, got: Array) -> bool:
        if wanted.choice is not None:
            return True
        if got.shape != wanted.value.shape or got.dtype != wanted.dtype:
            return False
        with np.errstate(all="ignore"):
            values = got.astype(np.float64).reshape(-1)
            if wanted.det is None:
                same = (values == wanted.value.astype(np.float64).reshape(-1)) | np.isnan(values)
                return bool(np.all(same))
            target = np.asarray(round_to(wanted.value, wanted.dtype)).astype(np.float64).reshape(-1)
        return self.limit(operation, dtype).accepts(target, values)


def _same_special(value: Array, got: Array) -> Array:
    return np.asarray((np.isnan(value) & np.isnan(got)) | (np.isinf(value) & (value == got)))


TORCH = {"fp32": Close(1.3e-6, 1e-5), "fp16": Close(1e-3, 1e-5), "bf16": Close(1.6e-2, 1e-5)}
ONNX = Close(1e-3, 1e-7)
FIXED_ATTENTION = {"fp32": Close(1e-3, 1e-3), "fp16": Close(1e-2, 1e-2), "bf16": Close(1e-2, 1e-2)}
FIXED_NORM = {"fp32": Close(1e-3, 1e-3), "fp16": Close(1e-3, 1e-3), "bf16": Close(1e-2, 1e-2)}
FIXED_REST = {"fp32": Close(1e-3, 1e-3), "fp16": Close(1e-2, 1e-2), "bf16": Close(1e-2, 1e-2)}
SIMILAR = {"fp32": Similar(1e-7), "fp16": Similar(5e-4), "bf16": Similar(5e-4)}


def _fixed(operation: str, dtype: str) -> Limit:
    table = FIXED_ATTENTION if operation in ATTENTION else FIXED_NORM if operation in NORMS else FIXED_REST
    return table[dtype]


def _similar(operation: str, dtype: str) -> Limit:
    if operation.startswith("quantized_linear"):
        return Similar(0.0, cosine=0.97)
    return Similar(5e-4) if operation in (*ATTENTION, "linear", "matmul") else SIMILAR[dtype]


HAND_SET: tuple[HandSet, ...] = (
    HandSet("torch", lambda operation, dtype: TORCH[dtype]),
    HandSet("ONNX", lambda operation, dtype: ONNX),
    HandSet("attn fixed", _fixed),
    HandSet("attn similar", _similar),
)
