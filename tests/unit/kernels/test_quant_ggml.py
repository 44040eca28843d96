"""5-bit blocks and K-quants: decoding against gguf bit for bit, encoding against its error bound."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.kernels.quant import FORMATS, decode, encode
from ferrum_ref.kernels.quant_k import half, six_bit_pairs

FIVE = ["Q5_0", "Q5_1"]
K = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
SCALES = {  # byte offsets of the float16 fields in a block
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
HALVES = {"zero": 0.0, "minus zero": -0.0, "subnormal": 6e-8, "largest": 65504.0, "infinite": np.inf, "nan": np.nan}


def expected(name: str, packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return np.asarray(dequantize(packed, gguf.GGMLQuantizationType[name]))


def assert_same_bits(actual: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], wanted.view(np.uint32)[~nan])


@pytest.mark.clause("QT-FIVE-1", "QT-K-1")
@pytest.mark.parametrize("name", FIVE + K)
@pytest.mark.parametrize("num_blocks", [1, 3, 700])
def test_random_bytes_decode_as_in_gguf_bit_for_bit(name: str, num_blocks: int) -> None:
    packed = np.random.default_rng(num_blocks).integers(
        0, 256, (2, num_blocks * FORMATS[name].block_bytes), dtype=np.uint8
    )
    assert_same_bits(decode(name, packed), expected(name, packed))


@pytest.mark.clause("QT-FIVE-1", "QT-K-1")
@pytest.mark.parametrize("name", FIVE + K)
@pytest.mark.parametrize("special", HALVES)
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x0F, 0xF0, 0x80])
def test_adversarial_blocks_decode_as_in_gguf_bit_for_bit(name: str, special: str, fill: int) -> None:
    block = np.full((1, FORMATS[name].block_bytes), fill, np.uint8)
    for start in SCALES[name]:
        block[0, start : start + 2] = np.frombuffer(np.float16(HALVES[special]).tobytes(), np.uint8)
    assert_same_bits(decode(name, block), expected(name, block))


@pytest.mark.clause("QT-FIVE-1")
def test_the_fifth_bit_of_element_i_is_bit_i_of_the_word() -> None:
    block = np.zeros((1, 22), np.uint8)
    block[0, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    block[0, 2] = 1
    assert decode("Q5_0", block)[0].tolist() == [0.0] + [-16.0] * 31


@pytest.mark.clause("QT-FIVE-2")
@pytest.mark.parametrize("name", FIVE)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-6, 4))
def test_five_bit_encoding_equals_gguf_byte_for_byte(name: str, seed: int, exponent: int) -> None:
    values = (np.random.default_rng(seed).standard_normal((4, 64)) * 10.0**exponent).astype(np.float32)
    values[0, :32] = 0
    np.testing.assert_array_equal(encode(name, values), quantize(values, gguf.GGMLQuantizationType[name]))


def steps(name: str, packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """|d * sc| of every element, read from the stored fields."""
    blocks = packed.reshape(-1, FORMATS[name].block_bytes)
    if name == "Q4_K":
        per_block = half(blocks, 0) * six_bit_pairs(blocks[:, 4:16])[0].astype(np.float32)
    else:
        per_block = half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return np.repeat(np.abs(per_block), 256 // per_block.shape[1], axis=1)


@pytest.mark.clause("QT-K-2")
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(-7, 4),
    st.sampled_from(["normal", "positive", "negative", "one spike", "mixed scales", "constant", "two sided"]),
)
def test_k_encoding_stays_within_half_of_the_stored_step(name: str, seed: int, exponent: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((3, 256))
    if kind == "positive":
        values = np.abs(values) + 1
    elif kind == "negative":
        values = -np.abs(values) - 1
    elif kind == "one spike":
        values = np.zeros((3, 256))
        values[:, rng.integers(256)] = 1
    elif kind == "mixed scales":
        values *= 10.0 ** rng.integers(-5, 1, (3, 256))
    elif kind == "constant":
        values = np.full((3, 256), rng.standard_normal())
    elif kind == "two sided":
        values = np.sign(values)
    source = (values * 10.0**exponent).astype(np.float32)
    packed = encode(name, source)
    error = np.abs(decode(name, packed).astype(np.float64) - source)
    rounding = 2.0**-22 * np.abs(source).max(axis=1, keepdims=True)
    assert (error <= steps(name, packed) * 0.5 + rounding).all()
    levels = 15 if name == "Q4_K" else 31
    widest = np.ptp(np.concatenate([source, np.zeros((3, 1), np.float32)], axis=1), axis=1, keepdims=True)
    smallest_half = 2.0**-24  # float16 holds no smaller scale
    assert (steps(name, packed) <= 1.2 * widest / levels + 64 * smallest_half).all()


@pytest.mark.clause("QT-K-2")
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_zeros_decode_to_zeros(name: str) -> None:
    assert not decode(name, encode(name, np.zeros((2, 512)))).any()


@pytest.mark.clause("QT-K-2", "QT-K-3")
def test_what_cannot_be_encoded_is_refused_by_name() -> None:
    for name in ("Q2_K", "Q3_K", "Q5_K"):
        with pytest.raises(UnsupportedError, match=name):
            encode(name, np.zeros(256))
    for name in ("Q4_K", "Q6_K"):
        for bad in (np.nan, np.inf, 3e38):
            with pytest.raises(InvalidParameterError, match=name):
                encode(name, np.full(256, bad))
        with pytest.raises(ShapeError, match="256"):
            encode(name, np.zeros(255))
