"""Element formats against ggml's own Python package, and against layouts worked out by hand."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ferrum_ref.errors import InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.kernels.quant import FORMATS, decode, encode, quant_format

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
BLOCK_FORMATS = ("Q4_0", "Q4_1", "Q8_0")
ODD_HALVES = (0x0000, 0x8000, 0x0001, 0x03FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01, 0x3C00)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def theirs(name: str, packed: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        if name == "F64":
            return packed.view("<f8").astype(np.float32)
        if name in FP8:
            return torch.from_numpy(packed).view(FP8[name]).float().numpy()
        return gguf.dequantize(packed, gguf.GGMLQuantizationType[name])


def packed_rows(name: str, rows: int, elements: int, seed: int) -> np.ndarray:
    width = FORMATS[name].packed_bytes(elements)
    return np.random.default_rng(seed).integers(0, 256, (rows, width), dtype=np.uint8)


@pytest.mark.clause("MD-QUANT-1")
def test_block_sizes_are_ggmls() -> None:
    for name in FP8:
        assert FORMATS[name].packed_bytes(12) == 12
    for name, layout in FORMATS.items():
        if name in FP8:
            continue
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (layout.block_elements, layout.block_bytes)
    with pytest.raises(
        UnsupportedError, match="'Q9_K', expected one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2, Q4_0, Q4_1, Q5_0"
    ):
        quant_format("Q9_K")


@pytest.mark.clause("MD-QUANT-2")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_decode_as_in_ggml(name: str, seed: int) -> None:
    packed = packed_rows(name, rows=7, elements=256 * 90, seed=seed)  # several chunks, the last one short
    ours, reference = decode(name, packed), theirs(name, packed)
    if name in FP8:  # a NaN has no payload of its own there
        assert np.array_equal(np.isnan(ours), np.isnan(reference))
        ours, reference = np.nan_to_num(ours), np.nan_to_num(reference)
    assert np.array_equal(bits(ours), bits(reference))


@pytest.mark.clause("MD-QUANT-2")
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_every_byte_under_every_odd_scale(name: str) -> None:
    """Zero, subnormal, largest, infinite and NaN scales, over blocks that hold every byte value."""
    layout = FORMATS[name]
    body = layout.block_bytes - (4 if name == "Q4_1" else 2)
    blocks = []
    for scale in ODD_HALVES:
        for minimum in ODD_HALVES if name == "Q4_1" else (0,):
            for start in range(0, 256, body):
                head = np.array([scale, minimum], "<u2").view(np.uint8)[: layout.block_bytes - body]
                blocks.append(np.concatenate([head, (np.arange(start, start + body) % 256).astype(np.uint8)]))
    packed = np.stack(blocks)
    ours, reference = decode(name, packed), theirs(name, packed)
    assert np.array_equal(np.isnan(ours), np.isnan(reference))
    assert np.array_equal(bits(ours)[~np.isnan(ours)], bits(reference)[~np.isnan(reference)])


@pytest.mark.clause("MD-QUANT-2")
def test_nibbles_lie_half_a_block_apart() -> None:
    """The example of D-54: byte 0x21 first, d = 1."""
    packed = np.zeros(18, np.uint8)
    packed[:2] = np.array([1.0], "<f2").view(np.uint8)
    packed[2] = 0x21
    values = decode("Q4_0", packed)
    assert values[0] == -7.0
    assert values[16] == -6.0
    assert set(np.delete(values, [0, 16])) == {-8.0}


@pytest.mark.clause("MD-QUANT-2")
def test_q8_0_is_signed() -> None:
    packed = np.zeros(34, np.uint8)
    packed[:2] = np.array([0.5], "<f2").view(np.uint8)
    packed[2:5] = np.array([-128, 127, -1], np.int8).view(np.uint8)
    assert decode("Q8_0", packed)[:4].tolist() == [-64.0, 63.5, -0.5, 0.0]


@pytest.mark.clause("MD-QUANT-3")
@pytest.mark.parametrize("name", FORMATS)
def test_out_is_filled_in_place(name: str) -> None:
    packed = packed_rows(name, rows=3, elements=512, seed=9)
    out = np.full((3, 512), 7, np.float32)
    assert decode(name, packed, out) is out
    assert np.array_equal(bits(out), bits(decode(name, packed)))
    assert np.array_equal(out, theirs(name, packed), equal_nan=True)


@pytest.mark.clause("MD-QUANT-3")
@pytest.mark.parametrize(
    "out",
    [np.zeros((2, 64), np.float32), np.zeros((3, 64), np.float64), np.zeros((64, 3), np.float32).T],
    ids=["shape", "dtype", "order"],
)
def test_wrong_out_is_refused_untouched(out: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"decode Q8_0: out: got .* expected C-contiguous float32\[3, 64\]"):
        decode("Q8_0", packed_rows("Q8_0", rows=3, elements=64, seed=1), out)
    assert not out.any()


@pytest.mark.clause("MD-QUANT-3", "MD-QUANT-6")
def test_partial_blocks_are_refused() -> None:
    with pytest.raises(ShapeError, match="multiple of 20"):
        decode("Q4_1", np.zeros((2, 19), np.uint8))
    with pytest.raises(ShapeError, match="expected uint8"):
        decode("F32", np.zeros(4, np.int8))
    with pytest.raises(ShapeError, match="got 33 elements, expected a multiple of 32"):
        encode("Q4_0", np.zeros(33, np.float32))
    with pytest.raises(ShapeError, match="got a scalar"):
        encode("F32", np.float32(1))


@pytest.mark.clause("MD-QUANT-4")
@given(hnp.arrays(np.uint32, 16))
def test_bf16_rounds_as_ggml_does(patterns: np.ndarray) -> None:
    values = patterns.view(np.float32)
    with np.errstate(all="ignore"):
        reference = gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
    assert np.array_equal(encode("BF16", values), reference)


@pytest.mark.clause("MD-QUANT-4")
@pytest.mark.parametrize("name", FP8)
@given(hnp.arrays(np.float32, 16, elements=st.floats(width=32, allow_nan=False)))
def test_fp8_rounds_as_torch_does(name: str, values: np.ndarray) -> None:
    values = values.clip(-448, 448)  # beyond its range torch saturates E4M3 and makes infinities of E5M2
    assert np.array_equal(encode(name, values), torch.from_numpy(values).to(FP8[name]).view(torch.uint8).numpy())


@pytest.mark.clause("MD-QUANT-4")
def test_plain_formats_round_once() -> None:
    values = np.array([1.0, 1 + 2**-11, 1 + 3 * 2**-11, 65520.0, -np.inf, 1e-8], np.float32)
    assert encode("F16", values).view("<f2").tolist() == [1.0, 1.0, 1 + 2**-9, np.inf, -np.inf, 0.0]
    assert np.array_equal(encode("F32", values).view("<f4"), values)
    assert np.isnan(decode("F16", encode("F16", np.array([np.nan], np.float32)))).all()


@pytest.mark.clause("MD-QUANT-5")
@pytest.mark.parametrize("name", BLOCK_FORMATS)
@given(
    blocks=hnp.arrays(
        np.float32,
        (3, 32),
        elements=st.floats(-6e4, 6e4, width=32).map(lambda x: 0.0 if abs(x) < 1e-30 else x),
    )
)
def test_blocks_are_quantised_as_in_ggml(name: str, blocks: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        reference = gguf.quantize(blocks, gguf.GGMLQuantizationType[name])
    assert np.array_equal(encode(name, blocks), reference.view(np.uint8))


@pytest.mark.clause("MD-QUANT-5")
@pytest.mark.parametrize(("name", "steps"), [("Q8_0", 0.5), ("Q4_0", 1.0), ("Q4_1", 0.5)])
def test_round_trip_stays_within_the_step(name: str, steps: float) -> None:
    """|x - decode(encode(x))| <= `steps` quantisation steps, plus float16's rounding of d and m (2**-11 of x)."""
    values = np.random.default_rng(4).standard_normal((50, 32)).astype(np.float32)
    span = values.max(-1) - values.min(-1)
    largest = np.abs(values).max(-1)
    step = {"Q8_0": largest / 127, "Q4_0": largest / 8, "Q4_1": span / 15}[name]
    error = np.abs(decode(name, encode(name, values)) - values).max(-1)
    assert (error <= steps * step + 3 * 2.0**-11 * largest).all()


