"""The .npy header against numpy's own writer, and against headers that lie."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.formats.npy import npy_values, read_npy_header

KINDS = ["?", "u1", "i1", "<u2", ">i2", "<i4", ">u4", "<i8", ">u8", "<f2", ">f2", "<f4", ">f4", "<f8", ">f8"]


def saved(array: Any, version: tuple[int, int] | None = None) -> bytes:
    target = io.BytesIO()
    np.lib.format.write_array(target, array, version=version)
    return target.getvalue()


def parsed(content: bytes) -> np.ndarray:
    header = read_npy_header(content, len(content), "x.npy")
    return npy_values(np.frombuffer(content, np.uint8)[header.data_offset :].copy(), header)


@pytest.mark.clause("WL-NPY-1", "WL-NPY-2")
@given(
    st.sampled_from(KINDS).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    ),
    st.booleans(),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_what_numpy_saves(array: np.ndarray, fortran: bool, version: tuple[int, int]) -> None:
    found = parsed(saved(np.asarray(array, order="F" if fortran else "C"), version))
    assert found.shape == array.shape
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype.newbyteorder("=")


def with_header(text: str, data: bytes = b"\x00" * 8, version: int = 1) -> bytes:
    raw = text.encode("latin-1")
    return b"\x93NUMPY" + bytes([version, 0]) + len(raw).to_bytes(2 if version == 1 else 4, "little") + raw + data


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
LIES = {
    "magic": b"PNG" + with_header(GOOD)[3:],
    "short": with_header(GOOD)[:9],
    "version": with_header(GOOD, version=1)[:6] + b"\x04\x00" + with_header(GOOD)[8:],
    "header length": b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\x7f" + GOOD.encode(),
    "truncated": with_header(GOOD, b"\x00" * 7),
    "trailing": with_header(GOOD, b"\x00" * 9),
    "huge": with_header(GOOD.replace("(2,)", "(9223372036854775807, 9223372036854775807)")),
    "zero times huge": with_header(GOOD.replace("(2,)", "(0, 9223372036854775807)"), b""),
    "negative": with_header(GOOD.replace("(2,)", "(-2,)")),
    "no tuple": with_header(GOOD.replace("(2,)", "(2)")),
    "many axes": with_header(GOOD.replace("(2,)", "(" + "1, " * 33 + ")"), b"\x00" * 4),
    "missing key": with_header("{'descr': '<f4', 'fortran_order': False, }"),
    "twice": with_header("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"),
    "code": with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').getpid(),), }"),
    "wrong kinds": with_header("{'descr': False, 'fortran_order': '<f4', 'shape': (2,), }"),
    "nested": with_header("{'descr': " + "[" * 3000 + "}"),
    "open": with_header(GOOD[:-1]),
}


@pytest.mark.clause("WL-NPY-1", "WL-NPY-2")
@pytest.mark.parametrize("name", LIES)
def test_lies(name: str) -> None:
    with pytest.raises((InvalidFormatError, UnsupportedError), match=r"read npy x\.npy") as caught:
        parsed(LIES[name])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.clause("WL-NPY-3")
def test_what_is_not_offered() -> None:
    """Objects are pickles: numpy itself would run them when asked to."""
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for content, message in (
        (objects.getvalue(), "pickles may run code"),
        (saved(np.zeros(2, "c8")), "got <c8"),
        (saved(np.zeros(2, "S3")), "S3"),
        (saved(np.zeros(2, [("a", "<f4")])), "record type"),
        (saved(np.zeros(2, "datetime64[s]")), "M8"),
        (with_header(GOOD.replace("<f4", "|V2"), b"\x00" * 4), "bfloat16 as V2"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            parsed(content)
