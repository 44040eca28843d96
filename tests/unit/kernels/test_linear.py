"""linear, embedding, integer arguments."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ferrum_ref.kernels.linear as module
from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.linear import embedding, linear

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.clause("KN-LINEAR-1")
def test_a_square_weight_is_transposed():
    w = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    assert linear(np.ones(2, np.float32), w).tolist() == [3, 7]


@pytest.mark.clause("KN-LINEAR-1", "KN-LINEAR-2")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 0, 3)])
def test_within_the_rounding_bound_for_every_rank(dtype, lead, bounds):
    rng = np.random.default_rng(7)
    x, w = rng.standard_normal((*lead, 65)).astype(dtype), rng.standard_normal((9, 65)).astype(dtype)
    y = linear(x, w)
    assert y.shape == (*lead, 9)
    assert y.dtype == dtype
    wide = x.astype(np.float64), w.astype(np.float64)
    expected = np.einsum("...k,nk->...n", *wide)
    assert (np.abs(y.astype(np.float64) - expected) <= bounds(dtype).linear(*wide)).all()


@pytest.mark.clause("KN-LINEAR-2")
def test_a_narrow_weight_is_widened_by_blocks(monkeypatch):
    rng = np.random.default_rng(8)
    x, w = rng.integers(-4, 5, (3, 16)).astype(np.float32), rng.integers(-4, 5, (37, 16)).astype(ml_dtypes.bfloat16)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 100)
    np.testing.assert_array_equal(linear(x, w), x @ w.astype(np.float32).T)  # small integers: exact in any order


@pytest.mark.clause("KN-LINEAR-2")
def test_accumulates_wider_than_storage():
    x, w = np.ones(5000, np.float16), np.ones((1, 5000), np.float16)
    assert linear(x, w).tolist() == [5000]  # a float16 sum stops at 2048
    assert linear(np.ones((2, 0), np.float32), np.ones((3, 0), np.float32)).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.clause("KN-LINEAR-1")
def test_strided_operands():
    rng = np.random.default_rng(9)
    x, w = rng.integers(-9, 9, (8, 6)).astype(np.float64), rng.integers(-9, 9, (10, 12)).astype(np.float64)
    np.testing.assert_array_equal(linear(x.T[::2, ::-1], w[:, :8]), x.T[::2, ::-1] @ w[:, :8].T)


@pytest.mark.clause("KN-LINEAR-3")
def test_linear_shapes():
    for x, w in (((2,), (3, 4)), ((2, 3), (3,)), ((), (3, 1)), ((3, 4), (4, 3))):
        with pytest.raises(ShapeError, match="linear: input"):
            linear(np.ones(x, np.float32), np.ones(w, np.float32))


@pytest.mark.clause("KN-EMBED-1", "KN-EMBED-2")
@given(st.lists(st.integers(0, 6), max_size=9))
def test_embedding_copies_rows(ids):
    table = np.random.default_rng(1).standard_normal((7, 3)).astype(ml_dtypes.bfloat16)
    rows = embedding(table, ids)
    assert rows.shape == (len(ids), 3)
    assert rows.tobytes() == b"".join(table[i].tobytes() for i in ids)
    rows[...] = 0
    assert (table != 0).all()
    with pytest.raises(InvalidParameterError, match="id 7, expected 0 <= id < 7"):
        embedding(table, [*ids, 7])
    with pytest.raises(InvalidParameterError, match="id -1"):
        embedding(table, np.array([*ids, -1]))
    with pytest.raises(ShapeError):
        embedding(table[0], ids)


@pytest.mark.clause("KN-INTEGER-1")
def test_integer_arguments():
    table = np.arange(8.0).reshape(4, 2)
    for ids in ([3, 0], (3, 0), np.array([3, 0], np.uint32), np.array([3, 0], np.int8), range(3, -1, -3)):
        assert embedding(table, ids).tolist() == [[6, 7], [0, 1]]
    for ids in ([1.0], np.array([1.5]), [True], ["1"]):
        with pytest.raises(InvalidParameterError, match="expected integers"):
            embedding(table, ids)
    with pytest.raises(ShapeError, match="1 axes"):
        embedding(table, np.array([[1]]))
