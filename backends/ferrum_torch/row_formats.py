"""Rows of ggml's blocks, or of plain numbers, as float32.

Every function takes blocks (..., bytes) uint8 and gives (..., elements) float32; products and sums are rounded in the
order in which the formula is written. d and m are float16 fields, q the quanta, sc and mn the 4- or 6-bit scale and
minimum of a sub-block. Quanta stay bytes, handled eight at a time, until their offset is subtracted, which is exact.
Source: ggml, ggml-quants.c.  Clauses: BK-TORCH-39 (specs/backend_torch.md), MD-QUANT-2, QT-FIVE-1, QT-K-1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

Unpack = Callable[[torch.Tensor], torch.Tensor]
ONE_IN_EVERY_BYTE = 0x0101010101010101
BIT_I_OF_BYTE_I = 0x8040201008040201 - (1 << 64)  # of a signed word


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How many elements lie in how many bytes, and how they are read."""

    elements: int
    num_bytes: int
    unpack: Unpack


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """d (q - 8)"""
    return _less(_planes(blocks[..., 2:], 4, 16), 8).mul_(half(blocks, 0))


def q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """d q + m"""
    return _less(_planes(blocks[..., 4:], 4, 16), 0).mul_(half(blocks, 0)).add_(half(blocks, 2))


def q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """d (q - 16)"""
    quanta = _planes(blocks[..., 6:], 4, 16) | _fifths(blocks[..., 2:6])
    return _less(quanta, 16).mul_(half(blocks, 0))


def q5_1(blocks: torch.Tensor) -> torch.Tensor:
    """d q + m"""
    quanta = _planes(blocks[..., 8:], 4, 16) | _fifths(blocks[..., 4:8])
    return _less(quanta, 0).mul_(half(blocks, 0)).add_(half(blocks, 2))


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """d q"""
    return blocks[..., 2:].view(torch.int8).to(torch.float32).mul_(half(blocks, 0))


def q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """(d sc) q - dmin mn, sub-blocks of 16"""
    scales, quanta = blocks[..., :16], _less(_planes(blocks[..., 16:80], 2, 32), 0)
    return _of_sub_blocks(quanta, half(blocks, 80) * (scales & 15).float(), half(blocks, 82) * (scales >> 4).float())


def q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """(d (sc - 32)) (q - 4), sub-blocks of 16; 6-bit scales: low nibbles in 8 bytes, two high bits in 4"""
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    nibbles = torch.cat((low & 15, low >> 4), -1)
    pairs = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
    quanta = _planes(blocks[..., 32:96], 2, 32) | (_planes(blocks[..., :32], 1, 32) << 2)
    return _of_sub_blocks(_less(quanta, 4), half(blocks, 108) * _less(nibbles | (pairs << 4), 32))


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """(d sc) q - dmin mn, sub-blocks of 32"""
    return _of_sub_blocks(_less(_planes(blocks[..., 16:144], 4, 32), 0), *_steps_and_lows(blocks))


def q5_k(blocks: torch.Tensor) -> torch.Tensor:
    """As Q4_K, with a fifth bit: bit s of byte i belongs to element i of sub-block s"""
    quanta = _planes(blocks[..., 48:176], 4, 32) | (_planes(blocks[..., 16:48], 1, 32) << 4)
    return _of_sub_blocks(_less(quanta, 0), *_steps_and_lows(blocks))


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """(d sc) (q - 32), sub-blocks of 16, sc a signed byte; two high bits beside the nibbles"""
    quanta = _planes(blocks[..., :128], 4, 64) | (_planes(blocks[..., 128:192], 2, 32) << 4)
    return _of_sub_blocks(_less(quanta, 32), half(blocks, 208) * blocks[..., 192:208].view(torch.int8).float())


