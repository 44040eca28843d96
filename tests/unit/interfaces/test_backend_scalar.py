"""Scalars are brought to their width."""

from __future__ import annotations

import ctypes
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.backend import ScalarValue

C_TYPES = {
    "I8": ctypes.c_int8,
    "I16": ctypes.c_int16,
    "I32": ctypes.c_int32,
    "I64": ctypes.c_int64,
    "U8": ctypes.c_uint8,
    "U16": ctypes.c_uint16,
    "U32": ctypes.c_uint32,
    "U64": ctypes.c_uint64,
}


@pytest.mark.clause("BK-ARG-1")
@given(st.sampled_from(sorted(C_TYPES)), st.integers(-(2**70), 2**70))
def test_integers_wrap_as_in_c(kind, number):
    made = getattr(ScalarValue, kind)(number)
    c_type = C_TYPES[kind]
    assert made == ScalarValue(kind, c_type(number).value)
    assert made.to_numpy().dtype == np.dtype(c_type)
    assert made.to_numpy() == c_type(number).value


@pytest.mark.clause("BK-ARG-1")
def test_the_examples():
    assert ScalarValue.U8(300).value == 44
    assert ScalarValue.I8(200).value == -56
    assert ScalarValue.U32(-1).value == 4294967295
    assert ScalarValue.I64(2**63).value == -(2**63)
    assert ScalarValue.U16(np.int64(70000)).value == 4464


@pytest.mark.clause("BK-ARG-2")
@given(st.floats(allow_nan=False))
def test_floats_round_once_to_nearest_even(number):
    expected = math.copysign(math.inf, number)
    if abs(number) < 2.0**128 - 2.0**103:  # from there on the nearest float32 is infinity
        expected = struct.unpack("<f", struct.pack("<f", number))[0]
    assert ScalarValue.F32(number).value == expected
    assert ScalarValue.F64(number).value == number


@pytest.mark.clause("BK-ARG-2")
def test_float_and_bool_examples():
    assert ScalarValue.F32(0.1).value == 0.10000000149011612
    assert ScalarValue.F32(1 + 2**-24).value == 1
    assert ScalarValue.F32(1e39).value == math.inf
    assert ScalarValue.F64(10**400).value == math.inf
    assert ScalarValue.F64(-(10**400)).value == -math.inf
    assert math.isnan(ScalarValue.F32(math.nan).value)
    assert ScalarValue.F32(3).to_numpy().dtype == np.float32
    assert ScalarValue.Bool(True).value is True
    assert ScalarValue.Bool(False).to_numpy().dtype == np.bool_


@pytest.mark.clause("BK-ARG-1", "BK-ARG-2")
@pytest.mark.parametrize(
    ("kind", "value"),
    [("I32", 1.0), ("U8", "1"), ("U64", None), ("F32", "1"), ("F64", None), ("Bool", 1), ("F16", 1), ("F32", 1j)],
)
def test_values_of_another_kind_are_refused(kind, value):
    with pytest.raises(InvalidParameterError, match="ScalarValue"):
        ScalarValue(kind, value)
