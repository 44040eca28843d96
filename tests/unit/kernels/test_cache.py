"""write_kv."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.kernels.cache import write_kv


@pytest.mark.clause("KN-WRITEKV-1", "KN-WRITEKV-2")
@given(st.lists(st.integers(-3, 11), max_size=14), st.sampled_from([(12,), (3, 4), (2, 3, 2)]), st.booleans())
@example([5, 4], (12,), True)  # a run, but not in order
@example([2, 2, 4], (3, 4), False)  # as long as a run
@example([3, 4, 5], (3, 4), False)
def test_equals_a_plain_loop(slots, lead, as_array):
    cache = np.random.default_rng(0).standard_normal((*lead, 2, 3)).astype(ml_dtypes.bfloat16)
    rows = np.random.default_rng(1).standard_normal((len(slots), 2, 3)).astype(ml_dtypes.bfloat16)
    expected = cache.copy().reshape(12, 2, 3)
    for slot, row in zip(slots, rows):
        if slot >= 0:
            expected[slot] = row
    write_kv(cache, rows, np.array(slots, np.int32) if as_array else slots)
    assert cache.tobytes() == expected.tobytes()


@pytest.mark.clause("KN-WRITEKV-1")
def test_a_slot_is_a_row_of_a_block():
    cache = np.zeros((5, 16, 1, 2), np.float32)
    write_kv(cache, np.full((1, 1, 2), np.nan, np.float32), [3 * 16 + 7])
    assert np.argwhere(np.isnan(cache[..., 0, 0])).tolist() == [[3, 7]]


@pytest.mark.clause("KN-WRITEKV-3")
@pytest.mark.parametrize("slots", [[0, 12], [12, 0], [-1, 99]])
def test_nothing_is_written_when_a_slot_is_out_of_range(slots):
    cache = np.zeros((3, 4, 1, 1), np.float32)
    with pytest.raises(BackendError, match="expected less than 12"):
        write_kv(cache, np.ones((2, 1, 1), np.float32), slots)
    assert (cache == 0).all()


@pytest.mark.clause("KN-WRITEKV-3")
def test_shapes_and_types():
    cache, rows = np.zeros((3, 4, 2, 2), np.float32), np.ones((2, 2, 2), np.float32)
    for bad, slots in ((rows[:1], [0, 1]), (rows[0], [0, 1]), (rows[..., :1], [0, 1]), (rows, [0])):
        with pytest.raises(ShapeError, match="write_kv: cache"):
            write_kv(cache, bad, slots)
    with pytest.raises(BackendError, match="one element type"):
        write_kv(cache, rows.astype(np.float16), [0, 1])
    with pytest.raises(ShapeError, match="contiguous"):
        write_kv(cache[:, :3], rows, [0, 1])
    with pytest.raises(InvalidParameterError):
        write_kv(cache, rows, [0.0, 1.0])
    assert (cache == 0).all()
    head_major = np.zeros((2, 12, 2), np.float32)  # (G, N, D) seen as (N, G, D): any strides will do for three axes
    write_kv(head_major.swapaxes(0, 1), rows, [5, 6])
    assert head_major.sum() == rows.sum() == head_major[:, 5:7].sum()
