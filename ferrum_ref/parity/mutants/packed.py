"""Bugs of projections by K-quants, GPTQ, AWQ, integers by groups and FP8: each reads the packed bytes wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ferrum_ref.kernels.quant_words import pack_words, unpack_words
from ferrum_ref.parity.honest.linear import projected
from ferrum_ref.parity.honest.packed import packed_linear
from ferrum_ref.parity.honest.sums import F32, dot_blas, stored, wide
from ferrum_ref.parity.mutants.mutant import Mutant
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.ops.packed import packed_arrays
from ferrum_ref.parity.schemes.catalogue import SCHEMES
from ferrum_ref.parity.schemes.rows import BlockRows
from ferrum_ref.parity.schemes.scheme import Scheme
from ferrum_ref.parity.units import Array

Change = Callable[[Inputs], Inputs]
BlockChange = Callable[[Array], None]
BY_NAME: dict[str, Scheme] = {scheme.name: scheme for scheme in SCHEMES}


def _mutant(scheme: str, name: str, change: Change) -> Mutant:
    honest = packed_linear(BY_NAME[scheme], "decoded")
    return Mutant("quantised linear", f"quantized_linear_{scheme}", name, lambda inputs: honest(change(inputs)))


def _blocks(scheme: str, name: str, change: BlockChange) -> Mutant:
    """The bytes of every block (N, blocks, bytes), changed in place before they are decoded."""
    form = BY_NAME[scheme]

    def changed(inputs: Inputs) -> Inputs:
        if not isinstance(form, BlockRows):
            return inputs
        blocks = form.blocks(inputs.arrays)
        change(blocks)
        return _with(inputs, packed=blocks.reshape(inputs.arrays["packed"].shape))

    return _mutant(scheme, name, changed)


def _with(inputs: Inputs, **changed: Array) -> Inputs:
    return replace(inputs, arrays={**inputs.arrays, **changed})


def _sized(inputs: Inputs, **changed: object) -> Inputs:
    return replace(inputs, case=replace(inputs.case, sizes={**inputs.case.sizes, **changed}))


def swap_nibbles(start: int, stop: int) -> BlockChange:
    """The high nibble is taken for the low one."""

    def change(blocks: Array) -> None:
        part = blocks[..., start:stop]
        blocks[..., start:stop] = (part << np.uint8(4)) | (part >> np.uint8(4))

    return change


def flip(start: int, stop: int, mask: int) -> BlockChange:
    def change(blocks: Array) -> None:
        blocks[..., start:stop] ^= np.uint8(mask)

    return change


def keep(start: int, stop: int, mask: int) -> BlockChange:
    def change(blocks: Array) -> None:
        blocks[..., start:stop] &= np.uint8(mask)

    return change


def next_block(start: int, stop: int) -> BlockChange:
    """These bytes are read from the block after."""

    def change(blocks: Array) -> None:
        blocks[..., start:stop] = np.roll(blocks[..., start:stop], -1, axis=-2)

    return change


def next_of(start: int, stop: int) -> BlockChange:
    """Each byte is taken for the one before it: scales of the next group of elements."""

    def change(blocks: Array) -> None:
        blocks[..., start:stop] = np.roll(blocks[..., start:stop], -1, axis=-1)

    return change


def bits_reversed(start: int, stop: int) -> BlockChange:
    def change(blocks: Array) -> None:
        bits = np.unpackbits(np.ascontiguousarray(blocks[..., start:stop]), axis=-1)
        blocks[..., start:stop] = np.packbits(bits[..., ::-1], axis=-1)

    return change


def zero_point_31(inputs: Inputs) -> tuple[Array, ...]:
    """Q6_K's zero point is 32: every weight gets one step d sc too much."""
    scheme, arrays = BY_NAME["q6_k"], packed_arrays(inputs)
    weight = scheme.weights(arrays, inputs.case.sizes) - scheme.offsets(arrays, inputs.case.sizes) / 32.0
    (x,) = wide(inputs, "x")
    return stored(inputs, projected(x, weight.astype(F32), dot_blas))


def other_version(inputs: Inputs) -> Inputs:
    """Version 1 keeps the zero point minus one, version 2 the zero point: they are confused."""
    return _sized(inputs, version=3 - inputs.case.sizes["version"])


def codes_from_the_high_end(inputs: Inputs) -> Inputs:
    bits, packed = inputs.case.sizes["bits"], inputs.arrays["packed"]
    codes = unpack_words(packed, bits, packed.shape[0] * 32 // bits, 0)
    each = 32 // bits
    if 32 % bits:
        return inputs
    turned = codes.reshape(-1, each, packed.shape[1])[:, ::-1].reshape(codes.shape)
    return _with(inputs, packed=pack_words(np.ascontiguousarray(turned), bits, 0))


def act_order_ignored(inputs: Inputs) -> Inputs:
    """Inputs are taken to belong to groups in the order in which they stand."""
    if "g_idx" not in inputs.arrays:
        return inputs
    return _with(inputs, g_idx=np.sort(inputs.arrays["g_idx"]))


def zeros_of_the_next_column(inputs: Inputs) -> Inputs:
    bits, columns = inputs.case.sizes["bits"], inputs.arrays["scales"].shape[1]
    zeros = unpack_words(inputs.arrays["qzeros"], bits, columns, 1)
    return _with(inputs, qzeros=pack_words(np.roll(zeros, -1, axis=1), bits, 1))


def awq_nibbles_in_plain_order(inputs: Inputs) -> Inputs:
    """Nibble i of a word is output i, as in GPTQ: what a kernel for that order makes of AWQ's words."""
    order = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])

    def plain(words: Array) -> Array:
        nibbles = unpack_words(words, 4, words.shape[1] * 8, 1).reshape(len(words), -1, 8)
        return pack_words(np.ascontiguousarray(nibbles[..., order].reshape(len(words), -1)), 4, 1)

    return _with(inputs, packed=plain(inputs.arrays["packed"]), qzeros=plain(inputs.arrays["qzeros"]))