def half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The float16 field at `offset` of every block, (..., 1) float32. Pure."""
    return _copied(blocks[..., offset : offset + 2]).view(torch.float16).to(torch.float32)


def _copied(data: torch.Tensor) -> torch.Tensor:
    """A copy that begins at an address fit for any type, wherever `data` begins."""
    return data.clone(memory_format=torch.contiguous_format)


def _planes(data: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Runs of `run` bytes, a multiple of 8: first the lowest `bits` bits of each, then the next ones, ...; uint8."""
    words = _copied(data).view(torch.int64).view(*data.shape[:-1], data.shape[-1] // run, run // 8)
    mask = ONE_IN_EVERY_BYTE * ((1 << bits) - 1)
    return torch.stack([(words >> shift) & mask for shift in range(0, 8, bits)], -2).flatten(-3).view(torch.uint8)


def _fifths(data: torch.Tensor) -> torch.Tensor:
    """16 for every bit set, lowest first: 4 bytes give 32. Eight copies of a byte keep one bit each."""
    bits = (data.to(torch.int64) * ONE_IN_EVERY_BYTE) & BIT_I_OF_BYTE_I
    return (((bits + 0x7F * ONE_IN_EVERY_BYTE) >> 3) & (16 * ONE_IN_EVERY_BYTE)).view(torch.uint8)


def _less(quanta: torch.Tensor, offset: int) -> torch.Tensor:
    """quanta - offset, a fresh float32 tensor; quanta below 128 in bytes, which may wrap on the way."""
    return (quanta - offset if offset else quanta).view(torch.int8).to(torch.float32)


def _of_sub_blocks(quanta: torch.Tensor, steps: torch.Tensor, lows: torch.Tensor | None = None) -> torch.Tensor:
    """steps q - lows, with a step and a low for each sub-block; writes into quanta."""
    values = quanta.view(*steps.shape, quanta.shape[-1] // steps.shape[-1])
    values.mul_(steps.unsqueeze(-1))
    if lows is not None:
        values.sub_(lows.unsqueeze(-1))
    return quanta


def _steps_and_lows(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d sc and dmin mn of the eight sub-blocks of Q4_K and Q5_K: 6 bits each in 12 bytes."""
    first, second, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 6) << 4)), -1)
    minima = torch.cat((second & 63, (rest >> 4) | ((second >> 6) << 4)), -1)
    return half(blocks, 0) * scales.float(), half(blocks, 2) * minima.float()


def _plain(dtype: torch.dtype) -> RowFormat:
    """One number; float64 is rounded once, the others widen exactly."""

    def unpack(numbers: torch.Tensor) -> torch.Tensor:
        whole = numbers.contiguous()
        if whole.storage_offset() % dtype.itemsize or whole.data_ptr() % dtype.itemsize:
            whole = _copied(whole)  # a view that begins within a number
        return whole.view(dtype).to(torch.float32)

    return RowFormat(1, dtype.itemsize, unpack)


ROW_FORMATS: Mapping[str, RowFormat] = MappingProxyType(
    {
        "Q4_0": RowFormat(32, 18, q4_0),
        "Q4_1": RowFormat(32, 20, q4_1),
        "Q5_0": RowFormat(32, 22, q5_0),
        "Q5_1": RowFormat(32, 24, q5_1),
        "Q8_0": RowFormat(32, 34, q8_0),
        "Q2_K": RowFormat(256, 84, q2_k),
        "Q3_K": RowFormat(256, 110, q3_k),
        "Q4_K": RowFormat(256, 144, q4_k),
        "Q5_K": RowFormat(256, 176, q5_k),
        "Q6_K": RowFormat(256, 210, q6_k),
        "F64": _plain(torch.float64),
        "F32": _plain(torch.float32),
        "F16": _plain(torch.float16),
        "BF16": _plain(torch.bfloat16),
        "F8_E4M3": _plain(torch.float8_e4m3fn),
        "F8_E5M2": _plain(torch.float8_e5m2),
    }
)


def unpack_rows(packed: torch.Tensor, form: RowFormat) -> torch.Tensor:
    """Rows (out, blocks * bytes) uint8 -> (out, blocks * elements) float32. Pure."""
    blocks = packed.reshape(packed.shape[0], packed.shape[1] // form.num_bytes, form.num_bytes)
    return form.unpack(blocks).reshape(packed.shape[0], form.elements * blocks.shape[1])
