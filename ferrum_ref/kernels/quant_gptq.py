"""GPTQ weights: integers packed along the input axis, a scale and a zero point for each group of inputs.

    W[n, k] = (q[k, n] - (z[g(k), n] + offset)) * s[g(k), n]        g(k) = g_idx[k], or k // group_size without g_idx

    qweight (K * bits / 32, N) int32, bits along K       scales (K / group_size, N) float
    qzeros  (K / group_size, N * bits / 32) int32, bits along N      g_idx (K,) int32, act-order
    offset  1 in checkpoints of version 1 ("gptq": they store the zero point minus one), 0 in version 2 ("gptq_v2")

The bracket is an integer, so the product has one rounding at most, to float32; with float16 scales it is exact.
Source: Frantar et al. 2022; AutoGPTQ's storage.  Clauses: QT-GPTQ-1..4 (specs/quant.md); D-53, D-76.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.quant_words import check_bits, pack_words, unpack_words
from ferrum_ref.types.parity_mode import ParityMode

Float32 = NDArray[np.float32]
Version = Literal["gptq", "gptq_v2"]


@dataclass(frozen=True, slots=True)
class GptqWeights:
    """The four tensors of one linear layer as they are stored; `group_size` -1 is one group."""

    qweight: NDArray[np.int32]
    qzeros: NDArray[np.int32]
    scales: NDArray[Any]
    g_idx: NDArray[np.int32] | None
    bits: int
    group_size: int
    version: Version = "gptq"

    @property
    def in_features(self) -> int:
        return int(self.qweight.shape[0]) * 32 // self.bits

    @property
    def out_features(self) -> int:
        return int(self.qweight.shape[1])


def gptq_groups(weights: GptqWeights) -> NDArray[np.int64]:
    """g(k) for every input k.  Pure.

    Raises InvalidParameterError for a group_size that is neither -1 nor positive, or a g_idx entry that names no group;
    ShapeError for a g_idx of the wrong length.  [QT-GPTQ-2]
    """
    num_inputs, num_groups = weights.in_features, weights.scales.shape[0]
    if weights.group_size != -1 and weights.group_size < 1:
        raise InvalidParameterError(f"gptq: group_size: got {weights.group_size}, expected -1 or a positive number")
    if weights.g_idx is None:
        size = num_inputs if weights.group_size == -1 else weights.group_size
        groups = np.arange(num_inputs) // size
    elif weights.g_idx.shape != (num_inputs,):
        raise ShapeError(f"gptq: g_idx: got {list(weights.g_idx.shape)}, expected [{num_inputs}]")
    else:
        groups = weights.g_idx.astype(np.int64)
    if groups.size and not 0 <= groups.min() <= groups.max() < num_groups:
        raise InvalidParameterError(
            f"gptq: groups: got {groups.min()} to {groups.max()}, expected 0 to {num_groups - 1}, the rows of scales"
        )
    return groups


def decode_gptq(weights: GptqWeights, parity_mode: ParityMode = ParityMode.REFERENCE) -> Float32:
    """W (N, K) float32, PyTorch's orientation.  Pure.  [QT-GPTQ-1..3; D-53, D-76]

    Under ParityMode.UPSTREAM zero points are taken as stored (no offset) and g_idx is ignored, as on upstream's GPU.
    Raises ShapeError when the tensors do not fit each other; InvalidParameterError as gptq_groups.
    """
    check_bits("decode_gptq", weights.bits)
    num_groups, num_outputs = weights.scales.shape
    if num_outputs != weights.out_features:
        raise ShapeError(f"gptq: scales: got {list(weights.scales.shape)}, expected [groups, {weights.out_features}]")
    zeros = unpack_words(_rows("qzeros", weights.qzeros, num_groups), weights.bits, num_outputs, axis=1)
    quanta = unpack_words(weights.qweight, weights.bits, weights.in_features, axis=0)
    offset = 1 if weights.version == "gptq" else 0
    groups = gptq_groups(weights)
    if parity_mode is ParityMode.UPSTREAM:
        size = weights.in_features if weights.group_size == -1 else weights.group_size
        offset, groups = 0, np.arange(weights.in_features) // size
    levels = quanta.astype(np.int16) - (zeros.astype(np.int16) + np.int16(offset))[groups]
    values: Float32 = levels.astype(np.float32) * weights.scales.astype(np.float32)[groups]
    return np.ascontiguousarray(values.T)


def encode_gptq(
    values: NDArray[Any],
    bits: int,
    group_size: int,
    *,
    g_idx: NDArray[np.int32] | None = None,
    version: Version = "gptq",
) -> GptqWeights:
    """GPTQ tensors of a matrix (N, K) by rounding to nearest, asymmetric; not GPTQ's error-compensating search.  Pure.

    Per group and output: low = min(x, 0), high = max(x, 0), s = (high - low) / (2**bits - 1) rounded up to float16,
    z = rint(-low / s), q = rint(x / s) + z; the error is at most s / 2. Version 1 cannot store a zero point of 0: there
    z is at least 1, and s at least high / (2**bits - 1.5), which keeps the bound.  [QT-GPTQ-4]
    Raises ShapeError unless K * bits and N * bits are multiples of 32; InvalidParameterError on bits or group_size.
    """
    check_bits("encode_gptq", bits)
    num_outputs, num_inputs = values.shape
    if num_inputs * bits % 32 or num_outputs * bits % 32:
        raise ShapeError(
            f"encode_gptq: values: got {list(values.shape)}, expected both sides to fill words at {bits} bits"
        )
    size = num_inputs if group_size == -1 else group_size
    if size < 1:
        raise InvalidParameterError(f"encode_gptq: group_size: got {group_size}, expected -1 or a positive number")
    groups = np.arange(num_inputs) // size if g_idx is None else g_idx.astype(np.int64)
    num_groups, top = int(groups.max()) + 1, (1 << bits) - 1
    columns = values.astype(np.float64).T
    low, high = np.zeros((num_groups, num_outputs)), np.zeros((num_groups, num_outputs))
    np.minimum.at(low, groups, columns)
    np.maximum.at(high, groups, columns)
    need = (high - low) / top
    if version == "gptq":
        need = np.maximum(need, high / (top - 0.5))
    scales = need.astype(np.float16)
    scales = np.where(scales.astype(np.float64) < need, np.nextafter(scales, np.float16(np.inf)), scales)
    scales = np.where(scales == 0, np.float16(1), scales)
    zeros = np.rint(-low / scales.astype(np.float64)).clip(1 if version == "gptq" else 0, top)
    quanta = (np.rint(columns / scales.astype(np.float64)[groups]) + zeros[groups]).clip(0, top).astype(np.uint8)
    stored = (zeros - (1 if version == "gptq" else 0)).astype(np.uint8)
    return GptqWeights(
        pack_words(quanta, bits, 0),
        pack_words(stored, bits, 1),
        scales.astype(np.float16),
        g_idx,
        bits,
        group_size,
        version,
    )


def _rows(name: str, words: NDArray[np.int32], num_rows: int) -> NDArray[np.int32]:
    if words.ndim != 2 or words.shape[0] != num_rows:
        raise ShapeError(f"gptq: {name}: got {list(words.shape)}, expected {num_rows} rows, one for each row of scales")
    return words
