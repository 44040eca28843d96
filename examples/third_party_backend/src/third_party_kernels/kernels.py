"""The kernels: computed in float32, rounded once to the type that came in."""

from __future__ import annotations

from typing import Any

import numpy as np


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """x / sqrt(mean(x**2) + eps) * weight"""
    wide = x.astype(np.float32)
    mean = np.mean(wide * wide, axis=-1, keepdims=True)
    return (wide / np.sqrt(mean + np.float32(eps)) * weight.astype(np.float32)).astype(x.dtype)


def rms_norm_with_a_bug(x: Any, weight: Any, eps: float) -> Any:
    """The same, with eps outside the root: a bug that a relative tolerance of one percent does not see."""
    wide = x.astype(np.float32)
    mean = np.mean(wide * wide, axis=-1, keepdims=True)
    return (wide / (np.sqrt(mean) + np.float32(eps)) * weight.astype(np.float32)).astype(x.dtype)


def silu_mul(gate: Any, up: Any) -> Any:
    """gate * sigmoid(gate) * up"""
    wide = gate.astype(np.float32)
    root = np.exp(np.minimum(wide, 0) / 2)  # the exponential in two factors: neither overflows
    sigmoid = root * root / (1 + np.exp(-np.abs(wide)))
    sigmoid = np.where(wide >= 0, 1 / (1 + np.exp(-np.abs(wide))), sigmoid)
    return (wide * sigmoid * up.astype(np.float32)).astype(gate.dtype)


def linear(x: Any, weight: Any) -> Any:
    """x @ weight.T"""
    return (x.astype(np.float32) @ weight.astype(np.float32).T).astype(x.dtype)
