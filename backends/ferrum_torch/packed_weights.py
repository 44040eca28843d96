"""Packed weights of every scheme of the contract, decoded to float32 some rows at a time.

    W[n, k] = (q[k, n] - (z[g, n] + offset)) s[g, n]     GPTQ, offset 1 in version "gptq"; AWQ, offset 0
    W = q s, or (q - z) s                                INT8 and INT4 by groups of inputs
    W = f s                                              FP8 numbers

The bracket is exact; each product is rounded once to float32.
Clauses: BK-TORCH-39..40 (specs/backend_torch.md); QT-WORDS-1, QT-GPTQ-1..2, QT-AWQ-1, QT-GROUP-1, QT-FP8-1 (quant.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ferrum_ref.errors import InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.quant_schemes import (
    QuantAwq,
    QuantFp8,
    QuantGptq,
    QuantGroups,
    QuantQ4_0,
    QuantQ8_0,
    QuantRows,
    QuantScheme,
)
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_torch.row_formats import ROW_FORMATS, unpack_rows

GGML_GROUP = 32
KINDS = (*(name.lower() for name in ROW_FORMATS), "gptq", "awq", "int8", "int4", "fp8")


class Beside(Protocol):
    """The torch tensor behind a tensor that goes with the packed one, by its name."""

    def __call__(self, name: str, tensor: TensorRef) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix (out, in); `rows(start, stop)` decodes rows, start a multiple of row_step."""

    num_outputs: int
    num_inputs: int
    rows: Callable[[int, int], torch.Tensor]
    row_step: int = 1


