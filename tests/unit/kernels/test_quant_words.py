"""GPTQ, AWQ, grouped integers, FP8 and Marlin against formulas written out element by element."""

import itertools
from typing import Literal

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.kernels.quant_awq import AwqWeights, decode_awq, pack_awq
from ferrum_ref.kernels.quant_gptq import GptqWeights, Version, decode_gptq, encode_gptq
from ferrum_ref.kernels.quant_groups import (
    Fp8Format,
    GroupWeights,
    decode_fp8,
    decode_groups,
    encode_fp8,
    encode_groups,
)
from ferrum_ref.kernels.quant_marlin import repack_marlin, repack_marlin_scales, unpack_marlin
from ferrum_ref.kernels.quant_words import pack_words, unpack_words
from ferrum_ref.types.parity_mode import ParityMode

UPSTREAM = ParityMode.UPSTREAM


def stream_of(elements: list[int], bits: int) -> list[int]:
    """The words of one stream, through one big integer."""
    whole = sum(element << (bits * k) for k, element in enumerate(elements))
    words = [(whole >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(elements) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.clause("QT-WORDS-1")
@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_words_hold_one_continuous_stream_along_either_axis(bits: int, count: int, seed: int) -> None:
    elements = np.random.default_rng(seed).integers(0, 1 << bits, (3, count), dtype=np.uint8)
    words = pack_words(elements, bits, 1)
    assert words.tolist() == [stream_of(row, bits) for row in elements.tolist()]
    np.testing.assert_array_equal(unpack_words(words, bits, count, 1), elements)
    np.testing.assert_array_equal(pack_words(elements.T, bits, 0), words.T)
    np.testing.assert_array_equal(unpack_words(words.T, bits, count, 0), elements.T)


@pytest.mark.clause("QT-WORDS-2")
def test_words_of_the_wrong_number_or_width_are_refused() -> None:
    words = np.zeros((2, 4), np.int32)
    for bits in (1, 9):
        with pytest.raises(InvalidParameterError, match="2 to 8"):
            unpack_words(words, bits, 8, 1)
        with pytest.raises(InvalidParameterError, match="2 to 8"):
            pack_words(np.zeros((2, 32), np.uint8), bits, 1)
    with pytest.raises(ShapeError, match="expected 32-bit words with 3"):
        unpack_words(words, 3, 32, 1)
    with pytest.raises(InvalidParameterError, match="below 8"):
        pack_words(np.full((1, 32), 8, np.uint8), 3, 1)


def random_gptq(bits: int, group_size: int, act_order: bool, version: Version, seed: int = 0) -> GptqWeights:
    rng, num_inputs, num_outputs = np.random.default_rng(seed), 64, 32
    size = num_inputs if group_size == -1 else group_size
    groups = np.arange(num_inputs) // size
    g_idx = rng.permutation(groups).astype(np.int32) if act_order else None
    words = [rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32) for shape in
             ((num_inputs * bits // 32, num_outputs), (num_inputs // size, num_outputs * bits // 32))]  # fmt: skip
    scales = rng.standard_normal((num_inputs // size, num_outputs)).astype(np.float16)
    return GptqWeights(words[0], words[1], scales, g_idx, bits, group_size, version)


def written_out(weights: GptqWeights, offset: int) -> NDArray[np.float64]:
    """The formula with Python's integers, one element after the other."""

    def element(words: list[int], index: int) -> int:
        whole = sum((word & 0xFFFFFFFF) << (32 * w) for w, word in enumerate(words))
        return (whole >> (index * weights.bits)) & ((1 << weights.bits) - 1)

    size = weights.in_features if weights.group_size == -1 else weights.group_size
    result = np.zeros((weights.out_features, weights.in_features))
    for n in range(weights.out_features):
        column = weights.qweight[:, n].tolist()
        for k in range(weights.in_features):
            g = int(weights.g_idx[k]) if weights.g_idx is not None else k // size
            zero = element(weights.qzeros[g].tolist(), n) + offset
            result[n, k] = (element(column, k) - zero) * float(weights.scales[g, n])
    return result


@pytest.mark.clause("QT-GPTQ-1", "QT-GPTQ-2")
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("group_size", "act_order"), list(itertools.product([8, 32, -1], [False, True])))
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_equals_the_formula(bits: int, group_size: int, act_order: bool, version: Version) -> None:
    weights = random_gptq(bits, group_size, act_order, version)
    np.testing.assert_array_equal(decode_gptq(weights), written_out(weights, 1 if version == "gptq" else 0))


@pytest.mark.clause("QT-GPTQ-1", "QT-GPTQ-2", "QT-GPTQ-3")
def test_the_two_zero_point_conventions_and_upstreams_result() -> None:
    nine, seven = pack_words(np.full((8, 8), 9, np.uint8), 4, 0), pack_words(np.full((1, 8), 7, np.uint8), 4, 1)
    scales = np.full((1, 8), 0.5, np.float16)
    first = GptqWeights(nine, seven, scales, None, 4, -1, "gptq")
    second = GptqWeights(nine, seven, scales, None, 4, -1, "gptq_v2")
    assert decode_gptq(first)[0, 0] == 0.5
    assert decode_gptq(second)[0, 0] == 1.0
    assert decode_gptq(first, UPSTREAM)[0, 0] == 1.0
    rows = pack_words(np.arange(8, dtype=np.uint8)[:, None].repeat(8, 1), 4, 0)
    g_idx = np.array([0, 1, 0, 1, 0, 1, 0, 1], np.int32)
    ordered = GptqWeights(rows, np.zeros((2, 1), np.int32), np.array([[1.0] * 8, [10.0] * 8]), g_idx, 4, 4, "gptq_v2")
    assert decode_gptq(ordered)[0].tolist() == [0, 10, 2, 30, 4, 50, 6, 70]
    assert decode_gptq(ordered, UPSTREAM)[0].tolist() == [0, 1, 2, 3, 40, 50, 60, 70]


@pytest.mark.clause("QT-GPTQ-2")
def test_gptq_tensors_that_do_not_fit_are_refused() -> None:
    good = random_gptq(4, 8, False, "gptq")
    with pytest.raises(InvalidParameterError, match="expected 0 to 7"):
        decode_gptq(GptqWeights(good.qweight, good.qzeros, good.scales, np.full(64, 8, np.int32), 4, 8))
    with pytest.raises(InvalidParameterError, match="group_size"):
        decode_gptq(GptqWeights(good.qweight, good.qzeros, good.scales, None, 4, 0))
    with pytest.raises(ShapeError, match="g_idx"):
        decode_gptq(GptqWeights(good.qweight, good.qzeros, good.scales, np.zeros(63, np.int32), 4, 8))
    with pytest.raises(ShapeError, match="scales"):
        decode_gptq(GptqWeights(good.qweight, good.qzeros, good.scales[:, :31], None, 4, 8))
    with pytest.raises(ShapeError, match="qzeros"):
        decode_gptq(GptqWeights(good.qweight, good.qzeros[:7], good.scales, None, 4, 8))


@pytest.mark.clause("QT-GPTQ-4")
@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.sampled_from([8, 32, -1]),
    st.booleans(),
    st.sampled_from(["gptq", "gptq_v2"]),
    st.sampled_from([-1.0, 0.0, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_gptq_encoding_decodes_within_half_a_scale(
    bits: int, group_size: int, act_order: bool, version: Version, shift: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = np.abs(rng.standard_normal((32, 64))) * (shift or 1) if shift else rng.standard_normal((32, 64))
    size = 64 if group_size == -1 else group_size
    g_idx = rng.permutation(np.arange(64) // size).astype(np.int32) if act_order else None
    weights = encode_gptq(values, bits, group_size, g_idx=g_idx, version=version)
    groups = np.arange(64) // size if g_idx is None else g_idx
    bound = weights.scales.astype(np.float64)[groups].T * (0.5 + 2.0**-40)
    assert (np.abs(decode_gptq(weights).astype(np.float64) - values) <= bound).all()


@pytest.mark.clause("QT-AWQ-1", "QT-AWQ-2")
@pytest.mark.parametrize("group_size", [8, 32, -1])
def test_awq_equals_the_formula(group_size: int) -> None:
    rng = np.random.default_rng(1)
    quanta, size = rng.integers(0, 16, (64, 24), dtype=np.uint8), 64 if group_size == -1 else group_size
    zeros = rng.integers(0, 16, (64 // size, 24), dtype=np.uint8)
    scales = rng.standard_normal((64 // size, 24)).astype(np.float16)
    qweight = np.zeros((64, 3), np.int64)
    for k, word, (nibble, output) in itertools.product(range(64), range(3), enumerate([0, 2, 4, 6, 1, 3, 5, 7])):
        qweight[k, word] |= int(quanta[k, 8 * word + output]) << (4 * nibble)
    words = qweight.astype(np.uint32).view(np.int32)
    np.testing.assert_array_equal(pack_awq(quanta), words)
    wanted = [
        [(int(quanta[k, n]) - int(zeros[k // size, n])) * float(scales[k // size, n]) for k in range(64)]
        for n in range(24)
    ]
    np.testing.assert_array_equal(decode_awq(AwqWeights(words, pack_awq(zeros), scales, group_size)), wanted)


@pytest.mark.clause("QT-AWQ-1", "QT-AWQ-2")
def test_awq_refuses_what_does_not_fit() -> None:
    words, zeros, scales = np.zeros((64, 3), np.int32), np.zeros((8, 3), np.int32), np.ones((8, 24), np.float16)
    with pytest.raises(UnsupportedError, match="3"):
        decode_awq(AwqWeights(words, zeros, scales, 8, 3))
    with pytest.raises(ShapeError, match=r"\[8, 24\]"):
        decode_awq(AwqWeights(words, zeros, scales[:, :8], 8))
    with pytest.raises(InvalidParameterError, match="divisor of 64"):
        decode_awq(AwqWeights(words, zeros, scales, 7))
    with pytest.raises(ShapeError, match="multiple of 8"):
        pack_awq(np.zeros((2, 9), np.uint8))


@pytest.mark.clause("QT-GROUP-1", "QT-GROUP-2")
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([4, 8]), st.sampled_from([8, 32, -1]), st.booleans(), st.integers(-3, 3), st.integers(0, 2**32 - 1)
)
def test_grouped_integers_decode_by_the_formula_within_half_a_scale(
    bits: Literal[4, 8], group_size: int, symmetric: bool, exponent: int, seed: int
) -> None:
    values = (np.random.default_rng(seed).standard_normal((5, 64)) * 10.0**exponent).astype(np.float32)
    values[0] = 0
    values[1] = np.abs(values[1]) + 1
    weights = encode_groups(values, bits, group_size, symmetric=symmetric)
    decoded, size = decode_groups(weights), 64 if group_size == -1 else group_size
    if bits == 4:
        packed = weights.quanta
        quanta = [[(int(packed[r, c // 2]) >> (4 * (c % 2))) & 15 for c in range(64)] for r in range(5)]
        quanta = [[q - 16 if symmetric and q >= 8 else q for q in row] for row in quanta]
    else:
        quanta = weights.quanta.tolist()
    for r, c in itertools.product(range(5), range(64)):
        level = quanta[r][c] - (0 if weights.zeros is None else int(weights.zeros[r, c // size]))
        assert decoded[r, c] == np.float32(level * float(weights.scales[r, c // size]))
    bound = np.repeat(weights.scales, size, axis=1) * (0.5 + 2.0**-14)
    assert (np.abs(decoded.astype(np.float64) - values) <= bound).all()
    assert not decoded[0].any()


@pytest.mark.clause("QT-GROUP-3")
def test_grouped_integers_refuse_bad_input() -> None:
    good = np.ones((2, 8))
    with pytest.raises(InvalidParameterError, match="4 or 8"):
        encode_groups(good, 5, 8, symmetric=True)  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match="divisor of 8"):
        encode_groups(good, 8, 3, symmetric=True)
    with pytest.raises(InvalidParameterError, match="finite"):
        encode_groups(np.array([[np.nan, 1.0]]), 8, 2, symmetric=True)
    with pytest.raises(ShapeError, match="even"):
        encode_groups(np.ones((2, 7)), 4, 7, symmetric=True)
    with pytest.raises(ShapeError, match="scales"):
        decode_groups(GroupWeights(np.ones((2, 8), np.int8), np.ones((3, 1), np.float32), None, 8, 8))


TORCH_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.clause("QT-FP8-1")
@pytest.mark.parametrize("fp8", ["e4m3", "e5m2"])
def test_fp8_decodes_all_256_codes_as_torch_with_each_kind_of_scale(fp8: Fp8Format) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    numbers = torch.from_numpy(codes).view(TORCH_FP8[fp8]).to(torch.float32).numpy()
    rng = np.random.default_rng(2)
    one, rows, blocks = np.float32(0.3), rng.random(16, np.float32), rng.random((4, 2), np.float32)
    np.testing.assert_array_equal(decode_fp8(codes, np.asarray(one), fp8), numbers * one)
    np.testing.assert_array_equal(decode_fp8(codes, rows, fp8), numbers * rows[:, None])
    np.testing.assert_array_equal(decode_fp8(codes, rows[:, None], fp8), numbers * rows[:, None])
    wide = np.array([[blocks[r // 4, c // 8] for c in range(16)] for r in range(16)], np.float32)
    np.testing.assert_array_equal(decode_fp8(codes, blocks, fp8), numbers * wide)


@pytest.mark.clause("QT-FP8-1", "QT-FP8-2")
@pytest.mark.parametrize("fp8", ["e4m3", "e5m2"])
@pytest.mark.parametrize("block", [None, (16, 16), (128, 128)])
def test_fp8_encoding_is_torchs_rounding_within_half_a_spacing(fp8: Fp8Format, block: tuple[int, int] | None) -> None:
    values = (np.random.default_rng(3).standard_normal((72, 200)) ** 3).astype(np.float32)
    values[:16, :16] = 0
    bits, scale = encode_fp8(values, fp8=fp8, block=block)
    shape = () if block is None else (-(-72 // block[0]), -(-200 // block[1]))
    assert scale.shape == shape
    sides = block or (72, 200)
    wide = np.array(
        [[scale if block is None else scale[r // sides[0], c // sides[1]] for c in range(200)] for r in range(72)]
    )
    ratio = (values / wide.astype(np.float32)).astype(np.float32)
    wanted = torch.from_numpy(ratio).to(TORCH_FP8[fp8]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(bits, wanted)
    kind = ml_dtypes.finfo(ml_dtypes.float8_e4m3fn if fp8 == "e4m3" else ml_dtypes.float8_e5m2)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(ratio), 1e-30))), kind.minexp)
    spacing = 2.0 ** (exponent - kind.nmant)
    error = np.abs(decode_fp8(bits, scale, fp8).astype(np.float64) - values)
    assert (error <= wide * spacing * (0.5 + 2.0**-14)).all()


@pytest.mark.clause("QT-FP8-3")
def test_fp8_refuses_bad_input() -> None:
    with pytest.raises(InvalidParameterError, match="finite"):
        encode_fp8(np.array([[np.inf]]))
    with pytest.raises(InvalidParameterError, match="powers of two"):
        encode_fp8(np.ones((4, 4)), block=(3, 4))
    with pytest.raises(ShapeError, match="N, K"):
        encode_fp8(np.ones(4))
    with pytest.raises(ShapeError, match="scale"):
        decode_fp8(np.zeros((4, 4), np.uint8), np.ones((3, 7)))


@pytest.mark.clause("QT-MARLIN-1", "QT-MARLIN-2")
def test_each_marlin_word_holds_the_tensor_core_fragment_of_its_lane() -> None:
    num_inputs, num_outputs = 32, 128
    quanta = np.random.default_rng(4).integers(0, 16, (num_inputs, num_outputs), dtype=np.uint8)
    words = repack_marlin(quanta)
    assert words.shape == (2, 256)
    np.testing.assert_array_equal(unpack_marlin(words), quanta)
    for strip, run, lane, tile in itertools.product(range(2), range(2), range(32), range(4)):
        word = int(words[strip, run * 128 + lane * 4 + tile]) & 0xFFFFFFFF
        pairs = [(word >> (4 * i)) & 0x000F000F for i in range(4)]
        fragment = [half for pair in pairs for half in (pair & 15, pair >> 16)]
        base_row, base_column = 16 * strip, 64 * run + 16 * tile
        # PTX, B operand of m16n8k16: b0, b1 in rows 2t, 2t+1, b2, b3 in rows 2t+8, 2t+9 of column lane / 4; twice
        wanted = [
            int(quanta[base_row + (lane % 4) * 2 + i % 2 + 8 * (i // 2), base_column + lane // 4 + 8 * column])
            for column in range(2)
            for i in range(4)
        ]
        assert fragment == wanted


@pytest.mark.clause("QT-MARLIN-2", "QT-MARLIN-3")
def test_marlin_scales_and_shapes() -> None:
    columns = np.arange(128, dtype=np.float32)
    grouped = repack_marlin_scales(np.stack([columns, columns + 1000]))
    for place in range(128):
        block, i, j = place // 64, (place % 64) // 8, place % 8
        assert grouped[0, place] == 64 * block + 8 * j + i
    assert (grouped[1] == grouped[0] + 1000).all()
    single = repack_marlin_scales(columns[None])
    for place in range(128):
        block, i, m, b = place // 32, (place % 32) // 8, (place % 8) // 2, place % 2
        assert single[0, place] == 32 * block + 2 * i + 8 * m + b
    for shape in ((15, 64), (16, 63)):
        with pytest.raises(ShapeError, match="multiple of 16"):
            repack_marlin(np.zeros(shape, np.uint8))
    with pytest.raises(ShapeError, match="multiple of 16"):
        unpack_marlin(np.zeros((1, 100), np.int32))