def awq_zero_point_one_more(inputs: Inputs) -> Inputs:
    """GPTQ's convention on AWQ's zero points, which are kept as they are."""
    words = inputs.arrays["qzeros"]
    zeros = unpack_words(words, 4, words.shape[1] * 8, 1)
    return _with(inputs, qzeros=pack_words(np.minimum(zeros + np.uint8(1), np.uint8(15)), 4, 1))


def rolled(name: str, axis: int) -> Change:
    """Entry i of `name` is read as entry i + 1."""

    def change(inputs: Inputs) -> Inputs:
        array = inputs.arrays.get(name)
        return inputs if array is None or array.ndim <= axis else _with(inputs, **{name: np.roll(array, -1, axis)})

    return change


def group_nibbles_swapped(inputs: Inputs) -> Inputs:
    packed = inputs.arrays["packed"]
    return _with(inputs, packed=(packed << np.uint8(4)) | (packed >> np.uint8(4)))


def zeros_ignored(inputs: Inputs) -> Inputs:
    """What is asymmetric is read as q s, q unsigned."""
    zeros = inputs.arrays.get("zeros")
    return inputs if zeros is None else _with(inputs, zeros=np.zeros_like(zeros))


def signs_ignored(inputs: Inputs) -> Inputs:
    """What is symmetric, in two's complement, is read as (q - 2^(bits-1)) s, q unsigned."""
    if "zeros" in inputs.arrays:
        return inputs
    packed, scales = inputs.arrays["packed"], inputs.arrays["scales"]
    middle = 128 if packed.dtype == np.int8 else 8
    return _with(inputs, packed=packed.view(np.uint8), zeros=np.full(scales.shape, middle, dtype=np.uint8))


def other_format(inputs: Inputs) -> Inputs:
    return _sized(inputs, format="e5m2" if inputs.case.sizes["format"] == "e4m3" else "e4m3")


def divided_by_the_scale(inputs: Inputs) -> Inputs:
    return _with(inputs, scale=np.float32(1.0) / inputs.arrays["scale"])


def sixteen_bits_confused(inputs: Inputs) -> Inputs:
    other = {"bf16": "f16", "f16": "bf16"}
    return _sized(inputs, kind=other.get(inputs.case.sizes["kind"], inputs.case.sizes["kind"]))


PACKED: tuple[Mutant, ...] = (
    _blocks("q4_1", "sign of the minimum lost", flip(3, 4, 0x80)),
    _blocks("q4_1", "high nibble first", swap_nibbles(4, 20)),
    _blocks("q4_1", "minimum of the next block", next_block(2, 4)),
    _blocks("q5_0", "fifth bits in reverse", bits_reversed(2, 6)),
    _blocks("q5_0", "fifth bits ignored", keep(2, 6, 0x00)),
    _blocks("q5_1", "minimum ignored", keep(2, 4, 0x00)),
    _blocks("q2_k", "scale and minimum swapped", swap_nibbles(0, 16)),
    _blocks("q2_k", "scale of the next 16", next_of(0, 16)),
    _blocks("q3_k", "third bits inverted", flip(0, 32, 0xFF)),
    _blocks("q3_k", "top bits of the scales ignored", keep(104, 108, 0x00)),
    _blocks("q4_k", "sign of the minima lost", flip(3, 4, 0x80)),
    _blocks("q4_k", "high nibble first", swap_nibbles(16, 144)),
    _blocks("q4_k", "nibbles of the last scales swapped", swap_nibbles(12, 16)),
    _blocks("q4_k", "top bits of the last scales ignored", keep(4, 12, 0x3F)),
    _blocks("q4_k", "scale of the next super-block", next_block(0, 2)),
    _blocks("q5_k", "fifth bits ignored", keep(16, 48, 0x00)),
    _blocks("q5_k", "minima ignored", keep(2, 4, 0x00)),
    Mutant("quantised linear", "quantized_linear_q6_k", "zero point 31 for 32", zero_point_31),
    _blocks("q6_k", "top pairs ignored", keep(128, 192, 0x00)),
    _blocks("q6_k", "sign of the scales lost", keep(192, 208, 0x7F)),
    _mutant("gptq", "zero point off by one", other_version),
    _mutant("gptq", "codes from the high end", codes_from_the_high_end),
    _mutant("gptq", "act-order ignored", act_order_ignored),
    _mutant("gptq", "zero points of the next column", zeros_of_the_next_column),
    _mutant("gptq", "scales of the next group", rolled("scales", 0)),
    _mutant("awq", "nibbles in plain order", awq_nibbles_in_plain_order),
    _mutant("awq", "zero point off by one", awq_zero_point_one_more),
    _mutant("awq", "scales of the next group", rolled("scales", 0)),
    _mutant("int4", "high nibble first", group_nibbles_swapped),
    _mutant("int4", "two's complement read as offset by 8", signs_ignored),
    _mutant("int4", "scale of the next group", rolled("scales", 1)),
    _mutant("int8", "zero points ignored", zeros_ignored),
    _mutant("int8", "two's complement read as offset by 128", signs_ignored),
    _mutant("fp8", "e4m3 and e5m2 confused", other_format),
    _mutant("fp8", "divided by the scale", divided_by_the_scale),
    _mutant("fp8", "scale of the next row", rolled("scale", 0)),
    _mutant("plain", "bf16 and fp16 confused", sixteen_bits_confused),
)
