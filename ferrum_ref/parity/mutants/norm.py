"""Bugs of RMSNorm and LayerNorm."""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.honest.attention import with_settings
from ferrum_ref.parity.honest.norm import layer_norm, rms_norm, rms_norm_residual, root_mean
from ferrum_ref.parity.honest.sums import F32, Kernel, stored, total_pairwise, wide
from ferrum_ref.parity.mutants.mutant import SIXTEEN_BITS, Mutant
from ferrum_ref.parity.mutants.partial import nan_taken_for_zero, rows_kept, rows_taken_for_contiguous
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

Outputs = tuple[Array, ...]


def _parts(inputs: Inputs) -> tuple[Array, Array, Array, np.float32]:
    """x, weight, mean square, eps."""
    x, weight = wide(inputs, "x", "weight")
    return x, weight, (x * x).mean(axis=-1, keepdims=True), F32(inputs.settings["eps"])


def eps_outside_root(inputs: Inputs) -> Outputs:
    x, weight, mean, eps = _parts(inputs)
    return stored(inputs, x / (np.sqrt(mean) + eps) * weight)


def eps_hard_coded(inputs: Inputs) -> Outputs:
    x, weight, mean, _ = _parts(inputs)
    return stored(inputs, x / np.sqrt(mean + F32(1e-6)) * weight)


def eps_forgotten(inputs: Inputs) -> Outputs:
    x, weight, mean, _ = _parts(inputs)
    return stored(inputs, x / np.sqrt(mean) * weight)


