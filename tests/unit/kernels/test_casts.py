"""Conversions bit for bit against ml_dtypes and torch: ties, saturation, NaN, subnormals."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from ferrum_ref.kernels import activation, linear
from ferrum_ref.kernels.rounding import cast, round_to
from ferrum_ref.numpy_backend.dtypes import ELEMENT_TYPES, element_type
from ferrum_ref.types.devices import DataType

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
BF16, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
TORCH = {FP16: torch.float16, BF16: torch.bfloat16, E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def hard_float32() -> np.ndarray:
    """Every float32 whose lower half is 0, 1, half, half + 1 or all ones: all ties of the 16-bit types and their
    neighbours, all specials and subnormals; then random bits."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    patterns = [high | low for low in (0, 1, 0x1000, 0x0FFF, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    patterns.append(np.random.default_rng(5).integers(0, 2**32, 100_000, dtype=np.uint32))
    return np.concatenate(patterns).view(np.float32)


def bits(array) -> np.ndarray:
    """The bits, every NaN as one value: payloads and signs of NaN are open."""
    raw = array.view(np.uint8 if array.dtype.itemsize == 1 else np.uint16).astype(np.int64)
    raw[np.isnan(array.astype(np.float32))] = -1
    return raw


@pytest.mark.clause("TN-CAST-1", "TN-FP8-2")
@pytest.mark.parametrize("dtype", [FP16, BF16, E5M2], ids=str)
def test_float32_against_ml_dtypes_and_torch(dtype):
    x = hard_float32()
    with np.errstate(all="ignore"):
        ours, theirs = round_to(x, dtype), x.astype(dtype)
    np.testing.assert_array_equal(bits(ours), bits(theirs))
    carrier = torch.uint8 if dtype.itemsize == 1 else torch.uint16
    other = torch.from_numpy(x).to(TORCH[dtype]).view(carrier).numpy().view(dtype)
    np.testing.assert_array_equal(bits(ours), bits(other))


@pytest.mark.clause("TN-CAST-2", "TN-FP8-2")
def test_e4m3_against_ml_dtypes_and_torch():
    x = hard_float32()
    inside = np.abs(x) <= 448
    with np.errstate(all="ignore"):
        ours, theirs = round_to(x, E4M3), x.astype(E4M3)
    np.testing.assert_array_equal(bits(ours)[inside], bits(theirs)[inside])
    other = torch.from_numpy(x[inside]).to(torch.float8_e4m3fn).view(torch.uint8).numpy().view(E4M3)
    np.testing.assert_array_equal(bits(ours)[inside], bits(other))
    nan = np.isnan(x)
    assert (bits(ours)[nan] == -1).all()
    beyond = ~inside & ~nan
    assert (ours[beyond].astype(np.float32) == np.copysign(np.float32(448), x[beyond])).all()


@pytest.mark.clause("TN-FP8-2", "TN-CAST-2")
def test_the_two_formats_overflow_differently():
    x = np.array([57344, 61439, 61440, -65536, np.inf, np.nan, 2.0**-16, 2.0**-17, 1.5 * 2.0**-17, -0.0])
    for wide in (np.float32, np.float64):
        with np.errstate(all="ignore"):
            five, four = round_to(x.astype(wide), E5M2).astype(float), round_to(x.astype(wide), E4M3).astype(float)
        assert str(five.tolist()) == str(
            [57344.0, 57344.0, np.inf, -np.inf, np.inf, np.nan, 2.0**-16, 0.0, 2.0**-16, -0.0]
        )
        assert str(four[:6].tolist()) == "[448.0, 448.0, 448.0, -448.0, 448.0, nan]"
    # just above the tie of 1 and 1.25, by less than float32 can tell: two roundings would take 1
    assert float(round_to(np.array([1.125 + 2.0**-40]), E5M2)[0]) == 1.25
    assert float(round_to(np.array([1.125]), E5M2)[0]) == 1.0


@pytest.mark.clause("TN-CAST-1", "TN-CAST-3", "TN-CAST-4", "TN-CAST-5", "TN-FP8-2")
def test_all_pairs_of_types_against_exact_arithmetic():
    """From every storage type to every other, through Python's exact integers and float64's room for all of them."""
    types = [*ELEMENT_TYPES.values(), E5M2]
    for source in types:
        if source.itemsize == 1:
            codes = np.arange(16 if source in (ELEMENT_TYPES[DataType.INT4], ELEMENT_TYPES[DataType.UINT4]) else 256)
            values = (codes % 2 if source == np.bool_ else codes).astype(np.uint8).view(source)
        elif source.itemsize == 2:
            values = np.arange(1 << 16, dtype=np.uint16).view(source)
        else:
            values = np.random.default_rng(2).integers(0, 2**32, 4000, dtype=np.uint32).view(source)
        with np.errstate(invalid="ignore"):
            wide = values.astype(np.float64)
        values, wide = values[~np.isnan(wide)], wide[~np.isnan(wide)]
        for target in types:
            with np.errstate(all="ignore"):
                got = cast(values, target).astype(np.float64)
            np.testing.assert_array_equal(got, expected(wide, target), err_msg=f"{source} -> {target}")


def expected(wide, target):
    """float64 values in `target`, by formulas of the types' definitions."""
    if target == np.bool_:
        return (wide != 0).astype(float)
    limits = {"int4": (-8, 7), "uint4": (0, 15)}
    if target.name in limits or target.kind in "iu":
        low, high = limits.get(target.name) or (np.iinfo(target).min, np.iinfo(target).max)
        return np.clip(np.rint(wide), low, high)
    precision, low_exponent = {
        "float32": (24, -149),
        "float16": (11, -24),
        "bfloat16": (8, -133),
        "float8_e4m3fn": (4, -9),
        "float8_e5m2": (3, -16),
    }[target.name]
    exponent = np.maximum(np.frexp(wide)[1] - precision, low_exponent)
    finite = np.isfinite(wide)
    rounded = np.where(finite, np.ldexp(np.rint(np.ldexp(np.where(finite, wide, 0), -exponent)), exponent), wide)
    largest = float(ml_dtypes.finfo(target).max)
    beyond = np.copysign(largest if target == E4M3 else np.inf, rounded)
    return np.where(np.abs(rounded) > largest, beyond, rounded)


@pytest.mark.clause("TN-FP8-3", "KN-PRECISION-1")
def test_kernels_take_both_formats():
    x = np.array([[-2.0, 0.5, 1.25, 3.5]])
    for dtype in (E4M3, E5M2):
        narrow, wide = x.astype(dtype), x.astype(dtype).astype(np.float32)
        assert (
            linear.linear(narrow, narrow).astype(float).tolist()
            == round_to(wide @ wide.T, dtype).astype(float).tolist()
        )
        assert activation.relu(narrow).dtype == dtype
        assert activation.silu(narrow).tobytes() == round_to(activation.silu(wide), dtype).tobytes()


@pytest.mark.clause("TN-FP8-1")
def test_which_format_a_data_type_means():
    assert element_type(DataType.FP8) == E4M3
