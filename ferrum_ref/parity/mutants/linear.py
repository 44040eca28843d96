"""Bugs of projections, with plain and with packed weights."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from ferrum_ref.kernels.rounding import round_to
from ferrum_ref.parity.honest.attention import with_arrays
from ferrum_ref.parity.honest.linear import BLOCK, linear, matmul, parts_of, projected, quantized_linear
from ferrum_ref.parity.honest.sums import F32, dot_blas, dot_sequential, stored, wide
from ferrum_ref.parity.mutants.mutant import SIXTEEN_BITS, Mutant
from ferrum_ref.parity.mutants.partial import columns_kept, nan_taken_for_zero, rows_kept, saturating
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array
from ferrum_ref.types.algorithm import Algorithm

Outputs = tuple[Array, ...]
HONEST = linear(dot_blas)


def tail_of_k_dropped(inputs: Inputs) -> Outputs:
    size = inputs.arrays["x"].shape[-1]
    whole = size // 8 * 8 or size
    return HONEST(with_arrays(inputs, x=inputs.arrays["x"][..., :whole], weight=inputs.arrays["weight"][:, :whole]))


def tail_of_columns_not_written(inputs: Inputs) -> Outputs:
    """Tiles of eight columns: what is left over stays zero."""
    (y,) = HONEST(inputs)
    whole = y.shape[-1] // 8 * 8
    y[..., whole:] = 0
    return (y,)


def sixteen_bit_accumulator(inputs: Inputs) -> Outputs:
    narrow = np.dtype(np.float16) if inputs.storage.name == "fp32" else inputs.storage.numpy_dtype
    x, weight = inputs.arrays["x"].astype(narrow), inputs.arrays["weight"].astype(narrow)
    rows = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
    total = dot_sequential(rows, weight.T)
    return stored(inputs, total.astype(F32).reshape(*x.shape[:-1], weight.shape[0]))


def cut_to_tf32(values: Array) -> Array:
    """The nearest number of ten explicit significand bits."""
    codes = np.ascontiguousarray(values).view(np.uint32)
    return np.asarray(((codes + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(F32))


def undeclared_tf32(inputs: Inputs) -> Outputs:
    x, weight = (cut_to_tf32(part) for part in wide(inputs, "x", "weight"))
    return stored(inputs, projected(x, weight, dot_blas))


def undeclared_bf16_factors(inputs: Inputs) -> Outputs:
    """Both factors are converted to bf16 for the tensor cores."""
    bf16 = np.dtype(ml_dtypes.bfloat16)
    x, weight = (np.asarray(round_to(part, bf16)).astype(F32) for part in wide(inputs, "x", "weight"))
    return stored(inputs, projected(x, weight, dot_blas))


def weight_not_transposed(inputs: Inputs) -> Outputs:
    weight = inputs.arrays["weight"]
    return HONEST(with_arrays(inputs, weight=np.ascontiguousarray(weight).reshape(weight.shape[::-1]).T))


def strides_ignored(inputs: Inputs) -> Outputs:
    """The kernel reads the buffer behind x as if it were contiguous."""
    x = inputs.arrays["x"]
    holder = x.base if x.base is not None and not x.flags.c_contiguous else x
    flat = np.asarray(holder).reshape(-1)[: x.size].reshape(x.shape)
    return HONEST(with_arrays(inputs, x=flat))


def split_k_without_last(inputs: Inputs) -> Outputs:
    """K is split in four; the last partial sum is never added."""
    x, weight = wide(inputs, "x", "weight")
    step = max(1, -(-x.shape[-1] // 4))
    kept = x.shape[-1] - step if x.shape[-1] > step else x.shape[-1]
    return stored(inputs, projected(x[..., :kept], weight[:, :kept], dot_blas))


def partial_sums_stored(inputs: Inputs) -> Outputs:
    """Split-K whose partial sums are kept in the storage type: undeclared roundings."""
    x, weight = wide(inputs, "x", "weight")
    step = max(1, -(-x.shape[-1] // 4))
    total = np.zeros((*x.shape[:-1], weight.shape[0]), dtype=F32)
    for start in range(0, x.shape[-1], step):
        part = projected(x[..., start : start + step], weight[:, start : start + step], dot_blas)
        (rounded,) = stored(inputs, total + part)
        total = rounded.astype(F32)
    return stored(inputs, total)


def result_cut(inputs: Inputs) -> Outputs:
    """The result is cut to 16 bits instead of rounded."""
    x, weight = wide(inputs, "x", "weight")
    y = projected(x, weight, dot_blas)
    nearest = np.array(round_to(y, inputs.storage.numpy_dtype))
    beyond = np.abs(nearest.astype(F32)) > np.abs(y)
    codes = nearest.view(np.uint16)
    codes -= beyond.astype(np.uint16)
    return (codes.view(nearest.dtype),)


def batch_zero_for_all(inputs: Inputs) -> Outputs:
    b = inputs.arrays["b"]
    first = b[(slice(0, 1),) * (b.ndim - 2)]
    return matmul(dot_blas)(with_arrays(inputs, b=np.broadcast_to(first, b.shape)))


Weights = Callable[[Array, Array, float], Array]


def packed(packed_format: str, weights: Weights) -> Callable[[Inputs], Outputs]:
    """The honest kernel with weights (N, blocks, 32) made of scales and codes in a wrong way."""
    zero = 8.0 if packed_format == "Q4_0" else 0.0

    def run(inputs: Inputs) -> Outputs:
        (x,) = wide(inputs, "x")
        scales, codes = parts_of(inputs.arrays["packed"], packed_format)
        weight = weights(scales, codes, zero).astype(F32).reshape(scales.shape[0], x.shape[-1])
        return stored(inputs, projected(x, weight, dot_blas))

    return run


def nibbles_interleaved(scales: Array, codes: Array, zero: float) -> Array:
    """Byte i holds elements 2 i and 2 i + 1."""
    mixed = np.stack([codes[..., :16], codes[..., 16:]], axis=-1).reshape(codes.shape)
    return np.asarray(scales[..., None] * (mixed - F32(zero)))


def nibbles_swapped(scales: Array, codes: Array, zero: float) -> Array:
    swapped = np.concatenate([codes[..., 16:], codes[..., :16]], axis=-1)
    return np.asarray(scales[..., None] * (swapped - F32(zero)))


def zero_point_one_less(scales: Array, codes: Array, zero: float) -> Array:
    return np.asarray(scales[..., None] * (codes - F32(zero - 1.0)))


def two_complement_nibbles(scales: Array, codes: Array, zero: float) -> Array:
    return np.asarray(scales[..., None] * np.where(codes > 7, codes - 16, codes))


def scale_as_bf16(scales: Array, codes: Array, zero: float) -> Array:
    """The two bytes of a float16 scale are read as bf16."""
    halves = np.ascontiguousarray(scales.astype(np.float16)).view(np.uint16)
    wrong = (halves.astype(np.uint32) << np.uint32(16)).view(F32)
    return np.asarray(wrong[..., None] * (codes - F32(zero)))


def scale_rounded(scales: Array, codes: Array, zero: float) -> Array:
    """Scales are kept in bf16, which has three bits less."""
    rounded = scales.astype(ml_dtypes.bfloat16).astype(F32)
    return np.asarray(rounded[..., None] * (codes - F32(zero)))


def scale_of_next_block(scales: Array, codes: Array, zero: float) -> Array:
    return np.asarray(np.roll(scales, -1, axis=-1)[..., None] * (codes - F32(zero)))


def subnormal_scales_flushed(scales: Array, codes: Array, zero: float) -> Array:
    flushed = np.where(np.abs(scales) < F32(2.0**-14), F32(0.0), scales)
    return np.asarray(flushed[..., None] * (codes - F32(zero)))


def scale_magnitude(scales: Array, codes: Array, zero: float) -> Array:
    return np.asarray(np.abs(scales)[..., None] * (codes - F32(zero)))


def last_block_dropped(scales: Array, codes: Array, zero: float) -> Array:
    kept = scales.copy()
    if kept.shape[-1] > 1:
        kept[:, -1] = 0
    return np.asarray(kept[..., None] * (codes - F32(zero)))


def unsigned_bytes(scales: Array, codes: Array, zero: float) -> Array:
    return np.asarray(scales[..., None] * np.where(codes < 0, codes + 256, codes))


def minus_128_clamped(scales: Array, codes: Array, zero: float) -> Array:
    return np.asarray(scales[..., None] * np.maximum(codes, F32(-127.0)))


def activations_quantised(packed_format: str) -> Callable[[Inputs], Outputs]:
    """Each block of 32 inputs is rounded to 8 bits first, undeclared."""
    zero = F32(8.0 if packed_format == "Q4_0" else 0.0)

    def run(inputs: Inputs) -> Outputs:
        (x,) = wide(inputs, "x")
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
        step = np.abs(blocks).max(axis=-1, keepdims=True, initial=0.0) / F32(127.0)
        safe = np.where(step > 0, step, F32(1.0))
        rounded = (np.rint(blocks / safe) * step).reshape(x.shape)
        scales, codes = parts_of(inputs.arrays["packed"], packed_format)
        weight = (scales[..., None] * (codes - zero)).reshape(scales.shape[0], x.shape[-1])
        return stored(inputs, projected(rounded, weight, dot_blas))

    return run


def unpacked_to_half(packed_format: str) -> Callable[[Inputs], Outputs]:
    """Weights are unpacked to float16 for the tensor cores: d (q - z) needs four bits more than d."""

    def weights(scales: Array, codes: Array, zero: float) -> Array:
        return (scales[..., None] * (codes - F32(zero))).astype(np.float16)

    return packed(packed_format, weights)


def _q(packed_format: str, name: str, weights: Weights) -> Mutant:
    operation = f"quantized_linear_{packed_format.lower()}"
    return Mutant("quantised linear", operation, name, packed(packed_format, weights))


LINEAR: tuple[Mutant, ...] = (
    Mutant("linear", "linear", "tail of K dropped", tail_of_k_dropped),
    Mutant("linear", "linear", "tail of the columns not written", tail_of_columns_not_written),
    Mutant("linear", "linear", "16-bit accumulator", sixteen_bit_accumulator),
    Mutant("linear", "linear", "TF32, undeclared", undeclared_tf32, ("fp32",)),
    Mutant("linear", "linear", "factors in bf16, undeclared", undeclared_bf16_factors, ("fp32", "fp16")),
    Mutant("linear", "linear", "weight not transposed", weight_not_transposed),
    Mutant("linear", "linear", "strides ignored", strides_ignored),
    Mutant("linear", "linear", "last of the splits of K lost", split_k_without_last),
    Mutant("linear", "linear", "partial sums stored in 16 bits", partial_sums_stored, SIXTEEN_BITS),
    Mutant("linear", "linear", "result cut instead of rounded", result_cut, SIXTEEN_BITS),
    Mutant("linear", "linear", "one sum, 16 declared", linear(dot_sequential), ("fp32",), Algorithm(partial_sums=16)),
    Mutant("linear", "matmul", "first matrix of the batch for all", batch_zero_for_all),
    Mutant("linear", "linear", "only 16 rows", rows_kept(HONEST, 16)),
    Mutant("linear", "linear", "only 128 columns", columns_kept(HONEST, 128)),
    Mutant("linear", "linear", "NaN taken for zero", nan_taken_for_zero(HONEST)),
    Mutant("linear", "linear", "overflow saturates", saturating(HONEST), ("fp16",)),
)
UNPACKED = quantized_linear("Q4_0", "unpacked")
QUANTIZED: tuple[Mutant, ...] = (
    _q("Q4_0", "nibbles interleaved", nibbles_interleaved),
    _q("Q4_0", "high nibble first", nibbles_swapped),
    _q("Q4_0", "zero point 7 for 8", zero_point_one_less),
    _q("Q4_0", "nibbles in two's complement", two_complement_nibbles),
    _q("Q4_0", "scale read as bf16", scale_as_bf16),
    _q("Q4_0", "scale kept in bf16", scale_rounded),
    _q("Q4_0", "scale of the next block", scale_of_next_block),
    _q("Q4_0", "subnormal scales flushed", subnormal_scales_flushed),
    _q("Q4_0", "sign of the scale lost", scale_magnitude),
    _q("Q4_0", "last block dropped", last_block_dropped),
    _q("Q8_0", "bytes without sign", unsigned_bytes),
    _q("Q8_0", "-128 clamped to -127", minus_128_clamped),
    _q("Q8_0", "scale of the next block", scale_of_next_block),
    _q("Q8_0", "last block dropped", last_block_dropped),
    Mutant("quantised linear", "quantized_linear_q4_0", "activations in 8 bits", activations_quantised("Q4_0")),
    Mutant("quantised linear", "quantized_linear_q8_0", "activations in 8 bits", activations_quantised("Q8_0")),
    Mutant(
        "quantised linear", "quantized_linear_q4_0", "unpacked to float16", unpacked_to_half("Q4_0"), ("fp32", "fp16")
    ),
    Mutant(
        "quantised linear", "quantized_linear_q8_0", "unpacked to float16", unpacked_to_half("Q8_0"), ("fp32", "fp16")
    ),
    Mutant("quantised linear", "quantized_linear_q4_0", "only 64 columns", columns_kept(UNPACKED, 64)),
)