@pytest.mark.clause("MD-QUANT-5")
@pytest.mark.parametrize("name", BLOCK_FORMATS)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-3, 1),
    kind=st.sampled_from(["normal", "positive", "negative", "spike", "two sided"]),
)
def test_each_number_decodes_within_half_its_stored_step(name: str, seed: int, exponent: int, kind: str) -> None:
    """The step is the d that was stored. Q4_0 has 8 steps on one side and 7 on the other, where it clips beyond 7.5."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((4, 32))
    if kind in ("positive", "negative"):
        values = (np.abs(values) + 1) * (1 if kind == "positive" else -1)
    elif kind == "spike":
        values[:, rng.integers(32)] *= 1000
    elif kind == "two sided":
        values = np.sign(values)
    source = (values * 10.0**exponent).astype(np.float32)
    packed = encode(name, source)
    step = packed.reshape(4, -1)[:, :2].copy().view("<f2").astype(np.float64)
    error = np.abs(decode(name, packed).astype(np.float64) - source)
    rounding = 3 * 2.0**-11 * np.abs(source).max(-1, keepdims=True) + 16 * 2.0**-24  # of d and m to float16
    clipped = source / np.where(step == 0, 1, step) > 7.5 if name == "Q4_0" else np.zeros_like(source, bool)
    assert (error <= np.where(clipped, 1.0, 0.5) * np.abs(step) + rounding).all()


@pytest.mark.clause("MD-QUANT-5")
@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("value", [0.0, 1e-42, -1e-42, 1e-38])
def test_tiny_blocks_become_zero(name: str, value: float) -> None:
    assert not decode(name, encode(name, np.full(32, value, np.float32))).any()


@pytest.mark.clause("MD-QUANT-6")
@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_float16_cannot_scale_is_refused(name: str, value: float) -> None:
    values = np.zeros(32, np.float32)
    values[5] = value
    values[6] = -1.0
    with pytest.raises(InvalidParameterError, match=f"encode {name}: values: got"):
        encode(name, values)