def mean_over_padded_size(inputs: Inputs) -> Outputs:
    x, weight, mean, eps = _parts(inputs)
    padded = -(-x.shape[-1] // 16) * 16
    return stored(inputs, x / np.sqrt(mean * F32(x.shape[-1] / padded) + eps) * weight)


def without_variance(inputs: Inputs) -> Outputs:
    x, weight, _, _ = _parts(inputs)
    return stored(inputs, x * weight)


def tail_not_summed(inputs: Inputs) -> Outputs:
    """A vector loop over eights that forgets the rest of the row in the sum."""
    x, weight, _, eps = _parts(inputs)
    whole = x.shape[-1] // 8 * 8 or x.shape[-1]
    mean = (x[..., :whole] ** 2).sum(axis=-1, keepdims=True) / F32(x.shape[-1])
    return stored(inputs, x / np.sqrt(mean + eps) * weight)


def one_added_to_weight(inputs: Inputs) -> Outputs:
    x, weight, mean, eps = _parts(inputs)
    return stored(inputs, x / np.sqrt(mean + eps) * (F32(1.0) + weight))


def mean_taken_off(inputs: Inputs) -> Outputs:
    x, weight, _, eps = _parts(inputs)
    x = x - x.mean(axis=-1, keepdims=True)
    return stored(inputs, x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight)


def rounded_before_weight(inputs: Inputs) -> Outputs:
    """The normed row is stored before the weight multiplies it: one more rounding than declared."""
    x, weight, mean, eps = _parts(inputs)
    (normed,) = stored(inputs, x / np.sqrt(mean + eps))
    return stored(inputs, normed.astype(F32) * weight)


def squares_in_storage_type(inputs: Inputs) -> Outputs:
    x, weight, _, eps = _parts(inputs)
    (squares,) = stored(inputs, x * x)
    mean = squares.astype(F32).mean(axis=-1, keepdims=True)
    return stored(inputs, x / np.sqrt(mean + eps) * weight)


def sum_in_half(inputs: Inputs) -> Outputs:
    x, weight, _, eps = _parts(inputs)
    with np.errstate(over="ignore"):
        mean = (x.astype(np.float16) ** 2).mean(axis=-1, keepdims=True, dtype=np.float16).astype(F32)
    return stored(inputs, x / np.sqrt(mean + eps) * weight)


def fast_inverse_root(inputs: Inputs) -> Outputs:
    """The famous constant with two Newton steps: good to 5e-6, not to float32."""
    x, weight, mean, eps = _parts(inputs)
    total = np.ascontiguousarray(mean + eps)
    codes = (np.uint32(0x5F3759DF) - (total.view(np.uint32) >> np.uint32(1))).astype(np.uint32)
    root = codes.view(F32)
    for _ in range(2):
        root = root * (F32(1.5) - F32(0.5) * total * root * root)
    return stored(inputs, x * root * weight)


def residual_rounded_before_norm(inputs: Inputs) -> Outputs:
    x, residual, weight = wide(inputs, "x", "residual", "weight")
    (joined,) = stored(inputs, x + residual)
    root = root_mean(joined.astype(F32), inputs.settings["eps"], total_pairwise, False)
    return (*stored(inputs, joined.astype(F32) * root * weight), joined)


def _normed_sum(inputs: Inputs, factor: float = 1.0) -> tuple[Array, Array]:
    x, residual, weight = wide(inputs, "x", "residual", "weight")
    joined = x + F32(factor) * residual
    return joined * root_mean(joined, inputs.settings["eps"], total_pairwise, False) * weight, joined


def residual_not_returned(inputs: Inputs) -> Outputs:
    return (*stored(inputs, _normed_sum(inputs)[0]), np.array(inputs.arrays["residual"]))


def residual_added_twice(inputs: Inputs) -> Outputs:
    normed, joined = _normed_sum(inputs)
    return stored(inputs, normed, joined + wide(inputs, "residual")[0])


def residual_not_normed(inputs: Inputs) -> Outputs:
    (joined,) = stored(inputs, _normed_sum(inputs)[1])
    return rms_norm(total_pairwise, "plain")(inputs)[0], joined


def _layer(inputs: Inputs, variance: str, bias: bool = True) -> Outputs:
    x, weight = wide(inputs, "x", "weight")
    mean = x.mean(axis=-1, keepdims=True)
    if variance == "unbiased":
        spread = ((x - mean) ** 2).sum(axis=-1, keepdims=True) / F32(max(x.shape[-1] - 1, 1))
    elif variance == "one pass":
        spread = np.maximum((x * x).mean(axis=-1, keepdims=True) - mean * mean, F32(0.0))
    else:
        spread = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    y = (x - mean) / np.sqrt(spread + F32(inputs.settings["eps"])) * weight
    return stored(inputs, y + wide(inputs, "bias")[0] if bias and "bias" in inputs.arrays else y)


def with_default_eps(kernel: Kernel) -> Kernel:
    """1e-5 is what most configurations say."""
    return lambda inputs: kernel(with_settings(inputs, eps=1e-5))


HONEST = rms_norm(total_pairwise, "plain")
NORM: tuple[Mutant, ...] = (
    Mutant("norm", "rms_norm", "eps outside the square root", eps_outside_root),
    Mutant("norm", "rms_norm", "eps hard-coded", eps_hard_coded),
    Mutant("norm", "rms_norm", "eps forgotten", eps_forgotten),
    Mutant("norm", "rms_norm", "variance over the padded size", mean_over_padded_size),
    Mutant("norm", "rms_norm", "variance never computed", without_variance),
    Mutant("norm", "rms_norm", "tail of the row not summed", tail_not_summed),
    Mutant("norm", "rms_norm", "one added to the weight", one_added_to_weight),
    Mutant("norm", "rms_norm", "mean taken off", mean_taken_off),
    Mutant("norm", "rms_norm", "rounded before the weight", rounded_before_weight, SIXTEEN_BITS),
    Mutant("norm", "rms_norm", "squares rounded to storage", squares_in_storage_type, SIXTEEN_BITS),
    Mutant("norm", "rms_norm", "sum in half precision", sum_in_half),
    Mutant("norm", "rms_norm", "fast inverse root", fast_inverse_root, ("fp32",)),
    Mutant("norm", "rms_norm_residual", "residual rounded before the norm", residual_rounded_before_norm, SIXTEEN_BITS),
    Mutant("norm", "rms_norm_residual", "sum not handed back", residual_not_returned),
    Mutant("norm", "rms_norm_residual", "residual added twice", residual_added_twice),
    Mutant("norm", "rms_norm_residual", "residual not normed", residual_not_normed),
    Mutant("norm", "layer_norm", "unbiased variance", lambda inputs: _layer(inputs, "unbiased")),
    Mutant("norm", "layer_norm", "variance in one pass", lambda inputs: _layer(inputs, "one pass"), ("fp32",)),
    Mutant("norm", "layer_norm", "bias forgotten", lambda inputs: _layer(inputs, "biased", bias=False)),
    Mutant("norm", "rms_norm", "only 8 rows", rows_kept(HONEST, 8)),
    Mutant("norm", "rms_norm", "rows taken for contiguous", rows_taken_for_contiguous(HONEST, "x")),
    Mutant("norm", "rms_norm", "NaN taken for zero", nan_taken_for_zero(HONEST)),
    Mutant("norm", "rms_norm_residual", "eps 1e-5", with_default_eps(rms_norm_residual(total_pairwise, "plain"))),
    Mutant("norm", "layer_norm", "eps 1e-5", with_default_eps(layer_norm(total_pairwise))),
)
