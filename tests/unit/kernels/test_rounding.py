"""Compute types and rounding."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, DeviceError
from ferrum_ref.kernels import activation, attention, linear, norm, rope, softmax
from ferrum_ref.kernels.rounding import cast, compute_dtype, round_to

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
LOW = (np.dtype(np.float16), BF16, FP8, E5M2)


def finite_values(dtype) -> list[float]:
    """Every finite value of a 16- or 8-bit type in order, decoded from its bits by the definition of the format."""
    mantissa, bias, bits = {
        "float16": (10, 15, 16),
        "bfloat16": (7, 127, 16),
        "float8_e4m3fn": (3, 7, 8),
        "float8_e5m2": (2, 15, 8),
    }[dtype.name]
    values = []
    for code in range(1 << (bits - 1)):
        exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
        if dtype != FP8 and exponent == (1 << (bits - 1 - mantissa)) - 1:
            break
        if dtype == FP8 and code == 0x7F:
            break
        scale = 2.0 ** (max(exponent, 1) - bias - mantissa)
        values.append((fraction + ((1 << mantissa) if exponent else 0)) * scale)
    return values


def nearest(values: list[float], x: float) -> float:
    """The value nearest to |x|, of two the one of even index (= even last bit), with the sign of x."""
    magnitude = Fraction(abs(x))
    index = int(np.searchsorted(values, abs(x)))
    low = max(index - 1, 0)
    high = min(index, len(values) - 1)
    below, above = magnitude - Fraction(values[low]), Fraction(values[high]) - magnitude
    pick = low if below < above or (below == above and low % 2 == 0) else high
    return float(np.copysign(values[pick], x))


@pytest.mark.clause("KN-PRECISION-1")
def test_float64_wins_and_everything_else_is_float32():
    for dtype in (*LOW, np.dtype(np.float32)):
        assert compute_dtype("op", np.zeros(1, dtype)) == np.float32
        assert compute_dtype("op", np.zeros(1, dtype), np.zeros(1)) == np.float64
    for dtype in (np.int32, np.bool_, np.complex64, object):
        with pytest.raises(BackendError, match="op: element type"):
            compute_dtype("op", np.zeros(1, dtype))


def _runs():
    r = np.random.default_rng(1)
    x, w, big = r.standard_normal((1, 3, 2, 8)), r.standard_normal(8), r.standard_normal((5, 8))
    cos, sin = r.standard_normal((4, 4)), r.standard_normal((4, 4))
    return {
        "rms_norm": (norm.rms_norm, (x, w, 1e-5)),
        "rms_norm_residual": (norm.rms_norm_residual, (x, x + 1, w, 1e-5)),
        "layer_norm": (norm.layer_norm, (x, w, w, 1e-5)),
        "silu": (activation.silu, (x,)),
        "silu_mul": (activation.silu_mul, (x, x + 1)),
        "gelu": (activation.gelu, (x,)),
        "relu": (activation.relu, (x,)),
        "softmax": (softmax.softmax, (x,)),
        "linear": (linear.linear, (x, big)),
        "rotary_embedding": (rope.rotary_embedding, (x, cos, sin, [2, 0, 1])),
        "attention": (attention.attention, (x, x + 1, x - 1, 0.3, True)),
        "paged_attention": (attention.paged_attention, (x, x[0][:, None] + 1, x[0][:, None], [2, 0, 1], [3])),
    }


@pytest.mark.clause("KN-PRECISION-1", "KN-PRECISION-2", "KN-PRECISION-3")
@pytest.mark.parametrize("name", _runs())
@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64], ids=str)
def test_every_kernel_computes_wide_rounds_once_and_changes_no_input(name, dtype):
    function, arguments = _runs()[name]

    def run(convert):
        return function(*(convert(a) if isinstance(a, np.ndarray) else a for a in arguments))

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    def read_only(a):
        a = a.astype(dtype)
        a.flags.writeable = False
        return a

    stored = first(run(read_only))
    assert stored.dtype == dtype
    wide = np.float64 if dtype == np.float64 else np.float32
    same = first(run(lambda a: a.astype(dtype).astype(wide)))
    # The same arithmetic on the widened inputs, rounded at the end: equal to the bit.
    np.testing.assert_array_equal(stored, round_to(same, np.dtype(dtype)))
    flipped = first(run(lambda a: np.flip(np.flip(a.astype(dtype), -1).copy(), -1)))  # strides of the other sign
    exact = first(run(lambda a: a.astype(dtype).astype(np.float64)))
    size = np.abs(exact).max()
    for result in (stored, flipped):
        error = np.abs(result.astype(np.float64) - exact).max()
        assert error <= 64 * size * {np.dtype(np.float16): 2**-11, BF16: 2**-8}.get(np.dtype(dtype), 2**-24)
    if dtype == np.float64:
        assert np.abs(flipped - exact).max() <= 64 * size * 2**-53


@pytest.mark.clause("KN-PRECISION-3", "TN-OPS-4")
@pytest.mark.parametrize("name", _runs())
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e38])
def test_special_values_raise_no_warning(name, poison):
    function, arguments = _runs()[name]
    for dtype in (np.float32, np.float16):
        changed = [
            a if not isinstance(a, np.ndarray) else np.where(np.arange(a.size).reshape(a.shape) % 5 == 0, poison, a)
            for a in arguments
        ]
        with np.errstate(all="ignore"):
            changed = [a.astype(dtype) if isinstance(a, np.ndarray) else a for a in changed]
        function(*changed)  # warnings are errors


@pytest.mark.clause("TN-CAST-1", "TN-FP8-2", "KN-PRECISION-2")
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_value_of_the_type_and_every_midpoint(dtype):
    values = finite_values(dtype)
    assert values[-1] == float(ml_dtypes.finfo(dtype).max)
    exact = np.array(values)
    middle = (exact[:-1] + exact[1:]) / 2
    even = np.where(np.arange(middle.size) % 2 == 0, exact[:-1], exact[1:])
    with np.errstate(over="ignore"):
        for wide in (np.float32, np.float64):
            assert (round_to(exact.astype(wide), dtype).astype(np.float64) == exact).all()
            assert (round_to(-middle.astype(wide), dtype).astype(np.float64) == -even).all()
    up, down = np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)
    assert (round_to(up, dtype).astype(np.float64) == exact[1:]).all()
    assert (round_to(down, dtype).astype(np.float64) == exact[:-1]).all()


@pytest.mark.clause("TN-CAST-1", "TN-FP8-2")
@given(st.floats(-1e6, 1e6) | st.floats(-500, 500) | st.floats(-1e-4, 1e-4))
def test_float64_is_rounded_once_to_the_nearest(x):
    for dtype in LOW:
        values = finite_values_of[dtype]
        if abs(x) < values[-1]:
            assert float(round_to(np.array([x]), dtype)[0]) == nearest(values, x)


finite_values_of = {dtype: finite_values(dtype) for dtype in LOW}


@pytest.mark.clause("TN-CAST-1")
def test_two_roundings_would_show():
    # 1 + 2**-8 + 2**-40 lies above the midpoint of 1 and 1 + 2**-7; through float32 it would land on the midpoint.
    x = np.array([1 + 2.0**-8 + 2.0**-40, -(1 + 2.0**-8), 1 + 3 * 2.0**-8])
    assert round_to(x, BF16).astype(np.float64).tolist() == [1 + 2.0**-7, -1.0, 1 + 2.0**-6]


@pytest.mark.clause("TN-CAST-1", "TN-CAST-2")
def test_overflow_and_specials():
    with np.errstate(all="ignore"):
        x = np.array([np.inf, -np.inf, np.nan, 1e39, -65520.0, 65519.0])
        assert str(round_to(x, np.dtype(np.float16)).tolist()) == "[inf, -inf, nan, inf, -inf, 65504.0]"
        assert str(round_to(x, BF16).astype(float).tolist()) == "[inf, -inf, nan, inf, -65536.0, 65536.0]"
        assert str(round_to(x, np.dtype(np.float32)).tolist()) == "[inf, -inf, nan, inf, -65520.0, 65519.0]"
    for wide in (np.float32, np.float64):
        x8 = np.array([np.inf, -np.inf, np.nan, 449.0, -1e9, 464.0, 448.0], wide)
        assert str(round_to(x8, FP8).astype(float).tolist()) == "[448.0, -448.0, nan, 448.0, -448.0, 448.0, 448.0]"


@pytest.mark.clause("TN-CAST-1", "TN-CAST-2")
def test_agrees_with_torch_on_all_float16_values():
    torch = pytest.importorskip("torch")
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = x[np.isfinite(x)]
    theirs = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(round_to(x, BF16).astype(np.float32), theirs)
    small = x[np.abs(x) <= 448]
    theirs = torch.from_numpy(small).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(round_to(small, FP8).astype(np.float32), theirs)


@pytest.mark.clause("TN-CAST-3")
def test_to_integers():
    x = np.array([2.5, 3.5, -2.5, 300.0, -np.inf, 1e30, -0.4], np.float32)
    assert cast(x, np.dtype(np.int8)).tolist() == [2, 4, -2, 127, -128, 127, 0]
    assert cast(x, np.dtype(np.uint8)).tolist() == [2, 4, 0, 255, 0, 255, 0]
    assert cast(x, np.dtype(np.int32)).tolist() == [2, 4, -2, 300, -(2**31), 2**31 - 1, 0]
    assert cast(x, np.dtype(np.uint32)).tolist() == [2, 4, 0, 300, 0, 2**32 - 1, 0]
    assert cast(x, np.dtype(ml_dtypes.int4)).astype(int).tolist() == [2, 4, -2, 7, -8, 7, 0]
    assert cast(x, np.dtype(ml_dtypes.uint4)).astype(int).tolist() == [2, 4, 0, 15, 0, 15, 0]
    assert cast(np.array([70000, -1, 3]), np.dtype(np.uint16)).tolist() == [65535, 0, 3]
    assert cast(np.array([2**32 - 1, 5], np.uint32), np.dtype(np.int32)).tolist() == [2**31 - 1, 5]
    assert cast(cast(np.array([-8, 7], np.int8), np.dtype(ml_dtypes.int4)), np.dtype(np.int16)).tolist() == [-8, 7]
    with pytest.raises(DeviceError, match="NaN"):
        cast(np.array([np.nan]), np.dtype(np.int8))
    with pytest.raises(DeviceError, match="complex64"):
        cast(np.array([1.0]), np.dtype(np.complex64))


@pytest.mark.clause("TN-CAST-4")
def test_integers_to_floats():
    x = np.array([2**24 + 1, 2**24 + 3, -(2**31), 2049], np.int64)
    assert cast(x, np.dtype(np.float32)).tolist() == [2**24, 2**24 + 4, -(2**31), 2049]
    # 2**24 + 2**16 + 1 lies above a BF16 midpoint; through float32 it would be the midpoint itself.
    assert float(cast(np.array([2**24 + 2**16 + 1], np.int32), BF16)[0]) == 2**24 + 2**17
    assert cast(np.array([2049, 2051], np.uint16), np.dtype(np.float16)).tolist() == [2048, 2052]
    assert cast(np.array([True, False]), BF16).astype(float).tolist() == [1, 0]
    assert cast(np.array([True, False]), np.dtype(np.int8)).tolist() == [1, 0]


@pytest.mark.clause("TN-CAST-5")
def test_to_bool():
    for dtype in (np.float32, BF16, np.float16):
        x = np.array([0.0, -0.0, 1e-7, np.nan, np.inf]).astype(dtype)
        assert cast(x, np.dtype(np.bool_)).tolist() == [False, False, True, True, True]
    assert cast(np.array([0, 256], np.int16), np.dtype(np.bool_)).tolist() == [False, True]
    x = np.ones(2, np.float32)
    assert cast(x, np.dtype(np.float32)) is x