def packed_weight(packed: torch.Tensor, scheme: QuantScheme, beside: Beside) -> PackedWeight:
    """The matrix that a tensor of this scheme is; decodes nothing yet. Pure.  [BK-TORCH-39]

    Raises UnsupportedError for a scheme, format or group that is not offered; ShapeError for tensors that do not fit;
    InvalidParameterError for a group size or g_idx that names no scale.
    """
    if packed.ndim != 2:
        raise _misfit("packed_weight", packed, "a matrix")
    if isinstance(scheme, QuantQ4_0 | QuantQ8_0) and scheme.group_size == GGML_GROUP:
        return _of_rows(packed, scheme.kind.upper())
    if isinstance(scheme, QuantRows) and scheme.format in ROW_FORMATS:
        return _of_rows(packed, scheme.format)
    if isinstance(scheme, QuantGptq):
        return _of_gptq(packed, scheme, beside)
    if isinstance(scheme, QuantAwq):
        return _of_awq(packed, scheme, beside)
    if isinstance(scheme, QuantGroups):
        return _of_groups(packed, scheme, beside)
    if isinstance(scheme, QuantFp8):
        return _of_fp8(packed, scheme, beside)
    raise _unsupported(scheme)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 words (W, N) -> int32 (count, N): element k is bits k * bits to (k + 1) * bits - 1 of the stream. Pure."""
    mask = (1 << bits) - 1
    if 32 % bits == 0:  # none crosses a word; copies of the sign that come in from the left are masked
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device).unsqueeze(1)
        return ((words.unsqueeze(1) >> shifts) & mask).flatten(0, 1)[:count]
    wide = words.to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(count, device=words.device) * bits
    index, shift = first // 32, (first % 32).unsqueeze(1)
    straddling = (index + 1).clamp(max=len(words) - 1)
    found = wide.index_select(0, index) >> shift
    return (found.bitwise_or_(wide.index_select(0, straddling) << (32 - shift)) & mask).to(torch.int32)


def _of_rows(packed: torch.Tensor, name: str) -> PackedWeight:
    form = ROW_FORMATS[name]
    if packed.dtype is not torch.uint8 or packed.shape[1] % form.num_bytes:
        raise _misfit("packed_weight", packed, f"uint8 (out, in/{form.elements}*{form.num_bytes}), blocks of {name}")
    num_inputs = packed.shape[1] // form.num_bytes * form.elements
    return PackedWeight(packed.shape[0], num_inputs, lambda start, stop: unpack_rows(packed[start:stop], form))


def _of_gptq(packed: torch.Tensor, scheme: QuantGptq, beside: Beside) -> PackedWeight:
    bits = scheme.bits
    if not 2 <= bits <= 8:
        raise InvalidParameterError(f"quantized_linear: bits: got {bits}, expected 2 to 8")
    qzeros, scales = beside("qzeros", scheme.qzeros), beside("scales", scheme.scales)
    num_inputs, num_outputs = packed.shape[0] * 32 // bits, packed.shape[1]
    if scheme.g_idx is not None:
        groups = beside("g_idx", scheme.g_idx).to(torch.int64)
        if tuple(groups.shape) != (num_inputs,):
            raise _misfit("g_idx", groups, f"({num_inputs},)")
        least, most = (int(groups.min()), int(groups.max())) if num_inputs else (0, -1)
    else:
        size = _group_size(scheme.group_size, num_inputs)
        groups, least, most = torch.arange(num_inputs, device=packed.device) // size, 0, (num_inputs - 1) // size
    _check_words("packed_weight", packed, 0, num_inputs, bits)
    if scales.ndim != 2 or scales.shape[1] != num_outputs:
        raise _misfit("scales", scales, f"(groups, {num_outputs})")
    if qzeros.ndim != 2 or qzeros.shape[0] != scales.shape[0]:
        raise _misfit("qzeros", qzeros, f"{scales.shape[0]} rows of words")
    _check_words("qzeros", qzeros, 1, num_outputs, bits)
    if not 0 <= least <= most < scales.shape[0] and num_inputs:
        raise InvalidParameterError(
            f"quantized_linear: groups {least} to {most}, expected 0 <= group < {scales.shape[0]}, the rows of scales; "
            "correct g_idx or group_size"
        )
    offset = 1 if scheme.version == "gptq" else 0

    def rows(start: int, stop: int) -> torch.Tensor:
        words = qzeros[:, start * bits // 32 : -(-stop * bits // 32)]
        zeros = unpack_words(words.t(), bits, stop - start).t() + offset
        levels = unpack_words(packed[:, start:stop], bits, num_inputs) - zeros.index_select(0, groups)
        return _times(levels, scales[:, start:stop], groups).t()

    return PackedWeight(num_outputs, num_inputs, rows, row_step=32)


def _of_awq(packed: torch.Tensor, scheme: QuantAwq, beside: Beside) -> PackedWeight:
    qzeros, scales = beside("qzeros", scheme.qzeros), beside("scales", scheme.scales)
    num_inputs, num_outputs = packed.shape[0], packed.shape[1] * 8
    _check_words("packed_weight", packed, 1, num_outputs, 4)
    size = _group_size(scheme.group_size, num_inputs)
    if num_inputs % size:
        raise InvalidParameterError(
            f"quantized_linear: group_size: got {scheme.group_size}, expected -1 or a divisor of {num_inputs}"
        )
    num_groups = num_inputs // size
    if tuple(scales.shape) != (num_groups, num_outputs):
        raise _misfit("scales", scales, f"({num_groups}, {num_outputs})")
    if tuple(qzeros.shape) != (num_groups, packed.shape[1]) or qzeros.dtype is not torch.int32:
        raise _misfit("qzeros", qzeros, f"int32 ({num_groups}, {packed.shape[1]})")
    groups = torch.arange(num_inputs, device=packed.device) // size
    shifts = torch.arange(8, dtype=torch.int32, device=packed.device)
    shifts = 16 * (shifts & 1) + 4 * (shifts >> 1)  # of outputs 0 to 7: nibbles 0, 4, 1, 5, 2, 6, 3, 7

    def ordered(words: torch.Tensor) -> torch.Tensor:
        return ((words.unsqueeze(2) >> shifts) & 15).flatten(1)

    def rows(start: int, stop: int) -> torch.Tensor:
        words = slice(start // 8, -(-stop // 8))
        levels = ordered(packed[:, words]) - ordered(qzeros[:, words]).index_select(0, groups)
        return _times(levels, scales[:, start:stop], groups).t()

    return PackedWeight(num_outputs, num_inputs, rows, row_step=8)


def _of_groups(packed: torch.Tensor, scheme: QuantGroups, beside: Beside) -> PackedWeight:
    if scheme.bits not in (4, 8):
        raise InvalidParameterError(f"quantized_linear: bits: got {scheme.bits}, expected 4 or 8")
    scales = beside("scales", scheme.scales)
    zeros = None if scheme.zeros is None else beside("zeros", scheme.zeros)
    element = torch.int8 if zeros is None and scheme.bits == 8 else torch.uint8
    if packed.dtype is not element:
        raise _misfit("packed_weight", packed, f"{element} for {scheme.bits} bits")
    num_outputs, num_inputs = packed.shape[0], packed.shape[1] * 8 // scheme.bits
    if scales.ndim != 2 or scales.shape[0] != num_outputs or not scales.shape[1] or num_inputs % scales.shape[1]:
        raise _misfit("scales", scales, f"({num_outputs}, groups), groups a divisor of {num_inputs}")
    if zeros is not None and zeros.shape != scales.shape:
        raise _misfit("zeros", zeros, f"{tuple(scales.shape)} as scales")

    def rows(start: int, stop: int) -> torch.Tensor:
        quanta = packed[start:stop]
        if scheme.bits == 4 and zeros is None:  # two's complement: shifting as signed copies the sign
            quanta = torch.stack(((quanta << 4).view(torch.int8) >> 4, quanta.view(torch.int8) >> 4), -1)
        elif scheme.bits == 4:
            quanta = torch.stack((quanta & 15, quanta >> 4), -1)
        levels = quanta.reshape(stop - start, scales.shape[1], num_inputs // scales.shape[1]).to(torch.float32)
        if zeros is not None:
            levels.sub_(zeros[start:stop].to(torch.float32).unsqueeze(2))
        return levels.mul_(scales[start:stop].to(torch.float32).unsqueeze(2)).flatten(1)

    return PackedWeight(num_outputs, num_inputs, rows)


def _of_fp8(packed: torch.Tensor, scheme: QuantFp8, beside: Beside) -> PackedWeight:
    if scheme.format not in ("e4m3", "e5m2"):
        raise _unsupported(scheme)
    if packed.dtype is not torch.uint8:
        raise _misfit("packed_weight", packed, "uint8, the codes of FP8 numbers")
    number = torch.float8_e4m3fn if scheme.format == "e4m3" else torch.float8_e5m2
    num_outputs, num_inputs = packed.shape
    scale = beside("scale", scheme.scale).to(torch.float32)
    if scale.numel() == 1:  # one a row, all the same: rows then need not be decoded together
        scale = scale.reshape(1).expand(num_outputs)
    high, wide = _fp8_block(scale, num_outputs, num_inputs)
    table = scale if scale.ndim == 2 else scale.unsqueeze(1)

    def rows(start: int, stop: int) -> torch.Tensor:
        values = packed[start:stop].contiguous().view(number).to(torch.float32)
        scales = table[start // high : -(-stop // high)].repeat_interleave(high, 0)[: stop - start]
        return values.mul_(scales if scales.shape[1] == 1 else scales.repeat_interleave(wide, 1)[:, :num_inputs])

    return PackedWeight(num_outputs, num_inputs, rows, row_step=high)


def _fp8_block(scale: torch.Tensor, num_outputs: int, num_inputs: int) -> tuple[int, int]:
    """How many rows and columns share a scale: a row's, or powers of two."""
    if tuple(scale.shape) in ((num_outputs,), (num_outputs, 1)):
        return 1, max(1, num_inputs)
    if scale.ndim == 2 and scale.numel() and num_outputs and num_inputs:
        extents = tuple(zip((num_outputs, num_inputs), scale.shape, strict=True))
        high, wide = (1 << (-(-extent // count) - 1).bit_length() for extent, count in extents)
        if (-(-num_outputs // high), -(-num_inputs // wide)) == tuple(scale.shape):
            return high, wide
    raise _misfit("scale", scale, f"one number, one a row, or one a block of ({num_outputs}, {num_inputs})")


def _times(levels: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """levels (in, n) integers, scales (groups, n) by groups (in,) -> (in, n) float32, rounded once."""
    return levels.to(torch.float32).mul_(scales.to(torch.float32).index_select(0, groups))


def _group_size(group_size: int, num_inputs: int) -> int:
    """How many inputs share a scale; -1 is all."""
    if group_size < 1 and group_size != -1:
        raise InvalidParameterError(f"quantized_linear: group_size: got {group_size}, expected -1 or at least 1")
    return max(1, num_inputs) if group_size == -1 else group_size


def _check_words(name: str, words: torch.Tensor, axis: int, count: int, bits: int) -> None:
    if words.dtype is not torch.int32 or words.shape[axis] != -(-count * bits // 32):
        raise _misfit(name, words, f"int32 with {-(-count * bits // 32)} words of {count} {bits}-bit integers")


def _misfit(name: str, got: torch.Tensor, expected: str) -> ShapeError:
    return ShapeError(f"quantized_linear: {name}: got {got.dtype} {tuple(got.shape)}, expected {expected}")


def _unsupported(scheme: QuantScheme) -> UnsupportedError:
    return UnsupportedError(
        f"quantized_linear: scheme: got {scheme}, expected one of {', '.join(KINDS)} (q4_0 and q8_0 with "
        f"group_size={GGML_GROUP}, ggml's blocks); dequantise and call linear"
    )
